"""The low-rank products equal what autograd gives for one example at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fedlora.errors import ShapeError
from fedlora.kernels import torch_ops
from fedlora.kernels.torch_ops import (
    norms,
    per_example_bias_gradient_into,
    per_example_gradient_into,
    product_with_own,
    weighted_sums,
)


def per_example_gradient(dy, h, dtype=torch.float32):
    """Written into the middle of a wider row, as in a private step, and the other way round: both agree."""
    m, r = dy.shape[-1], h.shape[-1]
    row = torch.full((len(dy), m * r + 5), float("nan"), dtype=dtype)
    turned = row.clone()
    out, other = row[:, 3:-2].unflatten(-1, (m, r)), turned[:, 3:-2].unflatten(-1, (r, m)).transpose(1, 2)
    for place in (out, other):
        per_example_gradient_into(place, dy, h)
    for whole in (row, turned):
        assert whole[:, :3].isnan().all() and whole[:, -2:].isnan().all()
    assert_close(other, out)
    return out


def per_example_bias_gradient(dy, dtype=torch.float32):
    row = torch.full((len(dy), dy.shape[-1] + 2), float("nan"), dtype=dtype)
    per_example_bias_gradient_into(row[:, 1:-1], dy)
    assert row[:, 0].isnan().all() and row[:, -1].isnan().all()
    return row[:, 1:-1]


tokens = st.lists(st.integers(1, 4), max_size=2)


@given(n=st.integers(0, 4), tokens=tokens, m=st.integers(1, 5), r=st.integers(1, 5), seed=st.integers(0, 99))
def test_gradients_equal_autograd_of_each_example(n, tokens, m, r, seed):
    draw = torch.Generator().manual_seed(seed)
    h = torch.randn(n, *tokens, r, generator=draw, dtype=torch.float64)
    dy = torch.randn(n, *tokens, m, generator=draw, dtype=torch.float64)
    weight = torch.zeros(m, r, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(m, dtype=torch.float64, requires_grad=True)
    weights = per_example_gradient(dy, h, torch.float64)
    biases = per_example_bias_gradient(dy, torch.float64)
    for i in range(n):
        y = torch.nn.functional.linear(h[i], weight, bias)
        of_weight, of_bias = torch.autograd.grad((y * dy[i]).sum(), (weight, bias))
        assert_close(weights[i], of_weight, rtol=1e-12, atol=1e-12)
        assert_close(biases[i], of_bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_sums_over_tokens_are_float32_whatever_comes_in(narrow):
    dy, h = torch.randn(2, 300, 3).to(narrow), torch.randn(2, 300, 4).to(narrow)
    wide, bias = per_example_gradient(dy, h), per_example_bias_gradient(dy)
    assert wide.dtype == bias.dtype == torch.float32
    assert_close(wide, torch.einsum("ntm,ntr->nmr", dy.double(), h.double()).float(), rtol=1e-5, atol=1e-4)
    assert_close(bias, dy.double().sum(dim=1).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("numbers", [0, 1, 255, 256, 257, 900])
@pytest.mark.parametrize("examples", [0, 1, 3])
def test_norms_and_sums_take_every_number_once(numbers, examples, monkeypatch):
    monkeypatch.setattr(torch_ops, "CHUNK", 256)
    rows = torch.randn(examples, numbers, generator=torch.Generator().manual_seed(numbers))
    shares = torch.rand(2, examples, dtype=torch.float64)
    assert_close(norms(rows), rows.double().norm(dim=1), rtol=1e-12, atol=0)
    assert_close(weighted_sums(rows, shares), shares @ rows.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dy", "h"), [((2, 3, 4), (2, 5, 4)), ((2, 3), (3, 3)), ((6, 4), (2, 3, 4)), ((4,), (4,))]
)
def test_shapes_that_do_not_match_are_refused(dy, h):
    with pytest.raises(ShapeError):
        per_example_gradient_into(torch.zeros(dy[0], dy[-1], h[-1]), torch.zeros(dy), torch.zeros(h))


def test_a_place_of_another_shape_is_refused():
    with pytest.raises(ShapeError):
        per_example_gradient_into(torch.zeros(2, 4, 3), torch.zeros(2, 5, 3), torch.zeros(2, 5, 4))
    with pytest.raises(ShapeError):
        per_example_bias_gradient_into(torch.zeros(2, 1), torch.zeros(2, 5, 3))


@given(n=st.integers(0, 4), tokens=tokens, m=st.integers(1, 5), r=st.integers(1, 5), biased=st.booleans())
def test_each_example_meets_its_own_weight(n, tokens, m, r, biased):
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(n, *tokens, r, generator=draw, dtype=torch.float64)
    weight = torch.randn(n, m, r, generator=draw, dtype=torch.float64)
    bias = torch.randn(n, m, generator=draw, dtype=torch.float64) if biased else None
    y = product_with_own(h, weight, bias)
    assert y.shape == (n, *tokens, m)
    for i in range(n):
        wanted = torch.nn.functional.linear(h[i], weight[i], None if bias is None else bias[i])
        assert_close(y[i], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 3, 5), (3, 4)])
def test_weights_of_other_examples_or_ranks_are_refused(shape):
    with pytest.raises(ShapeError, match="share n and r"):
        product_with_own(torch.ones(3, 7, 4), torch.ones(*shape))
