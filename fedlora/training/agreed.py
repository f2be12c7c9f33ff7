"""What a server and its nodes must have in common before a record is read: one digest of weights, task and seed."""

import hashlib
import json
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig

from fedlora.config.node import NodeConfig
from fedlora.config.schema import Dpo, RunConfig, Task
from fedlora.errors import ModelError
from fedlora.training.checkpoints import auto_class, base_digest, locate, quiet
from fedlora.training.look import is_pooler, look

OF_NO_LOSS = ("samples", "sample_tokens")
"""Keys of `task` that only the server reads, after the run."""


def agreed_digest(config: RunConfig | NodeConfig) -> str:
    """SHA-256 of what a loss comes from and no request brings: `base_digest`; or of that, the keys of `task` that are
    not as they are by default, and what the seed drew and no round trains.

    `model.dtype`, kernels and devices only round, and are each side's own. The checkpoint's config.json and its
    tokenizer are not looked at.

    Raises:
        ModelError: see `base_digest` and `drawn`.
        ConfigError: the adapter cannot be read.
    """
    words = [base_digest(config.model, config.lora, config.task)]
    if told := _told(config.task):
        words.append(json.dumps(told, sort_keys=True))
    if (by_seed := drawn(config)) is not None:
        words.append(by_seed)
    return words[0] if len(words) == 1 else hashlib.sha256(" ".join(words).encode()).hexdigest()


def drawn(config: RunConfig | NodeConfig, *, poolers: bool = True) -> str | None:
    """What of the frozen model no checkpoint holds, but the seed draws, in words; None: nothing.

    Args:
        config: of a run or a node.
        poolers: also of a pooler, for which the model has to be there.

    Raises:
        ModelError: the model is not there, or of no kind that transformers knows for the task.
    """
    task = config.task
    words = ["a head"] if getattr(task, "head", "") == "frozen" else []
    reads_pooler = not task.causal and getattr(task, "pooler", "checkpoint") != "identity"
    if poolers and reads_pooler and _lacks_pooler(config.model.name, auto_class(task)):
        # What is narrower than float64 is drawn alike, and rounded.
        words.append("a pooler in float64" if config.model.dtype == "float64" else "a pooler")
    return f"{' and '.join(words)} drawn from {config.seed}" if words else None


def _told(task_cfg: Task) -> dict[str, object]:
    """A preference is told from a completion by its kind alone; other kinds, by the adapters or the base model."""
    kind = () if isinstance(task_cfg, Dpo) else ("kind",)
    return task_cfg.model_dump(mode="json", exclude_defaults=True, exclude={*OF_NO_LOSS, *kind})


@cache
def _lacks_pooler(name: str, auto: Any) -> bool:
    """Whether the model that this class makes has a pooler that is the checkpoint's to bring, and is not there."""
    path = locate(name)
    if any(map(is_pooler, look(path).shapes)):
        return False
    try:
        with quiet(), torch.device("meta"):  # shapes alone
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            model = auto.from_config(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"model.name {name!r} at {str(path)!r} does not load as {auto.__name__} does: {error}; it needs an "
            "architecture that transformers knows for this task"
        ) from error
    inside = f"{model.base_model_prefix}."
    return any(key.startswith(inside) and is_pooler(key) for key, _ in model.named_parameters())
