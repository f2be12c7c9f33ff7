"""An adapted layer computes what PEFT's computes, and privacy survives what saves memory."""

import copy

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import cross_entropy
from transformers.modeling_layers import GradientCheckpointingLayer

from fedlora.config.schema import Classification, Lora, Model
from fedlora.errors import PrivacyError
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.training.adapter import LEFT
from fedlora.training.load import load_model
from fedlora.values import Adapters, Factors

TOKENS = torch.tensor([[7, 8, 9, 10, 11, 12], [3, 4, 5, 6, 0, 0]])
MASK = (TOKENS != 0).long()


def load(place, targets=("query", "dense"), **changes):
    model = load_model(
        Model(name=place, **changes),
        Classification(kind="sequence-classification"),
        Lora(target_modules=list(targets), r=2, lora_alpha=6),
        ("a", "b"),
        3,
    )
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.trained.values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model


def losses(model):
    logits = model.peft_model(input_ids=TOKENS, attention_mask=MASK).logits
    return cross_entropy(logits.float(), torch.tensor([0, 1]), reduction="none")


def as_peft_has_it(model):
    for layer in model.peft_model.modules():
        if isinstance(layer, LoraLayer):
            del layer.forward  # the instance's own; the class's is PEFT's
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-5), ("bfloat16", 0.1)])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_logits_and_gradients_are_those_of_pefts_own_layers(tiny, name, dtype, tolerance):
    found = []
    for model in (load(tiny[name], dtype=dtype), as_peft_has_it(load(tiny[name], dtype=dtype))):
        each = losses(model)
        each.sum().backward()
        found.append([each.detach(), *(parameter.grad for parameter in model.trained.values())])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_a_disabled_adapter_is_pefts_own_business(tiny):
    model = load(tiny["bert"])
    with torch.no_grad(), model.peft_model.disable_adapter():
        base = losses(model)
    assert not torch.allclose(base, losses(model).detach())


def test_a_merged_adapter_counts_once(tiny):
    model = load(tiny["bert"])
    with torch.no_grad():
        apart = losses(model)
        model.peft_model.base_model.merge_adapter()
        assert torch.allclose(losses(model), apart, rtol=1e-4, atol=1e-5)


def clipped(model):
    return DirectEngine().clipped_sum(model.peft_model, model.trained, [lambda: losses(model)], 0.1)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_recomputed_activations_give_the_same_clipped_sums_and_keep_less(tiny, name):
    targets = {"distilbert": ["q_lin"]}.get(name, ["query", "dense"])
    plain, recomputing = (
        load(tiny[name], targets=targets, gradient_checkpointing=on) for on in (False, True)
    )
    assert not any(module.training for module in recomputing.peft_model.modules())
    kept = []
    for model in (plain, recomputing):
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, seen=storages: seen.update({t.untyped_storage().data_ptr(): t.nbytes}) or t, lambda t: t
        ):
            losses(model)
        kept.append(len(storages))
    assert kept[1] < kept[0] / 2
    whole, again = clipped(plain), clipped(recomputing)
    assert all(torch.allclose(again[name], whole[name], rtol=1e-5, atol=1e-8) for name in whole)


def test_a_checkpoint_that_hides_the_backward_pass_is_refused(tiny):
    model = load(tiny["bert"])
    model.peft_model.gradient_checkpointing_enable({"use_reentrant": True})
    for layer in model.peft_model.modules():
        layer.training = isinstance(layer, GradientCheckpointingLayer)  # which transformers asks for
    model.peft_model.enable_input_require_grads()
    with pytest.raises(PrivacyError, match="cannot be clipped"):
        clipped(model)


def test_b_lies_turned_in_memory_and_what_leaves_the_model_does_not(tiny):
    model = load(tiny["bert"])
    copied = copy.deepcopy(model.peft_model).get_parameter(
        "base_model.model.bert.encoder.layer.0.output.dense.lora_B.default.weight"
    )
    for _, b in [*model.live.values(), (None, copied)]:
        assert b.shape[1] == 2 and b.t().is_contiguous()
    start = Adapters(
        basis=0,
        scale=model.scale,
        sites={
            site: Factors(a=a.detach().clone(), b=b.detach().contiguous())
            for site, (a, b) in model.live.items()
        },
        head=model.head(),
    )
    model.load(start)
    assert all(b.t().is_contiguous() for _, b in model.live.values())
    assert all(change.is_contiguous() and not change.any() for change in model.delta(start).sites.values())


def test_a_left_frame_that_is_loaded_after_the_model_moved_is_the_one_it_computes_with(tiny):
    lora = Lora(target_modules=["query"], r=2, lora_alpha=2, trains="core")
    model = load_model(
        Model(name=tiny["bert"]), Classification(kind="sequence-classification"), lora, ("a", "b"), 3
    )
    model.peft_model.to(torch.float64)  # as a move to a device does, it makes every tensor anew
    before = losses(model).detach()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (*model.trained.values(), *model.left.values()):
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    moved = losses(model).detach()
    with torch.no_grad():
        for left in model.left.values():
            left.zero_()
    for site, layer in model.layers().items():
        assert getattr(layer, LEFT) is model.left[site]
    assert not torch.allclose(moved, before)
    assert not torch.allclose(losses(model).detach(), moved)
