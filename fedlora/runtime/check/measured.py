"""What a run will be, told without training: clients, noise, epsilon, bytes, memory and time."""

import time
from dataclasses import replace

import numpy as np
import torch

from fedlora.config.schema import RunConfig
from fedlora.federation.events import Listener
from fedlora.privacy.accountants import epsilon
from fedlora.runtime.check.answer import ClientPreview, Preview
from fedlora.runtime.check.notes import plan_notes, promise_notes, unseen_classes
from fedlora.runtime.check.outline import PROCESS_BYTES, run_seconds
from fedlora.runtime.cores import usable_cores
from fedlora.runtime.prepare import Prepared, prepare
from fedlora.runtime.seats import model_holders, side_by_side
from fedlora.runtime.summarise import frame_sizes
from fedlora.runtime.world.forecast import forecast, note
from fedlora.training.client import participation
from fedlora.training.tasks import evaluate

PROBE_EXAMPLES = 64


def preview(config: RunConfig, listener: Listener) -> Preview:
    """All that `fedlora check --measure` prints; raises whatever `fedlora simulate` refuses before its first round."""
    prepared = prepare(config, listener)
    down, up = frame_sizes(prepared, prepared.first_state())
    peft_model = prepared.model.peft_model
    model_bytes = sum(t.nbytes for t in (*peft_model.parameters(), *peft_model.buffers()))
    by_size = {size: _client(prepared, size) for size in sorted(prepared.clients.terms)}
    clients = tuple(replace(by_size[m.examples], client=m.client) for m in prepared.clients.members)
    processes = model_holders(config.runtime, usable_cores())
    return Preview(
        clients=clients,
        classes=prepared.clients.classes,
        trained_parameters=_trained(prepared),
        steps_per_participation=config.federation.local_steps,
        bytes_up=up,
        bytes_down=down,
        memory_bytes=processes * (PROCESS_BYTES + model_bytes),
        training_seconds=_training_seconds(prepared),
        notes=(*promise_notes(config), *notes(prepared), *_forecast(prepared)),
    )


def notes(prepared: Prepared) -> list[str]:
    """What to know of a run before its first round, in sentences.

    Not what its promise is worth, which its end says, nor who is there in its world, which takes longer to find out.
    """
    clients = prepared.clients
    sizes = {member.client: member.examples for member in clients.members}
    mechanisms = [clients.terms[size].mechanism for size in sizes.values()]
    plan = plan_notes(
        prepared.config,
        sizes,
        noise=[mechanism.noise_multiplier for mechanism in mechanisms if mechanism is not None],
        trained=_trained(prepared),
        unseen=unseen_classes(clients.examples.examples.labels, clients.classes),
        repeated=clients.repeated,
    )
    return [*_cut(prepared), *plan]


def _forecast(prepared: Prepared) -> list[str]:
    return [] if prepared.world is None else [note(forecast(prepared, prepared.world))]


def _trained(prepared: Prepared) -> int:
    return sum(p.numel() for p in prepared.model.trained.values())


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
    workers = side_by_side(config.runtime, usable_cores())
    sizes = [member.examples for member in prepared.clients.members]
    return run_seconds(config, forward, sizes, len(prepared.clients.test), workers)


def _cut(prepared: Prepared) -> list[str]:
    """How many records are as long as may be, and so most likely longer."""
    most, held = prepared.config.data.max_length, prepared.clients.examples.examples
    if most is None or not (full := int((held.sequence_lengths >= most).sum())):
        return []
    count = len(held.sequence_lengths)
    return [
        f"{full:,} of {count:,} texts fill data.max_length {most}: what is longer is cut; more takes time and memory"
    ]
