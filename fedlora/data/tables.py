"""From named columns, wherever they were read, to a corpus."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.data.records import Corpus, Records
from fedlora.errors import DataError

MOST_QUOTED, LONGEST_QUOTED = 3, 30
"""Label values that one message quotes, and the characters of each."""

NAME_LIKE = re.compile(r"[\w.-]{1,30}")
"""A column's name as people write them; a text, which stands there where the header line is missing, has blanks."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """Columns of equal length. origin: what an error calls the source; lines: where each row stands in it,
    from 1."""

    origin: str
    columns: dict[str, list[object]]
    lines: Sequence[int]

    def where(self, row: int) -> str:
        """`origin:line` of a row."""
        return f"{self.origin}:{self.lines[row]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns mean what: one text or two; the label; the one that names each record's client."""

    text: tuple[str, ...]
    label: str | None
    group: str | None = None

    def names(self) -> list[str]:
        """Every column that is read of the training data, once."""
        named = (name for name in (self.label, self.group) if name is not None)
        return list(dict.fromkeys([*self.text, *named]))

    def test_names(self, *, causal: bool) -> list[str]:
        """Of the test data: they belong to nobody, and a causal LM's need no label."""
        label = () if causal or self.label is None else (self.label,)
        return list(dict.fromkeys([*self.text, *label]))


def require_columns(origin: str, wanted: Iterable[str], found: Iterable[str]) -> None:
    """Refuses a source that lacks a wanted column, naming those it has and the nearest one.

    Raises:
        DataError: a column is not there.
    """
    names = [str(name) for name in found]
    for name in wanted:
        if name not in names:
            told = [name for name in names if NAME_LIKE.fullmatch(name)]
            # Not quoted: a file without a header line has a record there.
            others = len(names) - len(told)
            hint = f" and {others} that look like no names; is the header line missing?" if others else ""
            raise DataError(f"{origin}: no column {name!r}; it has {shown(told)}{hint}{nearest(name, told)}")


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
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""


def corpus_from(train: Table, test: Table, columns: Columns, *, causal: bool) -> Corpus:
    """Texts, and labels as indices over the sorted labels of the test data, which are public.

    Classes are no private record's to choose: one more would change the head, outside of any epsilon. A causal
    LM reads a pair as prompt, newline, answer; labels, if any, only serve to deal its records out.

    Raises:
        DataError: no records, a value that is no text or no label, one test label only, a training label that
            the test data lack, a label column that is a text column too.
    """
    _require_no_text(columns)
    for table in (train, test):
        if not table.lines:
            raise DataError(f"{table.origin}: no records; need at least one line after the header")
    classes: tuple[str, ...] = ()
    train_labels = test_labels = None
    if columns.label is not None:
        names = _label_names(train, columns.label)
        tested = names if causal else _label_names(test, columns.label)
        classes = _sorted_classes(tested)
        if not causal:
            _require_two_classes(test, columns.label, classes)
            _require_known(train, columns.label, names, classes)
            test_labels = _indices(tested, classes)
        train_labels = _indices(names, classes)
    groups = None if columns.group is None else _label_names(train, columns.group)
    return Corpus(
        train=Records(texts=_texts(train, columns.text, causal), labels=train_labels, groups=groups),
        test=Records(texts=_texts(test, columns.text, causal), labels=test_labels),
        classes=() if causal else classes,
    )


def _texts(table: Table, names: tuple[str, ...], causal: bool) -> list[str] | list[tuple[str, str]]:
    first, *rest = ([_text(table, name, row) for row in range(len(table.lines))] for name in names)
    if not rest:
        return first
    pairs = list(zip(first, rest[0], strict=True))
    return ["\n".join(pair) for pair in pairs] if causal else pairs


def _text(table: Table, name: str, row: int) -> str:
    value = table.columns[name][row]
    if not isinstance(value, str):
        raise DataError(
            f"{table.where(row)}: column {name!r} holds {type(value).__name__}, not text; drop the row or "
            f"name another column"
        )
    return value


def _label_names(table: Table, name: str) -> list[str]:
    return [_label_name(table, name, row) for row in range(len(table.lines))]


def _label_name(table: Table, name: str, row: int) -> str:
    value = table.columns[name][row]
    if isinstance(value, float) and value.is_integer():  # a column of ints with a hole, as pandas writes it
        value = int(value)
    if isinstance(value, int | str) and value != "":
        return str(value)
    raise DataError(
        f"{table.where(row)}: column {name!r} holds {quoted(value)}; need a string or a whole number in every "
        f"row"
    )


def _sorted_classes(names: list[str]) -> tuple[str, ...]:
    distinct = set(names)
    try:
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    except ValueError:  # not all are whole numbers
        return tuple(sorted(distinct))


def _indices(names: list[str], classes: tuple[str, ...]) -> NDArray[np.int64]:
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[name] for name in names], dtype=np.int64)


def _require_two_classes(table: Table, label: str, classes: tuple[str, ...]) -> None:
    if len(classes) < 2:
        raise DataError(
            f"{table.origin}: column {label!r} holds one label only, {shown(classes)}; the test data decide "
            f"the classes, so they need at least two"
        )


def _require_known(table: Table, label: str, names: list[str], classes: tuple[str, ...]) -> None:
    known = set(classes)
    for row, name in enumerate(names):
        if name not in known:
            raise DataError(
                f"{table.where(row)}: label {quoted(name)} in column {label!r} is not among the {len(classes)} "
                f"classes of the test data, {shown(classes, MOST_QUOTED)}; correct it, or add a test record of "
                f"that class"
            )


def _require_no_text(columns: Columns) -> None:
    for key, name in (("data.label", columns.label), ("data.partition.column", columns.group)):
        if name is not None and name in columns.text:
            raise DataError(f"{key}: {name!r} is a column of data.text; name another column")
