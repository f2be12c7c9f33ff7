"""Which records run side by side, when they may belong to anybody: clips are per record, so any grouping is exact."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedlora.kernels.quantised import QuantisedLinear
from fedlora.training.batches import TOKEN_BUDGET
from fedlora.training.model import AdaptedModel

MOST_NUMBERS = 2**25
"""Gradients of all records of a micro-batch, and trained numbers of all clients of a pack: at 8 bytes, 256 MiB."""

NUMBERS_A_LAYER = 5e6
"""Weights that a core multiplies a token by in the time that calling one linear layer costs beside the product: 30
tokens of MiniLM with LoRA. So a micro-batch more pays where it saves that much padding."""


def packed_groups(
    lengths: NDArray[np.int64], *, overhead: float, most_records: int, token_budget: int = TOKEN_BUDGET
) -> list[NDArray[np.int64]]:
    """The records in groups of like length, shortest first, at the least cost in padded tokens.

    A function of its arguments alone.

    Args:
        lengths: (n,) tokens of each record.
        overhead: what a group costs beside its padded tokens, in tokens.
        most_records: of a group.
        token_budget: padded tokens of a group at most; a record longer than that is a group of its own.
    """
    order = np.argsort(lengths, kind="stable")
    longest = lengths[order]
    least, begins = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=np.int64)
    for stop in range(1, len(order) + 1):  # the cheapest way to group the `stop` shortest, by its last group
        fit = max(1, min(most_records, token_budget // max(1, int(longest[stop - 1]))))
        first = max(0, stop - fit)
        costs = least[first:stop] + np.arange(stop - first, 0, -1) * longest[stop - 1] + overhead
        begins[stop] = first + int(np.argmin(costs))
        least[stop] = costs[begins[stop] - first]
    groups: list[NDArray[np.int64]] = []
    stop = len(order)
    while stop > 0:
        groups.append(order[begins[stop] : stop])
        stop = int(begins[stop])
    return groups[::-1]


def overhead_of(adapted: AdaptedModel) -> float:
    """What a micro-batch of this model costs beside its tokens, in tokens, on a core; by the size of its layers.

    On an accelerator, which multiplies much faster than it is called: all that a micro-batch can hold.
    """
    if adapted.device != torch.device("cpu"):
        return float(TOKEN_BUDGET)
    sizes = [
        module.in_features * module.out_features
        for module in adapted.peft_model.modules()
        if isinstance(module, nn.Linear | QuantisedLinear)
    ]
    return NUMBERS_A_LAYER * len(sizes) / sum(sizes)
