"""The last layer of an encoder, for the first token alone where a classifier reads no other.

Attention of that layer needs the keys and values of all tokens. What comes after it is each token's own: three quarters
of a BERT layer's products, and of their backward pass, would serve tokens whose results nobody reads.
"""

import logging

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedlora.training.model import AdaptedModel, transformer_of
from fedlora.training.prefix import kept, made_up, redraw

log = logging.getLogger(__name__)

TOLERANCE_EPS = 64
"""Of logits and gradients, in norm: the same sums over fewer rows, which kernels round otherwise."""


def narrow_last_layer(adapted: AdaptedModel) -> bool:
    """What follows the last layer's attention runs for the first token only, if that changes nothing but rounding.

    Tried out on made-up records of unequal length, with trained parameters drawn anew and put back: logits and the
    gradient of everything trained are those of the whole layer. Where they are not, or the layer is of another build
    than BERT's, the model is left as it was; returns whether it was changed.
    """
    rest = _after_attention(adapted)
    if rest is None or adapted.causal:
        return False
    inputs = made_up(adapted)
    with kept(adapted):
        redraw(adapted)
        whole = _answers(adapted, inputs)
        handle = _narrowed(rest)
        try:
            found = _answers(adapted, inputs)
            error = max(float((new - old).norm() / old.norm()) for new, old in zip(found, whole, strict=True))
        except (RuntimeError, ValueError, IndexError):
            error = float("nan")  # a probe: what cannot run on one token wants them all
    if error <= TOLERANCE_EPS * torch.finfo(adapted.peft_model.dtype).eps:
        return True
    handle.remove()
    log.info("%s reads more than the first token", type(transformer_of(adapted.peft_model)).__name__)
    return False


def _narrowed(rest: nn.Module) -> RemovableHandle:
    return rest.register_forward_pre_hook(lambda _, states: tuple(each[:, :1] for each in states))


def _after_attention(adapted: AdaptedModel) -> nn.Module | None:
    """What of BERT's last layer is given (what attention mixed, what entered the layer), each (n, T, width)."""
    stacks = [
        module for module in transformer_of(adapted.peft_model).modules() if isinstance(module, nn.ModuleList)
    ]
    for stack in stacks:
        last = stack[len(stack) - 1] if len(stack) else nn.Module()
        rest = getattr(getattr(last, "attention", None), "output", None)
        if isinstance(rest, nn.Module) and hasattr(rest, "dense") and hasattr(rest, "LayerNorm"):
            return rest
    return None


@torch.enable_grad()
def _answers(adapted: AdaptedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The logits, and the gradient of everything trained that moves an uneven sum of them, float64."""
    logits = adapted.peft_model(**inputs).logits.double()
    weights = torch.linspace(-1, 2, logits.numel(), dtype=torch.float64, device=logits.device)
    total = (logits * weights.view_as(logits)).sum()
    gradients = torch.autograd.grad(total, list(adapted.trained.values()))
    return [logits.detach(), torch.cat([gradient.double().flatten() for gradient in gradients])]
