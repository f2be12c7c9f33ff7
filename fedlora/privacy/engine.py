"""What computes a clipped sum of per-example gradients, and the rules that every such engine keeps."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fedlora.errors import PrivacyError


class Engine(Protocol):
    """Laws: clips are joint, one an example; microbatches change rounding only; the model stays as it was."""

    def clipped_sum(
        self,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        losses: Iterable[Callable[[], Tensor]],
        max_grad_norm: float | None,
        sequences_per_record: int = 1,
    ) -> dict[str, Tensor]:
        """Sum over all examples of their jointly clipped gradients, by name of parameter, float32 or wider.

        Args:
            model: may share nothing between the examples of a batch; every input's first axis counts
                examples, or their sequences.
            trained: exactly the parameters of `model` that require a gradient.
            losses: each call runs one microbatch through `model` and gives its losses (n,), one an example.
                None at all, an empty draw, gives zeros.
            max_grad_norm: the joint bound; None does not clip and is not private.
            sequences_per_record: how many rows of the model's inputs make one example, one after the other; they share
                its loss, and are clipped as one.

        Raises:
            PrivacyError: something is trainable that would not be clipped, or examples cannot be told apart. It says
                nothing of how many there are, since how many were drawn is secret.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedLinear:
    """One linear layer with the names under which its parameters are trained; None for a frozen one."""

    path: str
    module: nn.Module
    weight: str | None
    bias: str | None


def trained_linears(
    model: nn.Module, trained: Mapping[str, nn.Parameter], layer: type[nn.Module] = nn.Linear
) -> tuple[TrainedLinear, ...]:
    """Every linear layer that owns a trained parameter; nothing else owns one and nothing else is trainable.

    Args:
        model: that they are in.
        trained: exactly the parameters of `model` that require a gradient.
        layer: their exact type.

    Raises:
        PrivacyError: `trained` is not that set, a trained parameter belongs to a module of another type, or batch
            normalisation couples the examples.
    """
    modules = list(_modules(model))
    _require_same_set(modules, trained)
    names = {id(parameter): name for name, parameter in trained.items()}
    linears = []
    for path, module in modules:
        _refuse_batch_norm(path, module)
        own = {kind: names[id(p)] for kind, p in module._parameters.items() if id(p) in names}
        if not own:
            continue
        # The exact type: a subclass may compute something else than x @ weight.T + bias.
        if type(module) is not layer:
            raise PrivacyError(
                f"{sorted(own.values())} belong to {path!r}, a {type(module).__name__}; "
                f"only {layer.__name__} can be clipped per example: freeze them"
            )
        linears.append(
            TrainedLinear(path=path, module=module, weight=own.get("weight"), bias=own.get("bias"))
        )
    return tuple(linears)


def require_per_record(losses: Tensor) -> None:
    """Passes only losses of shape (n,) that depend on something trained."""
    if losses.ndim != 1:
        raise PrivacyError(
            f"losses have {losses.ndim} axes, need one, (n,), with one loss for each record; "
            "average inside a record, never over the batch"
        )
    if not losses.requires_grad:
        raise PrivacyError(
            "losses depend on no trained parameter; run the microbatch through the model with gradients on"
        )


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What `model.named_modules()` gives, at a tenth of its time, since every private step asks anew."""
    seen: set[int] = set()
    ahead = [("", model)]
    while ahead:
        path, module = ahead.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        inside = [
            (f"{path}.{name}" if path else name, child)
            for name, child in module._modules.items()
            if child is not None
        ]
        ahead += reversed(inside)


def _require_same_set(modules: Sequence[tuple[str, nn.Module]], trained: Mapping[str, nn.Parameter]) -> None:
    trainable = {
        id(p): f"{path}.{name}" if path else name
        for path, module in modules
        for name, p in module._parameters.items()
        if p is not None and p.requires_grad
    }
    listed = {id(p): name for name, p in trained.items()}
    unlisted = sorted(name for key, name in trainable.items() if key not in listed)
    frozen = sorted(name for key, name in listed.items() if key not in trainable)
    if unlisted or frozen or not listed or len(listed) != len(trained):
        raise PrivacyError(
            f"trained and trainable parameters differ: {unlisted} require a gradient but are not listed, "
            f"{frozen} are listed but frozen or not the model's ({len(trained)} listed); "
            "freeze or list them, each once, since all that is trained is clipped, noised and sent"
        )


def _refuse_batch_norm(path: str, module: nn.Module) -> None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        module.training or not module.track_running_stats
    ):
        raise PrivacyError(
            f"{path!r} normalises over the batch, so one record moves another's gradient; call eval() on it"
        )


def zero_sums(trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Zeros of each trained parameter's shape, on its device, float64: what an empty draw sums to."""
    return {name: torch.zeros(p.shape, dtype=torch.float64, device=p.device) for name, p in trained.items()}
