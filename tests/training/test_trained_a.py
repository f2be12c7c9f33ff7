"""A client that trains A, B or both: each record's gradient is autograd's, and noise covers exactly what is sent."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedlora.algebra.deltas import tensors
from fedlora.config.schema import CausalLm, Classification, Lora, Model
from fedlora.errors import ModelError, ShapeError
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.noise import SeededNoise
from fedlora.privacy.opacus_engine import OpacusEngine
from fedlora.privacy.step import private_gradient
from fedlora.training.load import load_model
from fedlora.training.model import LORA_A, LORA_B
from fedlora.values import Adapters, Factors, Mechanism

SIDES = ("b", "a", "both")
TOKENS = torch.tensor([[7, 8, 9, 10, 11, 12], [3, 4, 5, 6, 0, 0], [2, 9, 4, 0, 0, 0]])
LABELS = torch.tensor([0, 1, 1])


def loaded(place, trains="ab"):
    model = load_model(
        Model(name=place, dtype="float64"),
        Classification(kind="sequence-classification"),
        Lora(target_modules=["query", "key", "dense"], r=2, lora_alpha=6, trains=trains),
        ("a", "b"),
        3,
    )
    draw = torch.Generator().manual_seed(0)
    sites = {
        site: Factors(
            a=torch.randn(2, d_in, generator=draw, dtype=torch.float64) * 0.3,
            b=torch.randn(d_out, 2, generator=draw, dtype=torch.float64) * 0.3,
            rest=torch.randn(d_out, d_in, generator=draw, dtype=torch.float64) * 0.1,
        )
        for site, (d_out, d_in) in model.shapes().items()
    }
    head = {
        name: torch.randn(value.shape, generator=draw, dtype=torch.float64)
        for name, value in model.head().items()
    }
    adapters = Adapters(basis=0, scale=3.0, sites=sites, head=head)
    model.load(adapters)
    return model, adapters


def losses(model, rows=slice(None)):
    mask = (TOKENS[rows] != 0).long()
    logits = model.peft_model(input_ids=TOKENS[rows], attention_mask=mask).logits
    return cross_entropy(logits, LABELS[rows], reduction="none")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize("engine", [DirectEngine(), OpacusEngine()])
def test_the_clipped_sum_is_that_of_each_record_alone_by_autograd(tiny, name, side, engine):
    model, _ = loaded(tiny[name])
    trained = model.trained_on(side)
    wanted = {key: torch.zeros_like(p) for key, p in trained.items()}
    bound = 0.4
    for record in range(len(TOKENS)):
        (loss,) = losses(model, slice(record, record + 1))
        gradients = torch.autograd.grad(loss, list(trained.values()))
        length = torch.cat([g.flatten() for g in gradients]).norm()
        for key, gradient in zip(trained, gradients, strict=True):
            wanted[key] += gradient * min(1.0, bound / float(length))
    got = engine.clipped_sum(model.peft_model, trained, [lambda: losses(model)], bound)
    assert got.keys() == wanted.keys()
    for key in wanted:
        assert wanted[key].abs().max() > 1e-6
        # Opacus divides by a norm that is 1e-6 too large
        assert torch.allclose(got[key], wanted[key], rtol=0, atol=1e-5 * float(wanted[key].abs().max()))


@pytest.mark.parametrize("side", SIDES)
def test_noise_covers_exactly_the_numbers_that_are_sent(tiny, side):
    model, adapters = loaded(tiny["bert"])
    trained = model.trained_on(side)
    gradient = private_gradient(
        DirectEngine(), model.peft_model, trained, [],
        mechanism=Mechanism(max_grad_norm=1.0, noise_multiplier=1.0),
        expected_batch=1.0, noise=SeededNoise(3), purpose=("run", "client", 1, 0),
    )  # fmt: skip
    with torch.no_grad():
        for name, value in gradient.items():
            trained[name] += value
    sent = tensors(model.delta(adapters, side))
    assert sum(value.numel() for value in sent) == sum(value.numel() for value in gradient.values())
    assert all(bool((value != 0).all()) for value in sent)
    untouched = {"b": "a", "a": "b"}.get(side)
    for site, (a, b) in model.live.items():
        kept = {"a": a, "b": b}
        if untouched:
            assert torch.equal(kept[untouched], getattr(adapters.sites[site], untouched))


def test_exactly_what_a_side_trains_requires_a_gradient(tiny):
    model, _ = loaded(tiny["bert"])
    for side, ends in (("b", LORA_B), ("a", LORA_A), ("both", (LORA_A, LORA_B))):
        trained = model.trained_on(side)
        needing = {id(p) for p in model.peft_model.parameters() if p.requires_grad}
        assert needing == {id(p) for p in trained.values()}
        assert {name for name in trained if name.endswith((LORA_A, LORA_B))} == {
            name for name in model.trained if name.endswith(ends)
        }
        assert set(model.head()) < set(trained)


def test_a_model_whose_a_is_frozen_trains_no_other_side(tiny):
    model = load_model(
        Model(name=tiny["bert"]),
        Classification(kind="sequence-classification"),
        Lora(target_modules=["query"], r=2, lora_alpha=2),
        ("a", "b"),
        3,
    )
    for side in ("a", "both"):
        with pytest.raises(ShapeError, match=f"{side}.*A is frozen here; write lora.trains: ab"):
            model.trained_on(side)
    assert model.trained_on("b").keys() == model.trained.keys()


def test_a_rest_is_added_to_the_weight_and_goes_when_it_is_sent_no_more(tiny):
    model, adapters = loaded(tiny["bert"], trains="b")
    with_rest = losses(model).detach()
    plain = {site: Factors(a=f.a, b=f.b) for site, f in adapters.sites.items()}
    model.load(Adapters(basis=0, scale=3.0, sites=plain, head=adapters.head))
    without = losses(model).detach()
    assert not model.rests() and (with_rest - without).abs().max() > 1e-4
    for site, layer in model.layers().items():
        with torch.no_grad():
            layer.base_layer.weight += adapters.sites[site].rest
    assert torch.allclose(losses(model), with_rest, rtol=1e-9, atol=1e-12)


def test_a_rest_of_another_shape_is_refused_and_nothing_is_loaded(tiny):
    model, adapters = loaded(tiny["bert"], trains="b")
    site = model.sites[0]
    odd = Factors(a=torch.zeros(2, 5), b=torch.zeros(7, 2), rest=torch.zeros(7, 5))
    before = {name: p.detach().clone() for name, p in model.trained.items()}
    with pytest.raises(ShapeError):
        model.load(Adapters(basis=0, scale=3.0, sites={**adapters.sites, site: odd}, head=adapters.head))
    assert all(torch.equal(before[name], p) for name, p in model.trained.items())
    with pytest.raises(ShapeError, match="rest"):
        Factors(a=torch.zeros(2, 5), b=torch.zeros(7, 2), rest=torch.zeros(5, 7))


def test_a_rank_above_a_side_loads_for_an_export_alone(tiny):
    given = (
        Model(name=tiny["llama"]),
        CausalLm(kind="causal-lm"),
        Lora(r=33, lora_alpha=33, target_modules=["q_proj", "v_proj"]),
        (),
        0,
    )
    with pytest.raises(ModelError, match="exceeds"):
        load_model(*given)
    model = load_model(*given, any_rank=True)
    assert all(a.shape[0] == b.shape[1] == 33 for a, b in model.live.values())
