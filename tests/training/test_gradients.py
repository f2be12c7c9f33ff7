"""Directions of gradients on public records: autograd's own of the frozen weights, with nothing left behind."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from fedlora.config.schema import CausalLm, Classification, Lora, Model
from fedlora.data.records import Examples
from fedlora.errors import DataError
from fedlora.training.gradients import gradient_directions
from fedlora.training.load import load_model
from fedlora.training.tasks import losses

TARGETS = {"bert": ["query", "output.dense"], "llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
TOKENS = np.random.default_rng(3).integers(3, 60, size=48).astype(np.int32)


def records(labels=(0, 1, 2, 2, 0, 1)):
    offsets = np.linspace(0, len(TOKENS), len(labels) + 1).astype(np.int64)
    return Examples(input_ids=TOKENS, offsets=offsets, labels=np.array(labels, dtype=np.int64))


def loaded(path, name, **lora):
    causal = name in ("llama", "gpt2")
    task = CausalLm(kind="causal-lm") if causal else Classification(kind="sequence-classification")
    rank = Lora(r=3, lora_alpha=3, target_modules=TARGETS[name], **lora)
    model = Model(
        name=str(path), kernels="torch"
    )  # packed weights are no parameters, to be differentiated by
    return load_model(model, task, rank, () if causal else ("a", "b", "c"), seed=1)


def one_step_of_the_head(model, examples):
    """As autograd sees it, over all records at once."""
    head = [name for name in model.trained if name in model.head()]
    loss = sum(loss().sum() for loss in losses(model, examples, np.arange(len(examples)))) / len(examples)
    gradients = torch.autograd.grad(loss, [model.trained[name] for name in head])
    with torch.no_grad():
        for name, gradient in zip(head, gradients, strict=True):
            model.trained[name] -= gradient


def of_autograd(model, examples):
    """Each frozen weight's gradient of the summed loss, (d_out, d_in)."""
    weights = {site: frozen_of(layer) for site, layer in model.layers().items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    loss = sum(loss().sum() for loss in losses(model, examples, np.arange(len(examples))))
    gradients = torch.autograd.grad(loss, list(weights.values()))
    turned = isinstance(next(iter(model.layers().values())).get_base_layer(), Conv1D)
    return {
        site: (gradient.T if turned else gradient).double()
        for site, gradient in zip(weights, gradients, strict=True)
    }


def frozen_of(layer):
    return layer.get_base_layer().weight


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("trains", ["b", "core", "ab"])
def test_the_directions_are_the_singular_vectors_of_autograds_gradient(tiny, name, trains):
    model, reference = (loaded(tiny[name], name, trains=trains) for _ in range(2))
    examples = records()
    found = gradient_directions(model, examples, 3)
    if reference.head():
        one_step_of_the_head(reference, examples)
    for site, gradient in of_autograd(reference, examples).items():
        columns, rows = found[site]
        assert columns.shape == (3, gradient.shape[0]) and rows.shape == (3, gradient.shape[1])
        assert rows.dtype == torch.float64
        assert_close(rows @ rows.T, torch.eye(3, dtype=torch.float64))
        # Diagonal between the frames, with the largest singular values: so both are the first singular vectors.
        between = (columns @ gradient @ rows.T).abs()
        largest = torch.linalg.svdvals(gradient)[:3]
        scale = float(largest[0])
        assert_close(between, torch.diag(largest), rtol=0, atol=1e-4 * scale)


def test_recomputed_layers_count_once(tiny):
    path = tiny["bert"]
    task = Classification(kind="sequence-classification")
    rank = Lora(r=2, lora_alpha=2, target_modules=TARGETS["bert"])
    plain, again = (
        load_model(Model(name=path, gradient_checkpointing=c), task, rank, ("a", "b", "c"), 1)
        for c in (False, True)
    )
    expected, found = (gradient_directions(model, records(), 2) for model in (plain, again))
    for site in expected:
        for ours, theirs in zip(found[site], expected[site], strict=True):
            assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("trains", ["b", "ab"])
def test_nothing_is_left_behind(tiny, trains):
    model = loaded(tiny["bert"], "bert", trains=trains)
    before = {name: parameter.detach().clone() for name, parameter in model.trained.items()}
    gradient_directions(model, records(), 2)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.trained.items())
    assert all(parameter.grad is None for parameter in model.trained.values())
    assert not any(layer._forward_hooks for layer in model.layers().values())


def test_records_that_would_move_nothing_are_refused(tiny):
    """No token of theirs is learned, so no weight has a gradient, and its directions would be anything."""
    model = loaded(tiny["llama"], "llama")
    silent = Examples(
        input_ids=TOKENS,
        offsets=np.array([0, 24, 48], dtype=np.int64),
        trained=np.zeros(len(TOKENS), dtype=np.bool_),
    )
    with pytest.raises(DataError, match=r"its 2 records do not move"):
        gradient_directions(model, silent, 2)
