"""Plain federated averaging of LoRA's B (McMahan et al., arXiv 1602.05629)."""

from fedlora.config.method import FedAvg
from fedlora.config.schema import Lora
from fedlora.methods.method import Method
from fedlora.methods.mixing import Mixing
from fedlora.methods.subspace import Subspace


def fedavg(method_cfg: FedAvg, lora_cfg: Lora) -> Method:
    """Clients train B; the server averages it; A stays as PEFT draws it, Kaiming-uniform.

    Averaging A and B apart would not average their product, and noise on both multiplies; so A is frozen here
    too, and plain FedAvg of B is FFA-LoRA with PEFT's A. The name stands for what a user of PEFT gets without
    further choices.
    """
    del lora_cfg  # the signature is that of every method; this one leaves no choice
    return Method(
        name=method_cfg.name,
        trains="b",
        subspace=Subspace(init="kaiming", refactor_every=None),
        mixing=Mixing.of(method_cfg.stale),
    )
