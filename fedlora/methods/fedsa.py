"""FedSA-LoRA (Guo et al., arXiv 2410.01463): A and B trained, A shared, each client's B its own."""

from fedlora.config.method import FedSa
from fedlora.config.schema import Lora
from fedlora.methods.method import Method
from fedlora.methods.mixing import Mixing
from fedlora.methods.subspace import Subspace


def fedsa(method_cfg: FedSa, lora_cfg: Lora) -> Method:
    """Clients train A and B; A is averaged over who was heard, and each client goes on from the B that it left.

    The paper sends A alone. Here the change of B goes with it: A's gradient depends on B, so A is private only if B
    has been clipped and noised with it, and what is noised and paid for already may as well be sent. So the server
    has a B too, the mean of all clients' by their shares, where who was never heard has zero: a model to score, to
    export and to diagnose. No client trains from it. Two more differences: the head, if one is trained, is averaged
    as everywhere here; and an update that the server did not count has moved its client's B all the same.
    """
    return Method(
        name=method_cfg.name,
        trains="ab",
        sides=("both",),
        subspace=Subspace(init=lora_cfg.init, refactor_every=None),
        mixing=Mixing.of(method_cfg.stale),
        own_b=method_cfg.own_b,
    )
