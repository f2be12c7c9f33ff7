"""Joint clipping: what bounds the influence of one example on a sum of gradients.

An example is one row: all that is trained, in one. Norms, factors and sums are float64: squares of float32 numbers
between 1e-38 and 1e38 neither overflow nor vanish in it, the bound C holds to 1e-11, and the rounding of the sum stays
far below the noise. The cost is two reads of n x (trained numbers), small beside the forward pass that made them.
"""

import math

import torch
from torch import Tensor

from fedlora.kernels.table import Ops


def clip_factors(norms: Tensor, max_grad_norm: float | None) -> Tensor:
    """Factors (n,) that bring each norm to at most max_grad_norm; 0 for an example whose norm is not finite.

    A non-finite gradient must not reach the sum: one NaN there would tell everybody that its record took
    part.

    Args:
        norms: (n,) float64, of all that is trained.
        max_grad_norm: the bound C; None leaves finite gradients as they are, which is not private.
    """
    if max_grad_norm is None:
        return torch.isfinite(norms).to(torch.float64)
    if not (max_grad_norm > 0 and math.isfinite(max_grad_norm)):
        raise ValueError(f"max_grad_norm {max_grad_norm} must be positive and finite")
    # Of an infinite norm, the quotient is 0; of not-a-number, not-a-number, which counts as 0 too.
    return torch.clamp(max_grad_norm / norms, max=1.0).nan_to_num(nan=0.0)


def clipped_sum(ops: Ops, rows: Tensor, max_grad_norm: float | None) -> Tensor:
    """The sum (P,) float64 over the examples of their clipped gradients.

    Adding or removing one example moves it by at most max_grad_norm in L2 norm.

    Args:
        ops: what computes norms and sums.
        rows: (n, P), one an example.
        max_grad_norm: as for `clip_factors`.
    """
    factors = clip_factors(ops.norms(rows), max_grad_norm)
    return _weighted(ops, rows, factors[None])[0]


def clipped_sums(ops: Ops, rows: Tensor, owners: Tensor, clients: int, max_grad_norm: float | None) -> Tensor:
    """The sums (clients, P) float64 over each client's own examples of their clipped gradients.

    Adding or removing one example moves its client's row by at most max_grad_norm in L2 norm, and no other.

    Args:
        ops: what computes norms and sums.
        rows: (n, P), one an example.
        owners: (n,) int64, the client in 0, ..., clients - 1 that each example belongs to.
        clients: how many; a row of zeros for each that owns no example.
        max_grad_norm: as for `clip_factors`.
    """
    clips = clip_factors(ops.norms(rows), max_grad_norm)
    if owners.shape != clips.shape or not bool(((owners >= 0) & (owners < clients)).all()):
        raise ValueError(
            f"owners {owners.tolist()} of {len(clips)} examples; name one of {clients} clients for each"
        )
    shares = torch.zeros(clients, len(clips), dtype=torch.float64, device=clips.device)
    shares[owners, torch.arange(len(clips), device=clips.device)] = clips
    return _weighted(ops, rows, shares)


def _weighted(ops: Ops, rows: Tensor, shares: Tensor) -> Tensor:
    """shares (k, n) @ rows (n, P)."""
    largest = shares.amax(dim=0) if len(shares) > 1 else shares[0]
    if len(rows) and not float(largest.min()) > 0:
        # 0 * NaN is NaN: an example of factor 0 has to leave, not to be multiplied.
        present = largest > 0
        shares, rows = shares[:, present], rows[present]
    return ops.weighted_sums(rows, shares)
