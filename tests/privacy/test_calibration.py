"""The calibrated noise keeps the budget, and little less of it would not."""

import math

import pytest

from fedlora.errors import ConfigError, PrivacyError
from fedlora.privacy.accountants import agreed_epsilon, epsilon
from fedlora.privacy.calibration import check_delta, noise_multiplier
from fedlora.privacy.sampling import poisson
from fedlora.privacy.step import spent
from fedlora.values import DpEvent, Mechanism, Sampling

SETTINGS = [
    (8.0, 1e-5, 64 / 2000, 120),
    (1.0, 1e-6, 0.00128, 5000),
    (0.1, 1e-5, 0.01, 1000),
    (8.0, 1e-5, 1.0, 120),
    (0.5, 1e-7, 0.3, 1),
]


def at(rate):
    """Draws of 100 of 100 / rate records, capped as every run's are."""
    return Sampling(rate=rate, expected_batch=100.0, max_draw=poisson(100, 1000).max_draw)


def calibrated(target, delta, rate, steps, *accountant, **more):
    return noise_multiplier(target, delta, at(rate), steps, *accountant, **more)


def event(setting, sigma):
    _, _, rate, steps = setting
    return spent(Mechanism(max_grad_norm=2.0, noise_multiplier=sigma), at(rate), steps)


def spends(setting, sigma, accountant, *beside):
    return epsilon([event(setting, sigma), *beside], setting[1], accountant)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_the_noise_is_enough_and_hardly_more(setting, accountant):
    sigma = calibrated(*setting, accountant)
    assert spends(setting, sigma, accountant) <= setting[0] < spends(setting, sigma * 0.997, accountant)


def test_prv_calibrates_too():
    setting = (3.0, 1e-5, 0.0064, 1000)
    sigma = calibrated(*setting, "prv")
    assert spends(setting, sigma, "prv") <= 3.0 < spends(setting, sigma * 0.997, "prv")


def test_a_generous_target_ends_at_some_noise():
    setting = (200.0, 1e-5, 0.01, 1)
    sigma = calibrated(*setting, "rdp")
    assert sigma > 0 and spends(setting, sigma, "rdp") <= 200


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_no_noise_is_calibrated_that_no_second_accountant_can_confirm(accountant):
    uncut = Sampling(rate=0.5, expected_batch=100.0, max_draw=10**6)
    with pytest.raises(PrivacyError, match=r"beyond 300.*lower privacy\.target_epsilon"):
        noise_multiplier(1000.0, 1e-5, uncut, 10, accountant)


def test_what_is_released_beside_training_is_paid_from_the_same_budget():
    setting = (8.0, 1e-5, 0.06, 20)
    evaluation = DpEvent(noise_multiplier=20.0, sample_rate=1.0, steps=20)
    alone, together = calibrated(*setting), calibrated(*setting, beside=[evaluation])
    assert together > alone
    assert (
        spends(setting, together, "pld", evaluation)
        <= 8.0
        < spends(setting, together * 0.997, "pld", evaluation)
    )
    assert spends(setting, alone, "pld", evaluation) > 8.0
    greedy = DpEvent(noise_multiplier=0.5, sample_rate=1.0, steps=20)
    with pytest.raises(PrivacyError, match=r"beside training cost epsilon .* all of the 8\.0"):
        calibrated(*setting, beside=[greedy])


def test_a_cap_that_cuts_draws_cannot_be_calibrated():
    """No noise makes up for draws cut at their mean: the event knows, so the search ends in a refusal."""
    with pytest.raises(PrivacyError, match="at most 100 records a step"):
        noise_multiplier(8.0, 1e-5, Sampling(rate=0.05, expected_batch=100.0, max_draw=100), 20)


def test_whatever_is_calibrated_has_been_agreed_upon():
    for setting in SETTINGS[:3]:
        sigma = calibrated(*setting)
        assert agreed_epsilon([event(setting, sigma)], setting[1]) <= setting[0]


def test_what_no_noise_can_keep_is_refused():
    with pytest.raises(
        PrivacyError, match=r"no noise multiplier up to 10000.*raise privacy\.target_epsilon"
    ) as refused:
        calibrated(1e-5, 1e-9, 1.0, 10**6)
    assert refused.value.exit_status == 3


@pytest.mark.parametrize(
    "wrong",
    [
        (0.0, 1e-5, 0.1, 1),
        (math.inf, 1e-5, 0.1, 1),
        (math.nan, 1e-5, 0.1, 1),
        (1.0, 0.0, 0.1, 1),
        (1.0, 1.0, 0.1, 1),
        (1.0, 1e-5, 0.1, 0),
    ],
)
def test_nonsense_is_refused(wrong):
    with pytest.raises(PrivacyError):
        calibrated(*wrong)


def test_the_clt_accountant_cannot_calibrate():
    with pytest.raises(ConfigError, match="pld, prv or rdp"):
        calibrated(8.0, 1e-5, 0.01, 100, "gdp")


def test_delta_must_lie_below_one_record():
    check_delta(9.9e-4, 1000)
    for delta, records in ((1e-3, 1000), (2e-3, 1000), (0.0, 10), (1e-5, 0), (math.nan, 10)):
        with pytest.raises(PrivacyError, match="target_delta"):
            check_delta(delta, records)
