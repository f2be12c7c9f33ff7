"""Steps along a gradient that is private already: whatever they make of it comes after the noise."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fedlora.config.schema import AdamW, Optimizer
from fedlora.training.model import AdaptedModel
from fedlora.training.precondition import rescaling, rules_of


def optimizer_over(
    trained: Mapping[str, nn.Parameter], config: Optimizer, lr: float, adapted: AdaptedModel | None = None
) -> torch.optim.Optimizer:
    """A new optimiser of these parameters, still where the round began.

    Whatever it does to a gradient it does after the noise, by numbers that the server knows or that were released.

    Args:
        trained: by name, as `adapted.trained`, or some copies of each side by side.
        config: what kind.
        lr: the round's.
        adapted: whose A a preconditioner is made of, as loaded for the round; needed where `config` has one.
    """
    if isinstance(config, AdamW):
        return torch.optim.AdamW(trained.values(), lr=lr, weight_decay=config.weight_decay)
    optimizer = torch.optim.SGD(trained.values(), lr=lr)
    if config.precondition != "none":
        assert adapted is not None
        # Before the pull, which stays what it says: a share of the way back.
        optimizer.register_step_pre_hook(rescaling(trained, rules_of(config.precondition, adapted)))
    if config.proximal:
        optimizer.register_step_pre_hook(_pull_to(trained, config.proximal))
    return optimizer


def _pull_to(start: Mapping[str, nn.Parameter], strength: float) -> Callable[..., None]:
    """Adds the gradient of strength / 2 * |number - start|^2 before each step (FedProx)."""
    began = {parameter: parameter.detach().clone() for parameter in start.values()}

    def pull(*_: object) -> None:
        for parameter, there in began.items():
            if parameter.grad is not None:
                parameter.grad = torch.add(parameter.grad, parameter.detach() - there, alpha=strength)

    return pull


def descend(
    optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter], gradient: Mapping[str, Tensor]
) -> None:
    """One step of the optimiser along `gradient`; no gradient is kept."""
    for name, parameter in trained.items():
        parameter.grad = gradient[name].to(parameter.dtype)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
