"""Joint clipping: what bounds the influence of one example on a sum of gradients.

Everything here is float64. Squares of float32 numbers between 1e-38 and 1e38 neither overflow nor vanish in
it, the bound C holds to 1e-15, and the rounding of the sum stays far below the noise. The cost is two reads of
n x (trained numbers), which is small beside the forward pass that made them; no wide copy of them is ever whole.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

CHUNK = 1 << 16
"""Numbers that are widened at a time: half a megabyte, which a core's own cache holds."""


def joint_squared_norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """Squared L2 norm (n,) of each example, over all tensors (n, ...); finite only if every entry is."""
    if not gradients:
        raise ValueError("no gradients to clip: name at least one trained tensor")
    squares = [wide.square().sum(dim=1) for g in gradients.values() for _, wide in _widened(g)]
    return torch.stack(squares).sum(dim=0)


def clip_factors(squared_norms: Tensor, max_grad_norm: float | None) -> Tensor:
    """Factors (n,) that bring each norm to at most max_grad_norm; 0 for an example whose norm is not finite.

    A non-finite gradient must not reach the sum: one NaN there would tell everybody that its record took
    part.

    Args:
        squared_norms: (n,) float64, joint over all trained tensors.
        max_grad_norm: the bound C; None leaves finite gradients as they are, which is not private.
    """
    finite = torch.isfinite(squared_norms)
    if max_grad_norm is None:
        return finite.to(torch.float64)
    if not (max_grad_norm > 0 and math.isfinite(max_grad_norm)):
        raise ValueError(f"max_grad_norm {max_grad_norm} must be positive and finite")
    factors = torch.clamp(max_grad_norm / squared_norms.sqrt(), max=1.0)
    return torch.where(finite, factors, 0.0)


def add_clipped_sum(
    sums: Mapping[str, Tensor], gradients: Mapping[str, Tensor], max_grad_norm: float | None
) -> None:
    """`sums` has grown by the sum over the examples of their jointly clipped gradients.

    Adding or removing one example moves the result by at most max_grad_norm in joint L2 norm.

    Args:
        sums: (...) float64 of each tensor, contiguous.
        gradients: (n, ...) of each.
        max_grad_norm: as for `clip_factors`.
    """
    factors = clip_factors(joint_squared_norms(gradients), max_grad_norm)
    _add({name: total[None] for name, total in sums.items()}, gradients, factors[None])


def add_clipped_sums(
    sums: Mapping[str, Tensor], gradients: Mapping[str, Tensor], owners: Tensor, max_grad_norm: float | None
) -> None:
    """Each client's row of `sums` has grown by the sum over its own examples of their jointly clipped gradients.

    Adding or removing one example moves its client's row by at most max_grad_norm in joint L2 norm, and no other.

    Args:
        sums: (clients, ...) float64 of each tensor, contiguous.
        gradients: (n, ...) of each.
        owners: (n,) int64, the client in 0, ..., clients - 1 that each example belongs to.
        max_grad_norm: as for `clip_factors`.
    """
    clips = clip_factors(joint_squared_norms(gradients), max_grad_norm)
    clients = min((len(rows) for rows in sums.values()), default=0)
    if owners.shape != clips.shape or not bool(((owners >= 0) & (owners < clients)).all()):
        raise ValueError(
            f"owners {owners.tolist()} of {len(clips)} examples; name one of {clients} clients for each"
        )
    shares = torch.zeros(clients, len(clips), dtype=torch.float64, device=clips.device)
    shares[owners, torch.arange(len(clips), device=clips.device)] = clips
    _add(sums, gradients, shares)


def _add(sums: Mapping[str, Tensor], gradients: Mapping[str, Tensor], shares: Tensor) -> None:
    """sums (k, ...) += shares (k, n) times gradients (n, ...), tensor by tensor."""
    present = (shares > 0).any(
        dim=0
    )  # 0 * NaN is NaN: an example of factor 0 has to leave, not to be multiplied
    whole = bool(present.all())
    shares = shares if whole else shares[:, present]
    for name, g in gradients.items():
        rows = sums[name].view(len(shares), -1)
        for columns, wide in _widened(g if whole else g[present]):
            part = rows[:, columns]
            torch.addmm(part, shares, wide, out=part)


def _widened(g: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The numbers of g (n, ...) in float64, (n, some): which of each example's, and these."""
    flat = g.flatten(start_dim=1)
    step = max(1, CHUNK // max(1, len(flat)))
    for start in range(0, flat.shape[1], step):
        columns = slice(start, start + step)
        yield columns, flat[:, columns].to(torch.float64)
