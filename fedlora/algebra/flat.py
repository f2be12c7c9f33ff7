"""Deltas as flat vectors: one row of numbers each, in an order that only names and shapes decide.

Sums over clients then cost one pass over one array instead of a call a tensor, and a group of updates is one matrix.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.errors import ShapeError
from fedlora.values import Adapters, Delta, Site

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each tensor of a delta stands in its flat vector: sites in sorted order, then head tensors in theirs."""

    sites: Shapes
    head: Shapes

    @classmethod
    def of(cls, like: Adapters | Delta) -> "Layout":
        """The layout of every delta shaped like this one, or of what adds to these adapters."""
        sites = like.sites
        b: Mapping[Site, Tensor] = {
            site: value if isinstance(value, Tensor) else value.b for site, value in sites.items()
        }
        return cls(sites=_shapes(b), head=_shapes(like.head))

    @property
    def numbers(self) -> int:
        """Length of the flat vector."""
        return sum(math.prod(shape) for _, shape in (*self.sites, *self.head))

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
        sites, head = delta.sites, delta.head
        if len(sites) != len(self.sites) or len(head) != len(self.head):
            raise ShapeError(f"a delta of {_told(Layout.of(delta))} where {_told(self)} is needed")
        try:
            parts = [sites[name] for name, _ in self.sites] + [head[name] for name, _ in self.head]
        except KeyError as error:
            raise ShapeError(f"a delta without {error} where {_told(self)} is needed") from None
        for part, (name, shape) in zip(parts, (*self.sites, *self.head), strict=True):
            if part.shape != shape:
                raise ShapeError(f"{name!r} is {tuple(part.shape)} where {shape} is needed")
        return parts

    def delta_of(self, flat: Tensor, basis: int) -> Delta:
        """The delta whose numbers these are, (numbers,); its tensors are views."""
        if flat.shape != (self.numbers,):
            raise ShapeError(
                f"{tuple(flat.shape)} numbers where ({self.numbers},) make a delta of {_told(self)}"
            )
        ends = iter(flat.split([torch.Size(shape).numel() for _, shape in (*self.sites, *self.head)]))
        sites = {name: next(ends).view(shape) for name, shape in self.sites}
        return Delta(
            basis=basis, sites=sites, head={name: next(ends).view(shape) for name, shape in self.head}
        )


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return tuple((name, tuple(tensors[name].shape)) for name in sorted(tensors))


def _told(layout: Layout) -> str:
    return f"{len(layout.sites)} sites and {len(layout.head)} head tensors, {layout.numbers} numbers"


def _holds(first: Tensor, numbers: int) -> bool:
    """Whether one storage goes on for so many numbers from here: only then are neighbours in memory parts of a row."""
    return (first.storage_offset() + numbers) * first.itemsize <= first.untyped_storage().nbytes()
