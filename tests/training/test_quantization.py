"""A model on a quantised base: what is rounded and what never is, and that privacy does not notice."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from fedlora.config.schema import CausalLm, Classification, Lora, Model, Sgd
from fedlora.data.records import Examples
from fedlora.errors import ModelError
from fedlora.kernels.packed import available
from fedlora.kernels.quantised import QuantisedLinear
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.noise import SeededNoise
from fedlora.privacy.opacus_engine import OpacusEngine
from fedlora.privacy.sampling import poisson
from fedlora.training.checkpoints import base_digest, weights_digest
from fedlora.training.client import Node, train
from fedlora.training.load import load_model
from fedlora.training.model import transformer_of
from fedlora.training.packing import overhead_of
from fedlora.training.prefix import frozen_prefix
from fedlora.values import Adapters, Factors, LocalWork, TrainRequest

TARGETS = {
    "bert": ["query", "dense"],
    "llama": ["q_proj", "down_proj"],
    "distilbert": ["q_lin"],
    "gpt2": ["c_attn"],
}
TOKENS = torch.tensor([[7, 8, 9, 10, 11, 12], [3, 4, 5, 6, 0, 0], [9, 9, 5, 0, 0, 0]])
MASK = (TOKENS != 0).long()
CLIP = 0.1
FORMATS = ("int8", "nf4")


def load(tiny, name="bert", layers=None, **changes):
    causal = name in ("llama", "gpt2")
    model = load_model(
        Model(name=tiny[name], **changes),
        CausalLm(kind="causal-lm") if causal else Classification(kind="sequence-classification"),
        Lora(target_modules=TARGETS[name], r=2, lora_alpha=6, layers_to_transform=layers),
        () if causal else ("a", "b"),
        3,
    )
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.trained.values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model


def losses(model, rows=slice(None)):
    logits = model.peft_model(input_ids=TOKENS[rows], attention_mask=MASK[rows]).logits.float()
    if model.causal:
        each = cross_entropy(logits.transpose(1, 2), TOKENS[rows], reduction="none")
        return (each * MASK[rows]).sum(dim=1)
    return cross_entropy(logits, torch.tensor([0, 1, 1])[rows], reduction="none")


def rounded_layers(model):
    layers = transformer_of(model.peft_model).named_modules()
    return {path: layer for path, layer in layers if isinstance(layer, QuantisedLinear)}


def whole_with_rounded_weights(tiny, name, quantised):
    """An unquantised model in plain torch, its frozen weights overwritten with what the quantised one stands for."""
    model = load(tiny, name, kernels="torch")
    for path, layer in rounded_layers(quantised).items():
        transformer_of(model.peft_model).get_submodule(path).weight.data.copy_(layer.dense(torch.float32))
    return model


@pytest.mark.parametrize(
    ("engine", "recompute"), [(DirectEngine, False), (DirectEngine, True), (OpacusEngine, False)]
)
@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("name", ["bert", "llama", "distilbert"])
def test_clipped_sums_are_those_of_autograd_one_by_one_over_the_rounded_weights(
    tiny, name, quantization, recompute, engine
):
    model = load(tiny, name, quantization=quantization, gradient_checkpointing=recompute)
    with torch.no_grad():
        losses(model)
    found = engine().clipped_sum(model.peft_model, model.trained, [lambda: losses(model)], CLIP)
    oracle = whole_with_rounded_weights(tiny, name, model)
    wanted = {key: torch.zeros(p.shape, dtype=torch.float64) for key, p in oracle.trained.items()}
    for row in range(len(TOKENS)):
        alone = losses(oracle, slice(row, row + 1)).sum()
        gradient = torch.autograd.grad(alone, list(oracle.trained.values()))
        norm = torch.cat([part.flatten() for part in gradient]).double().norm()
        for key, part in zip(wanted, gradient, strict=True):
            wanted[key] += part.double() * min(1.0, float(CLIP / norm))
    # float32 throughout, some thirty products deep, of gradients that were clipped to CLIP
    assert_close({k: v.double() for k, v in found.items()}, wanted, rtol=1e-4, atol=1e-5 * CLIP)


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_in_bfloat16_clipped_sums_are_those_to_its_rounding(tiny, name, quantization):
    model = load(tiny, name, quantization=quantization, dtype="bfloat16")
    oracle = whole_with_rounded_weights(tiny, name, model)
    found, wanted = (
        torch.cat(
            [
                part.flatten().double()
                for part in DirectEngine()
                .clipped_sum(one.peft_model, one.trained, [lambda one=one: losses(one)], CLIP)
                .values()
            ]
        )
        for one in (model, oracle)
    )
    assert (found - wanted).norm() < 0.1 * wanted.norm()  # roundings of 2^-9, some thirty in a row


def update(model):
    """What three steps of a client without clipping and noise change, as one row."""
    records = 12
    examples = Examples(
        input_ids=np.random.default_rng(1).integers(3, 60, size=records * 9, dtype=np.int32),
        offsets=np.arange(records + 1) * 9,
        labels=None if model.causal else np.arange(records) % 2,
    )
    node = Node(
        client="c", model=model, examples=examples, declared_records=records, sampling=poisson(8, records),
        optimizer=Sgd(name="sgd", lr=0.1), mechanism=None, alone=False, evaluation_noise=None, budget=None,
        engine=DirectEngine(), noise=SeededNoise(1),
    )  # fmt: skip
    sites = {site: Factors(a=a.detach().clone(), b=b.detach().clone()) for site, (a, b) in model.live.items()}
    start = Adapters(basis=0, scale=model.scale, sites=sites, head=model.head())
    work = LocalWork(steps=3, learning_rate=0.1)
    request = TrainRequest(run="r", base_model="w", code="k", round=1, adapters=start, work=work)
    delta = train(node, request, None).delta
    return torch.cat([change.flatten() for change in (*delta.sites.values(), *delta.head.values())])


@pytest.mark.parametrize(("quantization", "most"), [("int8", 0.02), ("nf4", 0.4)])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_an_update_stays_near_that_on_the_whole_base(tiny, name, quantization, most):
    # Weights move by 0.7 % (int8) and 9 % (nf4) of their norm, and what layers pass on adds up: here to 0.6 and 13 %
    # of the update at most, and a limit is three times that. In MiniLM's six layers gradients move by 3 and 26 %.
    whole, near = (update(load(tiny, name, quantization=bits)) for bits in ("none", quantization))
    assert 0 < (near - whole).norm() < most * whole.norm()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_all_frozen_linear_layers_inside_are_rounded_and_nothing_else(tiny, name):
    model = load(tiny, name, quantization="nf4", dtype="bfloat16")
    rounded = {id(layer) for layer in rounded_layers(model).values()}
    assert len(rounded) == {"bert": 2 * 6 + 1, "llama": 2 * 7}[name]
    for a, b in model.live.values():
        assert a.dtype == b.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in model.trained.values())
    plain = {path for path, layer in model.peft_model.named_modules() if isinstance(layer, nn.Linear)}
    assert all(any(mark in path for mark in ("lora_", "classifier", "lm_head")) for path in plain)


def test_a_pooler_that_the_export_carries_is_not_rounded(tiny):
    model = load_model(
        Model(name=tiny["bert-without-pooler"], quantization="nf4"),
        Classification(kind="sequence-classification"),
        Lora(target_modules=["query"], r=2, lora_alpha=2),
        ("a", "b"),
        3,
    )
    assert rounded_layers(model) and not any("pooler" in path for path in rounded_layers(model))


def test_a_model_without_such_layers_is_refused(tiny):
    with pytest.raises(ModelError, match=r"model\.quantization: GPT2LMHeadModel has no frozen nn.Linear"):
        load(tiny, "gpt2", quantization="int8")


@pytest.mark.parametrize("quantization", FORMATS)
def test_frozen_layers_below_the_lowest_adapted_one_can_still_be_left_out(tiny, quantization):
    assert frozen_prefix(load(tiny, layers=[1], quantization=quantization)) is not None


def test_a_merge_into_rounded_weights_is_no_silent_loss(tiny):
    model = load(tiny, quantization="nf4")
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        model.peft_model.base_model.merge_adapter()


def test_records_are_packed_as_on_the_whole_base(tiny):
    assert overhead_of(load(tiny, quantization="nf4")) == overhead_of(load(tiny))


@pytest.mark.skipif(not available(), reason="no oneDNN here")
def test_kernels_decide_whether_onednn_multiplies(tiny):
    for kernels, expected in (("auto", True), ("onednn", True), ("torch", False)):
        layers = rounded_layers(load(tiny, quantization="nf4", kernels=kernels))
        assert {layer.onednn for layer in layers.values()} == {expected}


def test_what_is_computed_with_has_a_digest_of_its_own(tiny):
    digests = {base_digest(Model(name=tiny["bert"], quantization=bits)) for bits in ("none", *FORMATS)}
    assert len(digests) == 3 and weights_digest(tiny["bert"]) in digests
