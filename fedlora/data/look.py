"""Somebody's one file, looked through for a first config: which columns matter, and what is kept apart to score on."""

import csv
import hashlib
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlora.data.files import column_names, load_table
from fedlora.data.table import HALF, SEMICOLONS, by_semicolons, is_text, nearest, shown
from fedlora.errors import DataError

TEST_SHARE = 0.1
"""Of the rows, kept apart."""
FEWEST_ROWS = 20
MOST_OWNERS = 50
MOST_LABELS = 50
_PROMPT_NAMES = ("prompt", "instruction", "question")
_COMPLETION_NAMES = ("completion", "response", "answer", "output")
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "topic", "intent")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFile:
    """The rows of a file in two parts.

    columns: those that are learnt from, by the keys of `data`; two are a pair of texts. header: what each row holds,
    these first, of a pair its first, then the file's others. owners: one of these, which may say whose a record is.
    """

    columns: Mapping[str, str | Sequence[str]]
    header: Sequence[str]
    train: Sequence[tuple[str, ...]]
    test: Sequence[tuple[str, ...]]
    owners: str | None


def look_through(path: str, *, text: Sequence[str], label: str | None, causal: bool) -> SplitFile:
    """The file in two parts, the same for the same rows; rows of one text, or of one first text, are in one part.

    Args:
        path: tsv, csv, jsonl or parquet.
        text: its text column, or two for pairs; none: the one with the longest values.
        label: its label column; None: one that is called so, or the one with the fewest different values.
        causal: for a causal language model, which wants no label, but a prompt and a completion if columns are called
            so and `text` is empty.

    Raises:
        DataError: it cannot be read, is too short, or no column looks like what is wanted.
    """
    names = [name for name in column_names(path) if name]  # spreadsheets leave columns without one
    _require_columns(path, names, [name for name in (*text, label) if name is not None])
    table = load_table(path, names)
    columns = {name: _words(column) for name, column in table.columns.items()}
    for name, column in columns.items():
        if (broken := next((row for row, word in enumerate(column) if not is_text(word)), None)) is not None:
            raise DataError(f"{table.where(broken)}: column {name!r} {HALF}")
    count = len(next(iter(columns.values()), ()))
    if count < FEWEST_ROWS:
        rows = f"{count or 'no'} row{'' if count == 1 else 's'}"
        raise DataError(
            f"{path}: {rows}; a private run needs hundreds for each owner, this at least {FEWEST_ROWS}"
        )
    if label is not None and (different := len(set(columns[label]))) > count // 2:
        raise DataError(
            f"{path}: {different} different values of {label!r} in {count} rows are no classes; name the column of "
            "labels: --label COLUMN"
        )
    kept = _completions(names) if causal and not text else {}
    if not kept:
        longest = max((n for n in names if n != label), key=lambda name: _length(columns[name]))
        kept["text"] = text[0] if text else longest
    if not causal:
        others = {name: own for name, own in columns.items() if name not in (kept["text"], *text)}
        kept["label"] = label or _label(path, others, count)
        unlabelled = next((row for row, word in enumerate(columns[kept["label"]]) if not word), None)
        if unlabelled is not None:
            raise DataError(
                f"{table.where(unlabelled)}: {kept['label']!r} is empty; write its label, or leave the row out"
            )
    header = [*kept.values(), *(name for name in names if name not in kept.values())]
    train, test = _split(list(zip(*(columns[name] for name in header), strict=True)), "label" in kept)
    if len(train) < FEWEST_ROWS:
        main = next(iter(kept.values()))
        raise DataError(
            f"{path}: {len(set(columns[main]))} different values of {main!r} in {count} rows leave {len(train)} to "
            "train on; name the column that holds the text: --text COLUMN"
        )
    given = {**kept, "text": list(text)} if len(text) > 1 else kept
    unused = {name: columns[name] for name in names if name not in (*kept.values(), *text)}
    return SplitFile(columns=given, header=header, train=train, test=test, owners=_owners(unused))


def csv_text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows under their header."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([columns, *rows])
    return out.getvalue()


def _split(
    rows: list[tuple[str, ...]], labelled: bool
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """The texts, first in their rows, with the least digests are for the test, and the least of each label, which is
    second: its labels are the classes.
    """
    digests = {row[0]: hashlib.sha256(row[0].encode()).digest() for row in rows}
    chosen = set(sorted(digests, key=digests.__getitem__)[: math.ceil(TEST_SHARE * len(digests))])
    if labelled:
        known = {row[1] for row in rows if row[0] in chosen}
        for text, label, *_ in sorted(rows, key=lambda row: digests[row[0]]):
            if label not in known:
                chosen.add(text)
                known.add(label)
    return [row for row in rows if row[0] not in chosen], [row for row in rows if row[0] in chosen]


def _require_columns(path: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    if by_semicolons(names):
        raise DataError(f"{path}: {SEMICOLONS}")
    for one in wanted:
        if one not in names:
            raise DataError(
                f"{path}: no column {one!r}; it has {shown(names)}{_pair(one, names) or nearest(one, names)}"
            )


def _pair(wanted: str, names: Sequence[str]) -> str:
    """What to say to somebody who named two columns as one."""
    parts = [part.strip() for part in wanted.split(",")]
    both = len(parts) == 2 and all(part in names for part in parts)
    return f"; for a pair of texts write --text {parts[0]} --text {parts[1]}" if both else ""


def _completions(names: Sequence[str]) -> dict[str, str]:
    """The columns that are called a prompt and a completion; none unless both are there."""
    called = {name.lower(): name for name in reversed(names)}
    prompt = next((called[name] for name in _PROMPT_NAMES if name in called), None)
    completion = next((called[name] for name in _COMPLETION_NAMES if name in called), None)
    return {} if prompt is None or completion is None else {"prompt": prompt, "completion": completion}


def _label(path: str, columns: dict[str, list[str]], count: int) -> str:
    called = {name.lower(): name for name in columns}
    for name in _LABEL_NAMES:
        if name in called:
            return called[name]
    different = {name: len(set(own)) for name, own in columns.items()}
    fits = [name for name, labels in different.items() if 2 <= labels <= min(MOST_LABELS, count // 5)]
    if not fits:
        raise DataError(
            f"{path}: no column looks like a label ({shown(list(columns))}); name it: --label COLUMN, or a causal "
            "language model with --model, which needs none"
        )
    return min(fits, key=lambda name: (different[name], list(columns).index(name)))


def _owners(unused: dict[str, list[str]]) -> str | None:
    """The first column of a few values, each of them many times and none empty."""
    for name, column in unused.items():
        often = Counter(column)
        if 2 <= len(often) <= MOST_OWNERS and min(often.values()) >= FEWEST_ROWS and "" not in often:
            return name
    return None


def _length(column: Sequence[str]) -> float:
    return sum(map(len, column)) / max(len(column), 1)


def _words(column: Sequence[object]) -> list[str]:
    return ["" if value is None else str(value) for value in column]
