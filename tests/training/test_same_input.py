"""Sites that are given one tensor share one product, which changes no number and keeps nothing."""

import copy
import gc
import io
import weakref

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import cross_entropy

from fedlora.config.schema import CausalLm, Classification, Lora, Model
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.training.adapter import scale_low
from fedlora.training.load import load_model
from fedlora.training.same_input import SameInput

TOKENS = torch.tensor([[7, 8, 9, 10, 11, 12], [3, 4, 5, 6, 13, 14]])
TARGETS = {
    "bert": ["query", "key", "value", "intermediate.dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
SHARED = {"bert": [["key", "query", "value"]] * 2, "gpt2": []}
SHARED["llama"] = [["k_proj", "q_proj", "v_proj"], ["gate_proj", "up_proj"]] * 2


def load(tiny, name, **changes):
    task = Classification(kind="sequence-classification") if name == "bert" else CausalLm(kind="causal-lm")
    lora = Lora(target_modules=TARGETS[name], r=2, lora_alpha=6)
    model = load_model(Model(name=tiny[name], dtype="float64", **changes), task, lora, ("a", "b"), 3)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.trained.values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model


def losses(model, rows=slice(None)):
    tokens = TOKENS[rows]
    logits = model.peft_model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    if not model.causal:
        return cross_entropy(logits, torch.tensor([0, 1])[rows], reduction="none")
    return cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(dim=1)


def layers(model):
    return [module for module in model.peft_model.modules() if isinstance(module, LoraLayer)]


def groups(model):
    found = [layer.forward.args[1] for layer in layers(model)]
    return list({id(group): group for group in found if group}.values())


def apart(model):
    for layer in layers(model):
        scale_low(layer, None)
    return model


def gradients(model):
    each = losses(model)
    return [each.detach(), *torch.autograd.grad(each.sum(), list(model.trained.values()))]


def assert_equal(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12 * float(other.abs().max()))


def clipped(model):
    return list(
        DirectEngine().clipped_sum(model.peft_model, model.trained, [lambda: losses(model)], 0.1).values()
    )


class Products:
    """How many products of A were asked for while it is open."""

    def __init__(self, monkeypatch):
        self.common = 0
        kept = SameInput.low

        def counting(group, layer, x):
            found = kept(group, layer, x)
            self.common += found is not None
            return found

        monkeypatch.setattr(SameInput, "low", counting)


@pytest.mark.parametrize("name", list(TARGETS))
def test_sites_with_one_input_are_found_and_no_others(tiny, name):
    model = load(tiny, name)
    names = {id(m): path.rpartition(".")[2] for path, m in model.peft_model.named_modules()}
    assert [sorted(names[id(layer)] for layer in group.layers) for group in groups(model)] == SHARED[name]


@pytest.mark.parametrize("name", list(TARGETS))
@pytest.mark.parametrize("recompute", [False, True])
def test_losses_and_gradients_are_those_of_sites_apart(tiny, name, recompute, monkeypatch):
    asked = Products(monkeypatch)
    wanted = apart(load(tiny, name))
    ours = load(tiny, name, gradient_checkpointing=recompute)
    asked.common = 0
    assert_equal(gradients(ours), gradients(wanted))
    assert asked.common >= sum(map(len, SHARED[name]))
    assert_equal(clipped(ours), clipped(wanted))


@pytest.mark.parametrize("name", list(TARGETS))
def test_clipped_sums_are_those_of_autograd_one_record_at_a_time(tiny, name):
    model = load(tiny, name)
    total = [torch.zeros_like(parameter) for parameter in model.trained.values()]
    for row in range(len(TOKENS)):
        own = torch.autograd.grad(losses(model, slice(row, row + 1)).sum(), list(model.trained.values()))
        norm = torch.cat([part.flatten() for part in own]).norm()
        assert norm > 0.1  # or clipping would not be seen
        for kept, part in zip(total, own, strict=True):
            kept += part * (0.1 / norm)
    assert_equal([one.to(torch.float64) for one in clipped(model)], total)


@pytest.fixture
def group(tiny):
    model = load(tiny, "bert")
    return groups(model)[0]


def exact(layer, x):
    """Of PEFT's own modules, one by one."""
    return layer.lora_A["default"](x) * layer.scaling["default"]


def test_each_takes_its_part_once_and_nothing_is_left(group):
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    parts = [group.low(layer, x) for layer in group.layers]
    assert_equal(parts, [exact(layer, x) for layer in group.layers])
    assert group.low(group.layers[1], x) is None
    held = weakref.ref(parts[0]._base), weakref.ref(x)
    del x, parts
    assert [one() for one in held] == [None, None]


@pytest.mark.parametrize("change", ["another", "in place", "A", "with gradient"])
def test_another_or_a_changed_input_is_computed_anew(group, change):
    first, second, _ = group.layers
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    with torch.no_grad():
        group.low(first, x)
    still_there = x
    if change == "another":
        x = still_there + 1
    elif change == "in place":
        x.mul_(2)
    elif change == "A":
        with torch.no_grad():
            second.lora_A["default"].weight.mul_(2)
    with torch.set_grad_enabled(change == "with gradient"):
        assert group.low(second, x) is None
        # and the whole layer, which falls back, is right
        group.low(first, x)
        assert torch.allclose(group.low(second, x), exact(second, x), rtol=1e-12)


def test_what_an_error_left_goes_with_its_input(tiny):
    model = load(tiny, "bert")
    group = groups(model)[0]
    broken = group.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        losses(model)
    broken.remove()
    gc.collect()
    assert group._offer.x() is None and not group._offer.parts
    assert_equal(gradients(model), gradients(apart(load(tiny, "bert"))))


def test_no_gradient_first_and_then_one(tiny):
    model, wanted = load(tiny, "bert"), apart(load(tiny, "bert"))
    with torch.no_grad():
        before = losses(model)
    assert_equal(gradients(model), gradients(wanted))
    assert torch.allclose(before, losses(wanted).detach(), rtol=1e-12)


def test_whatever_is_written_into_an_a_is_computed_with(tiny):
    model, wanted = load(tiny, "bert"), apart(load(tiny, "bert"))
    for change in (
        lambda a: a.data.mul_(3),
        lambda a: a.copy_(a + 1),
        lambda a: setattr(a, "data", a.data * 2),
    ):
        for one in (model, wanted):
            with torch.no_grad():
                for a, _ in one.live.values():
                    change(a)
        assert_equal(gradients(model), gradients(wanted))


def test_copies_pickles_and_casts_compute_with_their_own_a(tiny):
    model = load(tiny, "bert")
    losses(model)
    copied = copy.deepcopy(model.peft_model)
    file = io.BytesIO()
    torch.save(model.peft_model, file)
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False)):
        assert other.base_model is not model.peft_model.base_model
        with torch.no_grad():
            mask = torch.ones_like(TOKENS)
            before = model.peft_model(input_ids=TOKENS, attention_mask=mask).logits
            assert torch.equal(other(input_ids=TOKENS, attention_mask=mask).logits, before)
            for name, parameter in other.named_parameters():
                if ".lora_A." in name:
                    parameter.mul_(5)
            assert not torch.equal(other(input_ids=TOKENS, attention_mask=mask).logits, before)
            assert torch.equal(model.peft_model(input_ids=TOKENS, attention_mask=mask).logits, before)
    model.peft_model.float()
    assert losses(model).dtype == torch.float32


def test_a_trained_or_watched_a_is_a_call_of_its_own(tiny):
    model, wanted = load(tiny, "bert"), apart(load(tiny, "bert"))
    found = []
    for one in (model, wanted):
        a = next(layer for layer in one.peft_model.modules() if isinstance(layer, LoraLayer)).lora_A[
            "default"
        ]
        a.requires_grad_(True)
        found.append(torch.autograd.grad(losses(one).sum(), [a.weight]))
        a.requires_grad_(False)
        calls = []
        handle = a.register_forward_hook(lambda *_, seen=calls: seen.append(1))
        losses(one)
        handle.remove()
        assert calls == [1]
    assert_equal(*found)


def test_inference_mode_computes_the_same(tiny):
    model, wanted = load(tiny, "bert"), apart(load(tiny, "bert"))
    with torch.inference_mode():
        found = losses(model)
    assert torch.allclose(found, losses(wanted), rtol=1e-12)


def test_what_is_written_into_an_a_is_in_the_common_matrix_without_a_copy(group):
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    group.low(group.layers[0], x)
    before = group.matrix
    with torch.no_grad():
        for layer in group.layers:
            layer.lora_A["default"].weight.mul_(2)
    assert torch.allclose(group.low(group.layers[0], x), exact(group.layers[0], x), rtol=1e-12)
    assert group.matrix is before


def test_a_first_layer_that_is_on_its_own_leaves_nothing_to_take(group):
    first, second, _ = group.layers
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    group.low(first, x)
    first.lora_A["default"].requires_grad_(True)
    assert group.low(first, x) is None
    assert group.low(second, x) is None
