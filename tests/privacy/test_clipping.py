"""One example moves the sum by at most C, whatever its gradient is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.privacy.clipping import CHUNK, add_clipped_sum, clip_factors, joint_squared_norms

exponents = st.integers(-30, 30)
dtypes = st.sampled_from([torch.float32, torch.float64])


def clipped_sum(gradients, bound):
    sums = {name: torch.zeros(g.shape[1:], dtype=torch.float64) for name, g in gradients.items()}
    add_clipped_sum(sums, gradients, bound)
    return sums


def joint_norm(tensors):
    return float(torch.stack([t.double().square().sum() for t in tensors.values()]).sum().sqrt())


@given(exponent=exponents, bound=st.integers(-6, 6), dtype=dtypes, seed=st.integers(0, 99))
def test_one_example_ends_within_the_bound(exponent, bound, dtype, seed):
    draw, bound = torch.Generator().manual_seed(seed), 10.0**bound
    gradients = {
        "b": torch.randn(1, 4, 3, generator=draw, dtype=torch.float64),
        "head": torch.randn(1, 7, generator=draw, dtype=torch.float64),
    }
    scale = 10.0**exponent / joint_norm(gradients)
    gradients = {name: (scale * g).to(dtype) for name, g in gradients.items()}
    norm, clipped = joint_norm(gradients), clipped_sum(gradients, bound)
    assert joint_norm(clipped) <= bound * (1 + 1e-6)
    assert joint_norm(clipped) == pytest.approx(min(norm, bound), rel=1e-6, abs=0)
    for name, g in gradients.items():  # the direction stays, over all tensors together
        assert torch.allclose(clipped[name] / min(norm, bound), g[0].double() / norm, rtol=0, atol=1e-6)


@given(dtype=st.sampled_from([torch.bfloat16, torch.float16]), seed=st.integers(0, 9))
def test_narrow_gradients_are_clipped_in_wide_numbers(dtype, seed):
    gradients = {"b": torch.randn(1, 50, generator=torch.Generator().manual_seed(seed)).to(dtype)}
    assert joint_norm(clipped_sum(gradients, 0.1)) == pytest.approx(0.1, rel=1e-6)


def test_zero_gradients_and_no_examples_stay_zero():
    assert not clipped_sum({"b": torch.zeros(3, 2)}, 1.0)["b"].any()
    assert clipped_sum({"b": torch.zeros(0, 2, 4)}, 1.0)["b"].shape == (2, 4)


@pytest.mark.parametrize("numbers", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("examples", [1, 3])
def test_gradients_wider_than_what_is_widened_at_a_time_are_whole(numbers, examples):
    g = torch.randn(examples, numbers, generator=torch.Generator().manual_seed(numbers))
    norms = joint_squared_norms({"b": g})
    assert torch.allclose(norms, g.double().square().sum(dim=1), rtol=1e-12, atol=0)
    factors = torch.clamp(0.1 / g.double().norm(dim=1), max=1.0)
    assert torch.allclose(clipped_sum({"b": g}, 0.1)["b"], factors @ g.double(), rtol=1e-9, atol=1e-12)


def test_sums_grow_and_gradients_stay():
    g = {"b": torch.randn(3, 2, 2, dtype=torch.float64)}
    before, sums = g["b"].clone(), {"b": torch.ones(2, 2, dtype=torch.float64)}
    add_clipped_sum(sums, g, None)
    add_clipped_sum(sums, g, None)
    assert torch.equal(g["b"], before)
    assert torch.allclose(sums["b"], 1 + 2 * before.sum(dim=0))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bound", [1.0, None])
def test_one_bad_entry_takes_its_whole_example_out(poison, bound):
    gradients = {"b": torch.randn(3, 2, 2), "head": torch.randn(3, 5)}
    gradients["head"][1, 4] = poison
    kept = {name: g[[0, 2]] for name, g in gradients.items()}
    got, wanted = clipped_sum(gradients, bound), clipped_sum(kept, bound)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert clip_factors(joint_squared_norms(gradients), bound)[1] == 0


def test_finite_numbers_beyond_float32_count_as_themselves_until_their_squares_overflow():
    assert joint_norm(
        clipped_sum({"b": torch.full((1, 2), 1e150, dtype=torch.float64)}, 1.0)
    ) == pytest.approx(1)
    assert joint_norm(clipped_sum({"b": torch.full((1, 2), 1e200, dtype=torch.float64)}, 1.0)) == 0


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bound_that_is_none_is_refused(bound):
    with pytest.raises(ValueError, match="max_grad_norm"):
        clipped_sum({"b": torch.ones(1, 2)}, bound)
    with pytest.raises(ValueError, match="no gradients"):
        clipped_sum({}, 1.0)
