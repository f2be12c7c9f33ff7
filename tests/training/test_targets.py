"""Which layers are adapted, and with which rank: the same as PEFT would, by name, suffix, path and all-linear."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, TaskType, get_peft_model
from peft.utils.other import get_pattern_key
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedlora.config.ranks import matching
from fedlora.config.schema import CausalLm, Classification, Lora, Model
from fedlora.errors import ModelError
from fedlora.training.load import load_model
from fedlora.training.model import ADAPTER

CLASSES = ("a", "b", "c")
CAUSAL = ("llama", "gpt2")
TOKENS = torch.arange(1, 13).reshape(2, 6)


def loaded(path, name, **lora):
    task = (
        CausalLm(kind="causal-lm")
        if name in CAUSAL
        else Classification(kind="sequence-classification", head="trained")
    )
    cfg = Lora(**{"r": 2, "lora_alpha": 4, **lora})
    return load_model(Model(name=path), task, cfg, () if name in CAUSAL else CLASSES, 1)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "llama", "gpt2"])
def test_all_linear_adapts_the_layers_that_peft_adapts(tiny, name):
    causal = name in CAUSAL
    kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    base = kind.from_pretrained(tiny[name], **({} if causal else {"num_labels": 3}))
    task = TaskType.CAUSAL_LM if causal else TaskType.SEQ_CLS
    theirs = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type=task))
    wanted = {n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    ours = loaded(tiny[name], name, target_modules="all-linear")
    # PEFT excludes one layer of the head by its name; a head of several layers is carried whole here
    inside = {site for site in wanted if not site.startswith(("classifier", "head", "pre_classifier"))}
    assert set(ours.sites) == inside and len(ours.sites) > 4


def test_all_linear_keeps_to_the_layers_of_the_config(tiny):
    sites = loaded(tiny["bert"], "bert", target_modules="all-linear", layers_to_transform=[1]).sites
    assert len(sites) == 6 and all(".layer.1." in site for site in sites)
    with pytest.raises(ModelError, match=r"has no layer \[7\]"):
        loaded(tiny["bert"], "bert", target_modules="all-linear", layers_to_transform=[7])


PATTERN = {"layer.0.attention.self.query": 5, "query": 1, "intermediate.dense": 3}


def test_a_rank_pattern_gives_each_layer_its_rank_at_one_scale(tiny):
    names = ["query", "value", "intermediate.dense"]
    model = loaded(tiny["bert"], "bert", target_modules=names, rank_pattern=PATTERN)
    found = {site.removeprefix("bert.encoder."): a.shape[0] for site, (a, _) in model.live.items()}
    assert found == {
        "layer.0.attention.self.query": 5, "layer.1.attention.self.query": 1,
        "layer.0.attention.self.value": 2, "layer.1.attention.self.value": 2,
        "layer.0.intermediate.dense": 3, "layer.1.intermediate.dense": 3,
    }  # fmt: skip
    assert {layer.scaling[ADAPTER] for layer in model.layers().values()} == {model.scale} == {2.0}


def test_layers_of_one_input_and_unequal_ranks_compute_as_peft_does(tiny):
    model = loaded(
        tiny["bert"], "bert", target_modules=["query", "key", "value"], rank_pattern={"query": 5, "key": 1}
    )
    with torch.no_grad():
        for _, b in model.live.values():
            b.normal_(generator=torch.Generator().manual_seed(b.shape[1]))
        got = model.peft_model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
        for layer in model.layers().values():
            del layer.forward  # back to PEFT's own
        wanted = model.peft_model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_pattern_that_no_layer_has_and_a_rank_too_large_are_refused(tiny):
    with pytest.raises(ModelError, match="'keys' is the end of no adapted layer's path"):
        loaded(tiny["bert"], "bert", target_modules=["query"], rank_pattern={"keys": 1})
    with pytest.raises(ModelError, match=r"lora.rank_pattern: 17 exceeds"):
        loaded(tiny["bert"], "bert", target_modules=["query"], rank_pattern={"query": 17})


@given(
    st.lists(st.sampled_from(["q", "v", "a.q", "1.a.q", "layer.1", r"layer\.\d+\.a.q", "x"]), unique=True),
    st.sampled_from(["layer.1.a.q", "layer.2.a.q", "layer.1.a.v", "layer.1.a.xq", "q"]),
)
def test_patterns_match_as_in_peft(patterns, site):
    found = matching(patterns, site)
    assert get_pattern_key(patterns, site) == (site if found is None else found)
