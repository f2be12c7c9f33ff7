"""The one-run audit: guess which canaries were in the data at all, and how many right guesses privacy allows.

It knows nothing of steps, clip or Gaussian noise, so it is a second opinion, and a weak one: with few hundred
guesses its ceiling is an epsilon of about four, whatever leaks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import log_ndtr, ndtr, ndtri
from scipy.stats import binom
from torch import Tensor

from fedlora.audit.trace import Trace

GUESSED = 0.05
"""Share of the canaries guessed in, and the same share guessed out; fixed in advance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OneRunAudit:
    """`correct` of `guesses` about `canaries` were right.

    lower_bound: on epsilon at the given delta, whatever the mechanism (Steinke et al., arXiv 2305.08846).
    f_dp: the same, if the whole run trades errors as some Gaussian mechanism does (arXiv 2410.22235); tighter, but
        an assumption, so no claim is refuted by it.
    """

    confidence: float
    canaries: int
    guesses: int
    correct: int
    lower_bound: float
    f_dp: float


def audit_one_run(trace: Trace, sample_rate: float, delta: float, confidence: float) -> OneRunAudit:
    """Guesses by the likelihood ratio of all steps that the claimed mechanism would have.

    The canaries of both clients count: their data sets are disjoint, so each record has the same guarantee in
    the two runs together as in its own.
    """
    sigma = trace.mechanism.noise_multiplier
    scores = torch.cat([_scores(p.sum(dim=0), sample_rate, sigma) for p in trace.projections])
    included = torch.cat(trace.included)
    order = scores.argsort()
    each = round(GUESSED * len(scores))
    correct = int((~included[order[:each]]).sum() + included[order[-each:]].sum())
    return OneRunAudit(
        confidence=confidence,
        canaries=len(scores),
        guesses=2 * each,
        correct=correct,
        lower_bound=one_run_bound(len(scores), 2 * each, correct, delta, 1 - confidence),
        f_dp=f_dp_bound(len(scores), 2 * each, correct, delta, 1 - confidence),
    )


def _scores(signals: Tensor, sample_rate: float, sigma: float) -> Tensor:
    """Log of P(signals | in the data) / P(signals | not), (m,), from (T, m), each step independently drawn."""
    step = (signals - 0.5) / sigma**2 + math.log(sample_rate)
    return torch.logaddexp(step, torch.tensor(math.log1p(-sample_rate), dtype=step.dtype)).sum(dim=0)


def one_run_bound(canaries: int, guesses: int, correct: int, delta: float, significance: float) -> float:
    """The least epsilon under which so many correct guesses are not yet too unlikely; 0 if any explains them."""

    def explained(value: float) -> bool:
        return _p_value(canaries, guesses, correct, value, delta) >= significance

    return _least(explained, 64.0)


def _p_value(canaries: int, guesses: int, correct: int, value: float, delta: float) -> float:
    """P(at least `correct` right guesses) under (value, delta)-DP at most: theorem 5.2 of arXiv 2305.08846.

    The tail of a binomial of accuracy e^value / (1 + e^value), and what delta may add to it:
    2 m delta max_i P(correct - i <= binomial < correct) / i.
    """
    if correct == 0:
        return 1.0
    accuracy = 1 / (1 + math.exp(-value))
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, accuracy))
    added = float((below / np.arange(1, correct + 1)).max())
    return min(1.0, float(binom.sf(correct - 1, guesses, accuracy)) + 2 * canaries * delta * added)


def f_dp_bound(canaries: int, guesses: int, correct: int, delta: float, significance: float) -> float:
    """Epsilon at delta of the least Gaussian trade-off curve that explains so many right guesses; 0 if any does."""
    mu = _least(lambda value: _gaussian_explains(value, canaries, guesses, correct, significance), 16.0)
    return _gaussian_epsilon(mu, delta) if mu > 0 else 0.0


def _gaussian_explains(mu: float, canaries: int, guesses: int, correct: int, significance: float) -> bool:
    """Whether mu-Gaussian-DP allows P(at least `correct` of `guesses`) >= significance: arXiv 2410.22235.

    From i + 1 right guesses down to i: `right` and `wrong` are the masses that right and wrong guesses carry in
    the event of at least i right ones, each at least what the trade-off curve forces them to be. Where the
    guesses cannot carry that much, the curve does not allow the event to be so likely.
    """
    share = guesses / canaries
    right = significance * share * correct / guesses
    wrong = significance * share * (guesses - correct) / guesses
    for i in range(correct - 1, -1, -1):
        forced = max(wrong, float(ndtr(ndtri(min(right, 1.0)) - mu)))
        right += i / (guesses - i) * (forced - wrong)
        wrong = forced
    return right + wrong <= share


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon at delta of mu-Gaussian differential privacy (Balle and Wang 2018, theorem 8)."""

    def enough(value: float) -> bool:
        tail = value + float(log_ndtr(-value / mu - mu / 2))
        return float(ndtr(mu / 2 - value / mu)) - math.exp(tail) <= delta

    return _least(enough, 400.0)


def _least(holds: Callable[[float], bool], most: float) -> float:
    """The least value in [0, most], to 1e-6 of it and from below, from which on `holds`."""
    low, high = 0.0, most
    if holds(low):
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low
