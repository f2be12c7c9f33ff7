"""Canaries get through the real engine exactly the gradient they ask for, and the real clip takes it to C."""

import math

import pytest
import torch

from fedlora.audit.canaries import CANARIES, LAYERS, OVERSHOOT, REAL_RECORDS, client
from fedlora.audit.mutations import broken
from fedlora.audit.trace import Implementation, reference_sampling, traced
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.values import Mechanism

BOUND = 0.3


def gradient(record, bound):
    one = client("one", BOUND, 5)
    return one, DirectEngine().clipped_sum(one.model, one.trained, one.losses(torch.tensor([record])), bound)


def norm(tensors):
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def test_the_gradient_of_a_canary_is_its_direction_far_above_the_bound():
    one, whole = gradient(REAL_RECORDS + 3, None)
    canary = int(one.included[3])
    for name, directions in one.directions.items():
        assert torch.allclose(whole[name].float(), OVERSHOOT * BOUND * directions[canary], atol=1e-6)
    assert norm(whole) == pytest.approx(OVERSHOOT * BOUND, rel=1e-5)


def test_a_canary_has_equal_mass_in_every_layer_and_is_clipped_to_the_bound():
    _, clipped = gradient(REAL_RECORDS, BOUND)
    assert norm(clipped) == pytest.approx(BOUND, rel=1e-6)
    for total in clipped.values():
        assert float(total.norm()) == pytest.approx(BOUND / math.sqrt(LAYERS), rel=1e-5)


def test_real_records_are_below_and_above_the_bound():
    one = client("one", BOUND, 5)
    norms = [
        norm(DirectEngine().clipped_sum(one.model, one.trained, one.losses(torch.tensor([i])), None))
        for i in range(200)
    ]
    assert sum(n > BOUND for n in norms) > 10 and sum(n < BOUND for n in norms) > 10


def test_each_canary_is_in_with_probability_one_half():
    held = [len(client(name, BOUND, 5).included) for name in ("one", "two", "three", "four")]
    assert len(set(held)) > 1
    assert abs(sum(held) / (4 * CANARIES) - 0.5) < 4.5 * 0.5 / math.sqrt(4 * CANARIES)


def test_clients_share_nothing():
    one, two = client("one", BOUND, 5), client("two", BOUND, 5)
    first, second = (next(iter(c.directions.values()))[0].flatten() for c in (one, two))
    cosine = float(first @ second) / float(first.norm() * second.norm())
    assert not torch.equal(one.inputs, two.inputs) and abs(cosine) < 5 / math.sqrt(len(first))


def test_the_clip_by_layer_gives_each_layer_the_whole_bound():
    """The mutant is the bug it is named after: joint norm sqrt(layers) C."""
    mutant = next(m for m in broken(Implementation()) if m.name.startswith("per-layer"))
    one = client("one", BOUND, 5)
    sums = mutant.engine.clipped_sum(one.model, one.trained, one.losses(torch.tensor([REAL_RECORDS])), BOUND)
    assert norm(sums) == pytest.approx(BOUND * math.sqrt(LAYERS), rel=1e-5)
    assert all(parameter.requires_grad for parameter in one.trained.values())


def test_the_reference_rate_is_what_the_production_constructor_gives():
    sampling = reference_sampling()
    assert sampling.rate == 0.05 and sampling.expected_batch == 125 and sampling.max_draw > 300


def test_equal_seeds_give_equal_traces_and_other_seeds_do_not():
    mechanism = Mechanism(max_grad_norm=BOUND, noise_multiplier=1.0)
    first, again, other = (
        traced(Implementation(), mechanism, reference_sampling(), seed) for seed in (3, 3, 4)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.projections, again.projections, strict=True))
    assert not torch.equal(first.projections[0], other.projections[0])
