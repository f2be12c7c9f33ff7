"""Where pretrained weights lie, and how they become a model. The network comes last, and never to hang on."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, assert_never

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from fedlora.config import schema
from fedlora.errors import ModelError
from fedlora.kernels.quantised import FORMATS
from fedlora.training.from_adapter import adapter_digest
from fedlora.training.image_recipe import load_recipe
from fedlora.training.places import cached, not_found, packaged, require_askable

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}

HUB_TIMEOUT_S = 5.0
HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]


def locate(name: str) -> Path:
    """The directory that holds `name`: itself, in the hub's cache, in a package, or now downloaded.

    Raises:
        ModelError: in none of these, or there without a configuration.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ModelError(
                f"model.name {name!r}: no config.json in that directory; name one that save_pretrained wrote"
            )
        return directory
    return cached(name) or packaged(name) or _downloaded(name)


@cache
def weights_digest(name: str) -> str:
    """SHA-256 of the weights file of `name`, as the hub shows it; of several files, of their digests in order.

    Raises:
        ModelError: see `locate`; or there are no safetensors weights.
    """
    files = sorted(locate(name).glob("*.safetensors"))
    if not files:
        raise ModelError(f"model.name {name!r}: no safetensors weights in {str(locate(name))!r}")
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def architecture(name: str) -> str | None:
    """The class that the checkpoint says it was saved from, such as LlamaForCausalLM; None: it says nothing.

    Raises:
        ModelError: see `locate`.
    """
    named = json.loads((locate(name) / "config.json").read_text(encoding="utf-8")).get("architectures")
    return named[0] if named else None


def base_digest(
    model_cfg: schema.Model, lora_cfg: schema.Lora | None = None, task_cfg: schema.Task | None = None
) -> str:
    """SHA-256 of what a run is trained on top of: `weights_digest`; or of that, how they are rounded, the adapter that
    the run began from, and what the image processor makes of an image.

    Args:
        model_cfg: of the base model.
        lora_cfg: `from_adapter` is read; with task_cfg, too, None: of the frozen weights alone.
        task_cfg: tells whether images are read.

    Raises:
        ModelError: see `weights_digest` and `load_recipe`.
        ConfigError: the adapter cannot be read.
    """
    words = [weights_digest(model_cfg.name)]
    words += [FORMATS[model_cfg.quantization]] if model_cfg.quantization != "none" else []
    if lora_cfg is not None and lora_cfg.from_adapter is not None:
        words += [f"from adapter {adapter_digest(lora_cfg.from_adapter)}"]
    if isinstance(task_cfg, schema.ImageClassification):
        words += [f"images by {load_recipe(locate(model_cfg.name))}"]
    return words[0] if len(words) == 1 else hashlib.sha256(" ".join(words).encode()).hexdigest()


def _downloaded(name: str) -> Path:
    require_askable(name)
    try:
        with quiet():  # the top folder only: what lies deeper are other formats of the same weights
            folder = huggingface_hub.snapshot_download(
                name, allow_patterns=HUB_FILES, ignore_patterns=["*/*"], etag_timeout=HUB_TIMEOUT_S
            )
    except (HfHubHTTPError, OSError, ValueError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(not_found(name, f"the hub does not give it ({first_line})")) from error
    return Path(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings: new layers are meant to be new, the rest is between the libraries."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_base(
    model_cfg: schema.Model, task_cfg: schema.Task, classes: tuple[str, ...]
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The pretrained model for the task, and the names of those of its parameters that the checkpoint lacks.

    It is in evaluation mode (no dropout), and that of a language model names a token to pad with in its config. What is
    lacking was drawn from torch's global generator; the caller guards it. Only safetensors weights are read.

    Raises:
        ModelError: not there, not loadable for this task, or lacking weights.
    """
    causal = task_cfg.causal
    model, new = _loaded(model_cfg, task_cfg, None if causal else classes)
    required = [key for key in new if causal or _must_be_pretrained(model, key)]
    if required:
        raise ModelError(
            f"model.name {model_cfg.name!r}: the checkpoint lacks {len(required)} weights of "
            f"{type(model).__name__}, the first {required[0]!r}; name a checkpoint that was pretrained for "
            f"task.kind {task_cfg.kind}"
        )
    if not isinstance(task_cfg, schema.ImageClassification):
        _set_pad_token(model)
    return model.eval(), new


def auto_class(task_cfg: schema.Task) -> Any:
    """Which of transformers' classes loads models of this task."""
    match task_cfg:
        case schema.Classification():
            return AutoModelForSequenceClassification
        case schema.ImageClassification():
            return AutoModelForImageClassification
        case schema.CausalLm() | schema.Dpo():
            return AutoModelForCausalLM
        case _:
            assert_never(task_cfg)


def _loaded(
    model_cfg: schema.Model, task_cfg: schema.Task, classes: tuple[str, ...] | None
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    path = locate(model_cfg.name)
    extra = {} if classes is None else _label_arguments(model_cfg.name, classes)
    try:
        with quiet():
            model, loaded = auto_class(task_cfg).from_pretrained(
                str(path),
                dtype=DTYPES[model_cfg.dtype],
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **extra,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"model.name {model_cfg.name!r} at {str(path)!r} does not load for task.kind {task_cfg.kind}: {error}; "
            f"it needs an architecture that transformers knows for this task, and safetensors weights"
        ) from error
    new = {*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}
    return model, tuple(sorted(new))


def _label_arguments(name: str, classes: tuple[str, ...]) -> dict[str, Any]:
    if len(classes) < 2:
        raise ModelError(f"model.name {name!r}: a classifier over {len(classes)} classes; need at least two")
    return {
        "num_labels": len(classes),
        "id2label": dict(enumerate(classes)),
        "label2id": {label: index for index, label in enumerate(classes)},
        "ignore_mismatched_sizes": True,
    }


def _must_be_pretrained(model: PreTrainedModel, parameter: str) -> bool:
    """Everything inside the encoder but a pooler, which many checkpoints leave out."""
    return parameter.startswith(f"{model.base_model_prefix}.") and ".pooler." not in parameter


def _set_pad_token(model: PreTrainedModel) -> None:
    """Set even where the checkpoint names none: decoders find a record's last token by it. Always masked."""
    tokens = (getattr(model.config, name, None) for name in ("pad_token_id", "eos_token_id"))
    size = vocabulary(model)
    model.config.pad_token_id = next((t for t in tokens if isinstance(t, int) and 0 <= t < size), 0)


def vocabulary(model: PreTrainedModel) -> int:
    """How many tokens a language model knows."""
    return model.get_input_embeddings().get_parameter("weight").shape[0]
