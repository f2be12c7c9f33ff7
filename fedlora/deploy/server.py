"""The centre of a real federation: waits for the data owners' nodes, runs the rounds, keeps the results.

It holds no training record. Noise, clip and budget are each node's own; what the server reports as spent is
what the replies say, and each node's ledger is the authority.
"""

import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedlora.config.combinations import require_servable
from fedlora.config.load import config_digest, dump_config
from fedlora.config.node import CLIENT_NAME
from fedlora.config.schema import RunConfig
from fedlora.data import Examples, load_corpus
from fedlora.deploy.journal import Journal, Reported
from fedlora.deploy.soundness import Soundness
from fedlora.disk import write_durably
from fedlora.errors import ConfigError
from fedlora.federation.events import ClientDone, Event, Listener, RoundDone, RunDone, RunStarted
from fedlora.federation.loop import Stored, line_zero, rounds
from fedlora.federation.store import Store
from fedlora.methods import build
from fedlora.privacy.ledger import MOST_ATTEMPTS
from fedlora.privacy.noise import BY_THE_NODES
from fedlora.runs.beginning import first_state, origin, record_beginning
from fedlora.runs.forgetting import forgotten, remaining
from fedlora.runs.inputs import record_inputs
from fedlora.runs.rundir import (
    SPENT,
    Roster,
    finished_summary,
    load_roster,
    locked,
    require_server_dir,
    run_rounds,
    save_classes,
    save_roster,
)
from fedlora.runs.summary import run_summary, write_summary
from fedlora.tracking.telling import require_trackers, tracked
from fedlora.training.examples import reader_of
from fedlora.training.guards import clip_note, clipped, require_gradients
from fedlora.training.load import load_model
from fedlora.training.tasks import evaluate
from fedlora.transport import QUOTED
from fedlora.transport.flower_client import Hello
from fedlora.transport.flower_cohort import FlowerCohort
from fedlora.transport.flower_nodes import Nodes, meet
from fedlora.values import Adapters, Member, ServerState

log = logging.getLogger(__name__)


def serve(grid: Grid, config: RunConfig, stored: Stored = lambda state: None) -> Path:
    """The directory of the finished run. Goes on from the newest checkpoint, if there is one.

    Args:
        grid: Flower's, connected.
        config: `data` names the public test records and the classes, `data.partition.clients` the number of
            nodes to wait for, `privacy` the report's delta and accountant; the rest is as in a simulation.
        stored: see `federation.loop`.

    Raises:
        ConfigError: the directory holds another run or a simulation, or one that began with another base model or
            other test records, or the config names no number of nodes, or describes a world.
        IncompleteError: too few nodes answered; submit the run again.
    """
    require_servable(config)
    require_trackers(config.tracking)
    run_dir = Path(config.output)
    require_server_dir(run_dir, config)
    if finished_summary(run_dir) is not None:
        return run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir), tracked(config, run_dir, _say) as tell:
        _serve(grid, config, run_dir, tell, stored)
    return run_dir


def _say(event: Event) -> None:
    """What the log holds of a run: each reply, and each round."""
    match event:
        case RoundDone(round=line):
            log.info("round %(round)d: %(answered)s answered, score %(score)s, %(seconds).1f s", line)
        case ClientDone():
            log.info("%s", event)


def _serve(grid: Grid, config: RunConfig, run_dir: Path, tell: Listener, stored: Stored) -> None:
    centre = _centre(config)
    if load_roster(run_dir) is not None:
        _record(config, run_dir, centre)  # refuses before anybody is waited for
    # The roster comes first: without it, a directory with a config is a simulation's.
    roster, nodes = _roster(grid, config, run_dir, centre.classes)
    members = remaining(run_dir, roster.members)
    save_classes(run_dir, centre.classes)
    write_durably(run_dir / "config.yaml", dump_config(config))
    _record(config, run_dir, centre)
    noise = None if config.privacy == "none" else BY_THE_NODES
    store = Store(run_dir, roster.run, noise, config.method.stale.dtype)
    if store.is_empty():
        store.begin(centre.first, line_zero(centre.score(centre.first.adapters)))
    state = store.recover()
    federation = config.federation
    clip = None if config.privacy == "none" else config.privacy.max_grad_norm
    journal = Journal(run_dir / SPENT, forgotten(run_dir))
    cohort = FlowerCohort(
        nodes,
        deadline_s=federation.deadline_s,
        ttl_s=federation.deadline_s * (1 + federation.keep_gauges),
        listener=tell,
        echo=journal.furthest,
        asks=MOST_ATTEMPTS,
    )
    private = config.privacy != "none"
    tell(RunStarted(clients=len(members), rounds=federation.rounds, private=private, run_dir=run_dir))
    for _, line in rounds(
        state,
        origin=origin(config, roster.run),
        seed=config.seed,
        members=members,
        method=build(config.method, config.lora, config.seed),
        federation=federation,
        cohort=Reported(cohort, journal, Soundness(federation=federation, max_grad_norm=clip)),
        store=store,
        score=centre.score,
        stored=stored,
        max_grad_norm=clip,
    ):
        tell(RoundDone(round=line, eta_s=None))
    state, _ = store.load()
    clients = [member.client for member in roster.members]
    summary = run_summary(run_dir, config, clients=clients, state=state)
    write_summary(run_dir, summary)
    tell(RunDone(summary=summary))
    if (note := clip_note(run_rounds(run_dir), config.privacy)) is not None:
        log.warning("%s", note)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Centre:
    classes: tuple[str, ...]
    test: Examples
    first: ServerState
    score: Callable[[Adapters], dict[str, Any]]


def _record(config: RunConfig, run_dir: Path, centre: _Centre) -> None:
    """The run says what it began from; raises ConfigError where that is something else now."""
    record_beginning(config, run_dir)
    record_inputs(config, run_dir, test=centre.test)


def _centre(config: RunConfig) -> _Centre:
    """The public test data and the model that is scored on them."""
    corpus = load_corpus(config.data, config.task, config.seed)
    name, max_length = config.model.name, config.data.max_length
    test = reader_of(name=name, max_length=max_length, task_cfg=config.task)(corpus.test)
    model = load_model(
        config.model, config.task, config.lora, corpus.classes, config.seed, max_length=max_length
    )

    def score(adapters: Adapters) -> dict[str, Any]:
        model.load(adapters)
        found = evaluate(model, test)
        share = clipped(model, test, config.privacy)
        return {"metric": found.metric, "score": found.value, "loss": found.loss, **share}

    first = first_state(config, model, build(config.method, config.lora, config.seed))
    require_gradients(model, first.adapters)
    return _Centre(classes=corpus.classes, test=test, first=first, score=score)


def _roster(grid: Grid, config: RunConfig, run_dir: Path, classes: tuple[str, ...]) -> tuple[Roster, Nodes]:
    roster = load_roster(run_dir)
    members = () if roster is None else remaining(run_dir, roster.members)
    known = {member.client: member.examples for member in members}
    nodes = Nodes(grid, lambda hello: _fits(hello, classes, known))
    if roster is not None:
        log.info("waiting for %s", sorted(known))
        ends = time.monotonic() + config.federation.deadline_s
        meet(nodes, lambda hellos: _enough(hellos, known, ends, config.federation.min_clients))
        return roster, nodes
    wanted = config.data.partition.clients
    if wanted is None:
        raise ConfigError(
            "data.partition.clients: a server waits for that many nodes; write kind: iid and a number"
        )
    log.info("waiting for %d nodes", wanted)
    meet(nodes, lambda hellos: len(hellos) >= wanted)
    known.update({client: hello.records for client, hello in nodes.hellos.items()})
    roster = Roster(
        run=f"{config_digest(config)[:16]}-{secrets.token_hex(4)}",
        members=tuple(Member(client=client, examples=records) for client, records in sorted(known.items())),
    )
    save_roster(run_dir, roster)
    return roster, nodes


def _enough(hellos: Mapping[str, Hello], known: Mapping[str, int], ends: float, least: int) -> bool:
    """Everybody of the roster, or after the time that a round gets, as many as a round needs."""
    back = len(hellos.keys() & known.keys())
    return back == len(known) or (back >= least and time.monotonic() >= ends)


def _fits(hello: Hello, classes: tuple[str, ...], known: Mapping[str, int]) -> bool:
    if not re.match(CLIENT_NAME, hello.client):
        log.error("%r is no name for a node; use 1 to 96 letters, digits and . _ ~ -", hello.client[:200])
        return False
    if hello.classes != classes:
        log.error(
            "%r has classes %s, this run %s; list the same in its node.yaml",
            hello.client,
            str(hello.classes)[:QUOTED],
            classes,
        )
        return False
    if known and known.get(hello.client) != hello.records:
        log.error("%r with %d records is not on the roster %s", hello.client, hello.records, dict(known))
        return False
    return True
