"""FLoRA (Wang et al., arXiv 2409.05976): products stacked, merged into the weight, and a new start."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.algebra.deltas import applied
from fedlora.config.method import FLora
from fedlora.config.schema import Lora
from fedlora.methods.mean import mean_product, plus_rest, with_sites
from fedlora.methods.method import Method
from fedlora.methods.mixing import Mixing
from fedlora.methods.subspace import Subspace
from fedlora.values import Adapters, Delta, Factors, Site


def flora(method_cfg: FLora, lora_cfg: Lora) -> Method:
    """Clients train A and B; [B_1 .. B_k] [A_1; ..; A_k], weighted, goes into the rest; A is drawn anew and B is zero.

    The stacked product is the sum of the products, which is what is kept here, so that a request does not grow with
    the cohort. Exact, and the adapter learns nothing from one round to the next but through the weight.
    """
    return Method(
        name=method_cfg.name,
        trains="ab",
        sides=("both",),
        subspace=Subspace(init=lora_cfg.init, refactor_every=None, restart_every=1),
        mean=Stacked(),
        mixing=Mixing.of(method_cfg.stale),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacked:
    """W + rest is W + scale * mean(B A), and B is zero; the subspace's restart draws the next A."""

    products: bool = True
    leaves_rest: bool = True

    def moved(self, adapters: Adapters, step: Delta, products: Mapping[Site, Tensor], round: int) -> Adapters:
        """See Mean."""
        sites: dict[Site, Factors] = {}
        for site, old in adapters.sites.items():
            total = adapters.scale * mean_product(old, step, site, products.get(site))
            sites[site] = Factors(a=old.a, b=torch.zeros_like(old.b), rest=plus_rest(old.rest, total))
        return with_sites(applied(adapters, step), sites)
