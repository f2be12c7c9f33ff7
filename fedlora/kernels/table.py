"""The low-rank paths behind one table of functions: which of them computes is the config's and the device's to say."""

from typing import Protocol

from torch import Tensor


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
