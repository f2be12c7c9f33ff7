"""The statistics of the audit: bounds that hold as often as they say, and figures of the literature."""

import math

import numpy as np
import pytest
import torch

from fedlora.audit.one_run import _gaussian_epsilon, _p_value, f_dp_bound, one_run_bound
from fedlora.audit.sampler_audit import audit_sampler
from fedlora.audit.step_audit import THRESHOLDS, _above, _mu_lower_bound
from fedlora.audit.trace import reference_sampling
from fedlora.privacy.noise import SeededNoise
from fedlora.privacy.sampling import poisson_draw


def test_the_bound_on_mu_holds_and_is_close_for_gaussians_of_that_mu():
    """200 draws at 90 %: Bonferroni makes it hold nearly always; below 0.8 mu it would be useless."""
    generator = torch.Generator().manual_seed(1)
    for mu in (0.4, 1.0, 2.0):
        thresholds = mu / 2 + np.linspace(-3, 3, THRESHOLDS)
        found = [
            _mu_lower_bound(
                mu + torch.randn(5000, generator=generator),
                torch.randn(50_000, generator=generator),
                thresholds,
                0.1,
            )
            for _ in range(200)
        ]
        assert sum(value > mu for value in found) <= 20
        assert np.median(found) > 0.8 * mu


def test_no_gap_gives_no_bound_and_a_total_gap_a_finite_one():
    generator = torch.Generator().manual_seed(1)
    thresholds = 0.5 + np.linspace(-3, 3, THRESHOLDS)
    x, y = torch.randn(5000, generator=generator), torch.randn(5000, generator=generator)
    assert _mu_lower_bound(x, y, thresholds, 0.01) == 0
    assert _mu_lower_bound(torch.full((5000,), 50.0), torch.zeros(5000), thresholds, 0.01) == pytest.approx(
        5.9, abs=0.1
    )
    assert _mu_lower_bound(torch.zeros(0), y, thresholds, 0.01) == 0


def test_counts_above_thresholds_are_those_of_a_loop():
    values = torch.randn(500, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    thresholds = np.linspace(-2, 2, THRESHOLDS)
    assert _above(values, thresholds).tolist() == [int((values > t).sum()) for t in thresholds]


@pytest.mark.parametrize(
    ("canaries", "guesses", "ceiling"),
    [(1000, 100, 3.47), (1000, 1000, 5.78), (10_000, 10_000, 7.83), (20_000, 20_000, 8.20)],
)
def test_the_one_run_ceilings_are_the_known_ones(canaries, guesses, ceiling):
    assert one_run_bound(canaries, guesses, guesses, 1e-5, 0.05) == pytest.approx(ceiling, abs=0.01)


def test_without_delta_the_one_run_p_value_is_a_binomial_tail():
    accuracy = math.exp(1) / (1 + math.exp(1))
    tail = sum(math.comb(20, k) * accuracy**k * (1 - accuracy) ** (20 - k) for k in range(17, 21))
    assert _p_value(100, 20, 17, 1.0, 0.0) == pytest.approx(tail, rel=1e-9)
    assert _p_value(100, 20, 17, 1.0, 1e-3) > tail


def test_the_one_run_bound_holds_for_randomised_response_at_its_own_epsilon():
    """Randomised response meets the binomial with equality: 95 % bounds pass epsilon in 5 % of trials."""
    rng, value = np.random.default_rng(3), 1.5
    correct = rng.binomial(200, 1 / (1 + math.exp(-value)), size=400)
    bounds = {int(c): one_run_bound(200, 200, int(c), 0.0, 0.05) for c in set(correct.tolist())}
    over = sum(bounds[int(c)] > value for c in correct)
    assert over <= 400 * 0.05 + 4 * math.sqrt(400 * 0.05 * 0.95)


def test_guesses_no_better_than_a_coin_bound_nothing():
    assert one_run_bound(1000, 100, 50, 1e-5, 0.05) == 0
    assert f_dp_bound(1000, 100, 50, 1e-5, 0.05) == 0


def test_the_f_dp_ceilings_are_the_known_ones():
    assert f_dp_bound(1000, 100, 100, 1e-5, 0.05) == pytest.approx(5.55, abs=0.02)
    assert f_dp_bound(1000, 1000, 1000, 1e-5, 0.05) == pytest.approx(12.33, abs=0.02)


def test_the_f_dp_bound_holds_for_gaussians_of_that_mu():
    """One Gaussian a canary, the clearest tenth guessed: 95 % bounds are over in at most 5 % of 200 trials."""
    rng, mu, m = np.random.default_rng(4), 1.0, 400
    wanted, over = _gaussian_epsilon(mu, 1e-5), 0
    for _ in range(200):
        included = rng.random(m) < 0.5
        scores = np.where(included, mu, 0.0) + rng.standard_normal(m)
        order = scores.argsort()
        correct = int((~included[order[:20]]).sum() + included[order[-20:]].sum())
        over += f_dp_bound(m, 40, correct, 1e-5, 0.05) > wanted
    assert over <= 200 * 0.05 + 4 * math.sqrt(200 * 0.05 * 0.95)


def test_the_gaussian_epsilon_is_the_analytic_one():
    """At sigma 1 and delta 1e-5, 4.3777 (Balle and Wang 2018)."""
    assert _gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.3777, abs=1e-3)


def fixed_size(records, sampling, source, purpose):
    return source.uniform(records, purpose=purpose).argsort()[: round(records * sampling.rate)]


def the_same_batches_each_epoch(records, sampling, source, purpose):
    batches = round(1 / sampling.rate)
    order = source.uniform(records, purpose=("once",)).argsort()
    return order.tensor_split(batches)[purpose[-1] % batches]


def records_in_pairs(records, sampling, source, purpose):
    half = poisson_draw(records // 2, sampling, source, purpose)
    return torch.cat([half, half + records // 2])


def three_per_cent_too_often(records, sampling, source, purpose):
    return torch.nonzero(source.uniform(records, purpose=purpose) < 1.03 * sampling.rate).flatten()


def test_the_sampler_passes_over_twenty_seeds():
    scores = [audit_sampler(poisson_draw, reference_sampling(), SeededNoise(seed)) for seed in range(20)]
    assert not any(score.refuted for score in scores)
    for name in scores[0].scores:  # and the scores are standard: their spread is 1 within four deviations
        spread = np.std([score.scores[name] for score in scores], ddof=1)
        assert abs(spread - 1) < 4 / math.sqrt(2 * 19)


@pytest.mark.parametrize(
    ("counterfeit", "score"),
    [
        (fixed_size, "batch size"),
        (the_same_batches_each_epoch, "next epoch"),
        (records_in_pairs, "batch size"),
        (three_per_cent_too_often, "rate"),
    ],
)
def test_counterfeits_of_the_sampler_are_refuted(counterfeit, score):
    found = audit_sampler(counterfeit, reference_sampling(), SeededNoise(1))
    assert found.refuted and abs(found.scores[score]) > 4
