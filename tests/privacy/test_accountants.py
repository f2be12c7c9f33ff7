"""Epsilon is an upper bound, agrees between libraries, and has the right limits."""

import json
import math
import random
import subprocess
import sys
from dataclasses import asdict

import pytest

from fedlora.errors import ConfigError, PrivacyError
from fedlora.privacy.accountants import agreed_epsilon, composition, epsilon
from fedlora.privacy.sampling import poisson
from fedlora.privacy.step import spent
from fedlora.values import Mechanism

from .account_checks import REFERENCE, event, gaussian_epsilon


@pytest.mark.parametrize(("accountant", "adjacency"), REFERENCE)
def test_the_reference_table(accountant, adjacency):
    """10,000 records, 64 expected, sigma 1, 1000 steps, delta 1e-5; the cap that every run has is free."""
    capped = spent(Mechanism(max_grad_norm=1.0, noise_multiplier=1.0), poisson(64, 10_000), 1000)
    for one in (event(), capped):
        assert round(epsilon([one], 1e-5, accountant, adjacency), 3) == REFERENCE[accountant, adjacency]
    assert (
        epsilon([capped], 1e-5, accountant, adjacency) - epsilon([event()], 1e-5, accountant, adjacency)
        < 1e-5
    )


def _random_setting(number):
    """One training event, in a third of the settings an evaluation of every record beside it; and a delta."""
    draw = random.Random(number)

    def between(least, most):
        return math.exp(draw.uniform(math.log(least), math.log(most)))

    events = [event(between(0.6, 4), between(3e-4, 0.2), round(between(1, 5000)))]
    if number % 3 == 0:
        events.append(event(between(5, 500), 1.0, round(between(1, 50))))
    return events, 10.0 ** draw.uniform(-7, -4)


def _agree(number):
    events, delta = _random_setting(number)
    pld, prv, rdp = (epsilon(events, delta, accountant) for accountant in ("pld", "prv", "rdp"))
    assert pld >= prv - (0.01 + 0.01 * pld), (events, delta)
    # PRV adds its own error to its answer: 0.01, or a tenth of that where epsilon is small.
    assert abs(prv - pld) <= 0.05 * pld + 0.0011, (events, delta)
    assert rdp >= pld - 1e-3, (events, delta)
    assert [agreed_epsilon(events, delta, name) for name in ("pld", "prv", "rdp")] == [pld, prv, rdp]


@pytest.mark.parametrize("first", range(0, 20, 10))
def test_pld_and_prv_agree_and_rdp_lies_above(first):
    for number in range(first, first + 10):
        _agree(number)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(20, 200, 20))
def test_pld_and_prv_agree_and_rdp_lies_above_in_the_rest_of_200_settings(first):
    for number in range(first, first + 20):
        _agree(number)


@pytest.mark.parametrize("sigma", [0.5, 0.35])
def test_an_epsilon_beyond_the_second_accountant_is_refused_in_words(sigma):
    with pytest.raises(PrivacyError, match=r"beyond 300.*lower privacy\.target_epsilon"):
        agreed_epsilon([event(sigma, 0.5, 3000)], 1e-5)


def test_no_noise_is_agreed_to_be_infinite_and_no_event_to_be_free():
    assert agreed_epsilon([event(sigma=0.0)], 1e-5) == math.inf
    assert agreed_epsilon([], 1e-5) == agreed_epsilon([event(steps=0)], 1e-5) == 0.0


def test_a_fresh_process_that_reloads_the_events_gives_the_same_epsilon():
    events = [event(0.1 + 0.7, 0.0123456789, 7), event(steps=40), event(20.0, 1.0, 5)]
    code = (
        "import json, sys; from fedlora.privacy.accountants import epsilon; from fedlora.values import DpEvent; "
        "print(repr(epsilon([DpEvent(**one) for one in json.load(sys.stdin)], 1e-5)))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps([asdict(one) for one in events]),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(told.stdout) == epsilon(events, 1e-5)


@pytest.mark.parametrize("cap", [96, 128, 140, 280])
def test_what_a_cap_costs_is_bounded_from_above(cap):
    """Against dp-accounting's exact law of a truncated draw: far above the mean both are finite, and ours more."""
    from dp_accounting.pld import privacy_loss_distribution

    ours = epsilon([event(1.0, 0.0064, 100, 64.0, cap)], 1e-5)
    single = privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(10_000, 0.0064, cap, 1.0)
    theirs = single.self_compose(100).get_epsilon_for_delta(1e-5)
    assert ours == math.inf if cap < 140 else theirs <= ours <= theirs + 1e-4
    assert math.isfinite(theirs)


@pytest.mark.parametrize("sigma", [1.5, 10.0])
@pytest.mark.parametrize("steps", [1, 25])
def test_without_sampling_it_is_the_analytic_gaussian(sigma, steps):
    wanted = gaussian_epsilon(sigma / math.sqrt(steps), 1e-5)
    got = epsilon([event(sigma, 1.0, steps)], 1e-5)
    assert wanted - 1e-9 <= got <= wanted + 1e-3
    swapped = epsilon([event(sigma, 1.0, steps)], 1e-5, adjacency="replace-one")
    assert swapped == pytest.approx(gaussian_epsilon(sigma / math.sqrt(steps) / 2, 1e-5), abs=2e-3, rel=1e-4)


@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
def test_limits(accountant):
    assert epsilon([], 1e-5, accountant) == 0.0
    assert epsilon([event(steps=0), event(rate=0.0)], 1e-5, accountant) == 0.0
    assert epsilon([event(sigma=0.0, rate=0.0)], 1e-5, accountant) == 0.0
    assert epsilon([event(), event(sigma=0.0, steps=1)], 1e-5, accountant) == math.inf
    assert 0 <= epsilon([event(sigma=1e4, steps=1)], 1e-5, accountant) < 0.2
    assert (
        epsilon([event(sigma=0.02, rate=0.5)], 1e-5, accountant) > 1e4
    )  # absurd, but an answer within seconds


@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
def test_rounds_compose_like_one_run(accountant):
    whole = epsilon([event(steps=40)], 1e-5, accountant)
    assert epsilon([event(steps=10)] * 4, 1e-5, accountant) == whole
    mixed = [event(steps=10), event(sigma=2.0, steps=5), event(steps=30)]
    assert epsilon(mixed, 1e-5, accountant) == epsilon(mixed[::-1], 1e-5, accountant) > whole
    assert len(composition(mixed)) == 2


def test_it_grows_with_rate_and_steps_and_falls_with_noise_and_delta():
    def of(**changes):
        delta = changes.pop("delta", 1e-5)
        return epsilon([event(**changes)], delta)

    assert of(sigma=2.0) < of(sigma=1.0) < of(sigma=0.8)
    assert of(rate=0.003) < of(rate=0.0064) < of(rate=0.01)
    assert of(steps=10) < of(steps=1000) < of(steps=2000)
    assert of(delta=1e-4) < of(delta=1e-5) < of(delta=1e-6)
    assert epsilon([event()], 1e-5, adjacency="replace-one") > of()


@pytest.mark.parametrize("name", ["gdp", "clt", "GDP", "", "moments"])
def test_the_clt_accountant_cannot_be_reached(name):
    with pytest.raises(ConfigError, match="pld, prv or rdp"):
        epsilon([event()], 1e-5, name)


def test_nonsense_is_refused():
    with pytest.raises(ConfigError, match="adjacency"):
        epsilon([event()], 1e-5, "pld", "user-level")
    with pytest.raises(ConfigError, match="replace-one"):
        epsilon([event()], 1e-5, "rdp", "replace-one")
    for delta in (0.0, 1.0, -1e-5, math.nan):
        with pytest.raises(PrivacyError, match="delta"):
            epsilon([event()], delta)
    for wrong in (
        {"sigma": -1.0},
        {"sigma": math.nan},
        {"sigma": math.inf},
        {"rate": 1.1},
        {"steps": -1},
        {"steps": 0.5},
        {"mean": 64.0},
        {"cap": 64},
        {"mean": math.inf, "cap": 64},
    ):
        with pytest.raises(PrivacyError, match="no event"):
            epsilon([event(**wrong)], 1e-5)
