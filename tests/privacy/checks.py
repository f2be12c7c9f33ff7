"""The promises of the private step, as functions of an implementation, so that broken ones can fail them.

`room` has the attributes DirectEngine, private_gradient, poisson_draw, SeededNoise and clipped_sum.
"""

import math
from typing import Any

import torch
from torch import nn

from fedlora.errors import PrivacyError
from fedlora.values import Mechanism

from .models import perceptron, trainable

BOUND, SIGMA, EXPECTED = 0.5, 1.3, 16.0
QUIET = Mechanism(max_grad_norm=BOUND, noise_multiplier=1e-12, sample_rate=0.1)
LOUD = Mechanism(max_grad_norm=BOUND, noise_multiplier=SIGMA, sample_rate=0.1)


def _step(
    room: Any, case: Any, of: Any = None, *, mechanism: Any = LOUD, step: int = 0, size: int | None = None
) -> Any:
    return room.private_gradient(
        room.DirectEngine(), case.model, case.trained, case.micro_batches(size, of),
        mechanism=mechanism, expected_batch=EXPECTED, noise=room.SeededNoise(7), purpose=("noise", step),
    )  # fmt: skip


def _norm(tensors: Any) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors.values()]).sum().sqrt())


def _wide() -> Any:
    """A model of two tensors of 1e6 and 6e5 numbers, whose draws are always empty."""
    model = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 600, bias=False))
    return type("Empty", (), {"model": model, "trained": trainable(model), "micro_batches": lambda *_: []})()


def neighbours_differ_by_at_most_the_bound(room: Any) -> None:
    """200 random pairs of data sets that differ by one record; every second model has huge gradients."""
    for pair in range(200):
        case = perceptron(seed=pair, records=5, scale=1.0 if pair % 2 else 100.0)
        gone = pair % case.records
        rest = torch.tensor([i for i in range(case.records) if i != gone])
        whole, without = _step(room, case, mechanism=QUIET), _step(room, case, rest, mechanism=QUIET)
        difference = {name: EXPECTED * (whole[name].double() - without[name].double()) for name in whole}
        assert _norm(difference) <= BOUND * (1 + 1e-5), pair


def a_non_finite_record_is_as_good_as_absent(room: Any) -> None:
    case = perceptron(records=6)
    rest = _step(room, case, torch.arange(1, 6), mechanism=QUIET)
    for poison in (math.nan, math.inf):
        factor = torch.tensor([poison, 1, 1, 1, 1, 1])
        poisoned = room.private_gradient(
            room.DirectEngine(), case.model, case.trained,
            [lambda f=factor: case.losses(torch.arange(6)) * f],
            mechanism=QUIET, expected_batch=EXPECTED, noise=room.SeededNoise(7), purpose=("noise", 0),
        )  # fmt: skip
        assert all(torch.allclose(poisoned[name], rest[name], rtol=1e-5, atol=1e-7) for name in rest)


def an_empty_draw_carries_the_full_noise_in_every_tensor(room: Any) -> None:
    """Variance within 1 % of (sigma C / expected batch)^2 in each tensor: over five standard deviations."""
    released = _step(room, _wide())
    for name, value in released.items():
        variance = float(value.double().square().mean()) / (SIGMA * BOUND / EXPECTED) ** 2
        assert abs(variance - 1) < 0.01, (name, variance)


def a_full_draw_carries_the_full_noise(room: Any) -> None:
    """The noise on top of the same records: 600 steps of 63 numbers, so 3 % is four standard deviations."""
    case = perceptron(records=3)
    still = _step(room, case, mechanism=QUIET)
    steps = [_step(room, case, step=step) for step in range(600)]
    noise = torch.cat([(noisy[name] - still[name]).flatten() for noisy in steps for name in still])
    variance = float(noise.double().square().mean())
    assert abs(variance / (SIGMA * BOUND / EXPECTED) ** 2 - 1) < 0.03


def the_divisor_does_not_depend_on_the_draw(room: Any) -> None:
    """The same record once, three times and 48 times: its sum grows, the divisor stays."""
    case = perceptron(records=3)
    one = _step(room, case, torch.tensor([1]), mechanism=QUIET)
    for times in (3, 48):
        many = _step(room, case, torch.full((times,), 1), mechanism=QUIET)
        for name, value in one.items():
            assert torch.allclose(many[name], times * value, rtol=1e-4, atol=1e-7)


def one_clipped_record_has_the_norm_of_the_bound(room: Any) -> None:
    case = perceptron(scale=100.0, seed=2)
    huge = _step(
        room,
        case,
        torch.tensor([0]),
        mechanism=Mechanism(max_grad_norm=1e-3, noise_multiplier=1e-12, sample_rate=1.0),
    )
    assert abs(_norm(huge) * EXPECTED / 1e-3 - 1) < 1e-5


def microbatches_change_nothing(room: Any) -> None:
    case = perceptron(records=9)
    whole = _step(room, case, mechanism=QUIET)
    for size in (1, 2, 4):
        parts = _step(room, case, mechanism=QUIET, size=size)
        assert all(torch.allclose(parts[name], whole[name], rtol=1e-5, atol=1e-7) for name in whole)


def noise_of_steps_and_tensors_is_independent(room: Any) -> None:
    """Correlation below five standard deviations between steps, and between the tensors of one step."""
    model = nn.Sequential(nn.Linear(200, 200, bias=False), nn.Linear(200, 200, bias=False))
    case = type("Empty", (), {"model": model, "trained": trainable(model), "micro_batches": lambda *_: []})()
    steps = [_step(room, case, step=step) for step in range(3)]
    streams = torch.stack([value.flatten().double() for step in steps for value in step.values()])
    correlation = torch.corrcoef(streams) - torch.eye(len(streams))
    assert float(correlation.abs().max()) < 5 / math.sqrt(streams.shape[1])


def what_is_trainable_but_not_noised_is_refused(room: Any) -> None:
    case = perceptron()
    case.model[0].bias.requires_grad_(True)
    try:
        _step(room, case)
    except PrivacyError:
        return
    raise AssertionError("a trainable bias outside the clipped set went through")


def draws_are_poisson(room: Any) -> None:
    """Spread of the batch size: (records q (1 - q)), within five standard deviations over 400 draws."""
    records, rate, draws = 2000, 0.05, 400
    sizes = torch.tensor(
        [len(room.poisson_draw(records, rate, room.SeededNoise(3), ("draw", i))) for i in range(draws)]
    )
    mean, variance = records * rate, records * rate * (1 - rate)
    assert abs(float(sizes.double().mean()) - mean) < 5 * math.sqrt(variance / draws)
    assert abs(float(sizes.double().var()) / variance - 1) < 5 * math.sqrt(2 / draws)


CHECKS = (
    neighbours_differ_by_at_most_the_bound,
    a_non_finite_record_is_as_good_as_absent,
    an_empty_draw_carries_the_full_noise_in_every_tensor,
    a_full_draw_carries_the_full_noise,
    the_divisor_does_not_depend_on_the_draw,
    one_clipped_record_has_the_norm_of_the_bound,
    microbatches_change_nothing,
    noise_of_steps_and_tensors_is_independent,
    what_is_trainable_but_not_noised_is_refused,
    draws_are_poisson,
)
