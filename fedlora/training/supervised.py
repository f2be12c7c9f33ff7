"""Next tokens: which of them a record is to learn, what they cost, and how many are right."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora.training.batches import logits_of
from fedlora.training.model import AdaptedModel
from fedlora.training.objective import Metric

IGNORED = -100
"""The target that cross entropy counts as nothing."""


def learned(batch: Mapping[str, Tensor]) -> Tensor:
    """(rows, tokens - 1): whether the next token is one to learn: real, and marked where the batch has marks."""
    real = batch["attention_mask"][:, 1:] == 1
    return real & batch["trained"][:, 1:] if "trained" in batch else real


def token_losses(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """(rows, tokens - 1) cross entropy of every token that is learned, in nats; zero elsewhere, and no gradient."""
    targets = batch["input_ids"][:, 1:].masked_fill(~learned(batch), IGNORED)
    # (rows, vocabulary, tokens - 1): cross entropy wants the classes second
    return cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)


def mean_losses(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """(n,) mean over the tokens that the record learns; 0 of a record that learns none."""
    return token_losses(logits, batch).sum(dim=1) / learned(batch).sum(dim=1).clamp(min=1)


def supervised_scores(logits: Tensor, batch: Mapping[str, Tensor]) -> tuple[float, float, float]:
    """Of the batch: the records' losses summed, the nats of all learned tokens, and the number of these."""
    each = mean_losses(logits, batch).double()
    count = learned(batch).sum(dim=1)
    return float(each.sum()), float((each * count).sum()), float(count.sum())


def shares_right(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """(n,) float64: the share of a record's learned tokens that the model would have said; 0 where it learns none."""
    wanted = learned(batch)
    right = (logits.argmax(dim=-1)[:, :-1] == batch["input_ids"][:, 1:]) & wanted
    return (right.sum(dim=1) / wanted.sum(dim=1).clamp(min=1)).to(torch.float64)


@dataclass(frozen=True, slots=True)
class NextTokens:
    """The objective of a causal LM, of whole texts or of completions alone."""

    metric: ClassVar[Metric] = "perplexity"
    needs_labels: ClassVar[bool] = False

    def losses(self, adapted: AdaptedModel, batch: Mapping[str, Tensor]) -> Tensor:
        """(n,) `mean_losses`."""
        return mean_losses(logits_of(adapted, batch), batch)

    def shares(self, adapted: AdaptedModel, batch: Mapping[str, Tensor]) -> Tensor:
        """(n,) `shares_right`."""
        return shares_right(logits_of(adapted, batch), batch)

    def scores(self, adapted: AdaptedModel, batch: Mapping[str, Tensor]) -> tuple[float, float, float]:
        """`supervised_scores`."""
        return supervised_scores(logits_of(adapted, batch), batch)

    def value(self, good: Tensor, weight: Tensor) -> float:
        """The perplexity over all learned tokens; 1 where there is none."""
        return float(torch.exp(good / weight.clamp(min=1)))
