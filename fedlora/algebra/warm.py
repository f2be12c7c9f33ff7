"""A product that somebody else trained, in the form in which a run goes on with it."""

from dataclasses import replace

import torch
from torch import Tensor

from fedlora.algebra.factors import is_diagonal, orthonormalise
from fedlora.errors import ShapeError
from fedlora.values import Factors

ROUNDING = 64
"""Times the machine epsilon: what rows that were made orthonormal in a dtype may lack of it after rounding."""


def begun_with(own: Factors, theirs: Factors) -> Factors:
    """The product of `theirs` in factors shaped like `own`: the rows of A orthonormal, the first ones spanning theirs.

    Take a = l q (LQ): then b a = (b l) q. What q lacks of the rank are directions of own A, less what lies in q, beside
    which B is zero. Rows that are orthonormal already are taken as they are, and with them b. Where own has a left
    frame, b l = u c with orthonormal u, filled up likewise from own frame, and the core is c.

    Args:
        own: what a run would begin with, whole or with a core; its b is not looked at.
        theirs: a (k, n) and b (m, k) with k at most the rank of own, of any dtype.

    Raises:
        ShapeError: the sides differ, or k exceeds the rank of own; or own trains singular values alone.

    Cost: O((m + n) r^2).
    """
    left_of = own.b if own.left is None else own.left
    (r, n), (k, wide), m = own.a.shape, theirs.a.shape, left_of.shape[0]
    if is_diagonal(own):
        raise ShapeError("the product of another adapter does not lie in singular values; train B or a core")
    if wide != n or theirs.b.shape[0] != m or k > r:
        raise ShapeError(
            f"a product {(theirs.b.shape[0], wide)} of rank {k} cannot begin a site {(m, n)} of rank {r}"
        )
    q, b = _orthonormal(theirs)
    a = filled(q, own.a.double(), r)
    b = torch.nn.functional.pad(b, (0, r - k))
    if own.left is None:
        return Factors(a=a.to(own.a.dtype), b=b.to(own.b.dtype))
    u, s, w = torch.linalg.svd(b, full_matrices=False)
    rank = int((s > torch.finfo(torch.float64).eps * max(b.shape) * s[0]).sum())
    left = filled(u[:, :rank].T, own.left.double().T, r).T.contiguous()
    core = torch.zeros(r, r, dtype=torch.float64)
    core[:rank] = s[:rank, None] * w[:rank]
    return replace(own, a=a.to(own.a.dtype), b=core.to(own.b.dtype), left=left.to(own.left.dtype))


def filled(rows: Tensor, candidates: Tensor, r: int) -> Tensor:
    """The orthonormal `rows` (k, n), and below them r - k more: those candidates that lie least in what is there.

    Args:
        rows: float64.
        candidates: (r, n) float64 of rank r, so that r - k of their directions always lie outside.
        r: rows wanted, k at least.
    """
    for _ in range(r - len(rows)):
        outside = candidates - (candidates @ rows.T) @ rows
        row = outside[outside.norm(dim=1).argmax()]
        row = row - (row @ rows.T) @ rows  # once more, for what rounding left
        rows = torch.cat([rows, torch.nn.functional.normalize(row, dim=0)[None]])
    return rows


def _orthonormal(factors: Factors) -> tuple[Tensor, Tensor]:
    """a and b of the same product, float64, the rows of a orthonormal."""
    a, b = factors.a.double(), factors.b.double()
    lacking = float((a @ a.T - torch.eye(len(a), dtype=a.dtype)).abs().max())
    if lacking <= ROUNDING * torch.finfo(factors.a.dtype).eps:
        return a, b
    found = orthonormalise(a)
    return found.q, b @ found.l
