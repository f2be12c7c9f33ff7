"""What is learned: one loss for each record, touched by no other record. The kinds of task are `Objective`s."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.config import schema
from fedlora.data.records import Examples
from fedlora.errors import DataError
from fedlora.training.batches import ALONE, TOKEN_BUDGET, micro_batches
from fedlora.training.classification import Labels
from fedlora.training.model import AdaptedModel
from fedlora.training.objective import Metric, Objective
from fedlora.training.preference import Preferences
from fedlora.training.supervised import NextTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """value: of the metric, over all examples. loss: mean, nats."""

    metric: Metric
    value: float
    loss: float


def objective_of(task_cfg: schema.Task) -> Objective:
    """What the model is trained for; nobody asks for the kind of a task again."""
    match task_cfg:
        case schema.Classification() | schema.ImageClassification():
            return Labels()
        case schema.CausalLm():
            return NextTokens()
        case schema.Dpo():
            return Preferences(task_cfg.beta)
        case _:
            assert_never(task_cfg)


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
    groups = micro_batches(examples, indices, token_budget, adapted.intake)
    return [partial(_record_losses, adapted, examples, group) for group in groups]


def _record_losses(adapted: AdaptedModel, examples: Examples, group: NDArray[np.int64]) -> Tensor:
    return adapted.objective.losses(adapted, _batch(adapted, examples, group))


@torch.no_grad()
def evaluate(adapted: AdaptedModel, examples: Examples, token_budget: int = 2 * TOKEN_BUDGET) -> Score:
    """Accuracy of a classifier, perplexity of a causal LM over all learned tokens, or the share of pairs whose first
    completion is preferred (`accuracy`); and the mean loss.

    Raises:
        DataError: there is nothing to score on.
    """
    objective = adapted.objective
    if len(examples) == 0 or (examples.labels is None and objective.needs_labels):
        raise DataError(f"{len(examples)} test records, and no label to score them by; mend data.test")
    groups = micro_batches(examples, np.arange(len(examples)), token_budget, adapted.intake)
    scores = [objective.scores(adapted, _batch(adapted, examples, group)) for group in groups]
    loss, good, weight = torch.tensor(scores, dtype=torch.float64).sum(dim=0)
    return Score(
        metric=objective.metric, value=objective.value(good, weight), loss=float(loss / len(examples))
    )


@torch.no_grad()
def record_accuracies(adapted: AdaptedModel, examples: Examples) -> Tensor:
    """(n,) in [0, 1], in no particular order: whether a record's label is right, or the share of its learned tokens, or
    whether the preferred completion is the likelier one.

    Each record runs alone: beside others, rounding could turn a near tie, and one record move the answers of many.
    """
    groups = micro_batches(examples, np.arange(len(examples)), ALONE)
    return torch.cat([adapted.objective.shares(adapted, _batch(adapted, examples, g)).cpu() for g in groups])


def _batch(adapted: AdaptedModel, examples: Examples, group: NDArray[np.int64]) -> dict[str, Tensor]:
    return adapted.intake.collate(examples.select(group), adapted.device)
