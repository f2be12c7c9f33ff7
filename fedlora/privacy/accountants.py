"""Epsilon of a list of events: always an upper bound, always computed afresh from the events.

pld: privacy loss distributions (dp-accounting), pessimistic, the worse of adding and removing a record. The
default.
prv: privacy random variables (Opacus), its upper bound. rdp: Renyi (Opacus); 10 to 40 % above the others. The
Gaussian central-limit accountant (GDP, CLT) understates epsilon, by 12 % at our reference setting, and is not
here.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.privacy_accountant import NeighboringRelation
from dp_accounting.rdp import RdpAccountant

from fedlora.errors import ConfigError, PrivacyError
from fedlora.privacy.sampled_losses import sampled_losses
from fedlora.values import DpEvent

# Measured at n=10000, batch 64, sigma 1, 1000 steps, delta 1e-5: a grid of 1e-3 gives 1.1291 in 0.03 s, 2e-4
# gives 1.12818 in 0.13 s, 1e-4 gives 1.12815 in 0.26 s. The truth lies in 1.1231 to 1.1282. Strong noise has
# small losses and takes a finer grid at the same cost.
WIDEST_GRID = 2e-4
FEWEST_GRID_POINTS = 50_000
# A grid of more points would cost seconds and gigabytes; it is met only by epsilons in the hundreds.
MOST_GRID_POINTS = 400_000
# The share of delta that pays for draws cut at their cap.
CUT_SHARE = 1e-6
# How far PLD and PRV may differ: absolutely, and as a share of PLD.
AGREEMENT, AGREEMENT_SHARE = 0.01, 0.01
# What PRV adds to epsilon for its own errors, Opacus' default. Below 0.2 that would be most of the answer, so a
# tenth of it at least is asked for; above 10, a share of epsilon keeps its grid of bearable size.
PRV_ERROR, PRV_SHARE = 0.01, 1e-3
# Beyond this epsilon the exponentials in PRV overflow, and its Renyi bound is reported instead: an upper bound.
PRV_LIMIT = 300.0
# Of rdp, beside Opacus' own up to 63.
LARGE_ORDERS = (64, 96, 128, 192, 256, 512, 1000)


def epsilon(
    events: Sequence[DpEvent], delta: float, accountant: str = "pld", adjacency: str = "add-remove"
) -> float:
    """An upper bound on epsilon at `delta` of all `events` together: 0.0 for none, infinity without noise.

    Args:
        events: in any order, also of several mechanisms.
        delta: in (0, 1).
        accountant: "pld", "prv" or "rdp".
        adjacency: "add-remove", which is also zero-out; or "replace-one", by pld only.

    Raises:
        ConfigError: no such accountant or adjacency.
        PrivacyError: delta or an event is no such thing, or the accountant cannot handle the composition.
    """
    _require_known(accountant, adjacency)
    if not 0 < delta < 1:
        raise PrivacyError(
            f"delta {delta} must lie strictly between 0 and 1; choose one well below 1 / records"
        )
    return _epsilon(composition(events), delta, accountant, adjacency, 1.0)


def agreed_epsilon(events: Sequence[DpEvent], delta: float, accountant: str = "pld") -> float:
    """`epsilon`, after two independent accountants have agreed on these events.

    Raises:
        PrivacyError: PLD and the upper bound of PRV differ by more than they may, or epsilon is beyond 300,
            where PRV does not reach; or as `epsilon` does.
    """
    reported = epsilon(events, delta, accountant)
    pld, prv = epsilon(events, delta, "pld"), epsilon(events, delta, "prv")
    if pld != prv and max(pld, prv) >= PRV_LIMIT:
        raise PrivacyError(
            f"epsilon {pld:.4g} by pld, {prv:.4g} by prv at delta {delta}: beyond {PRV_LIMIT:g} no second accountant "
            "is exact, and nothing is protected; lower privacy.target_epsilon, that is, add noise"
        )
    if not (pld == prv or abs(pld - prv) <= AGREEMENT + AGREEMENT_SHARE * pld):
        raise PrivacyError(
            f"accountants disagree at delta {delta} on {list(events)}: epsilon {pld:.4f} by pld, {prv:.4f} by prv, "
            f"more than {AGREEMENT} + {AGREEMENT_SHARE:.0%} apart; report neither: change batch size or steps"
        )
    return reported


def coarse_epsilon(events: Sequence[DpEvent], delta: float, accountant: str, coarseness: float) -> float:
    """A quicker upper bound, for searching: pld widens its grid by `coarseness`, the others ignore it."""
    _require_known(accountant, "add-remove")
    return _epsilon(composition(events), delta, accountant, "add-remove", coarseness)


def whole_order_epsilon(events: Sequence[DpEvent], delta: float) -> float:
    """Of accountant rdp, an upper bound from orders that are whole, whose closed form needs no torch."""
    spent: Any = RdpAccountant(orders=[*range(2, 64), *LARGE_ORDERS])
    for event in events:
        step = PoissonSampledDpEvent(event.sample_rate, GaussianDpEvent(event.noise_multiplier))
        spent.compose(step, int(event.steps))
    return float(spent.get_epsilon(delta))


def composition(events: Sequence[DpEvent]) -> tuple[DpEvent, ...]:
    """The events in one canonical form: equal mechanisms merged, sorted, those that cost nothing left out."""
    steps: dict[DpEvent, int] = defaultdict(int)
    for event in events:
        _require_sound(event)
        if event.steps > 0 and event.sample_rate > 0:
            steps[replace(event, steps=1)] += event.steps
    return tuple(replace(event, steps=steps[event]) for event in sorted(steps, key=repr))


# Pure, and a report asks the same question again and again: remembering answers changes none.
@lru_cache(maxsize=4096)
def _epsilon(
    events: tuple[DpEvent, ...], delta: float, accountant: str, adjacency: str, coarseness: float
) -> float:
    if not events:
        return 0.0
    if any(event.noise_multiplier == 0 for event in events):
        return math.inf
    cut = sum(event.steps * _cut_probability(event) for event in events)
    reserved = CUT_SHARE * delta if cut > 0 else 0.0
    value = _uncut_epsilon(events, delta - reserved, accountant, adjacency, coarseness)
    # A mechanism that differs from an (e, d)-private one with probability c at most is (e, d + (1 + exp e) c).
    return value if (1 + math.exp(min(value, 700.0))) * cut <= reserved else math.inf


def _cut_probability(event: DpEvent) -> float:
    """Bounds the chance that a draw is above its cap k: exp(k + 1 - m) (m / (k + 1))^(k + 1) at mean m.

    Chernoff's bound for the Poisson law; it holds for a binomial number of no greater mean, which a draw is.
    """
    if event.max_draw is None or event.expected_batch is None:
        return 0.0
    least, mean = event.max_draw + 1, event.expected_batch
    return math.exp(min(0.0, least - mean + least * math.log(mean / least))) if least > mean else 1.0


def _uncut_epsilon(
    events: tuple[DpEvent, ...], delta: float, accountant: str, adjacency: str, coarseness: float
) -> float:
    if accountant == "pld":
        value = _pld_epsilon(events, delta, adjacency, coarseness)
    else:
        value = {"prv": _prv_epsilon, "rdp": _rdp_epsilon}[accountant](events, delta)
    if math.isnan(value):
        raise PrivacyError(
            f"accountant {accountant} found no number for {events} at delta {delta}; use accountant pld"
        )
    return max(0.0, value)


def _pld_epsilon(events: tuple[DpEvent, ...], delta: float, adjacency: str, coarseness: float) -> float:
    relation = (
        NeighboringRelation.REPLACE_ONE
        if adjacency == "replace-one"
        else NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    grid = coarseness * _grid(events, sensitivity=2.0 if adjacency == "replace-one" else 1.0)
    plds = [_pld(event, relation, grid) for event in events]
    total = plds[0]
    for pld in plds[1:]:
        total = total.compose(pld)
    return float(total.get_epsilon_for_delta(delta))


def _pld(
    event: DpEvent, relation: NeighboringRelation, grid: float
) -> privacy_loss_distribution.PrivacyLossDistribution:
    if event.sample_rate < 1:
        step = sampled_losses(event.noise_multiplier, event.sample_rate, grid, relation)
        return step.self_compose(event.steps)
    # Without sampling, n Gaussians are one Gaussian of sigma / sqrt(n), exactly.
    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=event.noise_multiplier / math.sqrt(event.steps),
        pessimistic_estimate=True,
        value_discretization_interval=grid,
        neighboring_relation=relation,
    )


def _grid(events: tuple[DpEvent, ...], sensitivity: float) -> float:
    """An interval that resolves the widest single loss (10 sigma out) and does not explode with their mean.

    The mean of one loss is at most q s and, for small q, about q^2 (exp(2 s) - 1) / 2, with s = 1 / (2
    sigma^2).
    """
    span, mean = 0.0, 0.0
    for event in events:
        steps, sigma, q = event.steps, event.noise_multiplier / sensitivity, event.sample_rate
        if q == 1:
            sigma, steps = sigma / math.sqrt(steps), 1
        s = 1 / (2 * sigma**2)
        span = max(span, s + 10 / sigma)
        mean += steps * min(q * s, q**2 * math.expm1(min(2 * s, 700.0)) / 2)
    return max(min(WIDEST_GRID, span / FEWEST_GRID_POINTS), (span + mean) / MOST_GRID_POINTS)


def _prv_epsilon(events: tuple[DpEvent, ...], delta: float) -> float:
    # Opacus is imported where it is used: it costs a second and configures logging, which `pld` need not pay.
    from opacus.accountants import PRVAccountant

    def upper(error: float) -> float:
        accountant: Any = PRVAccountant()
        accountant.history = _history(events)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(accountant.get_epsilon(delta, eps_error=error))

    bound = _rdp_epsilon(events, delta)
    if not bound < PRV_LIMIT:
        return bound
    try:
        value = upper(max(PRV_ERROR, PRV_SHARE * bound))
        if value < 20 * PRV_ERROR:
            value = min(value, upper(max(PRV_ERROR / 10, value / 25)))
        return value
    except (RuntimeError, ValueError) as error:
        raise PrivacyError(
            f"accountant prv cannot compose {events} at delta {delta}: {error}; use accountant pld"
        ) from error


def _rdp_epsilon(events: tuple[DpEvent, ...], delta: float) -> float:
    from opacus.accountants import RDPAccountant

    accountant: Any = RDPAccountant()
    accountant.history = _history(events)
    # Orders above Opacus' own 63 make small epsilons reachable; binomials overflow beyond 1024.
    orders = [*RDPAccountant.DEFAULT_ALPHAS, *LARGE_ORDERS]
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "expand the orders": a tighter bound may exist, this one holds
            return float(accountant.get_epsilon(delta, alphas=orders))
    except (OverflowError, ValueError) as error:
        raise PrivacyError(
            f"accountant rdp cannot compose {events} at delta {delta}: {error}; use accountant pld"
        ) from error


def _history(events: tuple[DpEvent, ...]) -> list[tuple[float, float, int]]:
    return [(event.noise_multiplier, event.sample_rate, event.steps) for event in events]


def _require_known(accountant: str, adjacency: str) -> None:
    if accountant not in ("pld", "prv", "rdp"):
        raise ConfigError(
            f"accountant {accountant!r} is not offered; choose pld, prv or rdp (GDP/CLT understates epsilon)"
        )
    if adjacency not in ("add-remove", "replace-one"):
        raise ConfigError(f"adjacency {adjacency!r} is unknown; choose add-remove or replace-one")
    if adjacency == "replace-one" and accountant != "pld":
        raise ConfigError(f"accountant {accountant!r} knows no replace-one adjacency; choose pld")


def _require_sound(event: DpEvent) -> None:
    sigma, rate, steps = event.noise_multiplier, event.sample_rate, event.steps
    mean, cap = event.expected_batch, event.max_draw
    if (mean is None) != (cap is None) or not (mean is None or 0 < mean < math.inf):
        raise PrivacyError(
            f"{event} is no event: need expected_batch > 0 and max_draw, or neither; mend it where it was made"
        )
    if not (sigma >= 0 and math.isfinite(sigma) and 0 <= rate <= 1 and steps >= 0 and steps == int(steps)):
        raise PrivacyError(
            f"{event} is no event: need noise_multiplier >= 0, sample_rate in [0, 1], whole steps >= 0; "
            "mend it where it was made"
        )
