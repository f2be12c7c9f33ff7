"""Deltas compared, and as a narrow memory gives them back."""

import torch

from fedlora.federation.record import Codec, Kept
from fedlora.values import Delta


def as_kept(delta: Delta, kept: Kept) -> Delta:
    return Codec.of(delta, kept).rounded(delta)


def same(x: Delta, y: Delta) -> bool:
    """Whether names, shapes, dtypes and all numbers are equal, bit for bit but for the sign of a zero."""
    return (
        Codec.of(x, "float32") == Codec.of(y, "float32")
        and x.basis == y.basis
        and all(torch.equal(x.sites[name], y.sites[name]) for name in x.sites)
        and all(torch.equal(x.head[name], y.head[name]) for name in x.head)
    )
