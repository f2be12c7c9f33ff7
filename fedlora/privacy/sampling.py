"""Poisson sampling: the draw that the accountants assume. Shuffled or fixed-size batches are not it."""

import math

import torch
from torch import Tensor

from fedlora.privacy.noise import NoiseSource
from fedlora.values import Sampling


def poisson(batch_size: int, records: int) -> Sampling:
    """Draws of `batch_size` records on average from `records`, a declared number; all of them where it is less.

    A draw is cut at 14 standard deviations and 40 records above the mean, more than memory for it is ever
    needed and less than chance ever reaches: the accountants are told, and it costs nothing.
    """
    cap = batch_size + math.ceil(14 * math.sqrt(batch_size)) + 40
    return Sampling(rate=min(1.0, batch_size / records), expected_batch=float(batch_size), max_draw=cap)


def poisson_draw(
    records: int, sampling: Sampling, source: NoiseSource, purpose: tuple[str | int, ...]
) -> Tensor:
    """Sorted indices (k,) of the records drawn, each independently with probability `rate`; k may be 0.

    Args:
        records: how many the client holds, at most as many as it declared.
        sampling: rate and cap, never computed from the records.
        source: who is drawn must stay as secret as the noise, and is written nowhere.
        purpose: names round and step, so that no two draws of a seeded source are the same.
    """
    if records < 0:
        raise ValueError(f"cannot draw from {records} records")
    taken = torch.nonzero(source.uniform(records, purpose=purpose) < sampling.rate).flatten()
    return taken[: sampling.max_draw]
