"""Factors of adapted layers and changes of them.

Shapes are (rows, columns). An adapted layer computes W x + scale * B (A x) with A (r, d_in) and B (d_out, r).
B means nothing without its A, so everything shaped like B carries the number of its basis. Where a frozen left frame
stands before it, B is a core: W x + scale * L (B (A x)) with L (d_out, k) and B (k, r); nothing else changes. Of a core
of which only the diagonal is trained, B is that, (1, r): W x + scale * L (B * (A x)). Where a method leaves a product
behind that no B A can hold, it is the rest: (W + rest) x + scale * B (A x).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from fedlora.errors import BasisError, ShapeError

if TYPE_CHECKING:  # the nouns alone cost no import of torch
    from torch import Tensor

Site: TypeAlias = str
"""Dotted path of an adapted module, as in the base model. Always visited in sorted order."""

Side: TypeAlias = Literal["b", "a", "both"]
"""What of every site a round trains: B (or the core), A, or both; the other is frozen."""

FRAME = -1
"""The basis number of the canonical frame: coordinates in the orthonormal rows `ServerState.frame`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """One adapted site.

    left: the frozen frame before a core, with orthonormal columns; None before a whole B.
    rest: (d_out, d_in), added to the frozen weight as it is, `scale` included; None: nothing is.
    """

    a: Tensor
    b: Tensor
    left: Tensor | None = None
    rest: Tensor | None = None

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ShapeError(
                f"a {tuple(self.a.shape)} and b {tuple(self.b.shape)} share no rank; need (r, n) and (m, r)"
            )
        if self.left is not None:
            k = self.left.shape[1] if self.left.ndim == 2 else None
            if self.b.shape[0] != k and self.b.shape != (1, k):
                raise ShapeError(
                    f"left {tuple(self.left.shape)} and core {tuple(self.b.shape)} share no rank; "
                    "need (m, k) and (k, r)"
                )
        rows = (self.b if self.left is None else self.left).shape[0]
        if self.rest is not None and self.rest.shape != (rows, self.a.shape[1]):
            raise ShapeError(
                f"rest {tuple(self.rest.shape)} is not shaped like the weight, {(rows, self.a.shape[1])}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """What a client starts from: the factors of every site and the head, if one is trained."""

    basis: int
    scale: float
    sites: Mapping[Site, Factors]
    head: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A change of B, (d_out, r) or, of a core, (k, r) a site, in one basis; of the head, which has none; and of A.

    sites: of B; empty where the round trained A alone. a: of A, (r, d_in) a site; empty where it was frozen. A belongs
    to its basis as a whole: no gauge carries its changes into another.
    """

    basis: int
    sites: Mapping[Site, Tensor]
    head: Mapping[str, Tensor] = field(default_factory=dict)
    a: Mapping[Site, Tensor] = field(default_factory=dict)

    def require_basis(self, basis: int) -> None:
        """Refuses to let coordinates of another basis through."""
        if self.basis != basis:
            raise BasisError(
                f"delta is in basis {self.basis}, needed in {basis}; rebase it with its gauges first"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """Change of coordinates, (r, r) a site: `delta @ gauge` is the delta of `basis` in the canonical frame."""

    basis: int
    sites: Mapping[Site, Tensor]
