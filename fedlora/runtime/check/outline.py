"""What a run will be, told from sizes and shapes alone: no torch, no model in memory, a second or two.

Noise is searched for on a coarse, pessimistic grid for the largest and the smallest client and read off between them;
the run itself calibrates each client finely, by two accountants. Time is multiplications over this machine's speed.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass

import numpy as np

from fedlora.config.asking import expected_cohort
from fedlora.config.data import Docstrings
from fedlora.config.schema import RunConfig
from fedlora.data import load_corpus
from fedlora.data.corpus import require_apart
from fedlora.data.docstrings import packages_of
from fedlora.data.own import file_records
from fedlora.data.partition import client_names, partition
from fedlora.runtime.check.answer import ClientPreview, Preview
from fedlora.runtime.check.notes import plan_notes, promise_notes, unseen_classes
from fedlora.runtime.check.rough_noise import between, rough_noise
from fedlora.runtime.check.sites import sites
from fedlora.runtime.cores import usable_cores
from fedlora.runtime.gpu import require_likely_gpu
from fedlora.runtime.seats import model_holders, side_by_side
from fedlora.training.look import Look, look
from fedlora.training.places import local, require_askable
from fedlora.training.positions import require_positions

BACKWARD_COST = 2.5
"""A training step costs about this many forward passes: one forward, and a backward without weight gradients."""
PROCESS_BYTES = 500 << 20
"""Of a Python process with torch and transformers imported, before any model."""
FRAME_BYTES = 1200
"""Of a request or a reply beside its numbers."""
BYTES_A_TOKEN = 4.5
"""Of English text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """Records of each client, and of the test; classes, and those of them without a training record; tokens of a record
    on average. exact: they were counted."""

    clients: Mapping[str, int]
    test: int
    classes: tuple[str, ...]
    unseen: Sequence[str]
    repeated: int
    tokens: float
    exact: bool


def outline(config: RunConfig) -> Preview:
    """What `fedlora check` prints unless it is to measure.

    Raises:
        ConfigError, PrivacyError: there is no GPU, the model is not there, the data cannot be read or dealt out, a
            target names no layer of the model, delta is too large, or no noise meets the budget. A run may still refuse
            what only a loaded model shows.
    """
    require_likely_gpu(config.runtime)
    seen = _seen(config.model.name)
    if seen is not None:
        require_positions(seen.architecture, seen.shapes, config.data.max_length)
    sizes = _sizes(config, seen)
    processes = model_holders(config.runtime, usable_cores())
    trained, sent, received = (0, 0, 0) if seen is None else _numbers(config, seen, sizes)
    clients = _clients(config, sizes.clients)
    return Preview(
        clients=clients,
        classes=sizes.classes,
        trained_parameters=trained,
        steps_per_participation=config.federation.local_steps,
        bytes_up=4 * sent + FRAME_BYTES,
        bytes_down=4 * received + FRAME_BYTES,
        memory_bytes=processes * (PROCESS_BYTES + (0 if seen is None else 4 * seen.numbers)),
        training_seconds=0.0 if seen is None else _seconds(config, seen, sizes),
        notes=(
            *promise_notes(config),
            *plan_notes(
                config,
                sizes.clients,
                noise=[noise for client in clients if (noise := client.noise_multiplier) is not None],
                trained=trained,
                unseen=sizes.unseen,
                repeated=sizes.repeated,
            ),
            *_notes(config, seen, sizes),
        ),
        measured=False,
    )


def _seen(name: str) -> Look | None:
    """The model as it lies here; None: the run would ask the hub for it, which is within reach."""
    place = local(name)
    if place is None:
        require_askable(name)
        return None
    return look(place)


def _sizes(config: RunConfig, seen: Look | None) -> _Sizes:
    if isinstance(config.data, Docstrings):
        packages = packages_of(config.data)
        clients = config.data.partition.clients or 1
        each = len(packages) * config.data.max_per_class // clients
        test = config.data.max_test_examples or len(packages) * config.data.max_per_class // 5
        counts = dict.fromkeys(client_names(clients), each)
        classes = () if config.task.causal else tuple(packages)
        tokens = float(config.data.max_length or 0)
        return _Sizes(
            clients=counts, test=test, classes=classes, unseen=(), repeated=0, tokens=tokens, exact=False
        )
    corpus = load_corpus(config.data, config.task, config.seed)
    repeated = 0 if config.privacy == "none" else require_apart(corpus, config.data)
    if config.data.public is not None:
        file_records(config.data.public, config.data, config.task, corpus.classes)
    parts = partition(corpus.train, config.data.partition, config.seed)
    return _Sizes(
        clients={client: len(parts[client]) for client in sorted(parts)},
        test=len(corpus.test),
        classes=corpus.classes,
        unseen=unseen_classes(corpus.train.labels, corpus.classes),
        repeated=repeated,
        tokens=_tokens(config, corpus.train.texts, seen),
        exact=True,
    )


def _tokens(config: RunConfig, texts: Sequence[object], seen: Look | None) -> float:
    """Of a record on average."""
    if config.data.max_length is None:  # an image: its patches, and one for the class
        return 1.0 + ((seen and seen.patches) or 0)
    some = texts[:: max(1, len(texts) // 200)]
    letters = sum(map(_letters, some)) / max(len(some), 1)
    return min(float(config.data.max_length), 2 + letters / BYTES_A_TOKEN)


def _letters(text: object) -> int:
    """Of a record, whatever it is made of."""
    if isinstance(text, str):
        return len(text)
    if is_dataclass(text):
        return sum(_letters(getattr(text, field.name)) for field in fields(text))
    return sum(map(_letters, text)) if isinstance(text, list | tuple) else 0


def _clients(config: RunConfig, sizes: Mapping[str, int]) -> tuple[ClientPreview, ...]:
    privacy, batch = config.privacy, config.federation.batch_size
    if privacy == "none":
        noise = None
    else:
        ends = sorted({min(sizes.values()), max(sizes.values())})
        noise = [(min(1.0, batch / size), rough_noise(config, privacy, size)) for size in ends]
    return tuple(
        ClientPreview(
            client=client,
            records=size,
            sample_rate=min(1.0, batch / size),
            noise_multiplier=None if noise is None else between(noise, min(1.0, batch / size)),
            epsilon=None if privacy == "none" else privacy.target_epsilon,
        )
        for client, size in sizes.items()
    )


def _numbers(config: RunConfig, seen: Look, sizes: _Sizes) -> tuple[int, int, int]:
    """Numbers trained, sent and received by a client in a round."""
    lora, trained, received = config.lora, 0, 0
    for out, into, r in sites(config, seen):
        a, b = r * into, r * out
        own = {"b": b, "ab": a + b, "core": r**2, "singular-values": r}[lora.trains]
        trained += own
        received += a + b + (own if lora.trains in ("core", "singular-values") else 0)
    head = 0
    if not config.task.causal and seen.hidden is not None:
        head = len(sizes.classes) * (seen.hidden + 1)
    sent = trained + (head if getattr(config.task, "head", "") == "trained" else 0)
    return sent, sent, received + head


def _seconds(config: RunConfig, seen: Look, sizes: _Sizes) -> float:
    """Multiplications of the whole run over those that this machine does in a second."""
    matrices = sum(
        math.prod(shape) for name, shape in seen.shapes.items() if len(shape) == 2 and "embed" not in name
    )
    forward = 2 * matrices * sizes.tokens / _speed()
    workers = side_by_side(config.runtime, usable_cores())
    return run_seconds(config, forward, list(sizes.clients.values()), sizes.test, workers)


def run_seconds(config: RunConfig, forward: float, sizes: Sequence[int], test: int, workers: int) -> float:
    """About how long the whole run takes.

    Args:
        config: the run.
        forward: seconds of one record's pass.
        sizes: records of each client.
        test: records scored each time.
        workers: clients that train at once.
    """
    federation, clients = config.federation, len(sizes)
    a_step = sum(min(size, federation.batch_size) for size in sizes) / clients
    drawn = federation.rounds * expected_cohort(federation, clients) * federation.local_steps * a_step
    scored = (1 + federation.rounds // federation.evaluate_every) * test
    return forward * (drawn * BACKWARD_COST / workers + scored)


def _speed() -> float:
    """Floating-point operations a second of one product of matrices, the best of some."""
    side = 384
    left = np.ones((side, side), dtype=np.float32)
    best = math.inf
    for _ in range(8):
        began = time.perf_counter()
        np.matmul(left, left)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def _notes(config: RunConfig, seen: Look | None, sizes: _Sizes) -> list[str]:
    """What is not told here, and what would tell it."""
    told = []
    if not sizes.exact:
        told.append("docstrings are not read for this: records are the most that there can be")
    if seen is None:
        told.append(
            f"{config.model.name} is not on this machine, so the run would ask the hub for it; numbers, bytes and time "
            "are not told"
        )
    told.append(
        "estimates from sizes and shapes: --measure loads the model, and refuses whatever the run would refuse"
    )
    if config.world is not None:
        told.append("--measure also forecasts who is there in this world")
    return told
