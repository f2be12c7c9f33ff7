"""FedEx-LoRA (Singhal et al., arXiv 2410.09432): FedIT whose error the frozen weight takes up."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedlora.algebra.deltas import applied
from fedlora.config.method import FedEx
from fedlora.config.schema import Lora
from fedlora.methods.mean import mean_product, plus_rest, with_sites
from fedlora.methods.method import Method
from fedlora.methods.mixing import Mixing
from fedlora.methods.subspace import Subspace
from fedlora.values import Adapters, Delta, Factors, Site


def fedex(method_cfg: FedEx, lora_cfg: Lora) -> Method:
    """Clients train A and B; each is averaged, and scale * (mean of products - product of means) goes into the rest.

    Exact at the price of a dense matrix a site in every request. Noise on both factors multiplies, and the rest
    keeps its product for good.
    """
    return Method(
        name=method_cfg.name,
        trains="ab",
        sides=("both",),
        subspace=Subspace(init=lora_cfg.init, refactor_every=None),
        mean=Residual(),
        mixing=Mixing.of(method_cfg.stale),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """Equation 8 of the paper: W + rest + scale * mean(B) mean(A) is W + scale * mean(B A)."""

    products: bool = True
    leaves_rest: bool = True

    def moved(self, adapters: Adapters, step: Delta, products: Mapping[Site, Tensor], round: int) -> Adapters:
        """See Mean."""
        means = applied(adapters, step)
        sites: dict[Site, Factors] = {}
        for site, old in adapters.sites.items():
            new = means.sites[site]
            error = mean_product(old, step, site, products.get(site)) - new.b.double() @ new.a.double()
            sites[site] = Factors(a=new.a, b=new.b, rest=plus_rest(old.rest, adapters.scale * error))
        return with_sites(means, sites)
