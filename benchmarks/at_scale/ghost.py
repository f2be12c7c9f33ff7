"""A client as a tutorial would have it: model and LoRA built in every call, Opacus' engine with ghost clipping.

The same numbers are trained (every B, and the head), by the same expected batch, clip, noise and number of steps. No
ledger, and noise from torch's generator. Records are tokenised once, which a tutorial does in every call.
"""

import warnings
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from opacus import PrivacyEngine
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from fedlora.config.schema import RunConfig
from fedlora.data.records import Examples
from fedlora.training.checkpoints import locate, quiet
from fedlora.values import Mechanism


def ghost_round(
    config: RunConfig,
    classes: tuple[str, ...],
    examples: Examples,
    start: NDArray[np.float32],
    mechanism: Mechanism,
    *,
    trimmed: bool = False,
) -> NDArray[np.float32]:
    """What is trained, after the round's steps from `start`; both flat, every B in sorted order before the head.

    trimmed: a batch is padded to its longest record instead of `max_length`.
    """
    model = _model(config, len(classes))
    trained = _trained(model)
    _load(trained, start)
    federation = config.federation
    collate = partial(_padded, length=None if trimmed else config.data.max_length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Opacus: no secure generator, hooks of frozen layers
        wrapped, optimizer, criterion, loader = PrivacyEngine().make_private(
            module=model.train(),
            optimizer=torch.optim.SGD(trained, lr=federation.optimizer.lr),
            criterion=nn.CrossEntropyLoss(),
            data_loader=DataLoader(_rows(examples), batch_size=federation.batch_size, collate_fn=collate),
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.max_grad_norm,
            grad_sample_mode="ghost",
        )
        for batch in _batches(loader, federation.local_steps):
            if len(batch[-1]) == 0:  # Poisson drew nobody; a tutorial goes on
                continue
            tokens, mask, labels = batch
            optimizer.zero_grad()
            criterion(wrapped(input_ids=tokens, attention_mask=mask).logits, labels).backward()
            optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in trained]).numpy()


def _model(config: RunConfig, classes: int) -> nn.Module:
    with quiet():
        base = AutoModelForSequenceClassification.from_pretrained(
            str(locate(config.model.name)), num_labels=classes, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, local_files_only=True,
        )  # fmt: skip
        lora = LoraConfig(
            r=config.lora.r, lora_alpha=int(config.lora.lora_alpha), lora_dropout=0.0,
            target_modules=list(config.lora.target_modules), task_type=TaskType.SEQ_CLS,
        )  # fmt: skip
        return get_peft_model(base, lora)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    """Every B, then the head's weight and bias by name; only these require a gradient from here on."""
    b = {name: p for name, p in model.named_parameters() if ".lora_B." in name}
    head = {name: p for name, p in model.named_parameters() if ".classifier.modules_to_save." in name}
    model.requires_grad_(False)
    chosen = [b[name] for name in sorted(b)] + [head[name] for name in sorted(head)]
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


@torch.no_grad()
def _load(trained: list[nn.Parameter], start: NDArray[np.float32]) -> None:
    pieces = torch.from_numpy(start.copy()).split([parameter.numel() for parameter in trained])
    for parameter, piece in zip(trained, pieces, strict=True):
        parameter.copy_(piece.view_as(parameter))


def _rows(examples: Examples) -> list[tuple[Tensor, Tensor]]:
    assert examples.labels is not None
    tokens = np.split(examples.input_ids.astype(np.int64), examples.offsets[1:-1])
    labels = torch.from_numpy(examples.labels)
    return [(torch.from_numpy(row), label) for row, label in zip(tokens, labels, strict=True)]


def _padded(rows: list[tuple[Tensor, Tensor]], length: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and mask (n, length), or as long as the longest; labels (n,)."""
    tokens = pad_sequence([row for row, _ in rows], batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row, _ in rows], batch_first=True)
    beyond = 0 if length is None else length - tokens.shape[1]
    return pad(tokens, (0, beyond)), pad(mask, (0, beyond)), torch.stack([label for _, label in rows])


def _batches(loader: DataLoader, steps: int) -> Iterator[tuple[Tensor, ...]]:
    done = 0
    while done < steps:
        for batch in loader:
            yield batch
            done += 1
            if done == steps:
                return
