"""The calibrated noise keeps the budget, and little less of it would not."""

import math

import pytest

from fedlora.errors import ConfigError, PrivacyError
from fedlora.privacy.accountants import epsilon
from fedlora.privacy.calibration import check_delta, noise_multiplier
from fedlora.values import DpEvent

SETTINGS = [
    (8.0, 1e-5, 64 / 2000, 120),
    (1.0, 1e-6, 0.00128, 5000),
    (0.1, 1e-5, 0.01, 1000),
    (8.0, 1e-5, 1.0, 120),
    (0.5, 1e-7, 0.3, 1),
]


def spends(setting, sigma, accountant):
    _, delta, rate, steps = setting
    return epsilon([DpEvent(noise_multiplier=sigma, sample_rate=rate, steps=steps)], delta, accountant)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_the_noise_is_enough_and_hardly_more(setting, accountant):
    sigma = noise_multiplier(*setting, accountant)
    assert spends(setting, sigma, accountant) <= setting[0] < spends(setting, sigma * 0.997, accountant)


def test_prv_calibrates_too():
    setting = (3.0, 1e-5, 0.0064, 1000)
    sigma = noise_multiplier(*setting, "prv")
    assert spends(setting, sigma, "prv") <= 3.0 < spends(setting, sigma * 0.997, "prv")


def test_a_generous_target_ends_at_some_noise():
    sigma = noise_multiplier(1e6, 1e-5, 0.01, 1, "rdp")
    assert sigma > 0 and spends((1e6, 1e-5, 0.01, 1), sigma, "rdp") <= 1e6


def test_what_no_noise_can_keep_is_refused():
    with pytest.raises(
        PrivacyError, match=r"no noise multiplier up to 10000.*raise privacy\.target_epsilon"
    ) as refused:
        noise_multiplier(1e-5, 1e-9, 1.0, 10**6)
    assert refused.value.exit_status == 3


@pytest.mark.parametrize(
    "wrong",
    [
        (0.0, 1e-5, 0.1, 1),
        (math.inf, 1e-5, 0.1, 1),
        (math.nan, 1e-5, 0.1, 1),
        (1.0, 0.0, 0.1, 1),
        (1.0, 1.0, 0.1, 1),
        (1.0, 1e-5, 0.0, 1),
        (1.0, 1e-5, 1.5, 1),
        (1.0, 1e-5, 0.1, 0),
    ],
)
def test_nonsense_is_refused(wrong):
    with pytest.raises(PrivacyError):
        noise_multiplier(*wrong)


def test_the_clt_accountant_cannot_calibrate():
    with pytest.raises(ConfigError, match="pld, prv or rdp"):
        noise_multiplier(8.0, 1e-5, 0.01, 100, "gdp")


def test_delta_must_lie_below_one_record():
    check_delta(9.9e-4, 1000)
    for delta, records in ((1e-3, 1000), (2e-3, 1000), (0.0, 10), (1e-5, 0), (math.nan, 10)):
        with pytest.raises(PrivacyError, match="target_delta"):
            check_delta(delta, records)
