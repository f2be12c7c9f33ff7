"""Language models end to end: what a run leaves generates the same words through transformers and PEFT alone."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedlora.config.schema import RunConfig
from fedlora.errors import ConfigError
from fedlora.export.peft_directory import as_peft, load_adapter, peft_lora, ranks_in, write_adapter
from fedlora.export.vllm import require_servable_by_vllm
from fedlora.methods import build
from fedlora.runs.beginning import first_state
from fedlora.runs.summary import summary_so_far
from fedlora.runs.trained import trained_adapters
from fedlora.runtime.simulate import simulate
from fedlora.training.load import load_model

WORDS = [
    "the", "a", "old", "new", "rain", "wind", "sun", "bread", "salt", "oven", "drum", "song", "choir",
    "near", "under", "with", "falls", "bakes", "sings", "and",
]  # fmt: skip
SMALL = {"vocab_size": len(WORDS) + 3, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
PROMPTS = ("the old rain", "a new song falls", "bread and salt")
STORIES = os.environ.get("FEDLORA_TEST_LLAMA", "")
"""Directory of a small pretrained llama, for whoever has one."""


def quiet(_: object) -> None:
    pass


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SMALL))


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, **SMALL))


@pytest.fixture(scope="session")
def decoders(tmp_path_factory) -> dict[str, Path]:
    """A tiny GPT-2, whose layers are Conv1D, and a tiny llama, each with a tokenizer of whole words."""
    root = tmp_path_factory.mktemp("decoders")
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for model in (gpt2(), llama()):
            model.save_pretrained(root / model.config.model_type)
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(
                root / model.config.model_type
            )
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def causal(tiny_config, tmp_path) -> Callable[..., RunConfig]:
    """A run of a few seconds that continues sentences of these words."""
    draw = torch.Generator().manual_seed(8)
    for name, lines in (("train", 120), ("test", 20)):
        rows = [
            " ".join(WORDS[n] for n in torch.randint(len(WORDS), (8,), generator=draw)) for _ in range(lines)
        ]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["text", *rows]) + "\n")

    def build_config(model: Path, **changes: object) -> RunConfig:
        data = {
            "source": "files", "train": str(tmp_path / "train.tsv"), "test": str(tmp_path / "test.tsv"),
            "text": "text", "label": None, "max_length": 12, "partition": {"kind": "iid", "clients": 2},
        }  # fmt: skip
        return tiny_config(
            **{
                "model__name": str(model), "task": {"kind": "causal-lm"}, "data": data,
                "lora": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
                "federation__rounds": 2, "federation__local_steps": 1,
                "federation__optimizer": {"name": "sgd", "lr": 8.0}, **changes,
            }
        )  # fmt: skip

    return build_config


def exported(config: RunConfig, run_dir: Path, to: Path, **how: bool):
    adapters, classes = trained_adapters(run_dir)
    summary = summary_so_far(run_dir)
    write_adapter(to, config=config, adapters=adapters, classes=classes, summary=summary, **how)
    return adapters


def greedy(model, tokenizer, prompt: str) -> list[int]:
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    mask = torch.ones_like(tokens)
    return model.generate(
        input_ids=tokens, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=2
    )[0].tolist()


def live(config: RunConfig, adapters):
    model = load_model(config.model, config.task, config.lora, (), config.seed)
    model.load(adapters)
    model.peft_model.config.use_cache = True
    return model.peft_model.eval()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_exported_adapter_generates_the_live_models_tokens(causal, decoders, tmp_path, name):
    pattern = {"attn.c_attn": 4, "mlp.c_fc": 1} if name == "gpt2" else {"q_proj": 4, "up_proj": 1}
    lora = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "rank_pattern": pattern}
    config = causal(decoders[name], lora=lora)
    run_dir = simulate(config, tmp_path / "run", quiet)
    adapters = exported(config, run_dir, tmp_path / "a")
    assert {len(factors.a) for factors in adapters.sites.values()} == {1, 2, 4}
    tokenizer = AutoTokenizer.from_pretrained(decoders[name])
    base = AutoModelForCausalLM.from_pretrained(decoders[name])
    without = [greedy(base, tokenizer, prompt) for prompt in PROMPTS]
    theirs = PeftModel.from_pretrained(base, tmp_path / "a").eval()
    wanted = [greedy(live(config, adapters), tokenizer, prompt) for prompt in PROMPTS]
    assert [greedy(theirs, tokenizer, prompt) for prompt in PROMPTS] == wanted != without
    again = config.model_copy(update={"lora": peft_lora(config.lora, ranks_in(tmp_path / "a"))})
    model = load_model(again.model, again.task, again.lora, (), 5)
    load_adapter(tmp_path / "a", model, ())
    assert [greedy(model.peft_model, tokenizer, prompt) for prompt in PROMPTS] == wanted
    begun = config.model_copy(
        update={"lora": config.lora.model_copy(update={"from_adapter": str(tmp_path / "a")})}
    )
    model = load_model(begun.model, begun.task, begun.lora, (), 5)
    state = first_state(begun, model, build(begun.method, begun.lora, begun.seed))
    assert [greedy(live(config, state.adapters), tokenizer, prompt) for prompt in PROMPTS] == wanted


@pytest.mark.parametrize("merge", [False, True])
def test_one_rank_for_all_layers_is_the_same_model(causal, decoders, tmp_path, merge):
    lora = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 5}}
    config = causal(decoders["llama"], lora=lora)
    run_dir = simulate(config, tmp_path / "run", quiet)
    adapters = exported(config, run_dir, tmp_path / "a", one_rank=not merge, merge=merge)
    tokenizer = AutoTokenizer.from_pretrained(decoders["llama"])
    place = tmp_path / "a" if merge else decoders["llama"]
    theirs = AutoModelForCausalLM.from_pretrained(place)
    if not merge:
        assert ranks_in(tmp_path / "a") == (5, None)
        served = require_servable_by_vllm(config, as_peft(adapters))
        assert (served.rank, served.max_lora_rank, served.options) == (5, 8, "--enable-lora")
        theirs = PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    wanted = [greedy(live(config, adapters), tokenizer, prompt) for prompt in PROMPTS]
    assert [greedy(theirs, tokenizer, prompt) for prompt in PROMPTS] == wanted


def test_what_vllm_would_refuse_is_told_with_the_next_move(causal, decoders, tiny_config):
    from fedlora.values import Adapters, Factors

    def sites(name: str, r: int) -> Adapters:
        return Adapters(basis=0, scale=1.0, sites={name: Factors(a=torch.ones(r, 4), b=torch.ones(4, r))})

    decoder = causal(decoders["llama"])
    assert (
        require_servable_by_vllm(decoder, sites("l.q_proj", 17)).options == "--enable-lora --max-lora-rank 32"
    )
    with pytest.raises(ConfigError, match="rank 513 exceeds its largest, 512: export with --merge"):
        require_servable_by_vllm(decoder, sites("l.q_proj", 513))
    with pytest.raises(ConfigError, match="knows no layers named gate_2"):
        require_servable_by_vllm(decoder, sites("l.gate_2", 2))
    with pytest.raises(ConfigError, match="no adapters for GPT2LMHeadModel: export with --merge"):
        require_servable_by_vllm(causal(decoders["gpt2"]), sites("h.c_attn", 2))
    with pytest.raises(ConfigError, match="modules_to_save"):
        require_servable_by_vllm(tiny_config(), sites("l.query", 2))


def test_rounded_weights_and_recomputed_layers_train_a_language_model(causal, decoders, tmp_path):
    base = simulate(causal(decoders["llama"]), tmp_path / "base", quiet)
    recomputed = causal(decoders["llama"], model__gradient_checkpointing=True)
    again = simulate(recomputed, tmp_path / "again", quiet)
    for site, factors in trained_adapters(base)[0].sites.items():
        torch.testing.assert_close(trained_adapters(again)[0].sites[site].b, factors.b, rtol=1e-4, atol=1e-5)
    for bits in ("int8", "nf4"):
        config = causal(decoders["llama"], model__quantization=bits)
        run_dir = simulate(config, tmp_path / bits, quiet)
        exported(config, run_dir, tmp_path / f"{bits}-adapter")
        assert summary_so_far(run_dir)["state_sha256"] != summary_so_far(base)["state_sha256"]


@pytest.mark.skipif(not STORIES, reason="FEDLORA_TEST_LLAMA names no directory of a small pretrained llama")
def test_a_real_small_llama_generates_the_same_story(causal, tmp_path):
    config = causal(Path(STORIES))
    run_dir = simulate(config, tmp_path / "run", quiet)
    adapters = exported(config, run_dir, tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(STORIES), tmp_path / "a").eval()
    for prompt in ("Once upon a time", "The little dog", "Lily wanted to"):
        assert greedy(theirs, tokenizer, prompt) == greedy(live(config, adapters), tokenizer, prompt)
