"""The nouns of the data room: text as it was read, text as a model reads it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import ShapeError

Text: TypeAlias = str | tuple[str, str]
"""One text, or a pair that the tokenizer joins in its own way."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Records:
    """Texts in file order.

    labels: (n,) class indices into `Corpus.classes`; None where the source has none.
    groups: the value of the partition column of each record; None where no column was asked for.
    """

    texts: list[str] | list[tuple[str, str]]
    labels: NDArray[np.int64] | None = None
    groups: list[str] | None = None

    def __post_init__(self) -> None:
        for name, column in (("labels", self.labels), ("groups", self.groups)):
            if column is not None and len(column) != len(self.texts):
                raise ShapeError(
                    f"{len(self.texts)} texts but {len(column)} {name}; need one for each record"
                )

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: NDArray[np.int64]) -> "Records":
        """The records at `indices`, in that order."""
        return Records(
            texts=[self.texts[i] for i in indices],  # pyright: ignore[reportArgumentType]
            labels=None if self.labels is None else self.labels[indices],
            groups=None if self.groups is None else [self.groups[i] for i in indices],
        )


def fingerprint(records: Records) -> str:
    """SHA-256 of the records as a set: whatever their order, and however a model will read them."""
    labels = [None] * len(records) if records.labels is None else records.labels.tolist()
    each = sorted(
        hashlib.sha256(json.dumps([text, label]).encode()).digest()
        for text, label in zip(records.texts, labels, strict=True)
    )
    return hashlib.sha256(b"".join(each)).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Corpus:
    """Private records to train on, public ones to score on, and the classes' names (none for a causal LM)."""

    train: Records
    test: Records
    classes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examples:
    """Tokenised records in a few flat arrays, so that shipping them to a worker costs no list a record.

    input_ids: (tokens,) of all records, one after the other.
    offsets: (n + 1,); record i is input_ids[offsets[i] : offsets[i + 1]].
    labels: (n,) class indices, where the source has any.
    token_type_ids: (tokens,), only for pairs and only where the tokenizer makes them.
    states: (tokens, width), what enters the lowest adapted layer of a model (bfloat16: its bits); constants that
        follow from tokens and weights, no part of the data's fingerprint. May be memory-mapped: to send the examples to
        another process would copy the file.
    """

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64] | None = None
    token_type_ids: NDArray[np.int8] | None = None
    states: NDArray[np.floating] | NDArray[np.uint16] | None = None

    def __post_init__(self) -> None:
        tokens, records = len(self.input_ids), len(self.offsets) - 1
        if records < 0 or self.offsets[0] != 0 or self.offsets[-1] != tokens:
            raise ShapeError(
                f"offsets of shape {self.offsets.shape} do not span {tokens} tokens; need 0, ..., {tokens}"
            )
        if self.labels is not None and len(self.labels) != records:
            raise ShapeError(f"{records} records but {len(self.labels)} labels")
        if self.token_type_ids is not None and len(self.token_type_ids) != tokens:
            raise ShapeError(f"{tokens} tokens but {len(self.token_type_ids)} token types")
        if self.states is not None and (self.states.ndim != 2 or len(self.states) != tokens):
            raise ShapeError(f"{tokens} tokens but states of shape {self.states.shape}; need a row a token")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each record, (n,)."""
        return np.diff(self.offsets)

    def between(self, start: int, stop: int) -> "Examples":
        """Records `start` to `stop`, as views."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        types = self.token_type_ids
        return Examples(
            input_ids=self.input_ids[first:last],
            offsets=self.offsets[start : stop + 1] - first,
            labels=None if self.labels is None else self.labels[start:stop],
            token_type_ids=None if types is None else types[first:last],
            states=None if self.states is None else self.states[first:last],
        )

    def select(self, indices: NDArray[np.int64]) -> "Examples":
        """The records at `indices`, in that order, in arrays of their own."""
        indices = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        # Token t of the selection lies in its record as far from that record's start as it did before.
        tokens = np.arange(offsets[-1]) + np.repeat(self.offsets[indices] - offsets[:-1], lengths)
        return Examples(
            input_ids=self.input_ids[tokens],
            offsets=offsets,
            labels=None if self.labels is None else self.labels[indices],
            token_type_ids=None if self.token_type_ids is None else self.token_type_ids[tokens],
            states=None if self.states is None else self.states[tokens],
        )


def concatenate(parts: Sequence[Examples]) -> Examples:
    """All records of all parts, in that order; an optional column is there if every part has it.

    Raises:
        ShapeError: some parts have a column that others lack, or there is no part.
    """
    if not parts:
        raise ShapeError("no parts to concatenate; give at least one, it may be empty")
    return Examples(
        input_ids=np.concatenate([part.input_ids for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))]).astype(
            np.int64
        ),
        labels=_joined("labels", [part.labels for part in parts]),
        token_type_ids=_joined("token_type_ids", [part.token_type_ids for part in parts]),
        states=_joined("states", [part.states for part in parts]),
    )


def _joined(name: str, columns: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    there = [column for column in columns if column is not None]
    if there and len(there) != len(columns):
        raise ShapeError(f"{len(there)} of {len(columns)} parts have {name}; join parts of one kind")
    return np.concatenate(there) if there else None
