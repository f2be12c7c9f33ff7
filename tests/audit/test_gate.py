"""The gate: what is shipped passes at epsilon 1, 3 and 8, and each broken implementation turns it red.

One fixed seed: every number below is reproduced bit for bit on one kind of machine. Ten broken implementations take a
minute or so of one core at each epsilon: at two of the three they are for `make slow`.
"""

from functools import lru_cache

import pytest

from fedlora.audit.audit import AuditResult, Verdict, attacked, audit, claim_of
from fedlora.audit.mutations import broken
from fedlora.audit.trace import Implementation
from fedlora.privacy.noise import OsEntropyNoise
from fedlora.privacy.opacus_engine import OpacusEngine
from tests.lanes import mostly_slow

CLAIMS = (1.0, 3.0, 8.0)
DELTA = 1e-5
# What refutes each one; for steps the test that sees most of it.
CAUGHT_BY = {
    "no noise": "joint",
    "noise divided by the batch once too often": "joint",
    "clip off": "joint",
    "per-layer clip with the same bound": "joint",
    "noise halved": "joint",
    "noise 20 % short": "joint",
    "same noise each step": "step differences",
    "one layer without noise": "layer 3",
    "shuffled instead of Poisson": "sampler",
    "same noise at each client": "client differences",
}


@lru_cache
def result(claimed: float) -> AuditResult:
    return audit(claim_of(claimed, DELTA, 1.0), seed=1)


@pytest.mark.parametrize("claimed", CLAIMS)
def test_what_is_shipped_passes_and_the_bound_is_sharp(claimed):
    found = audit(claim_of(claimed, DELTA, 1.0), seed=1, power=False)
    assert found.verdict is Verdict.NO_VIOLATION
    # 0.81 to 0.92 of the claim over eight seeds; Clopper-Pearson over 49 thresholds costs the rest.
    assert 0.75 * claimed < found.tiers.step.lower_bound < 0.97 * claimed
    assert all(mu < found.tiers.step.claimed_mu for mu in found.tiers.step.mu.values())
    assert 0 < found.tiers.one_run.lower_bound < found.tiers.one_run.f_dp < claimed


@pytest.mark.parametrize("claimed", mostly_slow(CLAIMS, 3.0))
def test_what_is_shipped_passes_where_everything_broken_does_not(claimed):
    assert result(claimed).verdict is Verdict.NO_VIOLATION


@pytest.mark.parametrize("claimed", mostly_slow(CLAIMS, 3.0))
@pytest.mark.parametrize("name", CAUGHT_BY)
def test_a_broken_implementation_is_refuted_by_the_test_made_for_it(claimed, name):
    red = result(claimed)
    tiers = red.power[name]
    by = CAUGHT_BY[name]
    if by == "sampler":
        assert "sampler" in tiers.refuting(red.claim) and tiers.sampler.worst == "next step"
    else:
        assert "step" in tiers.refuting(red.claim) and tiers.step.worst == by
        assert not tiers.sampler.refuted


@pytest.mark.parametrize("claimed", mostly_slow(CLAIMS, 3.0))
def test_the_power_table_has_every_broken_implementation(claimed):
    assert (
        set(result(claimed).power) == set(CAUGHT_BY) == {mutant.name for mutant in broken(Implementation())}
    )


@pytest.mark.parametrize("claimed", mostly_slow(CLAIMS, 3.0))
def test_shuffled_batches_are_invisible_to_every_canary(claimed):
    """Which is why the sampler has a tier of its own."""
    assert result(claimed).power["shuffled instead of Poisson"].refuting(result(claimed).claim) == (
        "sampler",
    )


def test_the_bound_and_the_units_of_the_gradient_cancel():
    """Everything is told in units of max_grad_norm, so another one changes rounding only."""
    small, one = claim_of(3.0, DELTA, 2.0**-7), result(3.0)
    tiers = attacked(Implementation(), small, seed=1)
    assert tiers.step.mu == pytest.approx(one.tiers.step.mu, abs=1e-3)


def test_the_oracle_engine_passes_with_the_same_figures():
    tiers = attacked(Implementation(engine=OpacusEngine()), claim_of(3.0, DELTA, 1.0), seed=1)
    assert tiers.step.mu == pytest.approx(result(3.0).tiers.step.mu, abs=1e-3)


def test_noise_and_draws_from_the_operating_system_pass_too():
    secret = Implementation(noise=lambda seed: OsEntropyNoise())
    assert audit(claim_of(3.0, DELTA, 1.0), 1, secret, power=False).verdict is Verdict.NO_VIOLATION
