"""Tiny models of several architectures, written once as a user's own directory would be."""

import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaModel,
    XLNetConfig,
    XLNetLMHeadModel,
)  # fmt: skip

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32,
       "max_position_embeddings": 40, "dropout": 0.1, "attention_dropout": 0.1, "init_std": 0.2,
       "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def _tiny_models():
    yield "bert", BertModel(BertConfig(vocab_size=60, **SIZES))
    yield "bert-without-pooler", BertModel(BertConfig(vocab_size=60, **SIZES), add_pooling_layer=False)
    roberta = RobertaConfig(vocab_size=60, max_position_embeddings=40, **SIZES)
    yield "roberta", RobertaModel(roberta, add_pooling_layer=False)
    yield (
        "distilbert",
        DistilBertModel(DistilBertConfig(vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=32)),
    )
    yield "modernbert", ModernBertForMaskedLM(ModernBertConfig(vocab_size=60, **SIZES, **MARKS))
    yield "llama", LlamaForCausalLM(LlamaConfig(vocab_size=60, **SIZES))
    yield "gpt2", GPT2LMHeadModel(GPT2Config(vocab_size=60, **GPT))
    yield "opt", OPTForCausalLM(OPTConfig(vocab_size=60, **OPT))
    yield "xlnet", XLNetLMHeadModel(XLNetConfig(vocab_size=60, d_model=16, n_layer=2, n_head=2, d_inner=32))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Directory of each tiny model, by architecture."""
    root = tmp_path_factory.mktemp("models")
    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, model in _tiny_models():
            model.save_pretrained(root / name)
    return {folder.name: str(folder) for folder in root.iterdir()}
