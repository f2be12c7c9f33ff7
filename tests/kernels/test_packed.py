"""A packed layer is the layer it came from, to the rounding of float32, and falls back where it cannot be."""

import copy
import io

import pytest
import torch
from torch import nn

from fedlora.kernels import packed
from fedlora.kernels.packed import PackedLinear, available, pack_frozen

pytestmark = pytest.mark.skipif(not available(), reason="needs torch with oneDNN on an x86 core")


def frozen(inputs, outputs, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def both_ways(layer, x, dy):
    x = x.detach().clone().requires_grad_(True)
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad


def off_by(found, exact, terms):
    """In units of what float32 may round in a sum of so many terms of this size."""
    return ((found.double() - exact).abs().max() / (exact.abs().max() * terms**0.5 * 2**-24)).item()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 4), (0,), (2, 0)])
@pytest.mark.parametrize("sizes", [(384, 96), (33, 257), (1, 5), (130, 1)])
def test_products_and_gradients_are_those_of_the_layer(sizes, shape, bias):
    layer = frozen(*sizes, bias=bias)
    draw = torch.Generator().manual_seed(1)
    x, dy = torch.randn(*shape, sizes[0], generator=draw), torch.randn(*shape, sizes[1], generator=draw)
    exact = both_ways(copy.deepcopy(layer).double(), x.double(), dy.double())
    found = both_ways(PackedLinear(layer), x, dy)
    for got, wanted, terms in zip(found, exact, sizes, strict=True):
        assert got.shape == wanted.shape
        assert got.numel() == 0 or off_by(got, wanted, terms) < 8


def test_strided_inputs_and_gradients_count_as_what_they_hold():
    layer = frozen(40, 30)
    x, dy = torch.randn(40, 6, 3).transpose(0, 2), torch.randn(30, 6, 3).transpose(0, 2)
    for got, wanted in zip(both_ways(PackedLinear(layer), x, dy), both_ways(layer, x, dy), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_same_numbers_give_the_same_bits():
    layer, x, dy = PackedLinear(frozen(384, 384)), torch.randn(5, 9, 384), torch.randn(5, 9, 384)
    first = both_ways(layer, x, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, both_ways(layer, x, dy), strict=True))
    other = PackedLinear(frozen(384, 384))
    assert all(torch.equal(a, b) for a, b in zip(first, both_ways(other, x, dy), strict=True))


def test_a_weight_changed_in_place_is_packed_anew():
    layer = PackedLinear(frozen(20, 10))
    x, dy = torch.randn(4, 20), torch.randn(4, 10)
    both_ways(layer, x, dy)
    layer.weight.mul_(3)
    y, dx = both_ways(layer, x, dy)
    assert torch.allclose(y, x @ layer.weight.T + layer.bias, atol=1e-5)
    assert torch.allclose(dx, dy @ layer.weight, atol=1e-5)


def test_a_weight_changed_between_forward_and_backward_is_an_error():
    layer, x = PackedLinear(frozen(20, 10)), torch.randn(4, 20, requires_grad=True)
    y = layer(x)
    layer.weight.mul_(3)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def test_data_put_in_the_place_of_a_weights_is_packed_anew():
    layer, x = PackedLinear(frozen(20, 10)), torch.randn(4, 20)
    layer(x)
    layer.weight.data = torch.zeros(10, 20)
    assert torch.equal(layer(x), layer.bias.expand(4, 10))


@pytest.mark.parametrize("of_x", [True, False])
@pytest.mark.parametrize("of_plus", [True, False])
def test_what_is_added_in_the_same_pass_has_its_own_gradient(of_x, of_plus):
    layer, dy = PackedLinear(frozen(20, 10)), torch.randn(3, 4, 10)
    x = torch.randn(3, 4, 20, requires_grad=of_x)
    plus = torch.randn(10, 4, 3).transpose(0, 2).requires_grad_(of_plus)
    y = layer(x, plus)
    assert torch.allclose(y, nn.functional.linear(x, layer.weight, layer.bias) + plus, atol=1e-5)
    if of_x or of_plus:
        y.backward(dy)
    assert (x.grad is not None) == of_x and (plus.grad is not None) == of_plus
    assert not of_x or torch.allclose(x.grad, dy @ layer.weight, atol=1e-5)
    assert not of_plus or torch.equal(plus.grad, dy)


def test_a_weight_put_in_the_place_of_another_is_packed_anew():
    layer, x = PackedLinear(frozen(20, 10)), torch.randn(4, 20)
    layer.weight = nn.Parameter(torch.ones(10, 20), requires_grad=False)
    layer(x)
    layer.weight = nn.Parameter(torch.zeros(10, 20), requires_grad=False)
    assert torch.equal(layer(x), layer.bias.expand(4, 10))


def test_whatever_it_cannot_serve_runs_as_in_any_linear_layer():
    layer = PackedLinear(frozen(20, 10))
    x = torch.randn(4, 20)
    plain = nn.functional.linear
    assert torch.equal(layer(x[0]), plain(x[0], layer.weight, layer.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.double()
    assert torch.equal(layer(x.double()), plain(x.double(), layer.weight, layer.bias))
    layer.requires_grad_(True)
    layer(x.double()).sum().backward()
    assert layer.weight.grad is not None


def test_a_layer_that_has_worked_can_be_copied_and_pickled():
    layer, x = PackedLinear(frozen(20, 10)), torch.randn(4, 20)
    before = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), before)
        assert other.weight is not layer.weight
        assert set(other.state_dict()) == {"weight", "bias"}


def test_nothing_is_kept_for_the_backward_pass():
    kept = []
    layer, x = PackedLinear(frozen(384, 384)), torch.randn(8, 384, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert not kept


def test_only_large_frozen_linear_layers_are_packed():
    side = int(packed.LEAST**0.5)

    class Doubled(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "frozen": frozen(side, side),
            "small": frozen(side, side - 1),
            "trained": nn.Linear(side, side),
            "trained_bias": frozen(side, side),
            "other": Doubled(side, side).requires_grad_(False),
            "wide": frozen(side, side).double(),
            "spared": frozen(side, side),
        }
    )
    model["trained_bias"].bias.requires_grad_(True)
    weight = model["frozen"].weight
    assert pack_frozen(model, frozenset({id(model["spared"])})) == 1
    assert [name for name, module in model.items() if type(module) is PackedLinear] == ["frozen"]
    assert model["frozen"].weight is weight
