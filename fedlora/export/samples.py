"""What the model says to public prompts, before and after training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.config.schema import RunConfig
from fedlora.config.task import CausalLm
from fedlora.data import load_corpus
from fedlora.data.completions import prompts
from fedlora.disk import write_durably
from fedlora.training.adapter import without_adapters
from fedlora.training.generation import continued
from fedlora.training.load import load_model
from fedlora.training.tokens import load_tokenizer
from fedlora.values import Adapters


def asks_for_samples(config: RunConfig) -> bool:
    """Whether samples belong to what the run hands over."""
    return isinstance(config.task, CausalLm) and config.task.samples > 0


def write_samples(target: Path, config: RunConfig, adapters: Adapters) -> None:
    """`target` has a line {prompt, before, after} for each of the first `task.samples` public test records.

    Greedy continuations of at most `task.sample_tokens` tokens, by the base model and with `adapters`. No training
    record is asked.

    Raises:
        DataError, ModelError: what the run was made of is no longer there.
    """
    task = config.task
    assert isinstance(task, CausalLm)
    tokenizer: Any = load_tokenizer(config.model.name)
    assert config.data.max_length is not None, "config/columns.py asks for it"
    test = load_corpus(config.data, task, config.seed).test
    asked = test.select(np.arange(min(task.samples, len(test))))
    # What an adapter that the run began from has to say is in `adapters`, whatever lies there now.
    lora_cfg = config.lora.model_copy(update={"from_adapter": None})
    model = load_model(config.model, task, lora_cfg, (), config.seed)
    model.load(adapters)
    lines = []
    for prompt in prompts(asked, tokenizer, config.data.max_length, task):
        after = continued(model, prompt, task.sample_tokens, tokenizer.eos_token_id)
        with without_adapters(model):
            before = continued(model, prompt, task.sample_tokens, tokenizer.eos_token_id)
        told = {
            "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
            "before": _text(tokenizer, prompt, before),
            "after": _text(tokenizer, prompt, after),
        }
        lines.append(json.dumps(told, ensure_ascii=False) + "\n")
    write_durably(target, "".join(lines))


def _text(tokenizer: Any, prompt: Sequence[int], said: Sequence[int]) -> str:
    """What was said as it stands behind the prompt: alone, some tokenizers would drop its first blank."""
    before = tokenizer.decode(list(prompt), skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *said], skip_special_tokens=True)
    if whole.startswith(before):
        return whole.removeprefix(before)
    return tokenizer.decode(list(said), skip_special_tokens=True)
