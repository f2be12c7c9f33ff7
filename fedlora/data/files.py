"""Local tsv, csv, jsonl and parquet files, also gzipped."""

import csv
import difflib
import gzip
import io
import json
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO, TypeAlias

from fedlora.data.table import Table, require_columns, shown
from fedlora.errors import DataError

FORMATS = (".tsv", ".csv", ".jsonl", ".parquet")

ALIKE = 0.6
"""Of two names from 0 to 1, how much makes one a likely mistyping of the other: trian of train, but not test."""

csv.field_size_limit(sys.maxsize)  # a text may be as long as it likes

Row: TypeAlias = tuple[int, list[object]]
"""Line in the file, from 1, and the wanted values."""


def load_table(path: str, wanted: list[str], *, apart_from: str | None = None) -> Table:
    """The wanted columns of one file, all rows, in file order.

    Args:
        path: relative to the working directory; the format is its ending, `.gz` behind it or not.
        wanted: names of columns.
        apart_from: a file that holds something else, and so is not suggested in place of one that is not there.

    Raises:
        DataError: no such file, another format, no such column, or text that cannot be read as that format.
    """
    file = _existing(path, apart_from)
    try:
        if _format(file) == ".parquet":
            return _parquet(file, path, wanted)
        with _opened(file) as stream:
            lines, columns = _columns(_rows(stream, path, _format(file), wanted), len(wanted))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}; is it whole, and readable for you?") from None
    named = dict(zip(wanted, columns, strict=True))
    return Table(origin=path, columns=named, lines=lines, directory=file.parent)


def column_names(path: str) -> list[str]:
    """The columns of one file, in their order; of jsonl those of the first line.

    Raises:
        DataError: no such file, another format, or one that cannot be read.
    """
    file = _existing(path)
    ending = _format(file)
    try:
        if ending == ".parquet":
            import pyarrow
            from pyarrow import parquet

            try:
                return list(parquet.ParquetFile(_whole(file)).schema_arrow.names)
            except pyarrow.ArrowException as error:
                raise DataError(f"{path}: not a parquet file: {error}; write it again") from None
        with _opened(file) as stream:
            if ending == ".jsonl":
                first = json.loads(next((line for line in stream if line.strip()), "{}"))
                return list(first) if isinstance(first, dict) else []
            return list(next(_fields(stream, path, ending), (0, []))[1])
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}; save it as UTF-8 text") from None


def _columns(rows: Iterable[Row], count: int) -> tuple[Sequence[int], list[list[object]]]:
    """Line numbers and columns; no row outlives its reading, since short ones weigh more than what they hold."""
    lines, columns = array("q"), [[] for _ in range(count)]
    for line, values in rows:
        lines.append(line)
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return lines, columns


def _existing(path: str, apart_from: str | None = None) -> Path:
    file = Path(path).expanduser()
    if file.is_file():
        return file
    if not file.parent.is_dir():
        raise DataError(
            f"{path}: no directory {str(file.parent)!r} (looked from {str(Path.cwd())!r}); mend the path"
        )
    if file.is_dir():
        raise DataError(f"{path}: a directory; name the file in it, a tsv, csv, jsonl or parquet")
    beside = sorted(other.name for other in file.parent.iterdir() if other.is_file())
    raise DataError(
        f"{path}: no such file (looked from {str(Path.cwd())!r}); that directory has "
        f"{shown(beside)}{_meant(file, beside, apart_from)}"
    )


def _meant(file: Path, beside: Sequence[str], apart_from: str | None) -> str:
    """`; did you mean ...?`: of the other tables there, the one whose name without its ending is nearest."""
    other = None if apart_from is None else Path(apart_from).expanduser().resolve()
    stems = {
        _stem(name): name for name in beside if _ending(name) and (file.parent / name).resolve() != other
    }
    close = difflib.get_close_matches(_stem(file.name), stems, n=1, cutoff=ALIKE)
    return f"; did you mean {stems[close[0]]!r}?" if close else ""


def _stem(name: str) -> str:
    return name.lower().removesuffix(".gz").removesuffix(_ending(name))


def _ending(name: str) -> str:
    """Which of FORMATS it is; empty if none."""
    plain = name.lower().removesuffix(".gz")
    return next((ending for ending in FORMATS if plain.endswith(ending)), "")


def _format(file: Path) -> str:
    if ending := _ending(file.name):
        return ending
    raise DataError(
        f"{file}: unknown format; name it {', '.join(FORMATS)}, or one of these with .gz behind it"
    )


def _opened(file: Path) -> TextIO:
    # newline="\n": a lone carriage return inside a field ends no line. utf-8-sig: spreadsheets write a byte
    # order mark.
    if file.name.lower().endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="\n")  # pyright: ignore[reportReturnType]
    return file.open(encoding="utf-8-sig", newline="\n")


def _rows(stream: TextIO, path: str, ending: str, wanted: list[str]) -> Iterator[Row]:
    if ending == ".jsonl":
        return _json_rows(stream, path, wanted)
    return _header_rows(_fields(stream, path, ending), path, wanted)


def _fields(stream: TextIO, path: str, ending: str) -> Iterator[tuple[int, list[str]]]:
    if ending == ".tsv":  # no quoting in tsv: a lone quote in a text must not swallow the lines behind it
        yield from (
            (line, text.rstrip("\r\n").split("\t"))
            for line, text in enumerate(stream, 1)
            if text.strip("\r\n")
        )
        return
    reader = csv.reader(stream, strict=True)
    try:
        yield from ((reader.line_num, fields) for fields in reader if fields)
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}: not csv: {error}; quote the field, doubling the quotes in it"
        ) from None


def _not_utf8(path: str, error: UnicodeDecodeError) -> DataError:
    """Without the text around the byte: it may be a record."""
    return DataError(
        f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8, in Excel: CSV UTF-8"
    )


def _header_rows(lines: Iterator[tuple[int, list[str]]], path: str, wanted: list[str]) -> Iterator[Row]:
    _, header = next(lines, (0, []))
    require_columns(path, wanted, header)
    places = [header.index(name) for name in wanted]
    for line, fields in lines:
        if len(fields) != len(header):
            count = "1 field" if len(fields) == 1 else f"{len(fields)} fields"
            raise DataError(f"{path}:{line}: {count}, but the header has {len(header)}; mend the line")
        yield line, [fields[place] for place in places]


def _json_rows(stream: Iterable[str], path: str, wanted: list[str]) -> Iterator[Row]:
    for line, text in enumerate(stream, 1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{line}: not JSON: {error.msg} at column {error.colno}; mend the line"
            ) from None
        if not isinstance(record, dict):
            raise DataError(f"{path}:{line}: holds {type(record).__name__}; need one JSON object a line")
        require_columns(f"{path}:{line}", wanted, record)
        yield line, [record[name] for name in wanted]


def _whole(file: Path) -> Path | io.BytesIO:
    """A parquet file, unpacked where it is gzipped."""
    return io.BytesIO(gzip.decompress(file.read_bytes())) if file.name.lower().endswith(".gz") else file


def _parquet(file: Path, path: str, wanted: list[str]) -> Table:
    import pyarrow  # here, since it is slow to load and most runs have no use for it
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(_whole(file))
        require_columns(path, wanted, opened.schema_arrow.names)
        table = opened.read(columns=wanted)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a parquet file: {error}; write it again") from None
    return Table(
        origin=path,
        columns={name: table.column(name).to_pylist() for name in wanted},
        lines=range(1, table.num_rows + 1),
        directory=file.parent,
    )
