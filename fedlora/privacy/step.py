"""The private step: the only place where gradients of records become something that may leave."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from fedlora.errors import PrivacyError
from fedlora.privacy.engine import Engine
from fedlora.privacy.gaussian import released
from fedlora.privacy.noise import NoiseSource
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

    Returns:
        The type of each parameter, at least float32, on its device.
    """
    if not (expected_batch > 0 and math.isfinite(expected_batch)):
        raise PrivacyError(
            f"expected_batch {expected_batch} must be positive and finite; take it from the configuration"
        )
    max_grad_norm = None if mechanism is None else mechanism.max_grad_norm
    sums = engine.clipped_sum(model, trained, losses, max_grad_norm)
    if set(sums) != set(trained):
        raise PrivacyError(
            f"engine summed {sorted(sums)}, trained are {sorted(trained)}; all of them must be noised"
        )
    if mechanism is not None:
        sums = released(
            sums,
            bound=mechanism.max_grad_norm,
            noise_multiplier=mechanism.noise_multiplier,
            noise=noise,
            purpose=purpose,
        )
    return {name: (total / expected_batch).to(_output_dtype(trained[name])) for name, total in sums.items()}


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
