"""FedSVD (Lee et al., arXiv 2505.12805)."""

from fedlora.config.method import FedSvd
from fedlora.config.schema import Lora
from fedlora.methods.method import Method
from fedlora.methods.mixing import Mixing
from fedlora.methods.subspace import Subspace


def fedsvd(method_cfg: FedSvd, lora_cfg: Lora) -> Method:
    """Clients train B; the server averages it and then gives A orthonormal rows, every refactor_every rounds.

    The refactorisation turns A within the row space of its first draw and never leaves it. So under plain
    SGD, L2 clipping and isotropic noise this is FFA-LoRA with an orthonormal A in other coordinates, from the
    first refactorisation on; with `lora.init: orthonormal` from the start. Under AdamW the coordinates matter
    and it is not.
    """
    return Method(
        name=method_cfg.name,
        trains="b",
        subspace=Subspace(
            init=lora_cfg.init,
            refactor_every=method_cfg.refactor_every,
            dense=method_cfg.route == "dense",
            soft_threshold=method_cfg.soft_threshold,
        ),
        mixing=Mixing.of(method_cfg.stale),
    )
