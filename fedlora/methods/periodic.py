"""PeriodicLoRA (Meng et al., arXiv 2402.16141): unload, and start anew elsewhere."""

from fedlora.config.method import Periodic
from fedlora.config.schema import Lora
from fedlora.methods.method import Method
from fedlora.methods.mixing import Mixing
from fedlora.methods.subspace import Subspace


def periodic(method_cfg: Periodic, lora_cfg: Lora) -> Method:
    """FFA-LoRA that unloads: every so many rounds the product goes into the rest, A is drawn anew and B is zero.

    The model is the same just after; what is learnt next lies in other directions. What was remembered of clients
    belongs to the old ones and is forgotten.
    """
    return Method(
        name=method_cfg.name,
        trains="b",
        subspace=Subspace(
            init=lora_cfg.init, refactor_every=None, restart_every=method_cfg.restart_every, restart_rows=None
        ),
        mixing=Mixing.of(method_cfg.stale),
    )
