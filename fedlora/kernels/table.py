"""The low-rank paths behind one table of functions: which of them computes is the config's and the device's to say."""

import importlib.util
import logging
from dataclasses import dataclass, field
from types import ModuleType
from typing import Literal, Protocol

import torch
from torch import Tensor

from fedlora.errors import ConfigError, ShapeError
from fedlora.kernels import packed, torch_ops

log = logging.getLogger(__name__)

Kernels = Literal["auto", "torch", "onednn", "triton"]
"""`model.kernels`. onednn concerns frozen weights on cores only, see `packed`; here it is torch."""


class Ops(Protocol):
    """What a private step asks of its kernels. `torch_ops` says what each gives; no other may give anything else."""

    def per_example_gradient_into(self, out: Tensor, dy: Tensor, h: Tensor) -> None:
        """out (n, m, r): dy[i].T @ h[i] of each example."""
        ...

    def per_example_bias_gradient_into(self, out: Tensor, dy: Tensor) -> None:
        """out (n, m): the sum of dy[i] over its tokens."""
        ...

    def norms(self, rows: Tensor) -> Tensor:
        """(n,) float64 of rows (n, P)."""
        ...

    def weighted_sums(self, rows: Tensor, shares: Tensor) -> Tensor:
        """(k, P) float64: shares (k, n) float64 @ rows (n, P)."""
        ...


def chosen(kernels: Kernels, device: str, dtype: str) -> Literal["torch", "onednn", "triton"]:
    """What a config's choice comes to on a machine like this one.

    Args:
        kernels: `model.kernels`.
        device: cpu or cuda.
        dtype: of the frozen weights; only float32 is packed.
    """
    if device == "cuda":
        wanted = kernels in ("auto", "triton") and importlib.util.find_spec("triton") is not None
        return "triton" if wanted else "torch"
    packs = kernels in ("auto", "onednn") and dtype == "float32" and packed.available()
    return "onednn" if packs else "torch"


def ops_for(kernels: Kernels, device: torch.device) -> Ops:
    """The functions that a private step on this device computes with.

    Raises:
        ConfigError: kernels that this device, or this machine, does not have.
    """
    on_gpu = device.type == "cuda"
    if kernels == "triton" and not on_gpu:
        raise ConfigError(f"model.kernels: triton, but clients train on {device}; write kernels: auto")
    if not on_gpu or kernels in ("torch", "onednn"):
        return torch_ops
    try:
        from fedlora.kernels import triton_ops
    except ImportError as error:
        if kernels == "triton":
            raise ConfigError(
                f"model.kernels: triton: {error}; install triton, or write kernels: auto"
            ) from error
        log.warning("model.kernels auto: no Triton here (%s); plain torch computes", error)
        return torch_ops
    return triton_ops if kernels == "triton" else WithFallback(triton_ops)


@dataclass(eq=False, slots=True)
class WithFallback:
    """`fast`, until it fails once, which the log tells; from then on `torch_ops`, which overwrites all it left."""

    fast: ModuleType | Ops
    failed: bool = field(default=False, init=False)

    def per_example_gradient_into(self, out: Tensor, dy: Tensor, h: Tensor) -> None:
        """See Ops."""
        self._call("per_example_gradient_into", out, dy, h)

    def per_example_bias_gradient_into(self, out: Tensor, dy: Tensor) -> None:
        """See Ops."""
        self._call("per_example_bias_gradient_into", out, dy)

    def norms(self, rows: Tensor) -> Tensor:
        """See Ops."""
        return self._call("norms", rows)

    def weighted_sums(self, rows: Tensor, shares: Tensor) -> Tensor:
        """See Ops."""
        return self._call("weighted_sums", rows, shares)

    def _call(self, name: str, *tensors: Tensor) -> Tensor:
        if not self.failed:
            try:
                return getattr(self.fast, name)(*tensors)
            except (ShapeError, torch.cuda.OutOfMemoryError):
                raise  # no fault of a compiler's
            except Exception as error:
                self.failed = True
                log.error("%s: %s; plain torch computes from here on", name, type(error).__name__)
        return getattr(torch_ops, name)(*tensors)
