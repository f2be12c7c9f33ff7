import pytest

from fedlora.config.schema import RunConfig
from fedlora.errors import PrivacyError
from fedlora.privacy.accountants import epsilon, whole_order_epsilon
from fedlora.privacy.calibration import noise_multiplier
from fedlora.privacy.sampling import poisson
from fedlora.runtime.check.rough_epsilon import rough_epsilon
from fedlora.runtime.check.rough_noise import rough_noise
from fedlora.values import DpEvent

RUNS = {
    "a usual run": [(0.46, 64 / 8000, 120)],
    "few records": [(1.8, 16 / 300, 50)],
    "many records, hardly any noise": [(0.14, 64 / 90_000, 20)],
    "all records in each step": [(4.3, 1.0, 50)],
    "nearly all": [(10.0, 0.9, 1000)],
    "one step of half of them": [(0.5, 0.5, 1)],
    "strong noise": [(23.0, 16 / 300, 50)],
    "many steps": [(64.0, 0.05, 100_000)],
    "few steps, hardly any noise": [(0.082, 0.00195, 10)],
    "three": [(0.06, 0.005, 3)],
    "scores told beside": [(40.0, 1.0, 3), (0.8, 0.1, 6)],
}


@pytest.mark.parametrize("steps", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("delta", [1e-5, 1e-7])
def test_epsilon_is_that_of_the_accountant(steps, delta):
    events = [DpEvent(noise_multiplier=sigma, sample_rate=rate, steps=times) for sigma, rate, times in steps]
    assert rough_epsilon(events, delta, "pld") == pytest.approx(epsilon(events, delta, "pld"), rel=0.006)
    assert rough_epsilon(events, delta, "rdp") == whole_order_epsilon(events, delta)


def test_epsilon_is_nothing_or_endless_where_it_is():
    assert rough_epsilon([DpEvent(noise_multiplier=1e4, sample_rate=1e-4, steps=1)], 1e-3, "pld") < 1e-6
    assert rough_epsilon([DpEvent(noise_multiplier=0.01, sample_rate=1.0, steps=100)], 1e-5, "pld") > 1e4


def given(config, **changes) -> RunConfig:
    return config(federation__batch_size=64, federation__local_steps=10, **changes)


@pytest.mark.parametrize("target", [0.3, 1.0, 8.0, 40.0])
@pytest.mark.parametrize("records", [300, 8000])
def test_noise_is_that_of_the_run_rounded_up(tiny_config, target, records):
    config = given(tiny_config, privacy__target_epsilon=target, privacy__max_participations=12)
    ours = rough_noise(config, config.privacy, records)
    theirs = noise_multiplier(target, 1e-5, poisson(64, records), 120)
    assert theirs <= ours <= 1.1 * theirs


def test_what_no_noise_can_keep_is_told_with_its_mend(tiny_config):
    config = given(tiny_config, privacy__target_epsilon=1e-6)
    with pytest.raises(PrivacyError, match=r"no noise keeps privacy\.target_epsilon 1e-06 over 30 steps"):
        rough_noise(config, config.privacy, 300)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("noise", [1e-200, 1e-6, 0.1, 1.0])
def test_scores_that_cost_more_than_all_are_named(tiny_config, noise):
    config = given(tiny_config, privacy__target_epsilon=3.0, privacy__evaluation_noise=noise)
    with pytest.raises(
        PrivacyError, match=r"privacy\.evaluation_noise .*: the scores of 3 participations cost"
    ):
        rough_noise(config, config.privacy, 300)


def test_scores_that_say_nothing_cost_nothing(tiny_config):
    config = given(tiny_config)
    silent = given(tiny_config, privacy__evaluation_noise=1e300)
    assert rough_noise(silent, silent.privacy, 300) == rough_noise(config, config.privacy, 300)
