"""How records come into a model: as tokens, or as pixels."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from fedlora.data.records import Examples


class Intake(Protocol):
    """What is particular to the kind of input that a model takes; all else is the same for texts and images.

    keeps_states: whether what frozen layers make of a record is a row a token of `Examples`, and can be kept so.
    """

    keeps_states: ClassVar[bool]

    def most_tokens(self, max_length: int | None) -> int:
        """Of one record, as the model's layers see it. max_length: `data.max_length`."""
        ...

    def footprints(self, examples: Examples) -> NDArray:
        """(n,) int64, tokens of each record in a batch of its own, as the model's layers see it."""
        ...

    def collate(self, examples: Examples, device: torch.device) -> dict[str, Tensor]:
        """All records as tensors of one batch, with their labels (n,) if they have any."""
        ...

    def inputs(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of a collated batch the model is called with, by name."""
        ...

    def made_up(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Inputs of a few records that nobody owns, the same in every process; on the CPU."""
        ...

    def public(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Inputs of records that show what the model's layers are given whatever the record is; on the CPU."""
        ...

    def blank(self, count: int, numbers: int) -> Examples:
        """So many records, of zeros. numbers: of each text; an image has as many as its model reads."""
        ...

    def save(self, directory: Path) -> None:
        """Whoever loads a model from `directory` finds there what turns records into its inputs."""
        ...
