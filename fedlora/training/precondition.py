"""What a step makes of B's gradient, which is clipped and noised by then: functions of it and of released numbers.

d_out rows of B, r columns; s = lora_alpha / r, by which the layer multiplies B A.
"""

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from fedlora.training.model import LORA_B, AdaptedModel

Rule: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""The gradient of B that is stepped along, of the noised one and of B where it stands; both (..., d_out, r)."""


def rules_of(kind: Literal["lora-pro", "allora"], adapted: AdaptedModel) -> dict[str, Rule]:
    """The rule of every B, by its name, for the A that the model holds now."""
    rule = lora_pro if kind == "lora-pro" else allora
    return {f"{site}{LORA_B}": rule(a.detach(), adapted.scale) for site, (a, _) in adapted.live.items()}


def rescaling(trained: Mapping[str, nn.Parameter], rules: Mapping[str, Rule]) -> Callable[..., None]:
    """A hook before a step: of those in `trained` that have a rule it has rescaled the gradient, of no others."""
    pairs = [(trained[name], rule) for name, rule in rules.items()]

    def rescale(*_: object) -> None:
        for parameter, rule in pairs:
            if parameter.grad is not None:
                parameter.grad = rule(parameter.grad, parameter.detach())

    return rescale


def lora_pro(a: Tensor, scale: float) -> Rule:
    """gradient @ (A A^T)^-1 / s^2: LoRA-Pro (arXiv 2407.18242) where A stays.

    The gradient of B is s G A^T, with G that of the weight, and a step moves the weight by s times its own. So the
    weight moves by G A^T (A A^T)^-1 A, the step of the full gradient as far as it lies in the rows of A, whatever A's
    lengths and angles and s are. Where rows of A depend on each other the inverse is the pseudo-inverse, and the
    projection the same.

    Args:
        a: (r, d_in). scale: s.
    """
    rows = a.double()
    metric = torch.linalg.pinv(rows @ rows.T, hermitian=True) / scale**2
    return lambda gradient, b: (gradient.double() @ metric).to(gradient.dtype)


def allora(a: Tensor, scale: float) -> Rule:
    """Row i of the gradient over s^2 sqrt(|row i of s B A| + 1 / s^2): ALLoRA (arXiv 2410.09692, section 4.2).

    There the layer adds B' A without a factor, and row i of the gradient of B' is divided by
    sqrt(|(B' A)_i| + 1 / eta^2) with eta = alpha / r. Here B' is s B: its gradient is that of B over s, and its step
    s times that of B; so s is eta, and all that the factor of the layer does is to scale what is clipped. Read not in
    the paper but in code that quotes that section; other code takes rows of B, which are as long where A has
    orthonormal rows.

    Args:
        a: (r, d_in). scale: s.
    """
    rows = a.double()
    metric = rows @ rows.T

    def rescaled(gradient: Tensor, b: Tensor) -> Tensor:
        wide = b.double()
        lengths = scale * ((wide @ metric) * wide).sum(dim=-1, keepdim=True).clamp_min(0.0).sqrt()
        return (gradient.double() / (scale**2 * (lengths + scale**-2).sqrt())).to(gradient.dtype)

    return rescaled
