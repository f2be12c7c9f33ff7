"""What to know of a run before it begins; the same from sizes and shapes and from a loaded model."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedlora.config.asking import expected_cohort, most_asked
from fedlora.config.schema import RunConfig
from fedlora.data.table import shown

MOST_NAMED = 5
"""Classes that a note names."""
LOUD = 4
"""Times as long as all records together, at which noise is told. Most of its length lies in directions that no record
has a say in: of 360 texts in four classes, noise of 2.6 times left 45 % right, where 22 % were before."""


def promise_notes(config: RunConfig) -> list[str]:
    """What the promise of any such run is worth, which its end says too."""
    privacy = config.privacy
    if privacy == "none":
        return ["NOT PRIVATE: privacy is none; what clients send can reveal their records"]
    told = [
        "seeded noise: a simulation is no guarantee to anybody; real nodes draw noise from the operating system"
    ]
    if privacy.tuned_on == "undeclared":
        told.append(
            "privacy.tuned_on is undeclared: the privacy statement will say that tuning may have cost more"
        )
    return told


def plan_notes(
    config: RunConfig,
    sizes: Mapping[str, int],
    *,
    noise: Sequence[float],
    trained: int,
    unseen: Sequence[str],
    repeated: int,
) -> list[str]:
    """All that follows from the config and the records, but for what its promise is worth.

    Args:
        config: the run.
        sizes: client -> its records.
        noise: noise multipliers of the clients; none: not private.
        trained: numbers that are trained; 0: not known.
        unseen: classes without a training record.
        repeated: different test texts that are to train on too, of a private run.
    """
    told = [*_flower(config), *_budget(config, sizes), *_small_clients(config, sizes)]
    told += _loud_noise(config, sizes, noise, trained)
    if repeated:
        told.append(
            f"{repeated:,} of the test texts are among those to train on: what is told of them is exact, and no "
            "epsilon covers it; leave them out of either"
        )
    if unseen:
        told.append(
            f"no training record has the label {shown(unseen, MOST_NAMED)}: it is a class since a test record has it; "
            "correct it there if it is mistyped"
        )
    return told


def unseen_classes(labels: NDArray[np.int64] | None, classes: Sequence[str]) -> list[str]:
    """The classes that none of these labels, which are their places, is of."""
    if labels is None or not classes:
        return []
    there = np.bincount(labels, minlength=len(classes))
    return [name for name, count in zip(classes, there, strict=True) if count == 0]


def _flower(config: RunConfig) -> list[str]:
    """Such a config is simulated on Flower's engine or served to real nodes, of which it knows nothing."""
    if config.runtime.kind != "flower":
        return []
    count = config.data.partition.clients
    waits = "needs data.partition.clients, and waits for as many" if count is None else f"waits for {count}"
    return [
        f"these are the clients of a simulation (fedlora simulate, flwr run); fedlora serve {waits} nodes, and the "
        "node.yaml of each decides its name, records, noise and epsilon: fedlora check node.yaml"
    ]


def _small_clients(config: RunConfig, sizes: Mapping[str, int]) -> list[str]:
    """The rate of such a client is 1: its noise is for no sampling at all."""
    batch_size = config.federation.batch_size
    small = sorted((records, client) for client, records in sizes.items() if records < batch_size)
    if not small:
        return []
    (least, client), count = small[0], len(small)
    who = f"{count:,} of {len(sizes):,} clients {'has' if count == 1 else 'have'} fewer records than"
    spared = "" if config.privacy == "none" else "sampling spares it no noise, and "
    return [
        f"{who} federation.batch_size {batch_size} ({client} has {least:,}): each step takes all of them, {spared}"
        f"the sum is divided by {batch_size} nevertheless; write {least:,} or less, or give them more records"
    ]


def _loud_noise(
    config: RunConfig, sizes: Mapping[str, int], noise: Sequence[float], trained: int
) -> list[str]:
    """Where the noise of the whole run is much longer than all that its records could add up to, were they of one mind.

    In n steps of clients, each a mean over b records clipped to C, these add up to n C at most; the noise of each step
    is sigma C / b in each of d numbers, in all sqrt(n d) sigma C / b.
    """
    if not noise or not trained:
        return []
    federation = config.federation
    steps = federation.rounds * expected_cohort(federation, len(sizes)) * federation.local_steps
    batch = min(federation.batch_size, sum(sizes.values()) / len(sizes))
    if math.sqrt(trained / steps) * (sum(noise) / len(noise)) <= LOUD * batch:
        return []
    return [
        f"the noise of the whole run is more than {LOUD} times as long as all that its records could add up to, were "
        "they of one mind: it will hardly learn; more clients, more records in federation.batch_size or a higher "
        "epsilon leave less"
    ]


def _budget(config: RunConfig, sizes: Mapping[str, int]) -> list[str]:
    """Where the budget and the run do not fit each other."""
    privacy, federation, clients = config.privacy, config.federation, len(sizes)
    if privacy == "none":
        return []
    told: list[str] = []
    rounds, most = federation.rounds, privacy.max_participations
    expected = rounds * expected_cohort(federation, clients) / clients
    if expected > most:
        ends = (
            f"after round {most} the run stops"
            if expected == rounds and config.world is None
            else f"rounds go on without it, and once fewer than {federation.min_clients} can answer, the run stops"
        )
        told.append(
            f"a client will be asked about {expected:.1f} times but may answer {most} times: {ends}; raise "
            "privacy.max_participations (more noise) or lower federation.rounds"
        )
    if (can := most_asked(clients, federation)) < most:
        told.append(
            f"nobody can be asked more than {can} times, but the noise is for {most}: write "
            f"privacy.max_participations: {can}, which makes it less at the same epsilon"
        )
    largest = max(sizes.values())
    if privacy.target_delta > 0.1 / largest:
        told.append(
            f"target_delta {privacy.target_delta:g} is above a tenth of 1/{largest}, the records of the "
            "largest client; lower is better"
        )
    return told
