"""One file a published method, each of the same three parts: what is trained, the subspace, the mixing."""

from typing import assert_never

from fedlora.config import schema
from fedlora.methods.fedavg import fedavg
from fedlora.methods.fedsb import fedsb
from fedlora.methods.fedsvd import fedsvd
from fedlora.methods.ffa import ffa
from fedlora.methods.method import Method

__all__ = ["Method", "build"]


def build(method_cfg: schema.Method, lora_cfg: schema.Lora) -> Method:
    """The method that the config names, ready for every round."""
    match method_cfg:
        case schema.FedSvd():
            return fedsvd(method_cfg, lora_cfg)
        case schema.Ffa():
            return ffa(method_cfg, lora_cfg)
        case schema.FedSb():
            return fedsb(method_cfg, lora_cfg)
        case schema.FedAvg():
            return fedavg(method_cfg, lora_cfg)
        case _:
            assert_never(method_cfg)
