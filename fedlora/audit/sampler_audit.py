"""The sampler audit: is the stream of indices what Poisson sampling gives? No canary can tell.

Fixed-size or shuffled batches leave every single release as it should be and still break the amplification that
the accountants count on; only the joint law of the draws shows it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.audit.trace import Draw
from fedlora.privacy.noise import NoiseSource
from fedlora.values import Sampling

RECORDS, STEPS = 2000, 400
LIMIT = 4.0
"""Of a standard score: five of them pass it by chance once in three thousand audits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerAudit:
    """Standard scores of the rate, the spreads of batch size and of a record's count, and two repetitions."""

    scores: Mapping[str, float]

    @property
    def refuted(self) -> bool:
        """Whether one of them is beyond LIMIT."""
        return any(not abs(z) <= LIMIT for z in self.scores.values())

    @property
    def worst(self) -> str:
        """The score furthest from 0."""
        return max(self.scores, key=lambda name: abs(self.scores[name]))


def audit_sampler(draw: Draw, sampling: Sampling, noise: NoiseSource) -> SamplerAudit:
    """Draws from 2000 records for 400 steps and compares with independent coins of the same rate."""
    taken = torch.zeros((STEPS, RECORDS), dtype=torch.float64)
    for step in range(STEPS):
        taken[step, draw(RECORDS, sampling, noise, ("audit", "sampler", step))] = 1
    return SamplerAudit(scores=_scores(taken, sampling.rate))


def _scores(taken: Tensor, rate: float) -> dict[str, float]:
    steps, records = taken.shape
    variance = rate * (1 - rate)
    epoch = round(1 / rate)
    return {
        "rate": (float(taken.mean()) - rate) / math.sqrt(variance / (steps * records)),
        "batch size": _spread(taken.sum(dim=1), records * variance),
        "participation": _spread(taken.sum(dim=0), steps * variance),
        "next step": _repetition(taken, rate, 1),
        "next epoch": _repetition(taken, rate, epoch),
    }


def _spread(counts: Tensor, variance: float) -> float:
    """Of the sample variance of binomial counts, which are nearly normal."""
    return (float(counts.var()) / variance - 1) / math.sqrt(2 / (len(counts) - 1))


def _repetition(taken: Tensor, rate: float, lag: int) -> float:
    """Of the number of records in a draw and in the one `lag` steps later; centred, so that the rate drops out."""
    if lag >= len(taken):
        return 0.0
    centred = taken - rate
    products = float((centred[lag:] * centred[:-lag]).sum())
    return products / (rate * (1 - rate) * math.sqrt((len(taken) - lag) * taken.shape[1]))
