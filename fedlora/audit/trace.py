"""One audited training: the real draw, engine, clip, noise and step, and what an adversary makes of each step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from fedlora.audit.canaries import CANARIES, REAL_RECORDS, Client
from fedlora.audit.canaries import client as toy_client
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.engine import Engine
from fedlora.privacy.noise import NoiseSource, SeededNoise
from fedlora.privacy.sampling import poisson, poisson_draw
from fedlora.privacy.step import private_gradient
from fedlora.values import Mechanism, Sampling

STEPS, RATE = 200, 0.05
"""The reference size: enough draws of canaries for a tight bound in a second."""
CLIENTS = ("one", "two")
_LEARNING_RATE = 0.05

Draw: TypeAlias = Callable[[int, Sampling, NoiseSource, tuple[str | int, ...]], Tensor]


def reference_sampling() -> Sampling:
    """Rate RATE of all the records that a toy client may hold, through the production constructor."""
    most = REAL_RECORDS + CANARIES
    return poisson(round(RATE * most), most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """What is audited: the pieces that a private step is put together from. The defaults are the real ones."""

    name: str = "as shipped"
    engine: Engine = field(default_factory=DirectEngine)
    noise: Callable[[int], NoiseSource] = SeededNoise
    draw: Draw = poisson_draw
    mechanism: Callable[[Mechanism], Mechanism] = lambda mechanism: mechanism


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What two clients' trainings showed, T steps, m canaries each.

    projections: by client, (layers, T, m): the released sum along each canary's direction in each layer, over the
        bound; a canary that was drawn adds 1 / layers to each, on average.
    across: by client, (T, m): the *other* client's sums along this client's canaries, all layers together.
    drawn: by client, (T, m): whether the canary was in the draw, known to the harness alone.
    included: by client, (m,): whether the canary was among the records at all.
    """

    mechanism: Mechanism
    projections: tuple[Tensor, ...]
    across: tuple[Tensor, ...]
    drawn: tuple[Tensor, ...]
    included: tuple[Tensor, ...]


def traced(implementation: Implementation, mechanism: Mechanism, sampling: Sampling, seed: int) -> Trace:
    """Trains two clients for STEPS steps and looks at every release, as an adversary of the accountant may.

    Args:
        implementation: the real pieces, or broken ones put in their place.
        mechanism: what is claimed; the implementation gets it, `Trace` remembers it.
        sampling: of each draw.
        seed: of records, canaries, coins, draws and noise.
    """
    clients = [toy_client(name, mechanism.max_grad_norm, seed) for name in CLIENTS]
    noise = implementation.noise(seed)
    runs = [_trained(client, implementation, mechanism, sampling, noise) for client in clients]
    sums, drawn = [run[0] for run in runs], [run[1] for run in runs]
    along = [[_along(client, total) for total in sums] for client in clients]
    included = [torch.zeros(CANARIES, dtype=torch.bool) for _ in clients]
    for mask, client in zip(included, clients, strict=True):
        mask[client.included] = True
    return Trace(
        mechanism=mechanism,
        projections=tuple(along[i][i] for i in range(len(clients))),
        across=tuple(along[i][1 - i].sum(dim=0) for i in range(len(clients))),
        drawn=tuple(drawn),
        included=tuple(included),
    )


def _trained(
    client: Client,
    implementation: Implementation,
    mechanism: Mechanism,
    sampling: Sampling,
    noise: NoiseSource,
) -> tuple[Tensor, Tensor]:
    """Released sums over the bound, (layers, STEPS, numbers of a layer), and who was drawn (STEPS, CANARIES)."""
    shape = (len(client.trained), STEPS, next(iter(client.trained.values())).numel())
    sums, drawn = torch.zeros(shape), torch.zeros((STEPS, CANARIES), dtype=torch.bool)
    used = implementation.mechanism(mechanism)
    for step in range(STEPS):
        purpose = ("audit", client.name, step)
        taken = implementation.draw(client.records, sampling, noise, ("draw", *purpose))
        drawn[step, client.canaries_of(taken)] = True
        gradient = private_gradient(
            implementation.engine,
            client.model,
            client.trained,
            client.losses(taken),
            mechanism=used,
            expected_batch=sampling.expected_batch,
            noise=noise,
            purpose=("noise", *purpose),
        )
        with torch.no_grad():
            for layer, (name, parameter) in enumerate(client.trained.items()):
                sums[layer, step] = gradient[name].flatten() * (sampling.expected_batch / client.bound)
                parameter -= _LEARNING_RATE / client.bound * gradient[name]
    return sums, drawn


def _along(client: Client, sums: Tensor) -> Tensor:
    """Projections (layers, STEPS, CANARIES) of sums on the client's canary directions, layer by layer."""
    directions = torch.stack([direction.flatten(1) for direction in client.directions.values()])
    return (sums @ directions.transpose(1, 2)).double()
