"""Joint clipping: what bounds the influence of one example on a sum of gradients.

Everything here is float64. Squares of float32 numbers between 1e-38 and 1e38 neither overflow nor vanish in
it, the bound C holds to 1e-15, and the rounding of the sum stays far below the noise. The cost is one pass
over n x (trained numbers), which is small beside the forward pass that made them.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def joint_squared_norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """Squared L2 norm (n,) of each example, over all tensors (n, ...); finite only if every entry is."""
    if not gradients:
        raise ValueError("no gradients to clip: name at least one trained tensor")
    squares = [g.flatten(start_dim=1).to(torch.float64).square().sum(dim=1) for g in gradients.values()]
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


def clipped_sum(gradients: Mapping[str, Tensor], max_grad_norm: float | None) -> dict[str, Tensor]:
    """Sum over the examples of their jointly clipped gradients, float64, shapes without the first axis.

    Adding or removing one example moves the result by at most max_grad_norm in joint L2 norm.
    """
    factors = clip_factors(joint_squared_norms(gradients), max_grad_norm)
    kept = factors > 0  # 0 * NaN is NaN: an example of factor 0 has to leave, not to be multiplied
    return {
        name: torch.tensordot(factors[kept], g[kept].to(torch.float64), dims=1)
        for name, g in gradients.items()
    }


def clipped_sums(
    gradients: Mapping[str, Tensor], owners: Tensor, clients: int, max_grad_norm: float | None
) -> dict[str, Tensor]:
    """Sum over each client's own examples of their jointly clipped gradients, (clients, ...) float64.

    Adding or removing one example moves its client's row by at most max_grad_norm in joint L2 norm, and no other.

    Args:
        gradients: (n, ...) of each tensor.
        owners: (n,) int64, the client in 0, ..., clients - 1 that each example belongs to.
        clients: how many; a row of zeros for each that owns no example.
        max_grad_norm: as for `clip_factors`.
    """
    clips = clip_factors(joint_squared_norms(gradients), max_grad_norm)
    if owners.shape != clips.shape or not bool(((owners >= 0) & (owners < clients)).all()):
        raise ValueError(
            f"owners {owners.tolist()} of {len(clips)} examples; name one of {clients} clients for each"
        )
    shares = torch.zeros(clients, len(clips), dtype=torch.float64, device=clips.device)
    shares[owners, torch.arange(len(clips), device=clips.device)] = clips
    present = clips > 0  # as in clipped_sum
    return {
        name: torch.tensordot(shares[:, present], g[present].to(torch.float64), dims=1)
        for name, g in gradients.items()
    }
