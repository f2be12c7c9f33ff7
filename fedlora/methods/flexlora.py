"""FlexLoRA (Bai et al., arXiv 2402.11505): the mean of the products, cut to rank r by an SVD."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedlora.algebra.deltas import applied
from fedlora.algebra.factors import truncated
from fedlora.config.method import FlexLora
from fedlora.config.schema import Lora
from fedlora.methods.mean import mean_product, with_sites
from fedlora.methods.method import Method
from fedlora.methods.mixing import Mixing
from fedlora.methods.subspace import Subspace
from fedlora.values import Adapters, Delta, Site


def flexlora(method_cfg: FlexLora, lora_cfg: Lora) -> Method:
    """Clients train A and B; the server forms the mean product, and sends its r strongest directions on.

    What lies beyond rank r is lost in each round. A has orthonormal rows, B carries the singular values. All clients
    have one rank here; the paper's unequal ones would each get the first of these directions.
    """
    return Method(
        name=method_cfg.name,
        trains="ab",
        sides=("both",),
        subspace=Subspace(init=lora_cfg.init, refactor_every=None),
        mean=Truncated(),
        mixing=Mixing.of(method_cfg.stale),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncated:
    """B A is the best rank-r approximation of the mean product; as it was, where that is zero."""

    products: bool = True
    leaves_rest: bool = False

    def moved(self, adapters: Adapters, step: Delta, products: Mapping[Site, Tensor], round: int) -> Adapters:
        """See Mean."""
        sites = {}
        for site, old in adapters.sites.items():
            total = mean_product(old, step, site, products.get(site))
            sites[site] = truncated(total, len(old.a)) if bool(total.any()) else old
        return with_sites(applied(adapters, step), sites)
