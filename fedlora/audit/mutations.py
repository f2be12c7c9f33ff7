"""Broken implementations, each with one real piece replaced: what the audit must be able to refute.

They are ordinary engines, noise sources, samplers and mechanisms; nothing in the production code knows of them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedlora.audit.trace import Implementation, reference_sampling
from fedlora.privacy.engine import Engine
from fedlora.privacy.noise import NoiseSource
from fedlora.values import Mechanism, Sampling

_STEP, _CLIENT = -2, -3
"""Where a release's purpose (..., client, step, tensor) names them."""


def broken(base: Implementation) -> tuple[Implementation, ...]:
    """Ten ways to go wrong that have all been seen in the field, everything else as in `base`."""
    batch = reference_sampling().expected_batch

    def noise(wrap: Callable[[NoiseSource], NoiseSource]) -> Callable[[int], NoiseSource]:
        return lambda seed: wrap(base.noise(seed))

    return (
        replace(base, name="no noise", noise=noise(lambda source: _Scaled(source, 0.0))),
        replace(
            base,
            name="noise divided by the batch once too often",
            noise=noise(lambda source: _Scaled(source, 1 / batch)),
        ),
        replace(base, name="clip off", engine=_Unclipped(base.engine)),
        replace(base, name="per-layer clip with the same bound", engine=_ClippedByLayer(base.engine)),
        replace(base, name="noise halved", mechanism=_half),
        replace(base, name="noise 20 % short", noise=noise(lambda source: _Scaled(source, 0.8))),
        replace(base, name="same noise each step", noise=noise(lambda source: _Forgetful(source, _STEP))),
        replace(base, name="one layer without noise", noise=noise(_LayerForgotten)),
        replace(base, name="shuffled instead of Poisson", draw=_shuffled),
        replace(
            base, name="same noise at each client", noise=noise(lambda source: _Forgetful(source, _CLIENT))
        ),
    )


def _half(mechanism: Mechanism) -> Mechanism:
    return replace(mechanism, noise_multiplier=mechanism.noise_multiplier / 2)


class _Wrapped:
    """A noise source that passes everything on; mutants override `normal`."""

    def __init__(self, source: NoiseSource) -> None:
        self._source = source

    @property
    def kind(self) -> str:
        return self._source.kind

    def normal(self, shape: tuple[int, ...], *, dtype: torch.dtype, purpose: tuple[str | int, ...]) -> Tensor:
        return self._source.normal(shape, dtype=dtype, purpose=purpose)

    def uniform(self, count: int, *, purpose: tuple[str | int, ...]) -> Tensor:
        return self._source.uniform(count, purpose=purpose)


class _Scaled(_Wrapped):
    def __init__(self, source: NoiseSource, factor: float) -> None:
        super().__init__(source)
        self._factor = factor

    def normal(self, shape: tuple[int, ...], *, dtype: torch.dtype, purpose: tuple[str | int, ...]) -> Tensor:
        return self._factor * super().normal(shape, dtype=dtype, purpose=purpose)


class _Forgetful(_Wrapped):
    """One part of the purpose is left out, so that streams repeat."""

    def __init__(self, source: NoiseSource, part: int) -> None:
        super().__init__(source)
        self._part = part

    def normal(self, shape: tuple[int, ...], *, dtype: torch.dtype, purpose: tuple[str | int, ...]) -> Tensor:
        left = (*purpose[: self._part], *purpose[len(purpose) + self._part + 1 :])
        return super().normal(shape, dtype=dtype, purpose=left)


class _LayerForgotten(_Wrapped):
    """The toy's fourth layer gets no noise."""

    def normal(self, shape: tuple[int, ...], *, dtype: torch.dtype, purpose: tuple[str | int, ...]) -> Tensor:
        drawn = super().normal(shape, dtype=dtype, purpose=purpose)
        return torch.zeros_like(drawn) if "b.3." in str(purpose[-1]) else drawn


class _Unclipped:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def clipped_sum(
        self,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        losses: Iterable[Callable[[], Tensor]],
        max_grad_norm: float | None,
        sequences_per_record: int = 1,
    ) -> dict[str, Tensor]:
        return self._engine.clipped_sum(model, trained, losses, None, sequences_per_record)


class _ClippedByLayer:
    """Each layer is brought to the whole bound by itself, so one record moves the sum by sqrt(layers) bounds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def clipped_sum(
        self,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        losses: Iterable[Callable[[], Tensor]],
        max_grad_norm: float | None,
        sequences_per_record: int = 1,
    ) -> dict[str, Tensor]:
        sums, batches = {}, list(losses)
        for name, parameter in trained.items():
            for other in trained.values():
                other.requires_grad_(other is parameter)
            sums |= self._engine.clipped_sum(
                model, {name: parameter}, batches, max_grad_norm, sequences_per_record
            )
        for parameter in trained.values():
            parameter.requires_grad_(True)
        return sums


def _shuffled(
    records: int, sampling: Sampling, source: NoiseSource, purpose: tuple[str | int, ...]
) -> Tensor:
    """Batches of one shuffled epoch after another."""
    *rest, step = purpose
    batches = round(1 / sampling.rate)
    order = source.uniform(records, purpose=(*rest, "epoch", int(step) // batches)).argsort()
    return order.tensor_split(batches)[int(step) % batches].sort().values
