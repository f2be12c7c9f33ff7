"""Named columns, wherever they were read, and words about them that quote little."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora.errors import DataError

LONGEST_QUOTED = 30
"""Characters of a value that a message quotes."""

SEMICOLONS = "its columns are separated by semicolons; save it with commas"
HALF = "holds half a character (a lone surrogate), which no text can; mend or drop the row"

NAME_LIKE = re.compile(r"[\w.-]{1,30}")
"""A column's name as people write them; a text, which stands there where the header line is missing, has blanks."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """Columns of equal length. origin: what an error calls the source; lines: where each row stands in it,
    from 1. directory: where relative paths in it begin."""

    origin: str
    columns: dict[str, list[object]]
    lines: Sequence[int]
    directory: Path = Path()

    def where(self, row: int) -> str:
        """`origin:line` of a row."""
        return f"{self.origin}:{self.lines[row]}"


def require_columns(origin: str, wanted: Iterable[str], found: Iterable[str]) -> None:
    """Refuses a source that lacks a wanted column, naming those it has and the nearest one.

    Raises:
        DataError: a column is not there, or there twice.
    """
    names = [str(name) for name in found]
    for name in wanted:
        if names.count(name) > 1:
            raise DataError(
                f"{origin}: {names.count(name)} columns are called {name!r}; give each its own name"
            )
        if name not in names:
            told = [name for name in names if NAME_LIKE.fullmatch(name)]
            # Not quoted: a file without a header line has a record there.
            others = len(names) - len(told)
            hint = f" and {others} that look like no names; is the header line missing?" if others else ""
            if by_semicolons(names):
                hint = f"; {SEMICOLONS}"
            raise DataError(f"{origin}: no column {name!r}; it has {shown(told)}{hint}{nearest(name, told)}")


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: half a character, as JSON may hold it, cannot."""
    return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)


def by_semicolons(names: Sequence[str]) -> bool:
    """Whether what was read as one column's name is several, as spreadsheets write them in much of Europe."""
    return len(names) == 1 and names[0].count(";") > 0


def shown(names: Sequence[str], most: int = 20) -> str:
    """Names of files, packages or columns, quoted and cut."""
    listed = ", ".join(quoted(name) for name in names[:most])
    return listed + (f" and {len(names) - most} more" if len(names) > most else "") if names else "none"


def quoted(value: object) -> str:
    """The value as a message may show it: at most 30 characters of a text, and of lists only that they are."""
    if value is None or isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        return type(value).__name__
    return repr(value if len(value) <= LONGEST_QUOTED else f"{value[:LONGEST_QUOTED]}…")


def nearest(name: str, names: Sequence[str]) -> str:
    """`; did you mean ...?`, or nothing where no name is near."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
