"""Deltas as flat vectors: one row of numbers each, in an order that only names and shapes decide.

Sums over clients then cost one pass over one array instead of a call a tensor, and a group of updates is one matrix.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.errors import ShapeError
from fedlora.values import Delta

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each tensor of a delta stands in its flat vector: of B by site, of the head by name, of A by site."""

    sites: Shapes
    head: Shapes
    a: Shapes = ()

    @classmethod
    def of(cls, like: Delta) -> "Layout":
        """The layout of every delta shaped like this one."""
        return cls(sites=_shapes(like.sites), head=_shapes(like.head), a=_shapes(like.a))

    @property
    def parts(self) -> Shapes:
        """Name and shape of every tensor, in the vector's order."""
        return (*self.sites, *self.head, *self.a)

    @property
    def numbers(self) -> int:
        """Length of the flat vector."""
        return sum(math.prod(shape) for _, shape in self.parts)

    def flat(self, delta: Delta) -> Tensor:
        """The delta's numbers (numbers,); its own storage, not a copy, if it came from `delta_of`.

        Raises:
            ShapeError: other names or shapes.
        """
        parts = self._parts(delta)
        place = parts[0].data_ptr() if parts else 0
        for part in parts:
            if part.data_ptr() != place or not part.is_contiguous() or part.dtype != parts[0].dtype:
                break
            place += part.nbytes
        else:
            if parts and _holds(parts[0], self.numbers):
                return parts[0].as_strided((self.numbers,), (1,))
        return torch.cat([part.flatten() for part in parts]) if parts else torch.zeros(0)

    def write(self, delta: Delta, row: Tensor) -> None:
        """`row`, (numbers,) of the delta's type, holds the delta's numbers.

        Raises:
            ShapeError: other names or shapes.
        """
        if parts := self._parts(delta):
            torch.cat([part.flatten() for part in parts], out=row)

    def _parts(self, delta: Delta) -> list[Tensor]:
        kinds = ((delta.sites, self.sites), (delta.head, self.head), (delta.a, self.a))
        if any(len(given) != len(needed) for given, needed in kinds):
            raise ShapeError(f"a delta of {_told(Layout.of(delta))} where {_told(self)} is needed")
        try:
            parts = [given[name] for given, needed in kinds for name, _ in needed]
        except KeyError as error:
            raise ShapeError(f"a delta without {error} where {_told(self)} is needed") from None
        for part, (name, shape) in zip(parts, self.parts, strict=True):
            if part.shape != shape:
                raise ShapeError(f"{name!r} is {tuple(part.shape)} where {shape} is needed")
        return parts

    def delta_of(self, flat: Tensor, basis: int) -> Delta:
        """The delta whose numbers these are, (numbers,); its tensors are views."""
        if flat.shape != (self.numbers,):
            raise ShapeError(
                f"{tuple(flat.shape)} numbers where ({self.numbers},) make a delta of {_told(self)}"
            )
        ends = iter(flat.split([torch.Size(shape).numel() for _, shape in self.parts]))
        sites, head, a = (
            {name: next(ends).view(shape) for name, shape in shapes}
            for shapes in (self.sites, self.head, self.a)
        )
        return Delta(basis=basis, sites=sites, head=head, a=a)


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return tuple((name, tuple(tensors[name].shape)) for name in sorted(tensors))


def _told(layout: Layout) -> str:
    sites = f"{len(layout.sites)} sites" + (f" (and A of {len(layout.a)})" if layout.a else "")
    return f"{sites} and {len(layout.head)} head tensors, {layout.numbers} numbers"


def _holds(first: Tensor, numbers: int) -> bool:
    """Whether one storage goes on for so many numbers from here: only then are neighbours in memory parts of a row."""
    return (first.storage_offset() + numbers) * first.itemsize <= first.untyped_storage().nbytes()
