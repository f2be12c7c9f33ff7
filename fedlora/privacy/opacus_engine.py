"""The oracle: the same clipped sum by Opacus 1.6, our rule for non-finite gradients put before its clip."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from fedlora.errors import PrivacyError
from fedlora.kernels.torch_ops import norms
from fedlora.privacy.engine import TrainedLinear, require_per_record, trained_linears, zero_sums


class OpacusEngine:
    """Opacus' hooks and its clipping. Stateless; see `Engine` for its laws.

    Opacus clips by C / (norm + 1e-6) and sums in the parameter's own type, so it equals the direct engine to
    float32 tolerance only, and parameters narrower than float32 are refused: a bfloat16 clip overshoots C by
    0.5 %.
    """

    def clipped_sum(
        self,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        losses: Iterable[Callable[[], Tensor]],
        max_grad_norm: float | None,
        sequences_per_record: int = 1,
    ) -> dict[str, Tensor]:
        """Sum over all examples of their jointly clipped gradients, float64; see `Engine.clipped_sum`."""
        linears = trained_linears(model, trained)
        _refuse_narrow(trained)
        sums = zero_sums(trained)
        with _hooked(model, linears, trained):
            # Infinity: no clip. Noise and the step itself are never Opacus' here.
            bound = float("inf") if max_grad_norm is None else max_grad_norm
            optimizer = DPOptimizer(
                torch.optim.SGD(list(trained.values()), lr=1.0),
                noise_multiplier=0.0,
                max_grad_norm=bound,
                expected_batch_size=None,
                loss_reduction="sum",
            )
            for micro_batch in losses:
                for name, part in _clipped_part(
                    optimizer, trained, micro_batch, sequences_per_record
                ).items():
                    sums[name] += part
        return sums


def _clipped_part(
    optimizer: DPOptimizer,
    trained: Mapping[str, nn.Parameter],
    micro_batch: Callable[[], Tensor],
    sequences_per_record: int,
) -> dict[str, Tensor]:
    losses = micro_batch()
    if losses.numel() == 0:
        return {}
    require_per_record(losses)
    with warnings.catch_warnings():
        # Frozen layers below make it say that its hook fires for outputs only, and the outputs' are the ones
        # used.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        losses.sum().backward()
    if sequences_per_record > 1:
        _join_sequences(trained, sequences_per_record)
    _zero_non_finite(trained, len(losses))
    optimizer.clip_and_accumulate()
    part = {name: p.summed_grad.to(torch.float64) for name, p in trained.items()}  # pyright: ignore
    optimizer.zero_grad(set_to_none=True)
    return part


def _join_sequences(trained: Mapping[str, nn.Parameter], sequences_per_record: int) -> None:
    """Each row of gradients is a record's: the sum over its sequences, which Opacus keeps apart."""
    for name, parameter in trained.items():
        rows = parameter.grad_sample  # pyright: ignore[reportAttributeAccessIssue]
        if rows is not None and len(rows) % sequences_per_record:
            raise PrivacyError(
                f"{name!r} has rows that are no records of {sequences_per_record} sequences; give all of each"
            )
        if rows is not None:
            parameter.grad_sample = rows.unflatten(0, (-1, sequences_per_record)).sum(dim=1)  # pyright: ignore


def _zero_non_finite(trained: Mapping[str, nn.Parameter], records: int) -> None:
    samples = {name: p.grad_sample for name, p in trained.items()}  # pyright: ignore
    wrong = sorted(name for name, g in samples.items() if g is None or len(g) != records)
    if wrong:
        raise PrivacyError(
            f"{wrong} have no rows of gradients, or more or fewer than there are losses; the loss must pass every "
            "trained layer, and the first axis must count examples"
        )
    sizes = torch.stack([norms(sample.flatten(start_dim=1)) for sample in samples.values()])
    finite = torch.isfinite(sizes).all(dim=0)
    for parameter in trained.values():
        parameter.grad_sample[~finite] = 0  # pyright: ignore


def _refuse_narrow(trained: Mapping[str, nn.Parameter]) -> None:
    narrow = {
        name: str(p.dtype) for name, p in trained.items() if p.dtype not in (torch.float32, torch.float64)
    }
    if narrow:
        raise PrivacyError(
            f"{narrow}: Opacus would clip in that type; train float32 parameters or use engine direct"
        )


@contextmanager
def _hooked(
    model: nn.Module, linears: tuple[TrainedLinear, ...], trained: Mapping[str, nn.Parameter]
) -> Iterator[None]:
    modes = [linear.module.training for linear in linears]
    gradients = [parameter.grad for parameter in trained.values()]
    for linear in linears:
        linear.module.training = (
            True  # Opacus sees nothing in eval mode; a linear layer computes the same in both
        )
    for parameter in trained.values():
        parameter.grad = None  # backward() would add into the caller's tensor
    hooks = GradSampleHooks(model, batch_first=True, loss_reduction="sum")
    try:
        yield
    finally:
        hooks.cleanup()
        for linear, mode in zip(linears, modes, strict=True):
            linear.module.training = mode
            _forget(linear.module, ("activations", "max_batch_len"))
        for parameter, gradient in zip(trained.values(), gradients, strict=True):
            parameter.grad = gradient
            _forget(parameter, ("summed_grad", "grad_sample", "_forward_counter", "_current_grad_sample"))


def _forget(owner: object, names: tuple[str, ...]) -> None:
    for name in names:
        if hasattr(owner, name):
            delattr(owner, name)
