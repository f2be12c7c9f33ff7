"""What is learned: one loss for each record, touched by no other record."""

from collections.abc import Callable
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
from fedlora.training.batches import ALONE, TOKEN_BUDGET, collate, logits_of, micro_batches
from fedlora.training.model import AdaptedModel
from fedlora.training.preference import margins, preference_losses, preference_scores, shares_preferred
from fedlora.training.supervised import mean_losses, shares_right, supervised_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """value: of the metric, over all examples; accuracy is better high, perplexity low. loss: mean, nats."""

    metric: Literal["accuracy", "perplexity"]
    value: float
    loss: float


def losses(
    adapted: AdaptedModel,
    examples: Examples,
    indices: NDArray[np.int64] | Tensor,
    token_budget: int = TOKEN_BUDGET,
) -> list[Callable[[], Tensor]]:
    """One callable a micro-batch: called, it runs the model forward and returns that batch's losses, (n,).

    A classifier's is the cross entropy of the record; a causal LM's the mean over the record's own learned
    tokens, so that neither padding nor a neighbour's length weighs in. A record that learns no token has loss 0,
    and no gradient. A pair of completions has one loss, `preference_losses`, and two rows in the model.
    """
    groups = micro_batches(examples, indices, token_budget)
    return [partial(_record_losses, adapted, examples, group) for group in groups]


def _record_losses(adapted: AdaptedModel, examples: Examples, group: NDArray[np.int64]) -> Tensor:
    batch = collate(examples.select(group), adapted.pad_token, adapted.device)
    if adapted.beta is not None:
        return preference_losses(adapted, batch, adapted.beta)
    logits = logits_of(adapted, batch)
    if adapted.causal:
        return mean_losses(logits, batch)
    return cross_entropy(logits, batch["labels"], reduction="none")


@torch.no_grad()
def evaluate(adapted: AdaptedModel, examples: Examples, token_budget: int = 2 * TOKEN_BUDGET) -> Score:
    """Accuracy of a classifier, perplexity of a causal LM over all learned tokens, or the share of pairs whose first
    completion is preferred (`accuracy`); and the mean loss.

    Raises:
        DataError: there is nothing to score on.
    """
    if len(examples) == 0 or (examples.labels is None and not adapted.causal):
        raise DataError(f"{len(examples)} test records, and no label to score them by; mend data.test")
    groups = micro_batches(examples, np.arange(len(examples)), token_budget)
    scores = [_scores(adapted, examples, group) for group in groups]
    loss, good, weight = torch.tensor(scores, dtype=torch.float64).sum(dim=0)
    mean_loss = float(loss / len(examples))
    if adapted.causal and adapted.beta is None:
        return Score(metric="perplexity", value=float(torch.exp(good / weight.clamp(min=1))), loss=mean_loss)
    return Score(metric="accuracy", value=float(good / weight), loss=mean_loss)


@torch.no_grad()
def record_accuracies(adapted: AdaptedModel, examples: Examples) -> Tensor:
    """(n,) in [0, 1], in no particular order: whether a record's label is right, or the share of its learned tokens, or
    whether the preferred completion is the likelier one.

    Each record runs alone: beside others, rounding could turn a near tie, and one record move the answers of many.
    """
    groups = micro_batches(examples, np.arange(len(examples)), ALONE)
    return torch.cat([_accuracies(adapted, examples, group) for group in groups])


def _accuracies(adapted: AdaptedModel, examples: Examples, group: NDArray[np.int64]) -> Tensor:
    batch = collate(examples.select(group), adapted.pad_token, adapted.device)
    if adapted.beta is not None:
        return shares_preferred(margins(adapted, batch)).cpu()
    logits = logits_of(adapted, batch)
    if adapted.causal:
        return shares_right(logits, batch).cpu()
    return (logits.argmax(dim=-1) == batch["labels"]).double().cpu()


def _scores(
    adapted: AdaptedModel, examples: Examples, group: NDArray[np.int64]
) -> tuple[float, float, float]:
    """Of a group: its records' losses summed; hits and records, or nats and predicted tokens."""
    batch = collate(examples.select(group), adapted.pad_token, adapted.device)
    if adapted.beta is not None:
        return preference_scores(adapted, batch, adapted.beta)
    logits = logits_of(adapted, batch)
    if adapted.causal:
        return supervised_scores(logits, batch)
    each = cross_entropy(logits, batch["labels"], reduction="none").double()
    hits = logits.argmax(dim=1) == batch["labels"]
    return float(each.sum()), float(hits.sum()), float(len(group))
