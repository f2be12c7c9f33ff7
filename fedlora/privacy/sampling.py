"""Poisson sampling: the draw that the accountants assume. Shuffled or fixed-size batches are not it."""

import torch
from torch import Tensor

from fedlora.privacy.noise import NoiseSource


def poisson_draw(records: int, rate: float, source: NoiseSource, purpose: tuple[str | int, ...]) -> Tensor:
    """Sorted indices (k,) of the records drawn, each independently with probability `rate`; k may be 0.

    Args:
        records: how many the client holds.
        rate: a constant of the configuration, never computed from the records.
        source: who is drawn must stay as secret as the noise.
        purpose: names round and step, so that no two draws of a seeded source are the same.
    """
    if records < 0 or not 0 < rate <= 1:
        raise ValueError(
            f"cannot draw from {records} records at rate {rate}; need records >= 0 and 0 < rate <= 1"
        )
    taken = source.uniform(records, purpose=purpose) < rate
    return torch.nonzero(taken).flatten()
