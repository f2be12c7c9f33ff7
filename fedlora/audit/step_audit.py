"""The step-level audit: how well a threshold on what one step released tells drawn canaries from others.

Whoever sees each step sees a Gaussian of mean 0 or C along a canary's direction, so no test of it can beat the
trade-off curve of mu = 1 / sigma: z(true positives) - z(false positives) <= mu (Dong et al. 2019). Counts give a
lower bound on that difference, hence on mu, and the accountant turns it into epsilon: the bound is on the
mechanism, the composition is taken from the accountant (Nasr et al., arXiv 2302.07956).
Looking at one layer, or at a difference of two releases, only loses information, so each is a test of the same mu.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtri
from scipy.stats import beta
from torch import Tensor

from fedlora.audit.trace import Trace
from fedlora.privacy.accountants import epsilon
from fedlora.values import DpEvent

THRESHOLDS = 49
"""Fixed before looking: from three deviations below the middle of both means to three above."""
_JOINT_SHARE = 0.5
"""Of the significance for the sharpest test; the others share the rest evenly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAudit:
    """Lower bounds, each at its own confidence and over all tests together.

    claimed_mu: 1 / noise multiplier. mu: by test, the lower bound at `confidence`, which all of them hold at once.
    lower_bound: epsilon of the largest mu.
    """

    confidence: float
    claimed_mu: float
    mu: Mapping[str, float]
    lower_bound: float

    @property
    def worst(self) -> str:
        """The test that found most."""
        return max(self.mu, key=lambda name: self.mu[name])


def audit_steps(trace: Trace, sample_rate: float, delta: float, confidence: float) -> StepAudit:
    """All tests of one trace, which together err with probability 1 - confidence at most.

    Args:
        trace: of two clients; both are pooled, since both run the same mechanism.
        sample_rate: of each step, for the composition.
        delta: of the epsilon to give.
        confidence: in (0, 1), over all tests and thresholds.
    """
    tests = list(_tests(trace))
    sigma = trace.mechanism.noise_multiplier
    mu = {}
    for test in tests:
        share = _JOINT_SHARE if test is tests[0] else (1 - _JOINT_SHARE) / (len(tests) - 1)
        thresholds = test.signal / 2 + test.spread * sigma * np.linspace(-3, 3, THRESHOLDS)
        mu[test.name] = _mu_lower_bound(test.drawn, test.others, thresholds, (1 - confidence) * share)
    steps = len(trace.drawn[0])
    return StepAudit(
        confidence=confidence,
        claimed_mu=1 / sigma,
        mu=mu,
        lower_bound=_epsilon(max(mu.values()), sample_rate, steps, delta),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Test:
    """Signals of drawn canaries and of the others; `signal` is the mean gap that the clip allows at most.

    spread: std of the noise, in noise multipliers.
    """

    name: str
    drawn: Tensor
    others: Tensor
    signal: float
    spread: float


def _tests(trace: Trace) -> Iterator[_Test]:
    """The joint test first."""
    layers = len(trace.projections[0])
    whole = [along.sum(dim=0) for along in trace.projections]
    yield _test("joint", whole, trace.drawn, 1.0, 1.0)
    for layer in range(layers):
        # Along the unit vector of one layer: a share 1 / sqrt(layers) of the canary, the noise of any direction.
        along = [p[layer] * math.sqrt(layers) for p in trace.projections]
        yield _test(f"layer {layer}", along, trace.drawn, 1 / math.sqrt(layers), 1.0)
    yield _on_steps(whole, trace.drawn)
    between = [own - other for own, other in zip(whole, trace.across, strict=True)]
    yield _test("client differences", between, trace.drawn, 1.0, math.sqrt(2))


def _test(name: str, signals: list[Tensor], drawn: tuple[Tensor, ...], signal: float, spread: float) -> _Test:
    positive = torch.cat([x[d] for x, d in zip(signals, drawn, strict=True)])
    negative = torch.cat([x[~d] for x, d in zip(signals, drawn, strict=True)])
    return _Test(name=name, drawn=positive, others=negative, signal=signal, spread=spread)


def _on_steps(signals: list[Tensor], drawn: tuple[Tensor, ...]) -> _Test:
    """Differences of steps 1 and 0, 3 and 2, ...: disjoint pairs, so that no noise is counted twice."""
    positive, negative = [], []
    for x, d in zip(signals, drawn, strict=True):
        even = len(x) // 2 * 2
        first, second, in_first, in_second = x[0:even:2], x[1:even:2], d[0:even:2], d[1:even:2]
        change = second - first
        positive += [change[in_second & ~in_first], -change[in_first & ~in_second]]
        negative.append(change[~in_first & ~in_second])
    return _Test(
        name="step differences",
        drawn=torch.cat(positive),
        others=torch.cat(negative),
        signal=1.0,
        spread=math.sqrt(2),
    )


def _mu_lower_bound(drawn: Tensor, others: Tensor, thresholds: np.ndarray, significance: float) -> float:
    """The largest z(TPR) - z(FPR) over the thresholds, each rate at its Clopper-Pearson limit; 0 at least."""
    each = significance / (2 * len(thresholds))
    found, missed = len(drawn), len(others)
    hits, alarms = _above(drawn, thresholds), _above(others, thresholds)
    with np.errstate(invalid="ignore"):
        least = np.where(hits > 0, beta.ppf(each, hits, found - hits + 1), 0.0)
        most = np.where(alarms < missed, beta.ppf(1 - each, alarms + 1, missed - alarms), 1.0)
    usable = (least > 0) & (most < 1)
    if not usable.any():
        return 0.0
    return max(0.0, float((ndtri(least[usable]) - ndtri(most[usable])).max()))


def _above(values: Tensor, thresholds: np.ndarray) -> np.ndarray:
    """How many values are above each of the ascending thresholds."""
    cells = torch.bucketize(values, torch.as_tensor(thresholds, dtype=values.dtype))
    counts = torch.bincount(cells, minlength=len(thresholds) + 1)
    return counts.flip(0).cumsum(0).flip(0)[1:].numpy()


def _epsilon(mu: float, sample_rate: float, steps: int, delta: float) -> float:
    """By the accountant that reports, pessimistic as for the claim, so that comparing epsilons compares mus."""
    if mu <= 0:
        return 0.0
    event = DpEvent(noise_multiplier=1 / mu, sample_rate=sample_rate, steps=steps)
    return epsilon([event], delta, "pld")
