"""What a step is taken on: sizes of the model, of its adapter and of the batch; all weights random."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fedlora.config.schema import CausalLm, Classification, Lora, Model
from fedlora.training.checkpoints import DTYPES, quiet
from fedlora.training.load import load_model
from fedlora.training.model import AdaptedModel

VOCABULARY = 1024
"""Small, so that a language model's logits are not the work; looking a token up costs the same in a large one."""
CLASSES = ("a", "b", "c", "d")
FIRST_WORD = 5
"""Below lie the tokens that mean padding in one model or another; records are not padded, so nothing is masked."""
SEED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One batch through one model.

    shape: minilm is all-MiniLM-L6-v2's, roberta RoBERTa-large's, llama a 7B's layers, tiny for trying out.
    linears: which linear layers are adapted, of each of `layers`. records, tokens: of the batch.
    memory: whether peaks are taken. judged: whether its figures are held against the goals.
    """

    name: str
    shape: Literal["minilm", "roberta", "llama", "tiny"] = "minilm"
    layers: int = 6
    linears: Literal["q,v", "all"] = "q,v"
    records: int
    tokens: int
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    memory: bool = True
    judged: bool = True

    @property
    def causal(self) -> bool:
        """Whether it is a language model; all others are classifiers."""
        return self.shape == "llama"

    @property
    def lora(self) -> Lora:
        """Rank 8 and a scale that is not 1."""
        targets = _TARGETS["llama" if self.causal else "bert"][self.linears]
        return Lora(r=8, lora_alpha=16.0, target_modules=list(targets))

    def save(self, directory: Path) -> None:
        """`directory` holds a checkpoint of this shape, and the problem itself."""
        kind, sizes = _SHAPES[self.shape]
        config = AutoConfig.for_model(
            kind, vocab_size=VOCABULARY, num_hidden_layers=self.layers, max_position_embeddings=600, **sizes
        )
        torch.manual_seed(SEED)
        with quiet():
            model = (AutoModelForCausalLM if self.causal else AutoModel).from_config(config)
            model.to(DTYPES[self.dtype]).save_pretrained(directory)
        (directory / "problem.json").write_text(json.dumps(asdict(self)))

    def ours(self, directory: Path, kernels: str) -> AdaptedModel:
        """Our own model from that checkpoint, on the problem's device; its head is frozen, only B moves."""
        chosen: Any = {"name": str(directory), "dtype": self.dtype, "kernels": kernels}
        kind = "causal-lm" if self.causal else "sequence-classification"
        task = CausalLm(kind=kind) if self.causal else Classification(kind=kind, head="frozen")
        adapted = load_model(Model(**chosen), task, self.lora, CLASSES, SEED)
        adapted.peft_model.to(self.device)
        return adapted

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Words (records, tokens), and the class (records,) of each record, of which language models take no note."""
        generator = torch.Generator().manual_seed(SEED)
        words = torch.randint(FIRST_WORD, VOCABULARY, (self.records, self.tokens), generator=generator)
        return words.to(self.device), (torch.arange(self.records) % len(CLASSES)).to(self.device)


def problem_in(directory: Path) -> Problem:
    """What `Problem.save` wrote."""
    return Problem(**json.loads((directory / "problem.json").read_text()))


_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "bert",
        {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128, **_NO_DROPOUT},
    ),
    "minilm": (
        "bert",
        {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, **_NO_DROPOUT},
    ),
    "roberta": (
        "roberta",
        {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, **_NO_DROPOUT},
    ),
    "llama": ("llama", {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008}),
}

_TARGETS = {
    # ".output.dense" ends both the attention's and the layer's own; the pooler's bare "dense" stays out
    "bert": {
        "q,v": ("query", "value"),
        "all": ("query", "key", "value", "intermediate.dense", "output.dense"),
    },
    "llama": {
        "q,v": ("q_proj", "v_proj"),
        "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    },
}


def _minilm(linears: Literal["q,v", "all"], records: int, tokens: int) -> Problem:
    words = "q,v" if linears == "q,v" else "all linear"
    return Problem(
        name=f"MiniLM {words} n{records} T{tokens}", linears=linears, records=records, tokens=tokens
    )


_TINY = Problem(
    name="tiny", shape="tiny", layers=2, linears="all", records=4, tokens=8, memory=False, judged=False
)

QUICK = (_TINY, _minilm("q,v", 8, 32))

FULL = (
    _minilm("q,v", 32, 64),
    _minilm("all", 32, 64),
    _minilm("q,v", 8, 32),
    _minilm("all", 8, 32),
    Problem(name="RoBERTa-large q,v n8 T32", shape="roberta", layers=24, records=8, tokens=32),
    Problem(
        name="RoBERTa-large all linear n8 T32",
        shape="roberta",
        layers=24,
        linears="all",
        records=8,
        tokens=32,
    ),
    Problem(name="7B layer q,v n2 T128", shape="llama", layers=1, records=2, tokens=128),
    Problem(
        name="7B layer all linear n2 T128", shape="llama", layers=1, linears="all", records=2, tokens=128
    ),
)

CUDA = (
    Problem(name="MiniLM q,v n32 T64, GPU", records=32, tokens=64, device="cuda"),
    Problem(
        name="RoBERTa-large q,v n64 T128, GPU",
        shape="roberta",
        layers=24,
        records=64,
        tokens=128,
        device="cuda",
    ),
    Problem(
        name="RoBERTa-large all linear n64 T128, GPU",
        shape="roberta",
        layers=24,
        linears="all",
        records=64,
        tokens=128,
        device="cuda",
    ),
    Problem(
        name="RoBERTa-large all linear n64 T128, GPU, bfloat16",
        shape="roberta",
        layers=24,
        linears="all",
        records=64,
        tokens=128,
        device="cuda",
        dtype="bfloat16",
    ),
    Problem(
        name="7B layers all linear n16 T512, GPU, bfloat16",
        shape="llama",
        layers=4,
        linears="all",
        records=16,
        tokens=512,
        device="cuda",
        dtype="bfloat16",
    ),
)
