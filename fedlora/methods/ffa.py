"""FFA-LoRA (Sun et al., arXiv 2403.12313)."""

from fedlora.config.method import Ffa
from fedlora.config.schema import Lora
from fedlora.methods.method import Method
from fedlora.methods.mixing import Mixing
from fedlora.methods.subspace import Subspace


def ffa(method_cfg: Ffa, lora_cfg: Lora) -> Method:
    """Clients train B; the server averages it; A stays as `lora.init` drew it.

    With orthonormal rows it is the control that any gain claimed for FedSVD must be measured against.
    """
    return Method(
        name=method_cfg.name,
        trains="b",
        subspace=Subspace(init=lora_cfg.init, refactor_every=None),
        mixing=Mixing.of(method_cfg.stale),
    )
