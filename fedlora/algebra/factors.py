"""One adapted site as a product of two thin factors; the product itself is formed only to merge.

Everything is computed in float64 whatever the dtype of the input: the matrices are thin, and a rounded basis
would be carried through every later round.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.errors import ShapeError
from fedlora.values import Factors


@dataclass(frozen=True, slots=True, kw_only=True)
class Orthonormal:
    """a = l @ q: q (r, n) has orthonormal rows, l (r, r) is lower triangular, its diagonal never negative."""

    q: Tensor
    l: Tensor  # noqa: E741 - the letter of the LQ factorisation


@dataclass(frozen=True, slots=True, kw_only=True)
class Refactored:
    """The same product in another basis; gauge (r, r) carries along whatever else stood left of a."""

    a: Tensor
    b: Tensor
    gauge: Tensor


def orthonormalise(a: Tensor) -> Orthonormal:
    """The rows of q are orthonormal and span at least row(a), with a == l @ q.

    Householder reflections give orthonormal rows also where a is rank-deficient or zero; the missing
    directions are then arbitrary, but the same in every call. For an a of orthonormal rows, q is a and l the
    identity.

    Args:
        a: (r, n), any row rank; needs r <= n.

    Returns:
        q (r, n) and l (r, r) in the dtype of a.

    Raises:
        ShapeError: a is no matrix, or r exceeds n.

    Cost: O(n r^2).
    """
    if a.ndim != 2 or a.shape[0] > a.shape[1]:
        raise ShapeError(
            f"a {tuple(a.shape)} cannot have orthonormal rows; need (r, n) with r <= n, so lower r"
        )
    lower, q = _lq(a.double())
    return Orthonormal(q=q.to(a.dtype), l=lower.to(a.dtype))


def refactorise(a: Tensor, b: Tensor) -> Refactored:
    """Rewrite b @ a with an orthonormal right factor, never forming the product.

    Take a = l q (LQ), then b l = u diag(s) w (SVD): the new pair is (w q, u diag(s)). Since w is a square
    rotation, row(a) is kept whole also where b is zero or rank-deficient; a dense SVD of the product would
    lose it.

    Args:
        a: right factor (r, n), any row rank; needs r <= n. Dimensionless, like b.
        b: left factor (m, r), same dtype and device; needs r <= m.

    Returns:
        a (rows orthonormal, the largest entry of each positive), b (columns orthogonal, norms descending) and
        gauge (r, r): x @ old_a == (x @ gauge) @ new_a for every x of shape (m, r).

    Raises:
        ShapeError: the ranks differ, or r exceeds m or n.

    Cost: O((m + n) r^2).  Source: FedSVD (arXiv 2505.12805); the LQ detour is ours.
    """
    Factors(a=a, b=b)  # refuses factors that share no rank
    (r, n), m = a.shape, b.shape[0]
    if r > min(m, n):
        raise ShapeError(f"rank {r} exceeds m {m} or n {n}; lower r to {min(m, n)}")
    lower, q = _lq(a.double())
    left, core = torch.linalg.qr(b.double() @ lower)
    u, s, w = torch.linalg.svd(core)
    sign = _row_signs(w @ q)
    w = sign[:, None] * w
    return Refactored(
        a=(w @ q).to(a.dtype),
        b=((left @ u) * (s * sign)).to(b.dtype),
        gauge=(lower @ w.T).to(a.dtype),
    )


def soft_thresholded(b: Tensor, threshold: float) -> Tensor:
    """b (m, r) of orthogonal columns, each shortened by `threshold`, those no longer than that to zero.

    Where a has orthonormal rows these lengths are the singular values of b @ a, so this is the proximal step of
    threshold * nuclear norm (Cai et al., arXiv 0810.3286): of all x it minimises
    |x - b @ a|^2 / 2 + threshold * |x|_*. SoRA's gates (arXiv 2311.11696), applied to what is already released.
    """
    lengths = b.double().norm(dim=0)
    return (b.double() * (1 - threshold / lengths.clamp_min(1e-300)).clamp_min(0.0)).to(b.dtype)


def whole(factors: Factors) -> Factors:
    """The same product with no left frame: b is left @ core, (d_out, r)."""
    if factors.left is None:
        return factors
    b = (factors.left.double() @ factors.b.double()).to(factors.b.dtype)
    return Factors(a=factors.a, b=b)


def merge(weight: Tensor, factors: Factors, scale: float) -> Tensor:
    """weight + scale * b @ a, in the dtype of weight.

    Args:
        weight: (d_out, d_in) of the frozen layer.
        factors: a (r, d_in) and b (d_out, r).
        scale: lora_alpha / r.

    Raises:
        ShapeError: the product is not shaped like weight.
    """
    factors = whole(factors)
    shape = (factors.b.shape[0], factors.a.shape[1])
    if tuple(weight.shape) != shape:
        raise ShapeError(
            f"b @ a is {shape} but the weight is {tuple(weight.shape)}; these factors belong to another layer"
        )
    return (weight.double() + scale * (factors.b.double() @ factors.a.double())).to(weight.dtype)


def _lq(a: Tensor) -> tuple[Tensor, Tensor]:
    # The signs of QR are a library's choice; a non-negative diagonal makes the result ours.
    q, r = torch.linalg.qr(a.T)
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(a)
    return (sign[:, None] * r).T, (q * sign).T


def _row_signs(a: Tensor) -> Tensor:
    # An SVD leaves the sign of each pair of singular vectors open. argmax takes the first of equal entries.
    largest = a.gather(1, a.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    return torch.where(largest < 0, -1.0, 1.0).to(a)
