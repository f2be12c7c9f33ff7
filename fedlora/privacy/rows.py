"""One row an example: its gradient of everything trained, so that whatever clips it cannot but clip jointly."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora.errors import PrivacyError
from fedlora.kernels.table import Ops


@dataclass(frozen=True, slots=True)
class Columns:
    """Where each trained tensor stands in a row of `numbers`. dtype: of a row, float32 or wider.

    A matrix lies there with its longer axis last: gradients are products of thin matrices, three to five times faster
    that way round.
    """

    places: Mapping[str, tuple[slice, torch.Size]]
    numbers: int
    dtype: torch.dtype

    @classmethod
    def of(cls, trained: Mapping[str, nn.Parameter], axes: int = 0) -> "Columns":
        """In the order of `trained`, whose tensors have so many axes before those of one example."""
        places: dict[str, tuple[slice, torch.Size]] = {}
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in trained.values()) else torch.float32
        stop = 0
        for name, parameter in trained.items():
            shape = parameter.shape[axes:]
            places[name] = slice(stop, stop + shape.numel()), shape
            stop += shape.numel()
        return cls(places, stop, dtype)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """rows (..., numbers) by name, (..., *shape); views."""
        return {name: self.part(rows, name) for name in self.places}

    def part(self, rows: Tensor, name: str) -> Tensor:
        """What of rows (..., numbers) belongs to one tensor, (..., *shape); a view."""
        columns, shape = self.places[name]
        part = rows[..., columns]
        if len(shape) == 2 and shape[0] > shape[1]:
            return part.unflatten(-1, (shape[1], shape[0])).transpose(-1, -2)
        return part.unflatten(-1, shape)


class Rows:
    """The gradients of one microbatch, written as the backward pass comes by. rows: (n, numbers), or None before."""

    def __init__(self, columns: Columns, ops: Ops, sequences_per_record: int = 1) -> None:
        self.rows: Tensor | None = None
        self._each = sequences_per_record
        self._columns = columns
        self._ops = ops
        self._written: set[str] = set()

    def add_weight(self, name: str, dy: Tensor, h: Tensor) -> None:
        """The tensor of this name, a weight (m, r), owes dy[i].T @ h[i] for each example i."""
        dy, h = self._by_record(name, dy), self._by_record(name, h)
        place, again = self._place(name, dy)
        self._ops.per_example_gradient_into(place, dy, h)
        self._add_again(again, place)

    def add_bias(self, name: str, dy: Tensor) -> None:
        """The tensor of this name, a bias (m,), owes the sum of dy[i] for each example i."""
        dy = self._by_record(name, dy)
        place, again = self._place(name, dy)
        self._ops.per_example_bias_gradient_into(place, dy)
        self._add_again(again, place)

    def whole(self, examples: int) -> Tensor:
        """(examples, numbers).

        Raises:
            PrivacyError: something trained was never passed, or examples were not told apart.
        """
        missing = sorted(self._columns.places.keys() - self._written)
        if missing or self.rows is None:
            raise PrivacyError(
                f"the loss does not pass through {missing} by calling their nn.Linear, they cannot be clipped; "
                "freeze them or call the module that owns them"
            )
        if len(self.rows) != examples:
            raise PrivacyError(
                "more or fewer losses than rows of gradients; the first axis must count examples "
                "(do not flatten tokens into the batch)"
            )
        return self.rows

    def _by_record(self, name: str, rows: Tensor) -> Tensor:
        """rows (n, ...) as (n / k, k tokens, ...): the k sequences of a record end to end, as if they were one.

        What a gradient sums over tokens it then sums over all of the record's sequences, before any clip sees it.
        """
        if self._each == 1:
            return rows
        if len(rows) % self._each:
            raise PrivacyError(
                f"{name!r} saw rows that are no records of {self._each} sequences; give all of each"
            )
        return rows.unflatten(0, (-1, self._each)).flatten(1, -2)

    def _place(self, name: str, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where to write; and, of a layer that is used again, where that has to be added to."""
        if self.rows is None:
            self.rows = torch.empty(
                len(dy), self._columns.numbers, dtype=self._columns.dtype, device=dy.device
            )
        if len(self.rows) != len(dy):
            raise PrivacyError(
                f"{name!r} saw more or fewer rows than others of the same microbatch; "
                "the first axis must count its examples wherever a layer is used"
            )
        place = self._columns.part(self.rows, name)
        if name not in self._written:
            self._written.add(name)
            return place, None
        return torch.empty_like(place), place

    @staticmethod
    def _add_again(again: Tensor | None, place: Tensor) -> None:
        # A layer applied twice in one forward pass owes the sum of both: one example, one gradient, one clip.
        if again is not None:
            again.add_(place)
