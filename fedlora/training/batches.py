"""Records side by side in one pass of a model."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.data.records import Examples
from fedlora.training.intake import Intake
from fedlora.training.model import AdaptedModel, transformer_of
from fedlora.training.prefix import resumed

TOKEN_BUDGET = 2048
"""Padded tokens of a micro-batch: large enough to fill two cores, small enough for their caches."""

ALONE = 1
"""The token budget at which every record is a micro-batch of its own."""


def micro_batches(
    examples: Examples,
    indices: NDArray[np.int64] | Tensor,
    token_budget: int = TOKEN_BUDGET,
    intake: Intake | None = None,
) -> list[NDArray[np.int64]]:
    """The indices in groups of like length, shortest first, of at most `token_budget` tokens when padded.

    A record longer than that is a group of its own. intake: counts a record's tokens; None: they are all numbers that
    it has.
    """
    wanted = np.asarray(indices, dtype=np.int64)
    lengths = (examples.footprints if intake is None else intake.footprints(examples))[wanted]
    order = np.lexsort((wanted, lengths))
    groups: list[NDArray[np.int64]] = []
    start = 0
    for stop in range(1, len(order) + 1):
        if stop == len(order) or (stop - start + 1) * lengths[order[stop]] > token_budget:
            groups.append(wanted[order[start:stop]])
            start = stop
    return groups


def collate(examples: Examples, pad_token: int, device: torch.device) -> dict[str, Tensor]:
    """All sequences as (rows, longest) int64 tensors, padded on the right, and attention_mask; labels (n,).

    rows: n, or of pairs 2 n, a record's two one after the other. states (rows, longest, width), padded with zeros, and
    trained (rows, longest), padded with False, where the examples have them.
    """
    lengths = torch.from_numpy(examples.sequence_lengths)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    batch = {"input_ids": _padded(examples.input_ids, mask, pad_token), "attention_mask": mask.long()}
    if examples.token_type_ids is not None:
        batch["token_type_ids"] = _padded(examples.token_type_ids, mask, 0)
    if examples.labels is not None:
        batch["labels"] = torch.from_numpy(examples.labels)
    if examples.trained is not None:
        batch["trained"] = _padded(examples.trained, mask, 0) == 1
    if examples.states is not None:
        states = states_of(examples.states.of(examples.offsets))
        batch["states"] = states.new_zeros((*mask.shape, states.shape[1]))
        batch["states"][mask] = states
    return {name: tensor.to(device) for name, tensor in batch.items()}


def logits_of(adapted: AdaptedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """(n, classes), or (rows, tokens, vocabulary); float32 or wider."""
    with resumed(adapted, batch.get("states")):
        logits = adapted.peft_model(**model_inputs(adapted, batch)).logits
    return logits if logits.dtype == torch.float64 else logits.float()


def model_inputs(adapted: AdaptedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model is called with on a batch of its intake's."""
    return adapted.intake.inputs(transformer_of(adapted.peft_model), batch)


def states_of(rows: NDArray[np.floating] | NDArray[np.uint16]) -> Tensor:
    """The rows as torch has them: numpy has no bfloat16, whose bits lie in uint16."""
    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def _padded(tokens: NDArray[np.integer] | NDArray[np.bool_], mask: Tensor, fill: int) -> Tensor:
    rows = torch.full(mask.shape, fill, dtype=torch.int64)
    rows[mask] = torch.from_numpy(tokens.astype(np.int64))
    return rows
