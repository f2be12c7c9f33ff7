import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    OPTConfig,
    OPTModel,
    RobertaConfig,
    RobertaModel,
)

from fedlora.errors import ModelError
from fedlora.training.positions import require_positions

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}


def shapes(model):
    return {name: parameter.shape for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("model", "most"),
    [
        (GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, vocab_size=11)), 16),
        (RobertaModel(RobertaConfig(**SMALL, intermediate_size=8, max_position_embeddings=18)), 16),
        (OPTModel(OPTConfig(**SMALL, ffn_dim=8, max_position_embeddings=16, word_embed_proj_dim=8)), 16),
    ],
    ids=lambda value: type(value).__name__,
)
def test_as_many_tokens_as_there_are_places_pass_through_and_no_more(model, most):
    name = type(model).__name__
    require_positions(name, shapes(model), most)
    model(input_ids=torch.full((1, most), 3))
    with pytest.raises(ModelError, match=f"{name} has places for {most}; write {most} or less"):
        require_positions(name, shapes(model), most + 1)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, most + 1), 3))


def test_who_turns_instead_is_given_texts_of_any_length_and_images_have_none():
    model = LlamaModel(LlamaConfig(**SMALL, intermediate_size=8, max_position_embeddings=16))
    require_positions("LlamaModel", shapes(model), 100)
    model(input_ids=torch.full((1, 100), 3))
    require_positions("BertModel", {"embeddings.position_embeddings.weight": (16, 8)}, None)
