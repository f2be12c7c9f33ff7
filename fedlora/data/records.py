"""The nouns of the data room: text as it was read, text as a model reads it."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora.data.texts import Text, as_json
from fedlora.errors import ShapeError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Records:
    """Texts in file order, all of one kind.

    labels: (n,) class indices into `Corpus.classes`; None where the source has none.
    groups: the value of the partition column of each record; None where no column was asked for.
    """

    texts: Sequence[Text]
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
            texts=[self.texts[i] for i in indices],
            labels=None if self.labels is None else self.labels[indices],
            groups=None if self.groups is None else [self.groups[i] for i in indices],
        )


def different(records: Records) -> set[str]:
    """Their texts, each once; letters of either case, and blanks however many, are the same."""
    each = (text if isinstance(text, str) else json.dumps(text, default=as_json) for text in records.texts)
    return {" ".join(text.casefold().split()) for text in each}


def fingerprint(records: Records) -> str:
    """SHA-256 of the records as a set: whatever their order, and however a model will read them."""
    labels = [None] * len(records) if records.labels is None else records.labels.tolist()
    each = sorted(
        hashlib.sha256(json.dumps([text, label], default=as_json).encode()).digest()
        for text, label in zip(records.texts, labels, strict=True)
    )
    return hashlib.sha256(b"".join(each)).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class States:
    """What enters the lowest adapted layer of a model, a row a token; where each record's rows lie among others'.

    rows: (m, width), of these records and perhaps of more (bfloat16: its bits). May be memory-mapped: choosing records
        copies none of it, but to send it to another process would copy the file.
    starts: (n,) the first row of each record.
    """

    rows: NDArray[np.floating] | NDArray[np.uint16]
    starts: NDArray[np.int64]

    def of(self, offsets: NDArray[np.int64]) -> NDArray[np.floating] | NDArray[np.uint16]:
        """(tokens, width), a copy: the rows of all records, one after the other, at these offsets (n + 1,)."""
        return self.rows[_gathered(self.starts, offsets)]


_Taking: TypeAlias = Callable[[NDArray[Any]], NDArray[Any]]
"""From an array of all records' tokens to that of some."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examples:
    """Tokenised records in a few flat arrays, so that shipping them to a worker costs no list a record.

    input_ids: (tokens,) of all records, one after the other. Of an image these are its bytes, uint8; how many tokens a
        model makes of them is its intake's to know.
    offsets: (n + 1,); record i is input_ids[offsets[i] : offsets[i + 1]].
    labels: (n,) class indices, where the source has any.
    token_type_ids: (tokens,), only for pairs and only where the tokenizer makes them.
    states: what a model's frozen layers make of the records; constants that follow from tokens and weights, no part of
        the data's fingerprint.
    trained: (tokens,) whether a token is learned, by the token before it; None: all are.
    firsts: (n,) of a record that is two sequences, a pair of completions, the tokens of the first one; None where each
        is one sequence.
    """

    input_ids: NDArray[np.int32 | np.uint8]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64] | None = None
    token_type_ids: NDArray[np.int8] | None = None
    states: States | None = None
    trained: NDArray[np.bool_] | None = None
    firsts: NDArray[np.int64] | None = None

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
        if self.trained is not None and len(self.trained) != tokens:
            raise ShapeError(
                f"{tokens} tokens but {len(self.trained)} marks of what is trained; need one a token"
            )
        if self.firsts is not None and len(self.firsts) != records:
            raise ShapeError(
                f"{records} records but {len(self.firsts)} lengths of first sequences; need one a record"
            )
        if self.firsts is not None and not np.all((self.firsts > 0) & (self.firsts < self.lengths)):
            raise ShapeError("a pair lacks one of its sequences; each needs a token at least")
        if self.states is not None and len(self.states.starts) != records:
            raise ShapeError(f"{records} records but states of {len(self.states.starts)}; need those of each")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each record, (n,)."""
        return np.diff(self.offsets)

    @property
    def sequences_per_record(self) -> int:
        """Rows that a record is in a batch: two of a pair."""
        return 1 if self.firsts is None else 2

    @property
    def sequence_lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence, (n x sequences_per_record,), a record's one after the other."""
        if self.firsts is None:
            return self.lengths
        return np.stack([self.firsts, self.lengths - self.firsts], axis=1).reshape(-1)

    @property
    def footprints(self) -> NDArray[np.int64]:
        """Tokens of each record in a batch of its own, (n,): of a pair, twice those of the longer sequence."""
        longest = self.sequence_lengths.reshape(len(self), self.sequences_per_record).max(axis=1, initial=0)
        return longest * self.sequences_per_record

    def between(self, start: int, stop: int) -> "Examples":
        """Records `start` to `stop`, as views."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        types, states = self.token_type_ids, self.states
        return Examples(
            input_ids=self.input_ids[first:last],
            offsets=self.offsets[start : stop + 1] - first,
            labels=None if self.labels is None else self.labels[start:stop],
            token_type_ids=None if types is None else types[first:last],
            states=None if states is None else replace(states, starts=states.starts[start:stop]),
            trained=None if self.trained is None else self.trained[first:last],
            firsts=None if self.firsts is None else self.firsts[start:stop],
        )

    def select(self, indices: NDArray[np.int64]) -> "Examples":
        """The records at `indices`, in that order, in arrays of their own; their states stay where they lie."""
        indices = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        taken = self._of_equal_length(indices) or self._of_any_length(indices, offsets)
        states = self.states
        return Examples(
            input_ids=taken(self.input_ids),
            offsets=offsets,
            labels=None if self.labels is None else self.labels[indices],
            token_type_ids=None if self.token_type_ids is None else taken(self.token_type_ids),
            states=None if states is None else replace(states, starts=states.starts[indices]),
            trained=None if self.trained is None else taken(self.trained),
            firsts=None if self.firsts is None else self.firsts[indices],
        )

    def _of_any_length(self, indices: NDArray[np.int64], offsets: NDArray[np.int64]) -> _Taking:
        tokens = _gathered(self.offsets[indices], offsets)
        return lambda array: array[tokens]

    def _of_equal_length(self, indices: NDArray[np.int64]) -> _Taking | None:
        """By rows, where all are of one length: an index a number would weigh eight times an image's bytes."""
        lengths = self.lengths
        if len(lengths) == 0 or lengths[0] == 0 or not np.all(lengths == lengths[0]):
            return None
        return lambda array: array.reshape(len(lengths), -1)[indices].reshape(-1)


def _gathered(starts: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each token lies, of records that begin at `starts` and are to lie at `offsets` (n + 1,)."""
    # A token lies in its record as far from that record's start as it is to lie.
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], np.diff(offsets))


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
        states=_joined_states(parts),
        trained=_joined("trained", [part.trained for part in parts]),
        firsts=_joined("firsts", [part.firsts for part in parts]),
    )


def _joined(name: str, columns: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    there = [column for column in columns if column is not None]
    if there and len(there) != len(columns):
        raise ShapeError(f"{len(there)} of {len(columns)} parts have {name}; join parts of one kind")
    return np.concatenate(there) if there else None


def _joined_states(parts: Sequence[Examples]) -> States | None:
    """Of all parts; copied out only where they lie in several arrays."""
    held = [part.states for part in parts]
    there = [states for states in held if states is not None]
    if len(there) < len(parts) or any(states.rows is not there[0].rows for states in there):
        rows = _joined("states", [None if p.states is None else p.states.of(p.offsets) for p in parts])
        starts = np.cumsum([0, *np.concatenate([part.lengths for part in parts])])[:-1]
        return None if rows is None else States(rows=rows, starts=starts.astype(np.int64))
    return States(rows=there[0].rows, starts=np.concatenate([states.starts for states in there]))
