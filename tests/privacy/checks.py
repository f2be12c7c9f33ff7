"""The promises of the private step, as functions of an implementation, so that broken ones can fail them.

`room` has every public name of noise, sampling, clipping, gaussian, step and the two engines.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedlora.errors import PrivacyError
from fedlora.values import Mechanism, Sampling

from .models import one_at_a_time, pairs, perceptron, trainable

BOUND, SIGMA, EXPECTED = 0.5, 1.3, 16.0
QUIET = Mechanism(max_grad_norm=BOUND, noise_multiplier=1e-12)
LOUD = Mechanism(max_grad_norm=BOUND, noise_multiplier=SIGMA)
ENGINES = ("DirectEngine", "OpacusEngine")
DRAWS = 1_000_000


class Constant:
    """A noise source whose every normal is the same number: shows what is done with a draw."""

    def __init__(self, value: float) -> None:
        self.value, self.purposes = value, []

    def normal(self, shape: Any, *, dtype: Any, purpose: Any) -> Any:
        self.purposes.append(purpose)
        return torch.full(shape, self.value, dtype=dtype)


def _step(
    room: Any, case: Any, of: Any = None, *, mechanism: Any = LOUD, step: int = 0, size: int | None = None,
    engine: str = "DirectEngine", noise: Any = None, losses: Any = None, sequences: int = 1,
) -> Any:  # fmt: skip
    return room.private_gradient(
        getattr(room, engine)(), case.model, case.trained, losses or case.micro_batches(size, of),
        mechanism=mechanism, expected_batch=EXPECTED, noise=noise or room.SeededNoise(7), purpose=("noise", step),
        sequences_per_record=sequences,
    )  # fmt: skip


def _norm(tensors: Any) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors.values()]).sum().sqrt())


def _wide() -> Any:
    """A model of two tensors of 1e6 numbers each, whose draws are always empty."""
    model = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1000, bias=False))
    return type("Empty", (), {"model": model, "trained": trainable(model), "micro_batches": lambda *_: []})()


def _step_of(bound: float, sigma: float) -> float:
    """The grid, found without a logarithm: the largest power of two under the noise, and 20 bits below."""
    return math.ldexp(1.0, math.frexp(sigma * bound)[1] - 1 - 20)


def _deviation(numbers: int, bound: float = BOUND, sigma: float = SIGMA) -> float:
    """What the noise must be scaled to when `numbers` are released together."""
    return sigma * (bound * (1 + 2**-10) + _step_of(bound, sigma) * math.sqrt(numbers))


# clipping


def neighbours_differ_by_at_most_the_bound(room: Any) -> None:
    """200 random pairs of data sets that differ by one record; every second model has huge gradients."""
    for pair in range(200):
        case = perceptron(seed=pair, records=5, scale=1.0 if pair % 2 else 100.0)
        gone = pair % case.records
        rest = torch.tensor([i for i in range(case.records) if i != gone])
        engine = ENGINES[pair // 2 % 2]
        whole = _step(room, case, mechanism=QUIET, engine=engine)
        without = _step(room, case, rest, mechanism=QUIET, engine=engine)
        difference = {name: EXPECTED * (whole[name].double() - without[name].double()) for name in whole}
        assert _norm(difference) <= BOUND * (1 + 1e-5), pair


def a_non_finite_record_is_as_good_as_absent(room: Any) -> None:
    case = perceptron(records=6)
    for engine in ENGINES:
        rest = _step(room, case, torch.arange(1, 6), mechanism=QUIET, engine=engine)
        for poison in (math.nan, math.inf):
            factor = torch.tensor([poison, 1, 1, 1, 1, 1])
            bad = [lambda f=factor: case.losses(torch.arange(6)) * f]
            poisoned = _step(room, case, mechanism=QUIET, engine=engine, losses=bad)
            assert all(torch.allclose(poisoned[name], rest[name], rtol=1e-5, atol=1e-7) for name in rest)


def gradients_of_any_size_end_within_the_bound(room: Any) -> None:
    """Norms 1e-30 to 1e30, and zero: clipped to C, or left as they are."""
    for dtype in (torch.float32, torch.float64):
        for exponent in range(-30, 31, 3):
            for bound in (1e-3, 1.0):
                rows = (
                    torch.tensor([[0.6, 0.48, 0.64], [0, 0, 0]], dtype=torch.float64) * 10.0**exponent
                ).to(dtype)
                norm = float(rows[0].double().norm())
                got = float(room.clipped_sum(room.ops, rows, bound).norm())
                assert abs(got / min(norm, bound) - 1) < 1e-6, (exponent, bound, got)


def numbers_beyond_a_chunk_count(room: Any) -> None:
    """Every number of a row wider than what is widened at a time counts once, in the norm and in the sum."""
    room.ops.CHUNK = 64
    for numbers in (31, 32, 33, 64, 65, 100):
        rows = torch.randn(2, numbers, generator=torch.Generator().manual_seed(numbers))
        sums = room.clipped_sum(room.ops, rows, 1.0)
        wide = rows.double()
        wanted = (wide / wide.norm(dim=1, keepdim=True)).sum(dim=0)
        assert torch.allclose(sums, wanted, rtol=1e-9, atol=1e-12), numbers


def narrow_gradients_are_summed_wide(room: Any) -> None:
    """Sums over tokens of bfloat16 numbers: 1e-2 off in their own type."""
    draw = torch.Generator().manual_seed(0)
    dy, h = (torch.randn(2, 500, size, generator=draw).to(torch.bfloat16) for size in (3, 4))
    weight, bias = torch.empty(2, 3, 4), torch.empty(2, 3)
    room.ops.per_example_gradient_into(weight, dy, h)
    room.ops.per_example_bias_gradient_into(bias, dy)
    assert torch.allclose(weight.double(), dy.double().transpose(1, 2) @ h.double(), rtol=1e-4, atol=1e-4)
    assert torch.allclose(bias.double(), dy.double().sum(dim=1), rtol=1e-4, atol=1e-4)


def one_clipped_record_has_the_norm_of_the_bound(room: Any) -> None:
    case = perceptron(scale=100.0, seed=2)
    tight = Mechanism(max_grad_norm=1e-3, noise_multiplier=1e-12)
    huge = _step(room, case, torch.tensor([0]), mechanism=tight)
    assert abs(_norm(huge) * EXPECTED / 1e-3 - 1) < 1e-5


def microbatches_change_nothing(room: Any) -> None:
    case = perceptron(records=9)
    for engine in ENGINES:
        whole = _step(room, case, mechanism=QUIET, engine=engine)
        for size in (1, 2, 4):
            parts = _step(room, case, mechanism=QUIET, size=size, engine=engine)
            assert all(torch.allclose(parts[name], whole[name], rtol=1e-5, atol=1e-7) for name in whole)


def sums_are_those_of_each_record_alone(room: Any) -> None:
    """Clipped and whole gradients of a layer used twice, against each record alone through plain autograd."""
    for bound in (1e-3, 1e6):
        case = perceptron()
        got = room.DirectEngine().clipped_sum(case.model, case.trained, case.micro_batches(5), bound)
        for name, wanted in one_at_a_time(case, bound).items():
            least = 1e-3 * bound if bound < 1 else 1e-3
            assert abs(got[name] - wanted).max() <= 1e-5 * max(wanted.abs().max(), least)


def the_sequences_of_a_record_are_clipped_as_one(room: Any) -> None:
    """A record of two rows is what autograd makes of it alone, moves the sum by the bound at most, is never half."""
    for engine in ENGINES:
        case = pairs(seed=1)
        try:
            found = _step(room, case, mechanism=QUIET, engine=engine, sequences=2)
            for name, wanted in one_at_a_time(case, BOUND).items():
                assert torch.allclose(EXPECTED * found[name].double(), wanted, rtol=1e-4, atol=1e-5), name
            for gone in range(case.records):
                rest = torch.tensor([i for i in range(case.records) if i != gone])
                without = _step(room, case, rest, mechanism=QUIET, engine=engine, sequences=2)
                difference = {
                    name: EXPECTED * (found[name].double() - without[name].double()) for name in found
                }
                assert _norm(difference) <= BOUND * (1 + 1e-5)
        except PrivacyError as error:
            raise AssertionError(f"{engine}: {error}") from error
        _refused(lambda e=engine, c=case: _step(room, c, engine=e))  # rows, each taken for a record
        last = case.model[-1]
        odd = [lambda layer=last: layer(torch.randn(3, 2, 6)).sum(dim=(1, 2))[:1]]
        _refused(lambda e=engine, o=odd, c=case: _step(room, c, engine=e, losses=o, sequences=2))


def what_is_trainable_but_not_noised_is_refused(room: Any) -> None:
    for engine in ENGINES:
        case = perceptron()
        case.model[0].bias.requires_grad_(True)
        _refused(lambda case=case, engine=engine: _step(room, case, engine=engine))


def what_no_gradient_reaches_is_refused(room: Any) -> None:
    """A trained layer that the loss does not pass: its part of the row was never written."""
    case = perceptron()
    last = case.model[-1]
    losses = [lambda: last(torch.randn(3, last.in_features)).sum(dim=1)]
    _refused(lambda: _step(room, case, losses=losses))


def what_the_engine_forgets_is_refused(room: Any) -> None:
    """An engine that sums all but one tensor: its noise would be missing."""

    class Forgetful(room.DirectEngine):
        def clipped_sum(self, *arguments: Any) -> Any:
            return dict(list(super().clipped_sum(*arguments).items())[1:])

    case = perceptron()
    room.Forgetful = Forgetful
    _refused(lambda: _step(room, case, engine="Forgetful"))


def what_couples_records_is_refused(room: Any) -> None:
    """Batch normalisation, a mean over the batch, tokens counted as records, layers that compute otherwise."""
    torch.manual_seed(0)
    normal = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))

    class Doubled(nn.Linear):
        def forward(self, x: Any) -> Any:
            return 2 * super().forward(x)

    doubled = nn.Sequential(Doubled(4, 4))
    case = perceptron()
    everyone = torch.arange(case.records)
    for engine in ENGINES:
        run = getattr(room, engine)().clipped_sum
        for model in (normal, doubled):
            losses = [lambda m=model: m(torch.randn(3, 4)).sum(dim=1)]
            _refused(lambda run=run, m=model, of=losses: run(m, trainable(m), of, 1.0))
        for mixed in (
            lambda: case.losses(everyone).mean(),
            lambda: case.losses(everyone).reshape(-1, 2).sum(dim=1),
        ):
            _refused(lambda run=run, of=mixed: run(case.model, case.trained, [of], 1.0))


def _refused(call: Callable[[], Any]) -> None:
    try:
        call()
    except PrivacyError:
        return
    raise AssertionError("went through")


# noise


def an_empty_draw_carries_the_full_noise_in_every_tensor(room: Any) -> None:
    """Variance within 1 % of what is owed in each tensor of 1e6 numbers: seven standard deviations."""
    released = _step(room, _wide())
    owed = _deviation(2 * DRAWS) / EXPECTED
    for name, value in released.items():
        variance = float(value.double().square().mean()) / owed**2
        assert abs(variance - 1) < 0.01, (name, variance)


def a_full_draw_carries_the_full_noise(room: Any) -> None:
    """The noise on top of the same records: 600 steps of 63 numbers, so 3 % is four standard deviations."""
    case = perceptron(records=3)
    still = _step(room, case, mechanism=QUIET)
    steps = [_step(room, case, step=step) for step in range(600)]
    noise = torch.cat([(noisy[name] - still[name]).flatten() for noisy in steps for name in still])
    variance = float(noise.double().square().mean())
    assert abs(variance / (SIGMA * BOUND / EXPECTED) ** 2 - 1) < 0.03


def noise_pays_for_the_rounding_of_the_sum(room: Any) -> None:
    """A draw of ones comes out as sigma (C (1 + 2**-10) + grid sqrt d), to the grid."""
    for bound, sigma in ((0.5, 1.3), (2.0, 0.6), (1e-3, 40.0)):
        sums = {"a": torch.zeros(1000, 999, dtype=torch.float64), "b": torch.zeros(1000, dtype=torch.float64)}
        out = room.released(sums, bound=bound, noise_multiplier=sigma, noise=Constant(1.0), purpose=("x",))
        owed = _deviation(10**6, bound, sigma)
        assert owed > sigma * bound * 1.0004
        for value in out.values():
            assert float((value - owed).abs().max()) <= _step_of(bound, sigma)


def everything_released_lies_on_the_grid(room: Any) -> None:
    """Multiples of one power of two, whatever the sum; sum and noise each moved by half a step at most."""
    draw = torch.Generator().manual_seed(1)
    for bound, sigma in ((0.5, 1.3), (3.0, 0.07), (1e-3, 1.0)):
        step = _step_of(bound, sigma)
        total = torch.randn(20_000, generator=draw, dtype=torch.float64) * bound
        for noise in (room.SeededNoise(3), Constant(0.0), Constant(1.0)):
            for one in (total, torch.zeros_like(total), 1e4 * total):
                out = room.released(
                    {"x": one}, bound=bound, noise_multiplier=sigma, noise=noise, purpose=("p",)
                )
                assert out["x"].dtype == torch.float64
                assert bool((out["x"] / step == torch.round(out["x"] / step)).all())
                if isinstance(noise, Constant):
                    owed = noise.value * _deviation(20_000, bound, sigma)
                    assert float((out["x"] - one - owed).abs().max()) <= 1.0001 * step
                    assert float((out["x"] - one - owed).abs().max()) >= 0.3 * step or not one.any()


def noise_of_steps_and_tensors_is_independent(room: Any) -> None:
    """Correlation below five standard deviations between steps, and between the tensors of one step."""
    model = nn.Sequential(nn.Linear(200, 200, bias=False), nn.Linear(200, 200, bias=False))
    case = type("Empty", (), {"model": model, "trained": trainable(model), "micro_batches": lambda *_: []})()
    steps = [_step(room, case, step=step) for step in range(3)]
    streams = torch.stack([value.flatten().double() for step in steps for value in step.values()])
    correlation = torch.corrcoef(streams) - torch.eye(len(streams))
    assert float(correlation.abs().max()) < 5 / math.sqrt(streams.shape[1])


def kolmogorov_smirnov(x: Any) -> float:
    """Greatest distance to the normal law, in units of 1 / sqrt(n): 1.95 is p = 1e-3, 2.8 is 3e-7."""
    steps = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    law = torch.special.ndtr(x.double().sort().values)
    return float(torch.maximum(law - steps[:-1], steps[1:] - law).max()) * math.sqrt(len(x))


def is_standard_normal(x: Any, farthest: float = 1.95) -> bool:
    """Variance within 1 % (seven standard deviations at 1e6), mean, lag 1, 2, 64 and 4096, and the law itself."""
    n = len(x)
    lags = [float((x[lag:] * x[:-lag]).mean()) for lag in (1, 2, 64, 4096)]
    return (
        abs(float(x.square().mean()) - 1) < 0.01
        and abs(float(x.mean())) < 5 / math.sqrt(n)
        and all(abs(lag) < 5 / math.sqrt(n - 4096) for lag in lags)
        and kolmogorov_smirnov(x) < farthest
    )


def normals_are_standard_normal(room: Any) -> None:
    """1e6 draws of both sources. The seeded one is held to p > 1e-3; the other, new each time, to 3e-7."""
    for source, farthest in ((room.SeededNoise(3), 1.95), (room.OsEntropyNoise(), 2.8)):
        x = source.normal((DRAWS,), dtype=torch.float64, purpose=("law",))
        assert is_standard_normal(x, farthest), source.kind
        assert float(x.abs().max()) > 4.5  # tails: fewer than 1 in 1e6 lies beyond 4.9


def nobody_repeats_the_entropy_of_the_system(room: Any) -> None:
    """Two calls of one purpose, and two sources, under the same global seeds."""
    first = room.OsEntropyNoise()
    normals, uniforms = [], []
    for source in (first, first, room.OsEntropyNoise()):
        torch.manual_seed(0)
        normals.append(source.normal((10_000,), dtype=torch.float64, purpose=("same",)))
        uniforms.append(source.uniform(10_000, purpose=("same",)) - 0.5)
    correlation = torch.corrcoef(torch.stack([*normals, *uniforms])) - torch.eye(6)
    assert float(correlation.abs().max()) < 5 / math.sqrt(10_000)


def a_stream_depends_on_its_key_alone(room: Any) -> None:
    """Seeds, laws and purposes give streams of their own; the same ones give the same stream."""

    def of(seed: int, *purpose: str | int) -> Any:
        return room.SeededNoise(seed).uniform(5000, purpose=purpose) - 0.5

    assert torch.equal(of(1, "a", 2), of(1, "a", 2))
    streams = torch.stack([of(1, "a", 2), of(2, "a", 2), of(1, "a", 3), of(1, "b", 2), of(1, "a", "2")])
    correlation = torch.corrcoef(streams) - torch.eye(len(streams))
    assert float(correlation.abs().max()) < 5 / math.sqrt(5000)


def a_forked_child_draws_its_own_noise(room: Any) -> None:
    source = room.OsEntropyNoise()
    source.normal((4,), dtype=torch.float64, purpose=("warm",))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, source.uniform(8, purpose=("x",)).numpy().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = torch.frombuffer(bytearray(os.read(read, 64)), dtype=torch.float64)
    os.close(read), os.close(write)
    assert not torch.isin(source.uniform(8, purpose=("x",)), theirs).any()


def uniforms_are_uniform(room: Any) -> None:
    for source in (room.SeededNoise(4), room.OsEntropyNoise()):
        u = source.uniform(DRAWS, purpose=("u",))
        assert float(u.min()) >= 0 and float(u.max()) < 1
        counts = torch.histc(u, bins=100, min=0, max=1)
        chi_square = float(((counts - DRAWS / 100) ** 2 / (DRAWS / 100)).sum())
        assert 99 - 5 * math.sqrt(198) < chi_square < 99 + 5 * math.sqrt(198), source.kind


# the step


def the_divisor_does_not_depend_on_the_draw(room: Any) -> None:
    """The same record once, three times and 48 times: its sum grows, the divisor stays."""
    case = perceptron(records=3)
    one = _step(room, case, torch.tensor([1]), mechanism=QUIET)
    for times in (3, 48):
        many = _step(room, case, torch.full((times,), 1), mechanism=QUIET)
        for name, value in one.items():
            assert torch.allclose(many[name], times * value, rtol=1e-4, atol=1e-7)


def what_is_spent_is_what_is_used(room: Any) -> None:
    """The event repeats the numbers of the objects that clip, noise and draw read; steps are all of them."""
    sampling = Sampling(rate=0.0123456789, expected_batch=64.0, max_draw=217)
    event = room.spent(LOUD, sampling, 41)
    assert event.noise_multiplier == LOUD.noise_multiplier and event.steps == 41
    assert (event.sample_rate, event.expected_batch, event.max_draw) == (0.0123456789, 64.0, 217)


# sampling


def draws_are_poisson(room: Any) -> None:
    """Spread of the batch size: (records q (1 - q)), within five standard deviations over 400 draws."""
    records, rate, draws = 2000, 0.05, 400
    sampling = Sampling(rate=rate, expected_batch=records * rate, max_draw=records)
    sizes = torch.tensor(
        [len(room.poisson_draw(records, sampling, room.SeededNoise(3), ("draw", i))) for i in range(draws)]
    )
    mean, variance = records * rate, records * rate * (1 - rate)
    assert abs(float(sizes.double().mean()) - mean) < 5 * math.sqrt(variance / draws)
    assert abs(float(sizes.double().var()) / variance - 1) < 5 * math.sqrt(2 / draws)


def a_draw_ends_at_its_cap(room: Any) -> None:
    sampling = Sampling(rate=0.5, expected_batch=10.0, max_draw=12)
    for step in range(20):
        drawn = room.poisson_draw(200, sampling, room.SeededNoise(3), ("draw", step))
        assert len(drawn) == 12 and torch.equal(drawn, drawn.unique())


def rate_and_divisor_are_constants_of_the_configuration(room: Any) -> None:
    """Around every floor where n / b rounds: rate b / n to the last bit, divisor b, never below rate * n."""
    for records in (1, 63, 64, 65, 127, 128, 129, 191, 9983, 9984, 10_000):
        sampling = room.poisson(64, records)
        assert sampling.rate == (1.0 if records <= 64 else 64 / records)
        assert sampling.expected_batch == 64.0 >= sampling.rate * records * (1 - 1e-12)
        assert sampling.max_draw == room.poisson(64, 10**6).max_draw >= 64 + 8 * math.sqrt(64)


CHECKS = (
    neighbours_differ_by_at_most_the_bound,
    a_non_finite_record_is_as_good_as_absent,
    gradients_of_any_size_end_within_the_bound,
    numbers_beyond_a_chunk_count,
    narrow_gradients_are_summed_wide,
    one_clipped_record_has_the_norm_of_the_bound,
    microbatches_change_nothing,
    sums_are_those_of_each_record_alone,
    the_sequences_of_a_record_are_clipped_as_one,
    what_is_trainable_but_not_noised_is_refused,
    what_no_gradient_reaches_is_refused,
    what_the_engine_forgets_is_refused,
    what_couples_records_is_refused,
    an_empty_draw_carries_the_full_noise_in_every_tensor,
    a_full_draw_carries_the_full_noise,
    noise_pays_for_the_rounding_of_the_sum,
    everything_released_lies_on_the_grid,
    noise_of_steps_and_tensors_is_independent,
    normals_are_standard_normal,
    nobody_repeats_the_entropy_of_the_system,
    a_stream_depends_on_its_key_alone,
    a_forked_child_draws_its_own_noise,
    uniforms_are_uniform,
    the_divisor_does_not_depend_on_the_draw,
    what_is_spent_is_what_is_used,
    draws_are_poisson,
    a_draw_ends_at_its_cap,
    rate_and_divisor_are_constants_of_the_configuration,
)
