"""Changes of B as vectors: sums within one basis, and exact passage between a basis and the canonical frame.

Head tensors have no basis and pass every change of frame untouched. Results list sites and head tensors in
sorted order, so that everything computed from them is bitwise reproducible.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.errors import ShapeError
from fedlora.values import FRAME, Adapters, Delta, Gauges


def zeros_like(adapters: Adapters) -> Delta:
    """No change: zeros shaped like every b, and every head tensor, in the adapters' basis."""
    return Delta(
        basis=adapters.basis,
        sites={site: torch.zeros_like(adapters.sites[site].b) for site in sorted(adapters.sites)},
        head={name: torch.zeros_like(adapters.head[name]) for name in sorted(adapters.head)},
    )


def add(x: Delta, y: Delta, weight: float = 1.0) -> Delta:
    """x + weight * y.

    Raises:
        BasisError: the bases differ.
        ShapeError: names or shapes differ.
    """
    y.require_basis(x.basis)
    return Delta(basis=x.basis, sites=_summed(x.sites, y.sites, weight), head=_summed(x.head, y.head, weight))


def scale(x: Delta, c: float) -> Delta:
    """c * x, in the basis of x."""
    return _mapped(x, lambda tensor: c * tensor)


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
    """Euclidean length over all sites and the head together, summed in float64.

    Bases with orthonormal A agree on it; a Kaiming A does not.
    """
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in _tensors(delta)))


def applied(adapters: Adapters, delta: Delta) -> Adapters:
    """The adapters with b + delta at each site and the head moved along; a, the basis and every dtype stay.

    Raises:
        BasisError: delta is in another basis.
        ShapeError: names or shapes differ.
    """
    delta.require_basis(adapters.basis)
    moved = _summed({site: factors.b for site, factors in adapters.sites.items()}, delta.sites, 1.0)
    sites = {site: replace(adapters.sites[site], b=b.to(adapters.sites[site].b)) for site, b in moved.items()}
    head = _summed(adapters.head, delta.head, 1.0)
    return replace(adapters, sites=sites, head={name: head[name].to(adapters.head[name]) for name in head})


def _mapped(delta: Delta, function: Callable[[Tensor], Tensor]) -> Delta:
    return Delta(
        basis=delta.basis,
        sites={site: function(delta.sites[site]) for site in sorted(delta.sites)},
        head={name: function(delta.head[name]) for name in sorted(delta.head)},
    )


def _tensors(delta: Delta) -> list[Tensor]:
    return [named[name] for named in (delta.sites, delta.head) for name in sorted(named)]


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
