"""The private step: the only place where gradients of records become something that may leave."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora.errors import PrivacyError
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.engine import Engine
from fedlora.privacy.gaussian import released
from fedlora.privacy.noise import NoiseSource
from fedlora.privacy.stacked import Stack
from fedlora.values import DpEvent, Mechanism, Sampling


def private_gradient(
    engine: Engine,
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    losses: Iterable[Callable[[], Tensor]],
    *,
    mechanism: Mechanism | None,
    expected_batch: float,
    noise: NoiseSource,
    purpose: tuple[str | int, ...],
    sequences_per_record: int = 1,
) -> dict[str, Tensor]:
    """One release of the Poisson-subsampled Gaussian: (clipped sum + noise) / expected batch, by parameter.

    An empty draw is a step like any other: its noise is what hides that it was empty.

    Args:
        engine: computes the clipped sum.
        model: see `Engine.clipped_sum`.
        trained: exactly what is clipped and noised, by name.
        losses: microbatches of the draw; none for an empty draw.
        mechanism: the bound and the noise, the same object that the ledger is debited for;
            None adds no noise, does not clip and is not private.
        expected_batch: a constant of the configuration, never the size of the draw, which is secret.
        noise: its stream is (purpose, name of the tensor).
        purpose: names run, client, round and step; no two steps may share it.
        sequences_per_record: see `Engine.clipped_sum`.

    Returns:
        The type of each parameter, at least float32, on its device.
    """
    release = Release(mechanism=mechanism, expected_batch=expected_batch, noise=noise, purpose=purpose)
    sums = engine.clipped_sum(model, trained, losses, release.bound, sequences_per_record)
    return _released(sums, trained, release)


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What makes of one clipped sum something that may leave; all as `private_gradient` takes it."""

    mechanism: Mechanism | None
    expected_batch: float
    noise: NoiseSource
    purpose: tuple[str | int, ...]

    def __post_init__(self) -> None:
        if not (self.expected_batch > 0 and math.isfinite(self.expected_batch)):
            raise PrivacyError(
                f"expected_batch {self.expected_batch} must be positive and finite; take it from the configuration"
            )

    @property
    def bound(self) -> float | None:
        """What each example is clipped to; None: not at all."""
        return None if self.mechanism is None else self.mechanism.max_grad_norm


def private_gradients(
    engine: DirectEngine,
    stack: Stack,
    losses: Iterable[tuple[Tensor, Callable[[], Tensor]]],
    releases: Sequence[Release],
) -> dict[str, Tensor]:
    """`private_gradient` of several clients at once: (clients, ...) by parameter, row k the release of client k.

    A client whose draw is empty is noised like any other. Each row is noised by itself, under its own purpose.

    Args:
        engine: computes the clipped sums.
        stack: exactly what is clipped and noised, of as many clients as there are releases.
        losses: microbatches of all draws, each with the owner of each of its examples.
        releases: one a client.

    Raises:
        PrivacyError: the bounds differ, a client lacks its release, or two clients would draw the same noise.
    """
    if len(releases) != stack.clients:
        raise PrivacyError(f"{stack.clients} clients, {len(releases)} releases; each needs its own noise")
    if len({release.bound for release in releases}) != 1:
        raise PrivacyError(f"bounds {[release.bound for release in releases]}; pack clients of one bound")
    if len({release.purpose for release in releases}) != len(releases):
        raise PrivacyError(
            f"{len(releases)} clients, but two share a purpose, hence their noise; name each once"
        )
    sums = engine.clipped_sums(stack, losses, releases[0].bound)
    rows = [
        _released({name: total[client] for name, total in sums.items()}, stack.trained, release)
        for client, release in enumerate(releases)
    ]
    return {name: torch.stack([row[name] for row in rows]) for name in stack.trained}


def _released(
    sums: Mapping[str, Tensor], trained: Mapping[str, nn.Parameter], release: Release
) -> dict[str, Tensor]:
    if set(sums) != set(trained):
        raise PrivacyError(
            f"engine summed {sorted(sums)}, trained are {sorted(trained)}; all of them must be noised"
        )
    if release.mechanism is not None:
        sums = released(
            sums,
            bound=release.mechanism.max_grad_norm,
            noise_multiplier=release.mechanism.noise_multiplier,
            noise=release.noise,
            purpose=release.purpose,
        )
    return {
        name: (total / release.expected_batch).to(_output_dtype(trained[name]))
        for name, total in sums.items()
    }


def spent(mechanism: Mechanism, sampling: Sampling, steps: int) -> DpEvent:
    """What `steps` private steps cost, from the objects that the noise and the draws read."""
    return DpEvent(
        noise_multiplier=mechanism.noise_multiplier,
        sample_rate=sampling.rate,
        steps=steps,
        expected_batch=sampling.expected_batch,
        max_draw=sampling.max_draw,
    )


def _output_dtype(parameter: nn.Parameter) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
