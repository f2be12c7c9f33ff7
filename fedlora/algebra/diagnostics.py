"""What an adapter is, read from its thin factors: spectrum, rank, and where it lies in the weight that it changes.

Everything is float64. The product scale * b @ a is formed for intruder dimensions only, which need the singular vectors
of the sum of weight and product.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.algebra.factors import merge, whole
from fedlora.errors import ShapeError
from fedlora.values import Factors

INTRUDERS_AMONG = 10
"""Leading singular vectors that are looked at for intruders: what the code released with arXiv 2410.21228 takes."""
INTRUDER_BELOW = 0.5
"""No cosine of an intruder with a singular vector of the weight reaches it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decomposed:
    """A weight (d_out, d_in) as left @ diag(values) @ right, p = min(d_out, d_in) of each, the largest first.

    left: (d_out, p), orthonormal columns. values: (p,). right: (p, d_in), orthonormal rows.
    """

    left: Tensor
    values: Tensor
    right: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Of an update's energy, what passes the first k left directions of a weight, the right ones, and both."""

    left: float
    right: float
    both: float


def decomposed(weight: Tensor) -> Decomposed:
    """The singular value decomposition of a weight (d_out, d_in), float64.

    Cost: O(d_out d_in p).
    """
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return Decomposed(left=left, values=values, right=right)


def singular_values(factors: Factors, scale: float = 1.0) -> Tensor:
    """Those of scale * b @ a, (r,), the largest first, float64; those beyond the shorter side are zero.

    Cost: O((d_out + d_in) r^2).
    """
    r_a, r_b = _triangles(factors)
    values = torch.linalg.svdvals(r_b @ r_a.T) * abs(scale)
    return torch.nn.functional.pad(values, (0, factors.a.shape[0] - len(values)))


def energy_shares(values: Tensor) -> Tensor:
    """The part of the squared Frobenius norm in each of these singular values (r,); zeros where all of them are."""
    energy = values.double().square()
    total = energy.sum()
    return energy / total if total > 0 else energy


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the normalised singular values (r,): from 1 to how many there are; 0 where all are zero.

    k equal values give k, whatever their size.  Source: Roy and Vetterli, "The effective rank" (EUSIPCO 2007), whose
    normalisation is by the sum of the values, not of their squares.
    """
    total = values.double().sum()
    if not total > 0:
        return 0.0
    share = values.double() / total
    return math.exp(-float(torch.special.xlogy(share, share).sum()))


def intruder_dimensions(
    weight: Tensor,
    factors: Factors,
    scale: float,
    *,
    base: Decomposed | None = None,
    k: int = INTRUDERS_AMONG,
    epsilon: float = INTRUDER_BELOW,
) -> int:
    """How many of the first k left singular vectors of weight + scale * b @ a are new.

    A vector is new if its cosine similarity, the sign left aside, with every left singular vector of the weight is
    below epsilon, and if its own singular value is not zero. A weight of more rows than columns has as many left
    singular vectors as columns: directions that it never reaches are nobody's.

    Args:
        weight: (d_out, d_in), frozen.
        factors: a (r, d_in) and b (d_out, r), or a core and its frame.
        scale: lora_alpha / r.
        base: `decomposed(weight)`, from who has it already.
        k: the largest singular values; fewer where there are no more.
        epsilon: in [0, 1]; 0 finds none.

    Raises:
        ShapeError: the factors belong to another layer.

    Cost: two decompositions of the weight's shape.  Source: Shuttleworth et al., arXiv 2410.21228, whose
    released code takes the absolute value and the thin decomposition.
    """
    base = decomposed(weight) if base is None else base
    tuned = decomposed(merge(weight.double(), factors, scale))
    nearest = (base.left.T @ tuned.left[:, :k]).abs().amax(dim=0)
    # A singular value that is zero but for rounding belongs to no direction in particular.
    floor = max(weight.shape) * torch.finfo(torch.float64).eps * tuned.values[:1]
    return int(((nearest < epsilon) & (tuned.values[:k] > floor)).sum())


def explained_share(base: Decomposed, factors: Factors, k: int) -> Shares:
    """What part of the energy of b @ a lies in the span of the weight's first k singular vectors; zeros if b @ a is.

    left: |U^T b a|^2 / |b a|^2, U (d_out, k) the left ones; right: with the right ones V; both: |U^T b a V|^2.

    Raises:
        ShapeError: the factors belong to another layer.

    Cost: O((d_out + d_in) r (r + k)).
    """
    factors = whole(factors)
    a, b = factors.a.double(), factors.b.double()
    if (b.shape[0], a.shape[1]) != (base.left.shape[0], base.right.shape[1]):
        raise ShapeError(
            f"b @ a is {(b.shape[0], a.shape[1])} but the weight is {(base.left.shape[0], base.right.shape[1])}; "
            "these factors belong to another layer"
        )
    r_a, r_b = _triangles(factors)
    total = _energy(r_b @ r_a.T)
    if total == 0:
        return Shares(left=0.0, right=0.0, both=0.0)
    inside_b, inside_a = base.left[:, :k].T @ b, a @ base.right[:k].T
    return Shares(
        left=_energy(inside_b @ r_a.T) / total,
        right=_energy(r_b @ inside_a) / total,
        both=_energy(inside_b @ inside_a) / total,
    )


def share_by_chance(shape: tuple[int, int], k: int) -> Shares:
    """What `explained_share` is on average for a weight of this shape whose k directions on each side are random."""
    left, right = (min(k, side) / side for side in shape)
    return Shares(left=left, right=right, both=left * right)


def signal_to_noise(energy: float, noise_energy: float) -> float:
    """max(0, energy - noise_energy) / noise_energy: how many times the noise in a released update its signal is.

    Before the max it is unbiased: noise of mean zero adds its own energy to that of any signal, and nothing else.
    Over n numbers of noise alone it spreads by sqrt(2 / n). It costs no privacy: it is a function of what was
    released and of constants of the configuration.

    Args:
        energy: squared length of the update, noise and all; or the sum, or mean, of several.
        noise_energy: what the noise in it is expected to add, likewise; positive.

    Raises:
        ValueError: there is no noise to compare with.
    """
    if not noise_energy > 0:
        raise ValueError(
            f"noise_energy {noise_energy} must be positive; an update without noise has no ratio"
        )
    return max(0.0, energy - noise_energy) / noise_energy


def _triangles(factors: Factors) -> tuple[Tensor, Tensor]:
    """r_a (., r) and r_b (., r): b @ a and r_b @ r_a.T differ by orthonormal columns and rows only."""
    factors = whole(factors)
    return (
        torch.linalg.qr(factors.a.double().T, mode="r").R,
        torch.linalg.qr(factors.b.double(), mode="r").R,
    )


def _energy(matrix: Tensor) -> float:
    return float(matrix.square().sum())
