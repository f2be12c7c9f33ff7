"""One label for each record: what choosing it costs, and whether it is right."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora.training.batches import logits_of
from fedlora.training.model import AdaptedModel
from fedlora.training.objective import Metric


@dataclass(frozen=True, slots=True)
class Labels:
    """The objective of a classifier: the cross entropy of the record's label, whatever the record is."""

    metric: ClassVar[Metric] = "accuracy"
    needs_labels: ClassVar[bool] = True

    def losses(self, adapted: AdaptedModel, batch: Mapping[str, Tensor]) -> Tensor:
        """(n,) cross entropy of each record."""
        return cross_entropy(logits_of(adapted, batch), batch["labels"], reduction="none")

    def shares(self, adapted: AdaptedModel, batch: Mapping[str, Tensor]) -> Tensor:
        """(n,) 1 where the record's label is the likeliest, else 0."""
        return (logits_of(adapted, batch).argmax(dim=-1) == batch["labels"]).double()

    def scores(self, adapted: AdaptedModel, batch: Mapping[str, Tensor]) -> tuple[float, float, float]:
        """The losses summed, the hits, and the records."""
        logits = logits_of(adapted, batch)
        each = cross_entropy(logits, batch["labels"], reduction="none").double()
        hits = logits.argmax(dim=1) == batch["labels"]
        return float(each.sum()), float(hits.sum()), float(len(each))

    def value(self, good: Tensor, weight: Tensor) -> float:
        """The share of hits."""
        return float(good / weight)
