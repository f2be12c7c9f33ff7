"""What a run works on, and how named columns, wherever they were read, become it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.config.columns import NAMES, Form
from fedlora.config.data import Data
from fedlora.data.forms import texts_of
from fedlora.data.records import Records, different
from fedlora.data.table import Table, quoted, shown
from fedlora.errors import DataError

MOST_QUOTED = 3
"""Label values that one message quotes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Corpus:
    """Private records to train on, public ones to score on, and the classes' names (none for a causal LM)."""

    train: Records
    test: Records
    classes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns mean what: those that make a record, and as what; the label; the one that names its client."""

    text: tuple[str, ...]
    label: str | None
    group: str | None = None
    form: Form = "text"

    def names(self) -> list[str]:
        """Every column that is read of the training data, once."""
        named = (name for name in (self.label, self.group) if name is not None)
        return list(dict.fromkeys([*self.text, *named]))

    def test_names(self, *, causal: bool) -> list[str]:
        """Of the test data: they belong to nobody, and a causal LM's need no label."""
        label = () if causal or self.label is None else (self.label,)
        return list(dict.fromkeys([*self.text, *label]))


def corpus_from(train: Table, test: Table, columns: Columns, *, causal: bool) -> Corpus:
    """Texts, and labels as indices over the sorted labels of the test data, which are public.

    Classes are no private record's to choose: one more would change the head, outside of any epsilon. A causal
    LM reads a pair as prompt, newline, answer; labels, if any, only serve to deal its records out.

    Raises:
        DataError: no records, a value that is no record or no label, one test label only, a training label that
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
        train=Records(
            texts=texts_of(train, columns.text, columns.form, causal=causal),
            labels=train_labels,
            groups=groups,
        ),
        test=Records(texts=texts_of(test, columns.text, columns.form, causal=causal), labels=test_labels),
        classes=() if causal else classes,
    )


def require_apart(corpus: Corpus, data: Data) -> int:
    """How many different test texts are texts to train on too. Where these are private, most are not.

    data: where all of them come from.

    Raises:
        DataError: more than half are, as in a copy of the training file; a few are in many published sets.
    """
    tested = different(corpus.test)
    both = len(tested & different(corpus.train))
    if 2 * both > len(tested):
        named = {"files": "data.test", "huggingface": "data.test_split", "docstrings": "data.packages"}
        raise DataError(
            f"{named[data.source]}: {both:,} of {len(tested):,} different texts are among those to train on, which are "
            "private, and scores, losses and samples of test records are exact; name public ones to test on"
        )
    return both


def labelled_records(table: Table, columns: Columns, classes: tuple[str, ...]) -> Records:
    """The records of one table, labels as indices into `classes`, which everybody shares.

    Raises:
        DataError: as `corpus_from`; or labels that are not among the classes.
    """
    assert columns.label is not None
    _require_no_text(columns)
    names = _label_names(table, columns.label)
    if unknown := set(names) - set(classes):
        raise DataError(
            f"{table.origin}: {len(unknown)} labels are not among classes {list(classes)}; mend them, or add them on "
            "every node"
        )
    texts = texts_of(table, columns.text, columns.form, causal=False)
    return Records(texts=texts, labels=_indices(names, classes))


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
            raise DataError(f"{key}: {name!r} is {_read_as(columns)}; name another column")


def _read_as(columns: Columns) -> str:
    if columns.form == "text":
        return "a column of data.text"
    names = (f"data.{name}" for name in NAMES[columns.form])
    return f"a column of the records themselves ({', '.join(names)})"
