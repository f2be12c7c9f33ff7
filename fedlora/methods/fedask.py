"""FedASK (arXiv 2507.09990) as it is run under differential privacy: A frozen at clients, a two-sided sketch."""

from fedlora.config.method import FedAsk
from fedlora.config.schema import Lora
from fedlora.methods.method import Method
from fedlora.methods.mixing import Mixing
from fedlora.methods.subspace import Subspace


def fedask(method_cfg: FedAsk, lora_cfg: Lora) -> Method:
    """Clients train B; the server rewrites B A as (U S^1/2) (S^1/2 V^T), the two sides of its sketch's SVD.

    A is frozen while clients train, so the mean product is mean(B) A, of rank r: a sketch of r columns finds it whole,
    and what is left of the method is FedSVD's refactorisation with the singular values shared between both sides. So
    A keeps its row space, but steps of B count for more where the product is strong already.
    """
    return Method(
        name=method_cfg.name,
        trains="b",
        subspace=Subspace(init=lora_cfg.init, refactor_every=1, singular_values="shared"),
        mixing=Mixing.of(method_cfg.stale),
    )
