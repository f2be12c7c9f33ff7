"""One adapted site as a product of two thin factors; the product itself is formed only to merge.

Everything is computed in float64 whatever the dtype of the input: the matrices are thin, and a rounded basis
would be carried through every later round.
"""

import math
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


def truncated(product: Tensor, r: int) -> Factors:
    """The nearest product of rank r in the Frobenius norm (Eckart and Young): a with orthonormal rows, float64.

    Args:
        product: (m, n), r at most the smaller side.
        r: rank.

    Cost: O(m n min(m, n)).
    """
    u, s, v = torch.linalg.svd(product.double(), full_matrices=False)
    return Factors(a=v[:r], b=u[:, :r] * s[:r])


def soft_thresholded(b: Tensor, threshold: float) -> Tensor:
    """b (m, r) of orthogonal columns, each shortened by `threshold`, those no longer than that to zero.

    Where a has orthonormal rows these lengths are the singular values of b @ a, so this is the proximal step of
    threshold * nuclear norm (Cai et al., arXiv 0810.3286): of all x it minimises
    |x - b @ a|^2 / 2 + threshold * |x|_*. SoRA's gates (arXiv 2311.11696), applied to what is already released.
    """
    lengths = b.double().norm(dim=0)
    return (b.double() * (1 - threshold / lengths.clamp_min(1e-300)).clamp_min(0.0)).to(b.dtype)


def is_diagonal(factors: Factors) -> bool:
    """Whether b (1, r) is the diagonal of a core: r numbers that no change of basis may mix."""
    return factors.left is not None and factors.left.shape[1] != factors.b.shape[0]


def whole(factors: Factors) -> Factors:
    """The same with no left frame: b is left @ core, (d_out, r)."""
    if factors.left is None:
        return factors
    left, core = factors.left.double(), factors.b.double()
    b = left * core if is_diagonal(factors) else left @ core
    return Factors(a=factors.a, b=b.to(factors.b.dtype), rest=factors.rest)


def folded(factors: Factors, scale: float) -> Factors:
    """The same change of the weight as one product, with neither left frame nor rest; what only rounding adds is gone.

    Where there is a rest, the rank grows to that of the whole change, min(d_out, d_in) at most.
    """
    if factors.rest is None:
        return whole(factors)
    u, s, v = torch.linalg.svd(change(factors, scale) / scale, full_matrices=False)
    # Rounding of each entry is a matrix of random signs, whose largest singular value grows like this.
    noise = torch.finfo(factors.rest.dtype).eps * math.sqrt(max(factors.rest.shape)) * s[0]
    r = max(1, int((s > noise).sum()))
    dtype = factors.b.dtype
    return Factors(a=v[:r].to(dtype), b=(u[:, :r] * s[:r]).to(dtype))


def padded(factors: Factors, r: int) -> Factors:
    """The same product with zeros up to rank r."""
    more = r - len(factors.a)
    a = torch.nn.functional.pad(factors.a, (0, 0, 0, more))
    return Factors(a=a, b=torch.nn.functional.pad(factors.b, (0, more)))


def merge(weight: Tensor, factors: Factors, scale: float) -> Tensor:
    """weight + scale * b @ a + rest, in the dtype of weight.

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
    return (weight.double() + change(factors, scale)).to(weight.dtype)


def change(factors: Factors, scale: float) -> Tensor:
    """All that the site adds to its weight, (d_out, d_in) float64: scale * b @ a + rest."""
    factors = whole(factors)
    product = scale * (factors.b.double() @ factors.a.double())
    return product if factors.rest is None else product + factors.rest.double()


def _lq(a: Tensor) -> tuple[Tensor, Tensor]:
    # The signs of QR are a library's choice; a non-negative diagonal makes the result ours.
    q, r = torch.linalg.qr(a.T)
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(a)
    return (sign[:, None] * r).T, (q * sign).T


def _row_signs(a: Tensor) -> Tensor:
    # An SVD leaves the sign of each pair of singular vectors open. argmax takes the first of equal entries.
    largest = a.gather(1, a.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    return torch.where(largest < 0, -1.0, 1.0).to(a)
