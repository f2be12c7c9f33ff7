"""What a run will be, told without training: clients, noise, epsilon, bytes, memory and time."""

import os
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedlora.config.schema import IndependentCohort, RunConfig
from fedlora.federation.events import Listener
from fedlora.privacy.accountants import epsilon
from fedlora.runtime.host import worker_count
from fedlora.runtime.prepare import Prepared, prepare
from fedlora.runtime.summarise import frame_sizes
from fedlora.runtime.world.forecast import forecast, note
from fedlora.training.client import participation
from fedlora.training.tasks import evaluate

PROBE_EXAMPLES = 64
BACKWARD_COST = 2.5
"""A training step costs about this many forward passes: one forward, and a backward without weight gradients."""
PROCESS_BYTES = 500 << 20
"""Of a Python process with torch and transformers imported, before any model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientPreview:
    """One client's terms. epsilon: after max_participations, the most it can ever be."""

    client: str
    records: int
    sample_rate: float
    noise_multiplier: float | None
    epsilon: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """The answer of `fedlora check`. Bytes are per client and round; memory and time are estimates."""

    clients: tuple[ClientPreview, ...]
    trained_parameters: int
    steps_per_participation: int
    bytes_up: int
    bytes_down: int
    memory_bytes: int
    training_seconds: float
    notes: tuple[str, ...]


def preview(config: RunConfig, listener: Listener) -> Preview:
    """Everything `fedlora check` prints; raises whatever `fedlora simulate` would refuse before its first round."""
    prepared = prepare(config, listener)
    down, up = frame_sizes(prepared, prepared.first_state())
    peft_model = prepared.model.peft_model
    model_bytes = sum(t.nbytes for t in (*peft_model.parameters(), *peft_model.buffers()))
    by_size = {size: _client(prepared, size) for size in sorted(prepared.clients.terms)}
    processes = 1 if config.runtime.kind == "local" else 1 + worker_count(config.runtime, os.cpu_count() or 1)
    return Preview(
        clients=tuple(replace(by_size[m.examples], client=m.client) for m in prepared.clients.members),
        trained_parameters=sum(p.numel() for p in prepared.model.trained.values()),
        steps_per_participation=config.federation.local_steps,
        bytes_up=up,
        bytes_down=down,
        memory_bytes=processes * (PROCESS_BYTES + model_bytes),
        training_seconds=_training_seconds(prepared),
        notes=tuple(_notes(prepared)),
    )


def _client(prepared: Prepared, records: int) -> ClientPreview:
    """The terms of every client with so many records, under no name."""
    terms = prepared.clients.terms[records]
    privacy, mechanism = prepared.config.privacy, terms.mechanism
    worst = None
    if privacy != "none" and mechanism is not None:
        steps = prepared.config.federation.local_steps
        once = participation(mechanism, terms.sampling, privacy.evaluation_noise, steps)
        worst = epsilon(once * privacy.max_participations, privacy.target_delta, privacy.accountant)
    return ClientPreview(
        client="",
        records=records,
        sample_rate=terms.sampling.rate,
        noise_multiplier=mechanism and mechanism.noise_multiplier,
        epsilon=worst,
    )


def _training_seconds(prepared: Prepared) -> float:
    """Scores a few test records to learn this machine's pace, and scales it to the whole run."""
    config = prepared.config
    probe = prepared.clients.test.select(np.arange(min(PROBE_EXAMPLES, len(prepared.clients.test))))
    torch.set_num_threads(config.runtime.threads)
    evaluate(prepared.model, probe)
    began = time.monotonic()
    evaluate(prepared.model, probe)
    forward = (time.monotonic() - began) / len(probe)
    federation = config.federation
    drawn = federation.rounds * _expected_cohort(prepared) * federation.local_steps * federation.batch_size
    workers = 1 if config.runtime.kind == "local" else worker_count(config.runtime, os.cpu_count() or 1)
    scored = (1 + federation.rounds // federation.evaluate_every) * len(prepared.clients.test)
    return forward * (drawn * BACKWARD_COST / workers + scored)


def _expected_cohort(prepared: Prepared) -> float:
    cohort, members = prepared.config.federation.cohort, prepared.clients.members
    if not isinstance(cohort, IndependentCohort):
        return cohort
    if isinstance(cohort.probability, dict):
        return sum(cohort.probability[member.client] for member in members)
    return cohort.probability * len(members)


def _notes(prepared: Prepared) -> list[str]:
    config, world = prepared.config, prepared.world
    told = [] if world is None else [note(forecast(prepared, world))]
    if config.privacy == "none":
        return ["NOT PRIVATE: privacy is none; what clients send can reveal their records", *told]
    notes = [
        *told,
        "seeded noise: a simulation is no guarantee to anybody; real nodes draw noise from the operating system",
    ]
    expected = config.federation.rounds * _expected_cohort(prepared) / len(prepared.clients.members)
    most = config.privacy.max_participations
    if expected > most:
        notes.append(
            f"a client will be asked about {expected:.1f} times but may answer {most} times: later rounds go on "
            f"without it; raise privacy.max_participations (more noise) or lower federation.rounds"
        )
    if config.privacy.tuned_on == "undeclared":
        notes.append(
            "privacy.tuned_on is undeclared: the privacy statement will say that tuning may have cost more"
        )
    largest = max(member.examples for member in prepared.clients.members)
    if config.privacy.target_delta > 0.1 / largest:
        notes.append(
            f"target_delta {config.privacy.target_delta:g} is above a tenth of 1/{largest}, the records of the "
            f"largest client; lower is better"
        )
    return notes
