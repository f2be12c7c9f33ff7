"""A local model as its files describe it, read without torch: what it is, its tensors' names and shapes."""

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import ModelError

MOST_HEADER = 100 << 20
"""Bytes; a longer safetensors header is no header."""
ATTENTION = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("q", "v"),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("c_attn",),
)
"""What queries and values are called, the usual place for LoRA; where the three are one layer, that one."""

TRANSPOSED = ("GPT2", "OpenAIGPT")
"""How architectures are called whose layers are transformers' Conv1D, with weights (in, out)."""


RENAMED = {
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.output.dense.": "attention.o_proj.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
}
"""What files of image models call their layers, and what transformers calls them once loaded; the first that fits."""

VISION = ("ViT", "DeiT", "Dinov2")
"""How architectures are called of which that is so."""

LOOKED_UP = re.compile(
    r"embed(ding)?s?|.+_embed(ding)?s?|embed_(in|out|tokens|positions)|wte|wpe|shared|relative_attention_bias"
)
"""How embeddings are called: their weights are matrices, too, but they multiply nothing."""

WITHOUT_POOLER = (*VISION, "Roberta", "XLMRoberta", "Camembert", "MPNet")
"""How architectures are called whose classifiers leave the pooler out, though a file may have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a model's directory says of it.

    causal: it predicts the next token. pooled: made for sentence embeddings, so its pooler was never trained.
    hidden: width of what its last layer leaves, where the config says so.
    vocabulary: words that it knows, likewise. shapes: of each tensor by name, layers as the loaded model calls them.
    patches: of an image model's image.
    """

    architecture: str
    causal: bool
    pooled: bool
    hidden: int | None
    vocabulary: int | None
    shapes: Mapping[str, tuple[int, ...]]
    patches: int | None = None

    @property
    def numbers(self) -> int:
        """Parameters of the whole model."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def attention(self) -> tuple[str, ...]:
        """Ends of the names of the layers that make queries and values.

        Raises:
            ModelError: it has none of a known name.
        """
        layers = self.layers()
        for names in ATTENTION:
            if all(any(layer.rpartition(".")[2] == name for layer in layers) for name in names):
                return names
        ends = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
        raise ModelError(
            f"{self.architecture}: no layer has a name that queries and values usually have; it has {ends}: write some "
            "of them into lora.target_modules"
        )

    def out_and_in(self, layer: str) -> tuple[int, int]:
        """(out, in) of one of `layers`; the GPT-2 family keeps its own the other way round."""
        first, second = self.shapes[f"{layer}.weight"]
        return (second, first) if self.architecture.startswith(TRANSPOSED) else (first, second)

    def layers(self) -> list[str]:
        """Linear layers of the encoder or decoder. Embeddings and heads have matrices, too, and are not among them."""
        matrices = {
            name.removesuffix(".weight"): shape
            for name, shape in self.shapes.items()
            if name.endswith(".weight") and len(shape) == 2
        }
        inside = _inside(self.shapes)
        return [
            name
            for name, shape in matrices.items()
            if name.startswith(inside)
            and not _looked_up(name)
            and (_numbered(name) or self._applied(name, shape))
        ]

    def _applied(self, name: str, shape: tuple[int, ...]) -> bool:
        """Of what is not in the stack: neither a row for each word (embeddings, the decoder's output) nor left out."""
        left_out = self.architecture.startswith(WITHOUT_POOLER) and is_pooler(name)
        return shape != (self.vocabulary, self.hidden) and not left_out


def look(directory: Path) -> Look:
    """What `save_pretrained` left there.

    Raises:
        ModelError: it is no directory of a model, or its weights are no safetensors.
    """
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise ModelError(f"{directory}: no config.json; name a directory as `save_pretrained` writes it")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        architectures = config.get("architectures") or [config["model_type"]]
        found = {name: shape for file in _files(directory) for name, shape in _shapes(file).items()}
        shapes = {_as_loaded(name, str(architectures[0])): shape for name, shape in found.items()}
        patches = _patches(config)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, struct.error) as error:
        raise ModelError(
            f"{directory}: no model that can be read ({type(error).__name__}: {error}); write it again"
        ) from None
    return Look(
        architecture=str(architectures[0]),
        causal=any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in architectures),
        hidden=next(
            (int(config[key]) for key in ("hidden_size", "n_embd", "d_model", "dim") if key in config), None
        ),
        vocabulary=config.get("vocab_size"),
        pooled=(directory / "modules.json").exists(),
        shapes=shapes,
        patches=patches,
    )


def _as_loaded(name: str, architecture: str) -> str:
    for theirs, ours in RENAMED.items() if architecture.startswith(VISION) else ():
        if theirs in name:
            return name.replace(theirs, ours)
    return name


def _inside(names: Iterable[str]) -> str:
    """What paths within the encoder or decoder begin with; empty where nothing but it is in the file.

    That is where both the layers of the stack and everything that is embedded lie.
    """
    names = list(names)
    stacked = {name.partition(".")[0] for name in names if _numbered(name)}
    embedded = {name.partition(".")[0] for name in names if any(map(LOOKED_UP.fullmatch, name.split(".")))}
    return f"{stacked.pop()}." if len(stacked) == 1 and stacked == embedded else ""


def is_pooler(name: str) -> bool:
    """Whether a path leads into what makes one vector of a text."""
    return "pooler" in name.split(".")


def _numbered(name: str) -> bool:
    """Whether a path leads into the stack."""
    return any(word.isdigit() for word in name.split("."))


def _looked_up(name: str) -> bool:
    return LOOKED_UP.fullmatch(name.rpartition(".")[2]) is not None


def _patches(config: Mapping[str, Any]) -> int | None:
    """Of an image, by the size of both; None of a model without images."""
    image, patch = config.get("image_size"), config.get("patch_size")
    if image is None or patch is None:
        return None
    sides = [
        [int(side) for side in size] if isinstance(size, list) else [int(size)] * 2 for size in (image, patch)
    ]
    return math.prod(whole // part for whole, part in zip(*sides, strict=True))


def _files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [directory / name for name in sorted(set(names))]
    whole = directory / "model.safetensors"
    if whole.is_file():
        return [whole]
    raise ModelError(
        f"{directory}: no model.safetensors; load the model once and save it with `save_pretrained`, which writes it"
    )


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """From the header alone: eight bytes of its length, then JSON."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > MOST_HEADER:
            raise ValueError(f"{file.name} has no safetensors header")
        header = json.loads(stream.read(length))
    return {name: tuple(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"}
