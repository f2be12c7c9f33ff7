"""A quantised layer is the linear layer of its rounded weight, both ways, and the rounding is the one others know."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear
from torch.testing import assert_close

from fedlora.kernels.packed import available
from fedlora.kernels.quantised import BLOCK, NF4, QuantisedLinear, quantise_frozen

FORMATS = ("int8", "nf4")
ONEDNN = [False, pytest.param(True, marks=pytest.mark.skipif(not available(), reason="no oneDNN here"))]


def drawn(out, width, *, bias=True, seed=0, scale=0.05):
    layer = nn.Linear(width, out, bias=bias).requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    layer.weight.copy_(torch.randn(out, width, generator=draw) * scale)
    return layer


@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 99), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_no_number_moves_further_than_half_a_step_of_its_scale(out, width, seed, size):
    weight = drawn(out, width, seed=seed, scale=size)
    weight.weight[0] = 0
    exact = weight.weight.double()
    for name in FORMATS:
        rounded = QuantisedLinear(weight, name)
        moved = (rounded.dense(torch.float32).double() - exact).abs()
        if name == "int8":
            steps = rounded.scales.double()[:, None].expand(out, width)
        else:  # the widest gap between two of the sixteen values is the lowest
            steps = (NF4[1] - NF4[0]) * rounded.scales.double().repeat_interleave(BLOCK)[: out * width].view(
                out, width
            )
        assert (
            moved <= steps * (0.5 + 1e-4)
        ).all()  # the quotient is a float32, and 127 steps of it 1e-5 of one
        assert not rounded.dense(torch.float32)[0].any()


@pytest.mark.parametrize("shape", [(64, 64), (3, 5), (48, 100), (1, 1)])
def test_four_bits_are_those_that_bitsandbytes_gives(shape):
    theirs = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    layer = drawn(*shape)
    packed, state = theirs.quantize_4bit(layer.weight.data, blocksize=BLOCK, quant_type="nf4")
    ours = QuantisedLinear(layer, "nf4")
    assert torch.equal(ours.dense(torch.float32), theirs.dequantize_4bit(packed, state))
    whole = shape[0] * shape[1] // 2  # bytes; half a one and whatever fills the last block may differ
    assert torch.equal(ours.codes[:whole], packed.view(-1)[:whole])


def test_eight_bits_are_those_that_bitsandbytes_gives_to_a_step():
    theirs = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    layer = drawn(48, 100)
    layer.weight.copy_(layer.weight.half().float())  # theirs begins so
    codes, absmax, _ = theirs.int8_vectorwise_quant(layer.weight.half())
    ours = QuantisedLinear(layer, "int8")
    assert_close(ours.scales, absmax / 127)
    assert (ours.codes.int() - codes.int()).abs().max() <= 1
    assert (ours.codes != codes).float().mean() < 0.01  # numbers half-way between two codes


@pytest.mark.parametrize("onednn", ONEDNN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(), (0,), (1,), (2, 7), (2, 3, 4)])
@pytest.mark.parametrize("name", FORMATS)
def test_both_directions_are_those_of_the_rounded_weight_after_a_pass_without_gradients_too(
    name, tokens, dtype, onednn
):
    layer = drawn(48, 100).to(dtype)
    rounded = QuantisedLinear(layer, name, onednn=onednn)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(*tokens, 100, generator=draw).to(dtype)
    weight = rounded.dense(dtype)
    with torch.no_grad():
        rounded(x)
    x.requires_grad_(True)
    y = rounded(x)
    dy = torch.randn(y.shape, generator=draw).to(dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert y.dtype == dx.dtype == dtype
    near = (
        1e-5 if dtype == torch.float32 else 2e-2
    )  # 100 products in float32; one rounding to 8 bits of a sum
    assert_close(y, linear(x, weight, layer.bias), rtol=near, atol=near)
    assert_close(dx, dy @ weight, rtol=near, atol=near)


@pytest.mark.parametrize("name", FORMATS)
def test_an_outlier_of_a_neighbour_moves_no_bit(name):
    rounded = QuantisedLinear(drawn(48, 100), name)
    x = torch.randn(3, 5, 100, generator=torch.Generator().manual_seed(1))
    loud = x.clone()
    loud[1:] *= 1e4
    assert torch.equal(rounded(x)[0], rounded(loud)[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_kept_for_the_backward_pass_and_the_result_may_be_added_to(name, bias):
    rounded, kept = QuantisedLinear(drawn(48, 100, bias=bias), name), []
    x = torch.randn(2, 7, 100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = rounded(x).add_(1)
    assert not kept
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert_close(dx, torch.ones_like(y) @ rounded.dense(torch.float32))


def test_trained_layers_shared_weights_and_whatever_is_not_served_stay():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5))).requires_grad_(False)
    model[1].bias.requires_grad_(True)
    model[3].weight = model[2].weight
    assert quantise_frozen(model, "nf4", lambda path, layer: path != "4") == 1
    assert [type(layer) for layer in model] == [QuantisedLinear, *[nn.Linear] * 4]


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("nf4", 4.5)])
def test_a_weight_takes_the_bits_that_the_config_promises(name, bits):
    rounded = QuantisedLinear(drawn(512, 1024), name)
    assert (rounded.codes.nbytes + rounded.scales.nbytes) * 8 == pytest.approx(512 * 1024 * bits, rel=0.01)
