"""One example moves the sum by at most C, whatever its gradient is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.kernels import torch_ops
from fedlora.privacy import clipping
from fedlora.privacy.clipping import clip_factors

exponents = st.integers(-30, 30)
dtypes = st.sampled_from([torch.float32, torch.float64])


def clipped_sum(rows, bound):
    return clipping.clipped_sum(torch_ops, rows, bound)


@given(exponent=exponents, bound=st.integers(-6, 6), dtype=dtypes, seed=st.integers(0, 99))
def test_one_example_ends_within_the_bound(exponent, bound, dtype, seed):
    draw, bound = torch.Generator().manual_seed(seed), 10.0**bound
    row = torch.randn(1, 19, generator=draw, dtype=torch.float64)
    row = (row * 10.0**exponent / row.norm()).to(dtype)
    norm, clipped = float(row.double().norm()), clipped_sum(row, bound)
    assert float(clipped.norm()) <= bound * (1 + 1e-6)
    assert float(clipped.norm()) == pytest.approx(min(norm, bound), rel=1e-6, abs=0)
    assert torch.allclose(
        clipped / min(norm, bound), row[0].double() / norm, rtol=0, atol=1e-6
    )  # the direction stays


def test_zero_gradients_and_no_examples_stay_zero():
    assert not clipped_sum(torch.zeros(3, 2), 1.0).any()
    assert not clipped_sum(torch.zeros(0, 8), 1.0).any()


def test_rows_stay_as_they_are():
    rows = torch.randn(3, 4, dtype=torch.float64)
    before = rows.clone()
    assert torch.allclose(clipped_sum(rows, None), before.sum(dim=0))
    assert torch.equal(rows, before)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bound", [1.0, None])
def test_one_bad_entry_takes_its_whole_example_out(poison, bound):
    rows = torch.randn(3, 9)
    rows[1, 4] = poison
    assert torch.equal(clipped_sum(rows, bound), clipped_sum(rows[[0, 2]], bound))
    assert clip_factors(torch_ops.norms(rows), bound)[1] == 0


def test_finite_numbers_beyond_float32_count_as_themselves_until_their_squares_overflow():
    assert float(clipped_sum(torch.full((1, 2), 1e150, dtype=torch.float64), 1.0).norm()) == pytest.approx(1)
    assert clipped_sum(torch.full((1, 2), 1e200, dtype=torch.float64), 1.0).norm() == 0


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bound_that_is_none_is_refused(bound):
    with pytest.raises(ValueError, match="max_grad_norm"):
        clipped_sum(torch.ones(1, 2), bound)
