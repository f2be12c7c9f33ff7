"""A last layer that runs for the first token alone where nothing else of it is read."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import DistilBertConfig, DistilBertModel

from fedlora.config.schema import Classification, Lora, Model
from fedlora.data.records import Examples
from fedlora.training.first_token import narrow_last_layer
from fedlora.training.load import load_model
from fedlora.training.tasks import losses

LENGTHS = [3, 9, 4, 12, 1, 7]
EVERYWHERE = ["query", "key", "value", "attention.output.dense", "intermediate.dense"]


def model_of(place, targets, **task):
    lora = Lora(r=2, lora_alpha=2.0, target_modules=targets)
    task = Classification(kind="sequence-classification", **task)
    adapted = load_model(Model(name=str(place), dtype="float64"), task, lora, ("a", "b", "c"), 0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from zero, where most gradients would be equal
        for parameter in adapted.trained.values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return adapted


def by_record(adapted):
    """Loss and gradients of each record, (n, 1 + trained numbers)."""
    draw = np.random.default_rng(0)
    examples = Examples(
        input_ids=draw.integers(5, 30, size=sum(LENGTHS)).astype(np.int32),
        offsets=np.cumsum([0, *LENGTHS]),
        labels=draw.integers(0, 3, size=len(LENGTHS)),
    )
    (run,) = losses(adapted, examples, np.arange(len(examples)))
    rows = []
    for loss in run():
        gradients = torch.autograd.grad(loss, list(adapted.trained.values()), retain_graph=True)
        rows.append(torch.cat([loss.detach()[None], *(gradient.flatten() for gradient in gradients)]))
    return torch.stack(rows)


def tokens_through(adapted, name):
    """Grows by the tokens a record of every pass through this module."""
    seen: list[int] = []
    module = adapted.peft_model.get_submodule(f"base_model.model.bert.encoder.{name}")
    module.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[1]))
    return seen


@pytest.mark.parametrize("targets", [["query", "value"], EVERYWHERE])
@pytest.mark.parametrize("task", [{}, {"head": "frozen"}, {"pooler": "identity"}])
def test_every_record_has_the_loss_and_the_gradient_of_the_whole_layer(tiny_encoder, targets, task):
    adapted = model_of(tiny_encoder, targets, **task)
    whole = by_record(adapted)
    assert narrow_last_layer(adapted)
    seen = {name: tokens_through(adapted, name) for name in ("layer.0.intermediate", "layer.1.intermediate")}
    found = by_record(adapted)
    # float64: some hundred products of order 1, rounded by 1e-16 each
    assert_close(found, whole, rtol=1e-12, atol=1e-12)
    assert whole[:, 1:].abs().max() > 1e-3
    assert seen == {"layer.0.intermediate": [max(LENGTHS)], "layer.1.intermediate": [1]}


@pytest.mark.parametrize(
    "reads", [lambda out: out + 1e-3 * out.mean(dim=1, keepdim=True), lambda out: out + 1e-3 * out[:, 1:2]]
)
def test_a_model_that_reads_more_than_the_first_token_keeps_its_whole_layer(tiny_encoder, reads):
    adapted = model_of(tiny_encoder, ["query"])
    encoder = adapted.peft_model.get_submodule("base_model.model.bert.encoder")
    encoder.layer[-1].register_forward_hook(lambda _module, _inputs, output: reads(output))
    whole = by_record(adapted)
    assert not narrow_last_layer(adapted)
    assert torch.equal(by_record(adapted), whole)


def test_a_layer_of_another_build_stays_as_it_is(tmp_path):
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    DistilBertModel(DistilBertConfig(vocab_size=60, **sizes)).save_pretrained(tmp_path)
    adapted = model_of(tmp_path, ["q_lin"])
    whole = by_record(adapted)
    assert not narrow_last_layer(adapted)
    assert torch.equal(by_record(adapted), whole)


def test_the_trial_leaves_what_is_trained_as_it_was(tiny_encoder):
    adapted = model_of(tiny_encoder, ["query"])
    before = {name: parameter.detach().clone() for name, parameter in adapted.trained.items()}
    assert narrow_last_layer(adapted)
    assert all(torch.equal(before[name], parameter) for name, parameter in adapted.trained.items())
    assert all(parameter.grad is None for parameter in adapted.trained.values())
