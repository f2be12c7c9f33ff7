"""What is learnt from public text: the same everywhere, and it removes the shared component it was made for."""

import pytest
import torch

from fedlora.config.schema import CausalLm, Classification, Lora, Model
from fedlora.errors import ModelError
from fedlora.methods.subspace import Public, Subspace
from fedlora.training.load import load_model
from fedlora.training.public import input_directions, mean_inputs, public_rows, weight_directions
from fedlora.training.tokens import load_tokenizer

LORA = Lora(r=2, lora_alpha=2, target_modules=["query", "value"])


def classifier(path, pooler="identity"):
    task = Classification(kind="sequence-classification", pooler=pooler)
    return load_model(Model(name=str(path)), task, LORA, ("a", "b", "c"), seed=1)


def test_public_rows_are_a_constant_of_the_vocabulary(tiny_encoder):
    tokenizer = load_tokenizer(str(tiny_encoder))
    rows = public_rows(tokenizer)
    assert torch.equal(rows, public_rows(load_tokenizer(str(tiny_encoder))))
    assert rows.shape == (256, 14)
    assert set(rows[:, 0].tolist()) == {tokenizer.cls_token_id}
    assert set(rows[:, -1].tolist()) == {tokenizer.sep_token_id}
    assert not set(rows[:, 1:-1].flatten().tolist()) & set(tokenizer.all_special_ids)


def test_the_identity_pooler_centres_the_first_token(tiny_encoder):
    model, rows = classifier(tiny_encoder), public_rows(load_tokenizer(str(tiny_encoder)))
    encoder = model.peft_model.base_model.model.bert
    with torch.no_grad():
        out = encoder(input_ids=rows)
    before_tanh = torch.atanh(out.pooler_output.double().clamp(-1 + 1e-7, 1 - 1e-7))
    first = out.last_hidden_state[:, 0].double()
    inside = out.pooler_output.abs() < 0.99  # beyond, float32's tanh keeps no digits to invert
    error = (before_tanh - (first - first.mean(dim=0)))[inside]
    assert error.abs().max() < 1e-3


def test_a_model_without_a_pooler_is_refused(tmp_path, tiny_encoder):
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    DistilBertModel(config).save_pretrained(tmp_path)
    load_tokenizer(str(tiny_encoder)).save_pretrained(tmp_path)
    task = Classification(kind="sequence-classification", pooler="identity")
    lora = Lora(r=2, lora_alpha=2, target_modules=["q_lin"])
    with pytest.raises(ModelError, match="write pooler: checkpoint"):
        load_model(Model(name=str(tmp_path)), task, lora, ("a", "b"), seed=1)


def test_centred_rows_of_a_are_orthonormal_and_blind_to_the_mean_input(tiny_encoder):
    model = classifier(tiny_encoder)
    means = mean_inputs(model.peft_model, model.layers(), model.intake.public(None))
    assert set(means) == set(model.sites)
    subspace = Subspace(init="centred", refactor_every=1, seed=5)
    for site, mean in means.items():
        a = subspace.first(site, (32, 32), 2, torch.float64, Public(mean_input=mean)).a
        assert torch.allclose(a @ a.T, torch.eye(2, dtype=torch.float64), atol=1e-12)
        assert (a @ mean).abs().max() < 1e-12 * max(1.0, float(mean.norm()))
        plain = (
            Subspace(init="orthonormal", refactor_every=1, seed=5).first(site, (32, 32), 2, torch.float64).a
        )
        assert (plain @ mean).abs().max() > 1e-3


def test_mean_inputs_are_what_the_layers_see(tiny_encoder):
    model, tokenizer = classifier(tiny_encoder), load_tokenizer(str(tiny_encoder))
    with torch.no_grad():
        states = model.peft_model.base_model.model.bert(
            input_ids=public_rows(tokenizer), output_hidden_states=True
        ).hidden_states
    means = mean_inputs(model.peft_model, model.layers(), {"input_ids": public_rows(tokenizer)})
    site = "bert.encoder.layer.1.attention.self.query"
    assert torch.allclose(means[site], states[1].double().flatten(0, 1).mean(0), atol=1e-6)


def test_input_directions_hold_most_of_what_inputs_vary_by(tiny_encoder):
    model, tokenizer = classifier(tiny_encoder), load_tokenizer(str(tiny_encoder))
    with torch.no_grad():
        states = model.peft_model.base_model.model.bert(
            input_ids=public_rows(tokenizer), output_hidden_states=True
        ).hidden_states
    found = input_directions(model.peft_model, model.layers(), {"input_ids": public_rows(tokenizer)}, 3)
    for layer in (0, 1):
        rows = found[f"bert.encoder.layer.{layer}.attention.self.query"]
        inputs = states[layer].double().flatten(0, 1)
        inputs = inputs - inputs.mean(dim=0)
        assert torch.allclose(rows @ rows.T, torch.eye(3, dtype=torch.float64), atol=1e-9)
        kept = (inputs @ rows.T).square().sum()
        best = torch.linalg.svdvals(inputs)[:3].square().sum()  # Eckart and Young
        assert torch.isclose(kept, best, rtol=1e-6)


def test_weight_directions_are_the_best_rank_r_cut_of_the_frozen_weight(tiny_encoder):
    model = classifier(tiny_encoder)
    for site, (left, right) in weight_directions(model.layers(), 4).items():
        weight = model.layers()[site].get_base_layer().weight.detach().double()
        assert left.shape == right.shape == (4, 32)
        cut = left.T @ (left @ weight @ right.T) @ right
        tail = torch.linalg.svdvals(weight)[4:].square().sum().sqrt()
        assert torch.isclose((weight - cut).norm(), tail, rtol=1e-9)


def test_a_causal_model_has_public_rows_too(tmp_path, tiny_encoder):
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(str(tiny_encoder))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lora = Lora(r=2, lora_alpha=2, target_modules=["q_proj"])
    model = load_model(Model(name=str(tmp_path)), CausalLm(kind="causal-lm"), lora, (), seed=1)
    (mean,) = mean_inputs(model.peft_model, model.layers(), {"input_ids": public_rows(tokenizer)}).values()
    assert mean.shape == (16,)
    assert mean.isfinite().all()
