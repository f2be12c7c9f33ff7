"""One file a published method, each of the same parts: what is trained, the subspace, the mixing, the mean."""

from dataclasses import replace
from typing import assert_never

from fedlora.config import method as config
from fedlora.config.schema import Lora
from fedlora.methods.fair import fair
from fedlora.methods.fedask import fedask
from fedlora.methods.fedavg import fedavg
from fedlora.methods.fedex import fedex
from fedlora.methods.fedit import fedit
from fedlora.methods.fedsa import fedsa
from fedlora.methods.fedsb import fedsb
from fedlora.methods.fedsvd import fedsvd
from fedlora.methods.ffa import ffa
from fedlora.methods.flexlora import flexlora
from fedlora.methods.flora import flora
from fedlora.methods.method import Method
from fedlora.methods.periodic import periodic
from fedlora.methods.rolora import rolora
from fedlora.methods.svfit import svfit
from fedlora.methods.switch import switch

__all__ = ["Method", "build"]


def build(method_cfg: config.Method, lora_cfg: Lora, seed: int) -> Method:
    """The method that the config names, ready for every round. seed: of the run, for what its subspace draws."""
    method = _named(method_cfg, lora_cfg)
    return replace(method, subspace=replace(method.subspace, seed=seed))


def _named(method_cfg: config.Method, lora_cfg: Lora) -> Method:
    match method_cfg:
        case config.FedSvd():
            return fedsvd(method_cfg, lora_cfg)
        case config.Ffa():
            return ffa(method_cfg, lora_cfg)
        case config.FedSb():
            return fedsb(method_cfg, lora_cfg)
        case config.SvFit():
            return svfit(method_cfg, lora_cfg)
        case config.FedAvg():
            return fedavg(method_cfg, lora_cfg)
        case config.FedIt():
            return fedit(method_cfg, lora_cfg)
        case config.FedSa():
            return fedsa(method_cfg, lora_cfg)
        case config.FedEx():
            return fedex(method_cfg, lora_cfg)
        case config.FLora():
            return flora(method_cfg, lora_cfg)
        case config.FlexLora():
            return flexlora(method_cfg, lora_cfg)
        case config.Fair():
            return fair(method_cfg, lora_cfg)
        case config.RoLora():
            return rolora(method_cfg, lora_cfg)
        case config.FedAsk():
            return fedask(method_cfg, lora_cfg)
        case config.Periodic():
            return periodic(method_cfg, lora_cfg)
        case config.Switch():
            return switch(method_cfg, lora_cfg)
        case _:
            assert_never(method_cfg)
