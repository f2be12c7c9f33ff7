"""From a budget to the noise that keeps it."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fedlora.errors import PrivacyError
from fedlora.privacy.accountants import agreed_epsilon, coarse_epsilon, epsilon
from fedlora.privacy.step import spent
from fedlora.values import DpEvent, Mechanism, Sampling

# More noise than this leaves no signal at any batch size; less than that is no privacy worth the name.
MOST_NOISE = 1e4
LEAST_NOISE = 1e-2
# Relative width at which the search ends; its result is confirmed, and raised if need be, by the fine
# accountant.
SEARCH_WIDTH = 5e-4
# A pessimistic grid five times the fine one answers in 0.03 s. Where it asks for so much more noise than
# needed that epsilon ends SLACK below its target, the search is finished on the fine one.
SEARCH_COARSENESS = 5.0
SLACK = 2e-3


def noise_multiplier(
    target_epsilon: float,
    target_delta: float,
    sampling: Sampling,
    steps: int,
    accountant: str = "pld",
    *,
    beside: Sequence[DpEvent] = (),
) -> float:
    """The least noise multiplier, to about 1e-3 and never below it, whose reported epsilon is within target.

    Args:
        target_epsilon: of one record, over all steps.
        target_delta: in (0, 1).
        sampling: of every step; its cap is paid for.
        steps: all that the client may ever take: max_participations x local steps.
        accountant: "pld", "prv" or "rdp"; the one that will report.
        beside: whatever else the client may ever release under the same budget, all participations of it.

    Raises:
        PrivacyError: the request makes no sense, no noise up to 1e4 meets it, or the accountants differ on it.
        ConfigError: no such accountant.
    """
    _require_sound(target_epsilon, target_delta, steps)
    others = epsilon(beside, target_delta, accountant)
    if others >= target_epsilon:
        raise PrivacyError(
            f"the releases beside training cost epsilon {others:.4g}, all of the {target_epsilon} allowed; "
            "raise privacy.target_epsilon, or give them more noise"
        )

    def events(sigma: float) -> list[DpEvent]:
        mechanism = Mechanism(max_grad_norm=1.0, noise_multiplier=sigma)  # epsilon is the same for any bound
        return [spent(mechanism, sampling, steps), *beside]

    def excess(sigma: float, name: str = accountant, coarseness: float = SEARCH_COARSENESS) -> float:
        reached = coarse_epsilon(events(sigma), target_delta, name, coarseness)
        return math.log(max(reached, 1e-300) / target_epsilon)

    # prv needs a second for what pld does in 0.03 s, and differs by a percent: begin where pld ends.
    start, factor = (
        (1.0, 2.0) if accountant != "prv" else (_search(lambda s: excess(s, "pld"), 1.0, 2.0), 1.02)
    )
    sigma = _rounded_up(_search(excess, start, factor))
    if accountant == "pld" and excess(sigma, coarseness=1.0) < -SLACK:
        sigma = _rounded_up(_search(lambda s: excess(s, coarseness=1.0), sigma, 1.02))
    return _confirmed(sigma, events, target_epsilon, target_delta, accountant)


def _search(excess: Callable[[float], float], start: float, factor: float) -> float:
    """A point within SEARCH_WIDTH above the least sigma of no positive excess; excess falls with sigma.

    Returns a point beyond MOST_NOISE if there is none below it, and stops looking near LEAST_NOISE.
    """
    low, high = _bracket(excess, start, factor)
    if high.excess > 0 or low.excess <= 0:
        return high.sigma
    side = 0
    while high.sigma > low.sigma * (1 + SEARCH_WIDTH):
        # The Illinois rule: a secant in log sigma against log epsilon, nearly a straight line; an end that
        # stays twice counts half. Kept a width off both ends, so that one more evaluation usually closes the
        # bracket.
        share = low.excess / (low.excess - high.excess) if math.isfinite(low.excess - high.excess) else 0.5
        gap = math.log(high.sigma / low.sigma)
        margin = min(0.5, 0.8 * SEARCH_WIDTH / gap)
        point = low.sigma * math.exp(gap * min(max(share, margin), 1 - margin))
        value = excess(point)
        if value > 0:
            low, high = _Point(point, value), _Point(high.sigma, high.excess * (0.5 if side == 1 else 1.0))
            side = 1
        else:
            low, high = _Point(low.sigma, low.excess * (0.5 if side == -1 else 1.0)), _Point(point, value)
            side = -1
    return high.sigma


class _Point(NamedTuple):
    sigma: float
    excess: float


def _bracket(excess: Callable[[float], float], start: float, factor: float) -> tuple[_Point, _Point]:
    """Neighbouring points, the first with too little noise; or the same twice, at the end of the range."""
    low = high = _Point(start, excess(start))
    while high.excess > 0 and high.sigma < MOST_NOISE:
        low, high = high, _Point(high.sigma * factor, excess(high.sigma * factor))
    while low.excess <= 0 and low.sigma > LEAST_NOISE:
        low, high = _Point(low.sigma / factor, excess(low.sigma / factor)), low
    return (low, high) if low.excess > 0 else (low, low)


def _confirmed(
    sigma: float,
    events: Callable[[float], list[DpEvent]],
    target_epsilon: float,
    target_delta: float,
    accountant: str,
) -> float:
    """sigma itself, or the first a little above it, whose fine epsilon is within target and agreed upon."""
    while sigma <= MOST_NOISE:
        if epsilon(events(sigma), target_delta, accountant) <= target_epsilon:
            agreed_epsilon(events(sigma), target_delta, accountant)
            return sigma
        sigma = _rounded_up(sigma * (1 + SEARCH_WIDTH))
    training = events(MOST_NOISE)[0]
    raise PrivacyError(
        f"no noise multiplier up to {MOST_NOISE:g} keeps epsilon {target_epsilon} at delta "
        f"{target_delta} over {training.steps} steps at sample rate {training.sample_rate} and at most "
        f"{training.max_draw} records a step (accountant {accountant}); "
        "raise privacy.target_epsilon, or lower privacy.max_participations, federation.local_steps "
        "or federation.batch_size"
    )


def _rounded_up(sigma: float) -> float:
    """sigma to five significant digits, upwards: a number that survives being typed again."""
    digits = 4 - math.floor(math.log10(sigma))
    rounded = round(sigma, digits)
    return rounded if rounded >= sigma else round(rounded + 10.0**-digits, digits)


def _require_sound(target_epsilon: float, target_delta: float, steps: int) -> None:
    if not (target_epsilon > 0 and math.isfinite(target_epsilon)):
        raise PrivacyError(
            f"target_epsilon {target_epsilon} must be positive and finite; set privacy.target_epsilon"
        )
    if not 0 < target_delta < 1:
        raise PrivacyError(
            f"target_delta {target_delta} must lie strictly between 0 and 1; set privacy.target_delta"
        )
    if steps < 1:
        raise PrivacyError(
            f"{steps} steps need no noise; raise privacy.max_participations or federation.local_steps"
        )


def check_delta(delta: float, records: int) -> None:
    """Passes only a delta below 1 / records: at 1 / records a mechanism may publish a record outright."""
    if records < 1 or not 0 < delta < 1 / records:
        raise PrivacyError(
            f"privacy.target_delta {delta} is not below 1 / {records}, the records of a client; "
            f"lower it (below {0.1 / max(records, 1):.1e} is usual)"
        )
