"""The promises of the accountants and of calibration, as functions of them, so that broken ones can fail them."""

import math
from types import ModuleType
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from scipy.optimize import brentq
from scipy.stats import norm

from fedlora.errors import ConfigError, PrivacyError
from fedlora.privacy.sampling import poisson
from fedlora.values import DpEvent, Sampling

REFERENCE = {
    ("pld", "add-remove"): 1.128,
    ("prv", "add-remove"): 1.138,
    ("rdp", "add-remove"): 1.429,
    ("pld", "replace-one"): 1.735,
}


def event(
    sigma: float = 1.0,
    rate: float = 0.0064,
    steps: Any = 1000,
    mean: float | None = None,
    cap: int | None = None,
) -> DpEvent:
    return DpEvent(noise_multiplier=sigma, sample_rate=rate, steps=steps, expected_batch=mean, max_draw=cap)


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """The analytic Gaussian mechanism (Balle and Wang 2018)."""

    def excess(eps: float) -> float:
        above, below = norm.cdf(0.5 / sigma - eps * sigma), norm.cdf(-0.5 / sigma - eps * sigma)
        return float(above - math.exp(eps) * below - delta)

    return float(brentq(excess, 0, 200))  # pyright: ignore


def _refused(call: Any, error: type[Exception] = PrivacyError) -> None:
    try:
        call()
    except error:
        return
    except Exception as other:
        raise AssertionError(f"fell over instead of refusing: {other!r}") from other
    raise AssertionError("not refused")


def the_reference_table_holds(accountants: ModuleType, calibration: ModuleType) -> None:
    for (name, adjacency), wanted in REFERENCE.items():
        assert round(accountants.epsilon([event()], 1e-5, name, adjacency), 3) == wanted, (name, adjacency)


def without_sampling_it_is_the_analytic_gaussian(accountants: ModuleType, calibration: ModuleType) -> None:
    for sigma, steps in ((1.5, 1), (10.0, 25)):
        wanted = gaussian_epsilon(sigma / math.sqrt(steps), 1e-5)
        assert wanted - 1e-9 <= accountants.epsilon([event(sigma, 1.0, steps)], 1e-5) <= wanted + 1e-3
        twice = accountants.epsilon([event(2 * sigma, 1.0, steps)], 1e-5, "pld", "replace-one")
        assert wanted - 1e-9 <= twice <= wanted + 1e-3


def both_directions_are_bounded(accountants: ModuleType, calibration: ModuleType) -> None:
    """Never below a lower bound on the truth: the optimistic distribution of dp-accounting, on a finer grid."""
    for sigma, rate, steps in ((1.0, 0.0064, 1000), (0.7, 0.2, 20)):
        low = privacy_loss_distribution.from_gaussian_mechanism(
            sigma, sampling_prob=rate, pessimistic_estimate=False, value_discretization_interval=5e-5
        )
        truth = low.self_compose(steps).get_epsilon_for_delta(1e-5)
        assert accountants.epsilon([event(sigma, rate, steps)], 1e-5) >= truth


WAYS = {
    NeighboringRelation.ADD_OR_REMOVE_ONE: (AdjacencyType.REMOVE, AdjacencyType.ADD),
    NeighboringRelation.REPLACE_ONE: (AdjacencyType.REPLACE,),
}


def a_sampled_step_loses_what_the_library_says(accountants: ModuleType, calibration: ModuleType) -> None:
    """Each way by itself; the library finds one outcome at a time."""
    for sigma, rate in ((1.0, 0.0064), (0.5, 0.04), (0.14, 7e-4), (3.0, 0.5), (20.0, 0.9), (100.0, 1e-5)):
        for relation, directions in WAYS.items():
            grid = accountants._grid((event(sigma, rate, 100),), sensitivity=len(directions))
            ours = accountants.sampled_losses(sigma, rate, grid, relation)
            theirs = privacy_loss_distribution.from_gaussian_mechanism(
                sigma, sampling_prob=rate, value_discretization_interval=grid, neighboring_relation=relation
            )
            assert ours._symmetric is theirs._symmetric
            for direction in ("_pmf_remove", "_pmf_add"):
                mine, right = (vars(found)[direction].to_dense_pmf() for found in (ours, theirs))
                assert (mine.size, mine._lower_loss) == (right.size, right._lower_loss)
                assert np.abs(mine._probs - right._probs).max() < 4e-15 / grid, (sigma, rate, direction)
                assert abs(mine._infinity_mass - right._infinity_mass) < 1e-15
    deltas = accountants.sampled_losses.__globals__["_deltas"]
    for sigma, rate, step in (
        (1.0, 0.0064, 2e-4),
        (0.14, 7e-4, 2e-3),
        (20.0, 0.9, 1e-5),
        (0.2, 1e-9, 2e-4),
        (100.0, 0.9, 3e-4),
    ):
        for direction in AdjacencyType:
            loss = GaussianPrivacyLoss(sigma, sampling_prob=rate, adjacency_type=direction)
            losses = np.arange(-2000, 2000) * step
            found = deltas(losses, loss, sigma)
            assert found.min() >= 0 and found.max() <= 1
            assert np.abs(found - loss.get_delta_for_epsilon(losses)).max() < 2e-14


def rounds_compose_like_one_run(accountants: ModuleType, calibration: ModuleType) -> None:
    whole = accountants.epsilon([event(steps=40)], 1e-5)
    assert accountants.epsilon([event(steps=10)] * 4, 1e-5) == whole
    for other in (event(sigma=2.0), event(rate=0.01), event(20.0, 1.0, 5), event(1.0, 0.0064, 40, 64.0, 217)):
        assert accountants.epsilon([event(steps=40), other], 1e-5) > max(
            whole, accountants.epsilon([other], 1e-5)
        )


def two_mechanisms_compose_as_an_outside_accountant_says(
    accountants: ModuleType, calibration: ModuleType
) -> None:
    """dp-accounting's own accountant, at its own grid, on events composed one round at a time."""
    for other in (event(2.2, 0.02, 10), event(1.1, 0.05, 10)):
        events, theirs = [event(1.1, 0.02, 30)] * 2 + [other], PLDAccountant()
        for one in events:
            sampled = dp_accounting.PoissonSampledDpEvent(
                one.sample_rate, dp_accounting.GaussianDpEvent(one.noise_multiplier)
            )
            theirs.compose(sampled, one.steps)
        assert abs(accountants.epsilon(events, 1e-5) / theirs.get_epsilon(1e-5) - 1) < 1e-3


def events_that_cost_infinity_are_not_forgotten(accountants: ModuleType, calibration: ModuleType) -> None:
    assert accountants.epsilon([event(), event(sigma=0.0, steps=1)], 1e-5) == math.inf
    assert accountants.epsilon([event(steps=0), event(rate=0.0)], 1e-5) == 0.0


def draws_cut_at_their_cap_are_paid(accountants: ModuleType, calibration: ModuleType) -> None:
    """At the mean, a cap makes any noise worthless; twice the mean it is too dear still; far above it is free."""
    free = accountants.epsilon([event(steps=100)], 1e-5)
    for cap in (64, 65, 96, 128):
        assert accountants.epsilon([event(1.0, 0.0064, 100, 64.0, cap)], 1e-5) == math.inf, cap
    capped = accountants.epsilon([event(1.0, 0.0064, 100, 64.0, 140)], 1e-5)
    assert free < capped < free + 1e-5
    # A large epsilon weighs a cut draw by its exponential.
    assert accountants.epsilon([event(0.3, 0.0064, 100, 64.0, 140)], 1e-5) == math.inf
    assert accountants.epsilon([event(0.3, 0.0064, 100)], 1e-5) < 50


def accountants_that_differ_stop_the_run(accountants: ModuleType, calibration: ModuleType) -> None:
    """The second accountant off by 3 % either way; and off by half as much as it may be."""
    right = accountants._prv_epsilon
    for off in (0.97, 1.03):
        accountants._epsilon.cache_clear()
        accountants._prv_epsilon = lambda events, delta, off=off: off * right(events, delta)
        _refused(lambda: accountants.agreed_epsilon([event()], 1e-5))
        _refused(lambda: accountants.agreed_epsilon([event()], 1e-5, "rdp"))
        _refused(lambda: calibration.noise_multiplier(2.0, 1e-5, poisson(64, 10_000), 100))
    accountants._epsilon.cache_clear()
    accountants._prv_epsilon = lambda events, delta: 1.005 * right(events, delta)
    assert accountants.agreed_epsilon([event()], 1e-5) == accountants.epsilon([event()], 1e-5)


def both_accountants_agree(accountants: ModuleType, calibration: ModuleType) -> None:
    for events in ([event()], [event(), event(20.0, 1.0, 20)], [event(1.1, 8e-4, 11)], [event(0.8, 0.2, 50)]):
        assert accountants.agreed_epsilon(events, 1e-5) == accountants.epsilon(events, 1e-5)


def the_clt_accountant_is_unreachable(accountants: ModuleType, calibration: ModuleType) -> None:
    for name in ("gdp", "clt", "GDP"):
        _refused(lambda name=name: accountants.epsilon([event()], 1e-5, name), ConfigError)
        _refused(lambda name=name: accountants.agreed_epsilon([event()], 1e-5, name), ConfigError)
        sampling = poisson(64, 10_000)
        _refused(lambda n=name, s=sampling: calibration.noise_multiplier(8.0, 1e-5, s, 10, n), ConfigError)


def calibrated_noise_keeps_the_budget(accountants: ModuleType, calibration: ModuleType) -> None:
    """Over every event of the budget, and little less noise would not."""
    beside = [event(20.0, 1.0, 10)]
    for target, sampling, others in ((3.0, poisson(64, 10_000), ()), (2.0, poisson(64, 1000), beside)):
        sigma = calibration.noise_multiplier(target, 1e-5, sampling, 10, beside=others)
        for factor, kept in ((1.0, True), (0.995, False)):
            spent = event(factor * sigma, sampling.rate, 10, sampling.expected_batch, sampling.max_draw)
            assert (accountants.epsilon([spent, *others], 1e-5) <= target) == kept, (target, factor)


def a_ruinous_cap_is_not_calibrated(accountants: ModuleType, calibration: ModuleType) -> None:
    cut = Sampling(rate=0.0064, expected_batch=64.0, max_draw=70)
    _refused(lambda: calibration.noise_multiplier(8.0, 1e-5, cut, 10))


def delta_stays_below_one_record(accountants: ModuleType, calibration: ModuleType) -> None:
    calibration.check_delta(0.999e-3, 1000)
    for delta, records in ((1e-3, 1000), (2e-3, 1000), (0.0, 1000), (1e-5, 0)):
        _refused(lambda d=delta, n=records: calibration.check_delta(d, n))
    for delta in (0.0, 1.0, -1e-5, math.nan):
        _refused(lambda d=delta: accountants.epsilon([event()], d))


CHECKS = (
    the_reference_table_holds,
    without_sampling_it_is_the_analytic_gaussian,
    both_directions_are_bounded,
    a_sampled_step_loses_what_the_library_says,
    rounds_compose_like_one_run,
    two_mechanisms_compose_as_an_outside_accountant_says,
    events_that_cost_infinity_are_not_forgotten,
    draws_cut_at_their_cap_are_paid,
    accountants_that_differ_stop_the_run,
    both_accountants_agree,
    the_clt_accountant_is_unreachable,
    calibrated_noise_keeps_the_budget,
    a_ruinous_cap_is_not_calibrated,
    delta_stays_below_one_record,
)
