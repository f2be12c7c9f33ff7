"""An adapter of which r numbers are trained: one beside each pair of frozen directions, an input's and an output's."""

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedlora.training.adapter import LEFT
from fedlora.training.model import ADAPTER


class Scales(nn.Module):
    """s * h of h (..., r), as one linear layer of weight s (1, r) over the rows h_i e_i.

    So whoever clips, noises and stacks linear layers meets a weight of r numbers, and an example's gradient is these
    r sums over its tokens, dy_i h_i, never an r x r matrix of which most would be thrown away. It costs r times as
    many numbers as h while a microbatch is back-propagated, and as many products as a core.
    """

    def __init__(self, like: nn.Linear) -> None:
        """Zero, of the rank, type and device of `like`, a B."""
        super().__init__()
        at = {"device": like.weight.device, "dtype": like.weight.dtype}
        self.each = nn.Linear(like.in_features, 1, bias=False, **at)
        nn.init.zeros_(self.each.weight)

    @property
    def weight(self) -> Tensor:
        """s (1, r)."""
        return self.each.weight

    def forward(self, h: Tensor) -> Tensor:
        """(..., r) of h (..., r)."""
        return self.each(torch.diag_embed(h)).squeeze(-1)


def train_singular_values(layer: LoraLayer) -> nn.Parameter:
    """`layer`'s B is r scales from here on, zero like B, before them a left frame (d_out, r), which is returned.

    It computes W x + left (s * (A x)): what changes of W are the singular values that belong to the directions in A and
    in the left frame, where these are its own.
    """
    up = layer.lora_B[ADAPTER]
    assert isinstance(up, nn.Linear)
    left = nn.Parameter(torch.zeros_like(up.weight), requires_grad=False)
    layer.lora_B[ADAPTER] = Scales(up)
    assert isinstance(layer, nn.Module)  # every LoRA layer of PEFT's is one
    layer.register_parameter(LEFT, left)
    return left
