"""What is learned: one loss for each record, touched by no other record."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora.data.records import Examples
from fedlora.errors import DataError
from fedlora.training.model import AdaptedModel, transformer_of
from fedlora.training.prefix import resumed

TOKEN_BUDGET = 2048
"""Padded tokens of a micro-batch: large enough to fill two cores, small enough for their caches."""

ALONE = 1
"""The token budget at which every record is a micro-batch of its own."""

IGNORED = -100
"""The target that cross entropy counts as nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """value: of the metric, over all examples; accuracy is better high, perplexity low. loss: mean, nats."""

    metric: Literal["accuracy", "perplexity"]
    value: float
    loss: float


def micro_batches(
    examples: Examples, indices: NDArray[np.int64] | Tensor, token_budget: int = TOKEN_BUDGET
) -> list[NDArray[np.int64]]:
    """The indices in groups of like length, shortest first, of at most `token_budget` tokens when padded.

    A record longer than that is a group of its own.
    """
    wanted = np.asarray(indices, dtype=np.int64)
    lengths = examples.lengths[wanted]
    order = np.lexsort((wanted, lengths))
    groups: list[NDArray[np.int64]] = []
    start = 0
    for stop in range(1, len(order) + 1):
        if stop == len(order) or (stop - start + 1) * lengths[order[stop]] > token_budget:
            groups.append(wanted[order[start:stop]])
            start = stop
    return groups


def losses(
    adapted: AdaptedModel,
    examples: Examples,
    indices: NDArray[np.int64] | Tensor,
    token_budget: int = TOKEN_BUDGET,
) -> list[Callable[[], Tensor]]:
    """One callable a micro-batch: called, it runs the model forward and returns that batch's losses, (n,).

    A classifier's is the cross entropy of the record; a causal LM's the mean over the record's own next
    tokens, so that neither padding nor a neighbour's length weighs in. A record of one token predicts
    nothing: loss 0.
    """
    groups = micro_batches(examples, indices, token_budget)
    return [partial(_record_losses, adapted, examples, group) for group in groups]


def _record_losses(adapted: AdaptedModel, examples: Examples, group: NDArray[np.int64]) -> Tensor:
    batch = collate(examples.select(group), adapted.pad_token, adapted.device)
    logits = _logits(adapted, batch)
    if adapted.causal:
        return _causal_losses(logits, batch)
    return cross_entropy(logits, batch["labels"], reduction="none")


def collate(examples: Examples, pad_token: int, device: torch.device) -> dict[str, Tensor]:
    """All examples as (n, longest) int64 tensors, padded on the right, and attention_mask; labels (n,).

    states (n, longest, width), padded with zeros, where the examples have them.
    """
    lengths = torch.from_numpy(examples.lengths)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    batch = {"input_ids": _padded(examples.input_ids, mask, pad_token), "attention_mask": mask.long()}
    if examples.token_type_ids is not None:
        batch["token_type_ids"] = _padded(examples.token_type_ids, mask, 0)
    if examples.labels is not None:
        batch["labels"] = torch.from_numpy(examples.labels)
    if examples.states is not None:
        states = states_of(examples.states)
        batch["states"] = states.new_zeros((*mask.shape, states.shape[1]))
        batch["states"][mask] = states
    return {name: tensor.to(device) for name, tensor in batch.items()}


def model_inputs(adapted: AdaptedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a collated batch the model is called with: tokens, mask, and token types if it knows any."""
    names = {"input_ids", "attention_mask"}
    base = transformer_of(adapted.peft_model)
    if "token_type_ids" in inspect.signature(base.forward).parameters:
        names.add("token_type_ids")
    return {name: batch[name] for name in names & batch.keys()}


def states_of(rows: NDArray[np.floating] | NDArray[np.uint16]) -> Tensor:
    """The rows as torch has them: numpy has no bfloat16, whose bits lie in uint16."""
    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def _padded(tokens: NDArray[np.integer], mask: Tensor, fill: int) -> Tensor:
    rows = torch.full(mask.shape, fill, dtype=torch.int64)
    rows[mask] = torch.from_numpy(tokens.astype(np.int64))
    return rows


def _logits(adapted: AdaptedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """(n, classes), or (n, tokens, vocabulary); float32 or wider."""
    with resumed(adapted, batch.get("states")):
        logits = adapted.peft_model(**model_inputs(adapted, batch)).logits
    return logits if logits.dtype == torch.float64 else logits.float()


def _causal_losses(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    real = batch["attention_mask"][:, 1:] == 1
    targets = batch["input_ids"][:, 1:].masked_fill(~real, IGNORED)
    # (n, vocabulary, tokens - 1): cross entropy wants the classes second
    each = cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    return each.sum(dim=1) / real.sum(dim=1).clamp(min=1)


@torch.no_grad()
def evaluate(adapted: AdaptedModel, examples: Examples, token_budget: int = 2 * TOKEN_BUDGET) -> Score:
    """Accuracy of a classifier, or perplexity of a causal LM over all tokens; and the mean loss.

    Raises:
        DataError: there is nothing to score on.
    """
    if len(examples) == 0 or (examples.labels is None and not adapted.causal):
        raise DataError(f"{len(examples)} test records, and no label to score them by; mend data.test")
    groups = micro_batches(examples, np.arange(len(examples)), token_budget)
    scores = [_scores(adapted, examples, group) for group in groups]
    loss, good, weight = torch.tensor(scores, dtype=torch.float64).sum(dim=0)
    mean_loss = float(loss / len(examples))
    if adapted.causal:
        return Score(metric="perplexity", value=float(torch.exp(good / weight.clamp(min=1))), loss=mean_loss)
    return Score(metric="accuracy", value=float(good / weight), loss=mean_loss)


@torch.no_grad()
def record_accuracies(adapted: AdaptedModel, examples: Examples) -> Tensor:
    """(n,) in [0, 1], in no particular order: whether a record's label is right, or the share of its next tokens.

    Each record runs alone: beside others, rounding could turn a near tie, and one record move the answers of many.
    """
    groups = micro_batches(examples, np.arange(len(examples)), ALONE)
    return torch.cat([_accuracies(adapted, examples, group) for group in groups])


def _accuracies(adapted: AdaptedModel, examples: Examples, group: NDArray[np.int64]) -> Tensor:
    batch = collate(examples.select(group), adapted.pad_token, adapted.device)
    found = _logits(adapted, batch).argmax(dim=-1)
    if not adapted.causal:
        return (found == batch["labels"]).double().cpu()
    real = batch["attention_mask"][:, 1:] == 1
    right = (found[:, :-1] == batch["input_ids"][:, 1:]) & real
    return (right.sum(dim=1) / real.sum(dim=1).clamp(min=1)).double().cpu()


def _scores(
    adapted: AdaptedModel, examples: Examples, group: NDArray[np.int64]
) -> tuple[float, float, float]:
    """Of a group: its records' losses summed; hits and records, or nats and predicted tokens."""
    batch = collate(examples.select(group), adapted.pad_token, adapted.device)
    logits = _logits(adapted, batch)
    if adapted.causal:
        each = _causal_losses(logits, batch).double()
        predicted = batch["attention_mask"].sum(dim=1) - 1
        return float(each.sum()), float((each * predicted).sum()), float(predicted.sum())
    each = cross_entropy(logits, batch["labels"], reduction="none").double()
    hits = logits.argmax(dim=1) == batch["labels"]
    return float(each.sum()), float(hits.sum()), float(len(group))
