"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290): a record is a pair of completions.

Its two sequences are two rows of a batch, one after the other. Both move the one loss of the record, so whoever clips
has to join the gradients of both rows first: `sequences_per_record` of the private step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedlora.training.adapter import without_adapters
from fedlora.training.batches import logits_of
from fedlora.training.model import AdaptedModel
from fedlora.training.objective import Metric
from fedlora.training.supervised import token_losses


def margins(adapted: AdaptedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """(n,) nats by which training has moved the first completion of each pair further up than the second.

    (log pi - log ref)(first) - (log pi - log ref)(second), sums over the completion's tokens; ref is the frozen base
    model without its adapter, constants that are computed anew and carry no gradient.
    """
    with torch.no_grad(), without_adapters(adapted):
        reference = _log_probabilities(adapted, batch)
    first, second = (_log_probabilities(adapted, batch) - reference).view(-1, 2).unbind(dim=1)
    return first - second


def preference_losses(adapted: AdaptedModel, batch: Mapping[str, Tensor], beta: float) -> Tensor:
    """(n,) -log sigmoid(beta * margin), equation 7; log 2 where nothing has moved."""
    return -logsigmoid(beta * margins(adapted, batch))


def shares_preferred(found: Tensor) -> Tensor:
    """(n,) float64 of margins: 1 where the first completion is preferred, 0 where the second, one half of a tie.

    Before training all are ties: the model is its own reference.
    """
    return (found.sign().double() + 1) / 2


def preference_scores(
    adapted: AdaptedModel, batch: Mapping[str, Tensor], beta: float
) -> tuple[float, float, float]:
    """Of the batch: the records' losses summed, how many prefer the first completion, and how many they are."""
    found = margins(adapted, batch)
    each = -logsigmoid(beta * found).double()
    return float(each.sum()), float(shares_preferred(found).sum()), float(len(each))


def _log_probabilities(adapted: AdaptedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """(rows,) of each row's completion, given what stands before it."""
    return -token_losses(logits_of(adapted, batch), batch).sum(dim=1)


@dataclass(frozen=True, slots=True)
class Preferences:
    """The objective of pairs of completions. beta: how hard the model is held to its reference."""

    beta: float
    metric: ClassVar[Metric] = "accuracy"
    needs_labels: ClassVar[bool] = False

    def losses(self, adapted: AdaptedModel, batch: Mapping[str, Tensor]) -> Tensor:
        """(n,) `preference_losses`."""
        return preference_losses(adapted, batch, self.beta)

    def shares(self, adapted: AdaptedModel, batch: Mapping[str, Tensor]) -> Tensor:
        """(n,) `shares_preferred`."""
        return shares_preferred(margins(adapted, batch))

    def scores(self, adapted: AdaptedModel, batch: Mapping[str, Tensor]) -> tuple[float, float, float]:
        """`preference_scores`."""
        return preference_scores(adapted, batch, self.beta)

    def value(self, good: Tensor, weight: Tensor) -> float:
        """The share of pairs whose first completion is preferred."""
        return float(good / weight)
