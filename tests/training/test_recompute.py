"""Recomputed layers stay in evaluation mode: they draw no dropout, also where a layer draws it itself, as OPT's do."""

import copy

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from fedlora.config.schema import CausalLm, Lora, Model
from fedlora.data.records import Examples
from fedlora.errors import ModelError
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.training.load import load_model
from fedlora.training.model import transformer_of
from fedlora.training.recompute import recompute_layers
from fedlora.training.tasks import evaluate, losses

EXAMPLES = Examples(
    input_ids=np.random.default_rng(5).integers(3, 60, size=48).astype(np.int32),
    offsets=np.linspace(0, 48, 7).astype(np.int64),
)
EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64, some thirty products deep
TARGETS = ["q_proj", "v_proj"]


def load(place, *, recompute):
    cfg = Model(name=place, dtype="float64", kernels="torch", gradient_checkpointing=recompute)
    model = load_model(
        cfg, CausalLm(kind="causal-lm"), Lora(target_modules=TARGETS, r=2, lora_alpha=6), (), 3
    )
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.trained.values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model


def gradients(model):
    loss = sum(run().sum() for run in losses(model, EXAMPLES, np.arange(len(EXAMPLES))))
    return [loss.detach(), *torch.autograd.grad(loss, list(model.trained.values()))]


def clipped(model):
    batches = losses(model, EXAMPLES, np.arange(len(EXAMPLES)))
    return DirectEngine().clipped_sum(model.peft_model, model.trained, batches, 0.1)


@pytest.fixture
def pair(tiny):
    """A model whose layers draw dropout themselves, whole and recomputed."""
    whole, recomputed = (load(tiny["opt"], recompute=recompute) for recompute in (False, True))
    assert transformer_of(recomputed.peft_model).config.dropout == 0.1
    return whole, recomputed


def test_scores_are_equal_time_after_time(pair):
    whole, recomputed = pair
    assert [evaluate(recomputed, EXAMPLES) for _ in range(3)] == [evaluate(whole, EXAMPLES)] * 3


def test_gradients_and_clipped_sums_are_those_of_whole_layers_time_after_time(pair):
    whole, recomputed = pair
    assert_close(gradients(recomputed), gradients(whole), **EXACT)
    assert all(map(torch.equal, gradients(recomputed), gradients(recomputed)))
    assert_close(clipped(recomputed), clipped(whole), **EXACT)


def test_no_module_is_ever_in_training_mode(pair):
    _, recomputed = pair
    assert not any(module.training for module in recomputed.peft_model.modules())


def test_every_layer_runs_again_in_the_backward_pass_and_keeps_less(pair, monkeypatch):
    inner, ran, kept = OPTDecoderLayer.forward, [], []
    monkeypatch.setattr(
        OPTDecoderLayer, "forward", lambda layer, *a, **k: ran.append(layer.training) or inner(layer, *a, **k)
    )
    for model in pair:
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, seen=storages: seen.update({t.untyped_storage().data_ptr(): t.nbytes}) or t, lambda t: t
        ):
            loss = sum(run().sum() for run in losses(model, EXAMPLES, np.arange(len(EXAMPLES))))
        kept.append(len(storages))
        forward = len(ran)
        loss.backward()
        assert len(ran) - forward == (forward if model is pair[1] else 0)
        assert not any(ran)
        ran.clear()
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_no_cache_of_keys_is_written_to(tiny, name):
    """A model inside another may keep a `use_cache` of its own, and would then write the same keys twice."""
    model, tokens = load(tiny[name], recompute=True), torch.arange(3, 15).reshape(2, 6)
    transformer_of(model.peft_model).config.use_cache = True
    output = model.peft_model(input_ids=tokens)
    output.logits.sum().backward()
    assert output.past_key_values.get_seq_length() == 0
    with torch.no_grad():  # where nothing runs again, it may
        assert model.peft_model(input_ids=tokens).past_key_values.get_seq_length() == 6


def test_a_copy_recomputes_its_own_layers(pair):
    _, recomputed = pair
    copied = copy.deepcopy(recomputed.peft_model)
    layers = [module for module in copied.modules() if isinstance(module, OPTDecoderLayer)]
    assert len(layers) == 2 and all(layer.forward.args == (layer,) for layer in layers)


def test_a_model_that_transformers_cannot_recompute_is_refused(pair, monkeypatch):
    whole, _ = pair
    monkeypatch.setattr(type(transformer_of(whole.peft_model)), "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match="cannot recompute OPTForCausalLM's layers; write false"):
        recompute_layers(whole.peft_model)
