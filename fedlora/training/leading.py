"""A client of lower rank: of every B the first columns are trained, and the others stand still (DyLoRA's prefix,
arXiv 2210.07558).

Nothing is masked. Who clips, noises and steps meets a B of k columns, so that nothing is clipped for numbers that do
not move, and no noise is drawn for them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from fedlora.errors import ShapeError
from fedlora.training.model import ADAPTER, LORA_B, AdaptedModel


class LeadingColumns(nn.Module):
    """B h of h (..., r), as one linear layer of B's first k columns and another, frozen, of the rest.

    Both weights lie in B's own memory: what steps the first has stepped B.
    """

    def __init__(self, b: Tensor, k: int) -> None:
        """Of the first k columns of b (d_out, r), 1 <= k < r."""
        super().__init__()
        self.first = _linear(b[:, :k], trained=True)
        self.others = _linear(b[:, k:], trained=False)

    def forward(self, h: Tensor) -> Tensor:
        """(..., d_out) of h (..., r)."""
        k = self.first.in_features
        return self.first(h[..., :k]) + self.others(h[..., k:])


def _linear(weight: Tensor, *, trained: bool) -> nn.Linear:
    """A layer of this very weight (d_out, columns), without a bias."""
    d_out, columns = weight.shape
    layer = nn.Linear(columns, d_out, bias=False, device="meta")  # draws nothing
    layer.weight = nn.Parameter(weight, requires_grad=trained)
    return layer


@contextmanager
def leading_columns(adapted: AdaptedModel, k: int | None) -> Iterator[AdaptedModel]:
    """The same model, of whose every B exactly the first k columns are trained; whole again afterwards.

    What has become of them is then in B, so `adapted.delta` is d_out x r, and zero beyond k columns.

    Args:
        adapted: as loaded for the round. It trains whole B, and no A.
        k: None, or r: the model is given back as it is.

    Raises:
        ShapeError: k is no number of columns that B has, or what is trained is no B.
    """
    r = min(b.shape[1] for _, b in adapted.live.values())
    if k is None or k == r:
        yield adapted
        return
    if not 1 <= k < r or adapted.left or adapted.trains_a:
        raise ShapeError(
            f"the first {k} columns of B cannot be trained here: write 1 to {r}, and lora.trains: b"
        )
    ups = {site: cast(nn.ModuleDict, layer.lora_B) for site, layer in adapted.layers().items()}
    whole = {site: up[ADAPTER] for site, up in ups.items()}
    narrow = {site: LeadingColumns(b.detach(), k) for site, (_, b) in adapted.live.items()}
    first = {f"{site}{LORA_B}": split.first.weight for site, split in narrow.items()}
    try:
        for site, up in ups.items():
            up[ADAPTER] = narrow[site]
        yield replace(adapted, trained={name: first.get(name, p) for name, p in adapted.trained.items()})
    finally:
        for site, up in ups.items():
            up[ADAPTER] = whole[site]
