"""Low-rank products in plain torch: the definition of correct for every faster kernel.

n examples, ... token axes (any number, also none), m outputs, r inputs. All results are float32 or wider.
"""

import torch
from torch import Tensor

from fedlora.errors import ShapeError


def per_example_gradient(dy: Tensor, h: Tensor) -> Tensor:
    """The gradient (n, m, r) of each example's loss with respect to the weight of y = h @ weight.T.

    With LoRA's B as the weight, h = A x is already r wide, so this costs n T m r products and never forms
    anything of the size of A or of B A.

    Args:
        dy: gradient at the output (n, ..., m).
        h: input (n, ..., r), the same leading shape.

    Raises:
        ShapeError: the leading shapes differ.
    """
    if dy.ndim < 2 or dy.shape[:-1] != h.shape[:-1]:
        raise ShapeError(f"dy {tuple(dy.shape)} and h {tuple(h.shape)} must share all axes but the last")
    n, m, r = len(dy), dy.shape[-1], h.shape[-1]
    # Widened before the product: a bfloat16 sum over tokens is off by 1e-2, and clipping must see true norms.
    wide_dy, wide_h = _widened(dy), _widened(h)
    if wide_dy.dtype != wide_h.dtype:
        wide_dy, wide_h = wide_dy.double(), wide_h.double()
    tokens = dy.shape[1:-1].numel()
    return torch.bmm(wide_dy.reshape(n, tokens, m).transpose(1, 2), wide_h.reshape(n, tokens, r))


def per_example_bias_gradient(dy: Tensor) -> Tensor:
    """The gradient (n, m) of each example's loss with respect to a bias, from dy (n, ..., m)."""
    if dy.ndim < 2:
        raise ShapeError(f"dy {tuple(dy.shape)} needs an axis of examples and one of outputs")
    return _widened(dy).reshape(len(dy), dy.shape[1:-1].numel(), dy.shape[-1]).sum(dim=1)


def product_with_own(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y (n, ..., m) of h (n, ..., r): y[i] = h[i] @ weight[i].T + bias[i], in the type of h.

    Args:
        h: (n, ..., r).
        weight: (n, m, r), one an example.
        bias: (n, m).

    Raises:
        ShapeError: n or r differ.
    """
    if h.ndim < 2 or weight.ndim != 3 or (len(h), h.shape[-1]) != (len(weight), weight.shape[2]):
        raise ShapeError(f"h {tuple(h.shape)} and weight {tuple(weight.shape)} must share n and r")
    n, m, r = weight.shape
    rows, turned = h.reshape(n, h.shape[1:-1].numel(), r), weight.transpose(1, 2)
    y = torch.bmm(rows, turned) if bias is None else torch.baddbmm(bias[:, None], rows, turned)
    return y.reshape(*h.shape[:-1], m)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
