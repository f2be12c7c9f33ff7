"""What a model's files say of it without torch is what the loaded model is."""

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora.training.look import look

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
DISTIL = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
OPT = {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 16}
CLASSIFIER, DECODER = "ForSequenceClassification", "ForCausalLM"


@pytest.mark.parametrize(
    ("kind", "sizes", "saved", "loaded"),
    [
        ("Bert", SMALL, "Model", CLASSIFIER),
        ("Bert", SMALL, CLASSIFIER, CLASSIFIER),
        ("Roberta", SMALL, "Model", CLASSIFIER),
        ("Roberta", SMALL, "ForMaskedLM", CLASSIFIER),
        (
            "Electra",
            {**SMALL, "embedding_size": 16},
            "Model",
            CLASSIFIER,
        ),  # embeddings_project is a linear layer
        ("MPNet", SMALL, "Model", CLASSIFIER),
        ("DistilBert", DISTIL, "ForMaskedLM", CLASSIFIER),
        ("GPT2", GPT2, "Model", "LMHeadModel"),
        ("GPT2", GPT2, "LMHeadModel", "LMHeadModel"),
        ("Llama", {**SMALL, "tie_word_embeddings": False}, DECODER, DECODER),
        ("GPTNeoX", SMALL, DECODER, DECODER),
        ("OPT", OPT, DECODER, DECODER),
    ],
)
def test_its_layers_are_the_linear_ones_of_the_encoder_or_decoder(tmp_path, kind, sizes, saved, loaded):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = getattr(transformers, f"{kind}Config")(**sizes)
        getattr(transformers, f"{kind}{saved}")(whole).save_pretrained(tmp_path)
        model = getattr(transformers, f"{kind}{loaded}")(whole)
    inside = f"{model.base_model_prefix}."
    linear = {
        name.removeprefix(inside)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.startswith(inside)
    }
    assert {name.removeprefix(inside) for name in look(tmp_path).layers()} == linear
