"""Changes of B, of A and of the head as vectors: sums within one basis; of B also exact passage between a basis and
the canonical frame.

Head tensors have no basis and pass every change of frame untouched. Changes of A pass none: where A moves, a new frame
begins. Results list tensors in sorted order, so that everything computed from them is bitwise reproducible.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.algebra.factors import whole
from fedlora.errors import ShapeError
from fedlora.values import FRAME, Adapters, Delta, Gauges, Side


def trainable(adapters: Adapters, side: Side = "b") -> Delta:
    """What a round of this side trains, as it stands: the tensors themselves, in the place of their changes."""
    sites = sorted(adapters.sites)
    return Delta(
        basis=adapters.basis,
        sites={} if side == "a" else {site: adapters.sites[site].b for site in sites},
        head={name: adapters.head[name] for name in sorted(adapters.head)},
        a={} if side == "b" else {site: adapters.sites[site].a for site in sites},
    )


def with_rest(adapters: Adapters) -> Adapters:
    """The same, with a rest of zeros at each site that has none."""
    sites = {
        site: f if f.rest is not None else replace(f, rest=f.b.new_zeros(whole(f).b.shape[0], f.a.shape[1]))
        for site, f in adapters.sites.items()
    }
    return replace(adapters, sites=sites)


def zeros_like(adapters: Adapters, side: Side = "b") -> Delta:
    """No change of what a round of this side trains, in the adapters' basis."""
    return mapped(trainable(adapters, side), torch.zeros_like)


def empty_memory(adapters: Adapters, side: Side = "b") -> Delta:
    """Zeros in the frame, in float64: a sum that clients join and leave for ever stays the sum of those in it."""
    return mapped(replace(zeros_like(adapters, side), basis=FRAME), Tensor.double)


def mapped(delta: Delta, function: Callable[[Tensor], Tensor]) -> Delta:
    """The function of every tensor."""
    return Delta(
        basis=delta.basis,
        sites={site: function(delta.sites[site]) for site in sorted(delta.sites)},
        head={name: function(delta.head[name]) for name in sorted(delta.head)},
        a={site: function(delta.a[site]) for site in sorted(delta.a)},
    )


def tensors(delta: Delta) -> list[Tensor]:
    """All of it: B, A, head, each in sorted order."""
    return [named[name] for named in (delta.sites, delta.a, delta.head) for name in sorted(named)]


def add(x: Delta, y: Delta, weight: float = 1.0) -> Delta:
    """x + weight * y.

    Raises:
        BasisError: the bases differ.
        ShapeError: names or shapes differ.
    """
    y.require_basis(x.basis)
    return Delta(
        basis=x.basis,
        sites=_summed(x.sites, y.sites, weight),
        head=_summed(x.head, y.head, weight),
        a=_summed(x.a, y.a, weight),
    )


def scale(x: Delta, c: float) -> Delta:
    """c * x, in the basis of x."""
    return mapped(x, lambda tensor: c * tensor)


def into_frame(delta: Delta, gauges: Gauges) -> Delta:
    """The same change of b @ a, in coordinates of the canonical frame: delta @ gauge at each site.

    Raises:
        BasisError: the gauges are of another basis.
        ShapeError: a site has no gauge.
    """
    delta.require_basis(gauges.basis)
    return replace(delta, basis=FRAME, sites=_transformed(delta, gauges, torch.matmul))


def from_frame(delta: Delta, gauges: Gauges) -> Delta:
    """The same change of b @ a, in coordinates of `gauges.basis`; undoes `into_frame`.

    Solves x @ gauge == delta, since a Kaiming A makes a gauge that is no rotation.

    Raises:
        BasisError: delta is not in the frame.
        ShapeError: a site has no gauge.
    """
    delta.require_basis(FRAME)
    return replace(delta, basis=gauges.basis, sites=_transformed(delta, gauges, _solve_right))


def joint_norm(delta: Delta) -> float:
    """Euclidean length over all tensors together, summed in float64.

    Bases with orthonormal A agree on it; a Kaiming A does not.
    """
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors(delta)))


def applied(adapters: Adapters, delta: Delta) -> Adapters:
    """The adapters with b + delta and a + delta.a at each site, the head moved along; basis and every dtype stay.

    Raises:
        BasisError: delta is in another basis.
        ShapeError: names or shapes differ.
    """
    delta.require_basis(adapters.basis)
    side: Side = "b" if not delta.a else "both" if delta.sites else "a"
    moved = add(trainable(adapters, side), delta)
    sites = {}
    for site, old in adapters.sites.items():
        a, b = moved.a.get(site, old.a), moved.sites.get(site, old.b)
        sites[site] = replace(old, a=a.to(old.a), b=b.to(old.b))
    return replace(
        adapters, sites=sites, head={name: moved.head[name].to(adapters.head[name]) for name in moved.head}
    )


def _summed(x: Mapping[str, Tensor], y: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    if x.keys() != y.keys():
        raise ShapeError(
            f"tensors {sorted(x.keys() ^ y.keys())} stand on one side of a sum only; both need the same names"
        )
    for name in sorted(x):
        if x[name].shape != y[name].shape:
            raise ShapeError(
                f"{name!r} is {tuple(x[name].shape)} and {tuple(y[name].shape)}; a sum needs equal shapes"
            )
    return {name: torch.add(x[name], y[name], alpha=weight) for name in sorted(x)}


def _transformed(
    delta: Delta, gauges: Gauges, change: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    # In float64: an update may be carried in and out of the frame many times before it is forgotten.
    missing = sorted(delta.sites.keys() - gauges.sites.keys())
    if missing:
        raise ShapeError(
            f"no gauge of basis {gauges.basis} for sites {missing}; gauges and deltas must be of one run"
        )
    return {
        site: change(delta.sites[site].double(), gauges.sites[site].double()).to(delta.sites[site].dtype)
        for site in sorted(delta.sites)
    }


def _solve_right(delta: Tensor, gauge: Tensor) -> Tensor:
    return torch.linalg.solve(gauge, delta, left=False)
