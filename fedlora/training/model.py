"""A pretrained model with LoRA, of which only A, B and the head can move, each if it is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from fedlora.errors import ShapeError
from fedlora.training.intake import Intake
from fedlora.training.objective import Objective
from fedlora.values import Adapters, Delta, Side, Site

REST = "lora_rest"
"""Attribute of an adapted layer: what its frozen weight has taken up, (d_out, d_in); most methods leave none."""

ADAPTER = "default"  # PEFT's name for the one adapter that a model here has

LORA_A = ".lora_A"
LORA_B = ".lora_B"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdaptedModel:
    """One process's copy of the model. Its weights change in place by `load` and by whoever steps `trained`.

    sites: adapted modules, sorted, named as in the base model. scale: lora_alpha / r.
    live: the A (r, d_in) and the B (d_out, r) of every site that the model computes with; a core's B is (r, r).
    left: the frozen left frame (d_out, r) of every site whose core is trained.
    trained: all that rounds train, by name: `<site>.lora_B`, `<site>.lora_A` where A is trained too, the head's own
        names. What requires a gradient: all of it, or since `trained_on`, what that said.
    causal: a language model, not a classifier. objective: what it is trained for. intake: how it takes in records.
    """

    peft_model: PeftModel
    sites: tuple[Site, ...]
    scale: float
    live: Mapping[Site, tuple[nn.Parameter, nn.Parameter]]
    left: Mapping[Site, Tensor]
    trained: Mapping[str, nn.Parameter]
    causal: bool
    objective: Objective
    intake: Intake

    @property
    def device(self) -> torch.device:
        """Where it is trained."""
        return next(iter(self.trained.values())).device

    def shapes(self) -> dict[Site, tuple[int, int]]:
        """(d_out, d_in) of every site."""
        return {
            site: (self.left[site].shape[0] if site in self.left else b.shape[0], a.shape[1])
            for site, (a, b) in self.live.items()
        }

    def layers(self) -> dict[Site, nn.Module]:
        """The adapted layer of every site, as it stands in the model."""
        base = transformer_of(self.peft_model)
        return {site: base.get_submodule(site) for site in self.sites}

    def head(self) -> dict[str, Tensor]:
        """Clones of the head's trained tensors; empty where the head is frozen or there is none."""
        return {name: p.detach().clone() for name, p in self.trained.items() if _is_of_head(name)}

    def rests(self) -> dict[Site, Tensor]:
        """What the frozen weights have taken up, (d_out, d_in), of every site that has."""
        found = {site: getattr(layer, REST, None) for site, layer in self.layers().items()}
        return {site: rest for site, rest in found.items() if rest is not None}

    @property
    def trains_a(self) -> bool:
        """Whether A is trained."""
        return any(name.endswith(LORA_A) for name in self.trained)

    def trained_on(self, side: Side) -> dict[str, nn.Parameter]:
        """What a round of this side trains; exactly this requires a gradient from here on.

        Raises:
            ShapeError: A is frozen in this model, but the side trains it.
        """
        if side != "b" and not self.trains_a:
            raise ShapeError(
                f"asked to train side {side!r}, but A is frozen here; write lora.trains: ab, or another method"
            )
        idle = {"b": LORA_A, "a": LORA_B}.get(side)
        chosen = {name: p for name, p in self.trained.items() if idle is None or not name.endswith(idle)}
        for name, parameter in self.trained.items():
            parameter.requires_grad_(name in chosen)
        return chosen

    @torch.no_grad()
    def load(self, adapters: Adapters) -> None:
        """The model computes with `adapters` from here on: A, B, left frames, rests and head are copied in.

        Raises:
            ShapeError: other sites, head tensors, shapes or another scale than this model has; nothing was
            copied.
        """
        if adapters.scale != self.scale:
            raise ShapeError(f"adapters have scale {adapters.scale}, the model lora_alpha / r = {self.scale}")
        pairs: list[tuple[str, Tensor, Tensor]] = []
        live = self.live
        _require_names("sites", adapters.sites, live)
        for site, (a, b) in live.items():
            pairs += [(f"{site} a", a, adapters.sites[site].a), (f"{site} b", b, adapters.sites[site].b)]
        left = {site: factors.left for site, factors in adapters.sites.items() if factors.left is not None}
        _require_names("left frames", left, self.left)
        pairs += [(f"{site} left", frame, left[site]) for site, frame in self.left.items()]
        head = {name: p for name, p in self.trained.items() if _is_of_head(name)}
        _require_names("head tensors", adapters.head, head)
        pairs += [(name, parameter, adapters.head[name]) for name, parameter in head.items()]
        for name, parameter, value in pairs:
            if parameter.shape != value.shape:
                raise ShapeError(
                    f"{name} is {tuple(value.shape)} in the adapters, {tuple(parameter.shape)} in the model"
                )
        for _, parameter, value in pairs:
            parameter.copy_(value)
        for site, layer in self.layers().items():
            set_rest(layer, adapters.sites[site].rest)

    @torch.no_grad()
    def delta(self, start: Adapters, side: Side = "b") -> Delta:
        """What has changed since `load(start)`, in the basis of `start`; shares no memory with the model.

        side: what was trained; the rest has not changed, and is not told.
        """
        live, began = self.live, start.sites
        # B lies turned in memory; what leaves the model lies as its shape says
        sites = {} if side == "a" else {s: (b - began[s].b.to(b)).contiguous() for s, (_, b) in live.items()}
        return Delta(
            basis=start.basis,
            sites=sites,
            head={name: value - start.head[name].to(value) for name, value in self.head().items()},
            a={} if side == "b" else {s: a - began[s].a.to(a) for s, (a, _) in live.items()},
        )


def set_rest(layer: nn.Module, rest: Tensor | None) -> None:
    """`layer` adds `rest`, in the type of its B, to its frozen weight from here on; None: nothing."""
    if rest is None:
        if getattr(layer, REST, None) is not None:
            layer.register_parameter(REST, None)
        return
    like = layer.get_parameter(f"lora_B.{ADAPTER}.weight")
    layer.register_parameter(REST, nn.Parameter(rest.detach().to(like, copy=True), requires_grad=False))


def _is_of_head(name: str) -> bool:
    return not name.endswith((LORA_A, LORA_B))


def _require_names(what: str, given: Mapping[str, object], live: Mapping[str, object]) -> None:
    if given.keys() != live.keys():
        raise ShapeError(
            f"adapters lack {what} {sorted(live.keys() - given.keys())} and have "
            f"{sorted(given.keys() - live.keys())} "
            f"that the model does not; both sides must come from the same config"
        )


def transformer_of(peft_model: PeftModel) -> Any:
    """The transformers model inside: its module names bear no prefix of PEFT's."""
    return peft_model.base_model.get_submodule("model")
