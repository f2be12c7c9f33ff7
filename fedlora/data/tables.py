"""From named columns, wherever they were read, to a corpus."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.data.records import Corpus, Records
from fedlora.errors import DataError


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
            raise DataError(f"{origin}: no column {name!r}; it has {shown(names)}{nearest(name, names)}")


def shown(names: Sequence[str], most: int = 20) -> str:
    """The names, quoted and cut: a file without a header line shows a record here."""
    listed = ", ".join(repr(name[:40]) for name in names[:most])
    return listed + (f" and {len(names) - most} more" if len(names) > most else "") if names else "none"


def nearest(name: str, names: Sequence[str]) -> str:
    """`; did you mean ...?`, or nothing where no name is near."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""


def corpus_from(train: Table, test: Table, columns: Columns, *, causal: bool) -> Corpus:
    """Texts, and labels as indices over the sorted training labels.

    A causal LM reads a pair as prompt, newline, answer; labels, if any, only serve to deal its records out.

    Raises:
        DataError: no records, a value that is no text or no label, one label only, an unknown test label.
    """
    for table in (train, test):
        if not table.lines:
            raise DataError(f"{table.origin}: no records; need at least one line after the header")
    classes: tuple[str, ...] = ()
    train_labels = test_labels = None
    if columns.label is not None:
        names = _label_names(train, columns.label)
        classes = _sorted_classes(names)
        train_labels = _indices(names, classes)
    if columns.label is not None and not causal:
        _require_two_classes(train, columns.label, classes)
        names = _label_names(test, columns.label)
        _require_known(test, columns.label, names, classes)
        test_labels = _indices(names, classes)
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
        f"{table.where(row)}: column {name!r} holds {value!r}; need a string or a whole number in every row"
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
            f"{table.origin}: column {label!r} holds one label only, {shown(classes)}; need at least two"
        )


def _require_known(table: Table, label: str, names: list[str], classes: tuple[str, ...]) -> None:
    known = set(classes)
    for row, name in enumerate(names):
        if name not in known:
            raise DataError(
                f"{table.where(row)}: label {name!r} in column {label!r} does not occur in the training "
                f"data, which has {shown(classes)}; drop the row or add such records to train"
            )
