"""What any kind of task answers: a loss for each record, and how well the model does on it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from fedlora.training.model import AdaptedModel

Metric: TypeAlias = Literal["accuracy", "perplexity"]
"""What a score is: accuracy is better high, perplexity low."""


class Objective(Protocol):
    """One kind of task. A record's loss, share and score are touched by no other record of the batch.

    metric: what `value` gives. needs_labels: whether records without labels cannot be scored.
    """

    metric: ClassVar[Metric]
    needs_labels: ClassVar[bool]

    def losses(self, adapted: "AdaptedModel", batch: Mapping[str, Tensor]) -> Tensor:
        """(n,) of each record, in nats."""
        ...

    def shares(self, adapted: "AdaptedModel", batch: Mapping[str, Tensor]) -> Tensor:
        """(n,) float64 in [0, 1]: how much of each record is right."""
        ...

    def scores(self, adapted: "AdaptedModel", batch: Mapping[str, Tensor]) -> tuple[float, float, float]:
        """Of the batch: the records' losses summed; what `value` divides, summed; and by what."""
        ...

    def value(self, good: Tensor, weight: Tensor) -> float:
        """The metric, of the last two of `scores`, each summed over all batches; float64 scalars."""
        ...
