"""What vLLM asks of an adapter that it serves, checked before it is written.

Read in its own source and list of models: vllm/config/lora.py, vllm/lora/peft_helper.py, vllm/lora/lora_model.py.
"""

from dataclasses import dataclass

from fedlora.config.schema import RunConfig
from fedlora.errors import ConfigError
from fedlora.training.checkpoints import architecture
from fedlora.values import Adapters

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be. An adapter of any rank up to it is taken: nothing has to be filled up to it."""
DEFAULT_RANK = 16

WITHOUT = frozenset({
    "ArcticForCausalLM", "BloomForCausalLM", "DbrxForCausalLM", "FalconForCausalLM", "FalconMambaForCausalLM",
    "FlexOlmoForCausalLM", "GPT2LMHeadModel", "GPTJForCausalLM", "GPTNeoXForCausalLM", "Gemma3nForCausalLM",
    "MPTForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM", "OlmoeForCausalLM", "OrionForCausalLM",
    "StableLmForCausalLM", "Zamba2ForCausalLM",
})  # fmt: skip
"""Decoders that vLLM's list of models has, without adapters."""

LAYERS = frozenset({
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj",
    "gate_up_proj", "fc1", "fc2", "c_attn", "c_fc", "c_proj", "dense", "query_key_value", "dense_h_to_4h",
    "dense_4h_to_h", "W_pack", "wqkv", "wo", "w1", "w2", "w3", "in_proj", "x_proj",
})  # fmt: skip
"""Last names of the linear layers in decoders for which vLLM has adapters; another name is none it expects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """How vLLM is started for it. rank: the adapter's, of all layers. max_lora_rank: the least option that does."""

    rank: int
    max_lora_rank: int

    @property
    def options(self) -> str:
        """Of `vllm serve`."""
        enough = self.max_lora_rank <= DEFAULT_RANK
        return "--enable-lora" + ("" if enough else f" --max-lora-rank {self.max_lora_rank}")


def require_servable_by_vllm(config: RunConfig, adapters: Adapters) -> Served:
    """How to serve the adapter, written with one rank for all layers: vLLM reads no `rank_pattern`.

    Args:
        config: of the run.
        adapters: as PEFT has them, with no rest.

    Raises:
        ConfigError: everything that vLLM would refuse, with what to do.
    """
    wrong: list[str] = []
    if config.task.kind != "causal-lm":
        wrong.append(
            f"task.kind is {config.task.kind}, whose head travels in modules_to_save, which it takes from no adapter: "
            "serve it with transformers and PEFT"
        )
    elif (name := architecture(config.model.name)) in WITHOUT:
        wrong.append(f"it has no adapters for {name}: export with --merge, and serve the whole model")
    strange = sorted({site.rpartition(".")[2] for site in adapters.sites} - LAYERS)
    if strange and not wrong:
        wrong.append(f"it knows no layers named {', '.join(strange)}: export with --merge, or adapt others")
    rank = max(len(factors.a) for factors in adapters.sites.values())
    if rank > RANKS[-1]:
        wrong.append(f"rank {rank} exceeds its largest, {RANKS[-1]}: export with --merge")
    if wrong:
        raise ConfigError(f"--for vllm: vLLM would not serve this adapter: {'; '.join(wrong)}")
    return Served(rank=rank, max_lora_rank=next(most for most in RANKS if rank <= most))
