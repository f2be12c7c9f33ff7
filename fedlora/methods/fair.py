"""LoRA-FAIR (Bian et al., arXiv 2411.14961): FedIT, and a correction of B at the server."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.algebra.deltas import applied
from fedlora.config.method import Fair
from fedlora.config.schema import Lora
from fedlora.methods.mean import mean_product, with_sites
from fedlora.methods.method import Method
from fedlora.methods.mixing import Mixing
from fedlora.methods.subspace import Subspace
from fedlora.values import Adapters, Delta, Site


def fair(method_cfg: Fair, lora_cfg: Lora) -> Method:
    """Clients train A and B; each is averaged, then B moves so that B A comes near the mean of the products.

    The paper asks for the largest cosine between the two with a penalty on the correction, and searches for it by
    gradient steps; here it is the least squared distance, whose minimum is known: the same aim, in closed form.
    """
    return Method(
        name=method_cfg.name,
        trains="ab",
        sides=("both",),
        subspace=Subspace(init=lora_cfg.init, refactor_every=None),
        mean=Corrected(penalty=method_cfg.penalty),
        mixing=Mixing.of(method_cfg.stale),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrected:
    """mean(B) + dB, where dB minimises |mean(B A) - (mean(B) + dB) mean(A)|^2 + penalty |dB|^2.

    dB = E mean(A)^T (mean(A) mean(A)^T + penalty I)^-1 with E = mean(B A) - mean(B) mean(A).
    """

    penalty: float
    products: bool = True
    leaves_rest: bool = False

    def moved(self, adapters: Adapters, step: Delta, products: Mapping[Site, Tensor], round: int) -> Adapters:
        """See Mean."""
        means = applied(adapters, step)
        sites = {}
        for site, old in adapters.sites.items():
            a, b = means.sites[site].a.double(), means.sites[site].b.double()
            error = mean_product(old, step, site, products.get(site)) - b @ a
            gram = a @ a.T + self.penalty * torch.eye(len(a), dtype=a.dtype)
            sites[site] = replace(means.sites[site], b=b + torch.linalg.solve(gram, error @ a.T, left=False))
        return with_sites(means, sites)
