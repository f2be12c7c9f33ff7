"""A forward pass that begins at the lowest adapted layer.

With LoRA in the last layers only, the hidden states that enter the lowest of them are constants of a record: the
model has no dropout and nothing below is trained. Given these states, the layers below need not run. Embeddings,
masks and positions are still the model's own work: they cost little, and layers above ask for them.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.training.model import AdaptedModel, transformer_of

log = logging.getLogger(__name__)

TOLERANCE_EPS = 4
"""The probe's two passes run the same kernels on the same shapes and give padding no weight: but last bits differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """The frozen layers of a model: all of the ModuleList `stack` below number `layer`, which is above 0."""

    stack: str
    layer: int


class _Reached(Exception):  # noqa: N818  # it is no error: nothing above is wanted
    """The pass is where it was to stop."""


def lowest_adapted(adapted: AdaptedModel) -> Prefix | None:
    """The layers below the lowest adapted one, by the names of the sites alone; None where there are none."""
    base = transformer_of(adapted.peft_model)
    first = adapted.sites[0].split(".")
    paths = (".".join(first[:length]) for length in range(1, len(first)))
    stack = next((path for path in paths if isinstance(base.get_submodule(path), nn.ModuleList)), None)
    if stack is None or not all(site.startswith(f"{stack}.") for site in adapted.sites):
        return None
    layer = min(int(site[len(stack) + 1 :].split(".", 1)[0]) for site in adapted.sites)
    return Prefix(stack=stack, layer=layer) if layer > 0 else None


def frozen_prefix(adapted: AdaptedModel) -> Prefix | None:
    """The layers that need not run for a record whose states are known; None where all must, as the log says.

    Tried out on made-up records with trained parameters drawn anew (a head at zero would hide every difference):
    the states may not move with what is trained, every frozen layer runs once and gives the next its states, and
    the logits are those of a whole pass. The parameters are put back.
    """
    prefix = lowest_adapted(adapted)
    if prefix is None or not adapted.intake.keeps_states:
        return None
    with kept(adapted):
        reason = _objection(adapted, prefix)
    if reason:
        log.warning(
            "all layers of %s run in every step: %s",
            type(transformer_of(adapted.peft_model)).__name__,
            reason,
        )
    return None if reason else prefix


@torch.no_grad()
def entering(adapted: AdaptedModel, prefix: Prefix, inputs: Mapping[str, Tensor]) -> Tensor:
    """The states (n, T, width) that enter the lowest adapted layer; nothing above it is computed.

    Args:
        adapted: see `prefix`.
        prefix: of this model.
        inputs: what the model is called with: input_ids (n, T) and the rest.
    """
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(_first(args, kwargs))
        raise _Reached

    handle = _layers(adapted, prefix)[prefix.layer].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        adapted.peft_model(**inputs)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


@contextmanager
def resumed(adapted: AdaptedModel, states: Tensor | None) -> Iterator[None]:
    """The model's next passes begin at the lowest adapted layer with `states` (n, T, width); None: at the first."""
    prefix = None if states is None else lowest_adapted(adapted)
    assert states is None or prefix is not None, "states are given only where frozen_prefix found a prefix"
    with ExitStack() as undo:
        if prefix is not None:
            layers = _layers(adapted, prefix)
            for layer in layers[: prefix.layer]:
                undo.enter_context(_passing_on(layer))

            def put_in(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

            handle = layers[prefix.layer].register_forward_pre_hook(put_in, with_kwargs=True)
            undo.callback(handle.remove)
        yield


@contextmanager
def _passing_on(layer: nn.Module) -> Iterator[None]:
    """The layer returns what it is given. The module stays where it is: models read attributes of it."""
    own = vars(layer)
    earlier = own.get("forward")
    own["forward"] = lambda *args, **kwargs: _first(args, kwargs)
    try:
        yield
    finally:
        del own["forward"]
        if earlier is not None:
            own["forward"] = earlier


@torch.no_grad()
def _objection(adapted: AdaptedModel, prefix: Prefix) -> str:
    """Why the layers below may not be left out; empty where they may."""
    inputs = made_up(adapted)
    real = inputs["attention_mask"] == 1
    outputs: list[object] = []
    handles = [
        layer.register_forward_hook(lambda _layer, _inputs, output: outputs.append(output))
        for layer in _layers(adapted, prefix)[: prefix.layer]
    ]
    try:
        before = entering(adapted, prefix, inputs)
    finally:
        for handle in handles:
            handle.remove()
    width, dtype = (
        getattr(transformer_of(adapted.peft_model).config, "hidden_size", None),
        adapted.peft_model.dtype,
    )
    if tuple(before.shape) != (*real.shape, width) or before.dtype != dtype:
        given = f"{tuple(before.shape)} of {before.dtype}"
        return f"layer {prefix.layer} of {prefix.stack} is given {given}, not (n, T, {width}) of {dtype}"
    if len(outputs) != prefix.layer or outputs[-1] is not before:
        return f"the layers of {prefix.stack} do not hand their states from one to the next, each once"
    redraw(adapted)
    if not torch.equal(before[real], entering(adapted, prefix, inputs)[real]):
        return f"what is trained moves the states below layer {prefix.layer} of {prefix.stack}"
    whole = adapted.peft_model(**inputs).logits
    with resumed(adapted, before * real[..., None]):
        found = adapted.peft_model(**inputs).logits
    if whole.ndim == 3:
        whole, found = whole[real], found[real]
    change = float((found.double() - whole.double()).norm() / whole.double().norm())
    # written so that not-a-number, of logits that are all zero, is an objection too
    if not change <= TOLERANCE_EPS * torch.finfo(before.dtype).eps:
        return f"without the layers below {prefix.layer} of {prefix.stack} the logits change by {change:.2g}"
    return ""


def made_up(adapted: AdaptedModel) -> dict[str, Tensor]:
    """The intake's made-up records, where the model is."""
    inputs = adapted.intake.made_up(transformer_of(adapted.peft_model))
    return {name: tensor.to(adapted.device) for name, tensor in inputs.items()}


@contextmanager
def kept(adapted: AdaptedModel) -> Iterator[None]:
    """What is trained may be overwritten within; afterwards it is as it was."""
    live = list(adapted.trained.values())
    before = [parameter.detach().clone() for parameter in live]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(live, before, strict=True):
                parameter.copy_(value)


@torch.no_grad()
def redraw(adapted: AdaptedModel) -> None:
    """Everything trained is random, and the same in every process."""
    draw = torch.Generator().manual_seed(0)
    for parameter in adapted.trained.values():
        parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)


def _layers(adapted: AdaptedModel, prefix: Prefix) -> nn.ModuleList:
    stack = transformer_of(adapted.peft_model).get_submodule(prefix.stack)
    assert isinstance(stack, nn.ModuleList)
    return stack


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The states a layer is called with: its first argument, by whatever way it comes."""
    return args[0] if args else kwargs["hidden_states"]
