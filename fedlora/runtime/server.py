"""The centre of a real federation: waits for the data owners' nodes, runs the rounds, keeps the results.

It holds no training record. Noise, clip and budget are each node's own; what the server reports as spent is
what the replies say, and each node's ledger is the authority.
"""

import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedlora.config.load import config_digest, dump_config
from fedlora.config.schema import RunConfig
from fedlora.data import load_corpus
from fedlora.data.tokenise import tokenise
from fedlora.errors import ConfigError
from fedlora.federation.cohort import Cohort
from fedlora.federation.loop import line_zero, rounds
from fedlora.federation.store import Store, append_durably, state_digest, write_durably
from fedlora.methods import build
from fedlora.runtime.flower_client import Hello
from fedlora.runtime.flower_cohort import FlowerCohort, Nodes, meet
from fedlora.runtime.prepare import first_state
from fedlora.runtime.rundir import finished_summary, locked, run_config, run_rounds
from fedlora.runtime.summary import privacy_summary, versions, write_summary
from fedlora.training.model import load_model, load_tokenizer
from fedlora.training.tasks import evaluate
from fedlora.values import (
    Adapters,
    ClientUpdate,
    DpEvent,
    Member,
    Refusal,
    RefusalReason,
    Reply,
    ServerState,
    TrainRequest,
)

log = logging.getLogger(__name__)


def serve(grid: Grid, config: RunConfig) -> Path:
    """The directory of the finished run. Goes on from the newest checkpoint, if there is one.

    Args:
        grid: Flower's, connected.
        config: `data` names the public test records and the classes, `data.partition.clients` the number of
            nodes to wait for, `privacy` the report's delta and accountant; the rest is as in a simulation.

    Raises:
        ConfigError: the directory holds another run, or the config names no number of nodes.
        IncompleteError: too few nodes answered; submit the run again.
    """
    run_dir = Path(config.output)
    if (run_dir / "config.yaml").exists() and config_digest(run_config(run_dir)) != config_digest(config):
        raise ConfigError(f"{run_dir} holds the run of another config; choose another output")
    if finished_summary(run_dir) is not None:
        return run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir):
        _serve(grid, config, run_dir)
    return run_dir


def _serve(grid: Grid, config: RunConfig, run_dir: Path) -> None:
    centre = _centre(config)
    write_durably(run_dir / "config.yaml", dump_config(config))
    write_durably(run_dir / "classes.json", json.dumps(centre.classes))
    roster, nodes = _roster(grid, config, run_dir, centre.classes)
    store = Store(run_dir)
    if store.is_empty():
        store.begin(centre.first, line_zero(centre.score(centre.first.adapters)))
    state = store.recover()
    federation = config.federation
    cohort = FlowerCohort(
        nodes,
        deadline_s=federation.deadline_s,
        ttl_s=federation.deadline_s * (1 + federation.keep_gauges),
        listener=lambda event: log.info("%s", event),
    )
    for _, line in rounds(
        state,
        run=roster.run,
        seed=config.seed,
        members=roster.members,
        method=build(config.method, config.lora),
        federation=federation,
        cohort=Reported(cohort, run_dir / "spent.jsonl"),
        store=store,
        score=centre.score,
    ):
        log.info("round %(round)d: %(answered)s answered, score %(score)s, %(seconds).1f s", line)
    write_summary(run_dir, summary(config, roster.members, run_dir))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Centre:
    classes: tuple[str, ...]
    first: ServerState
    score: Callable[[Adapters], dict[str, Any]]


def _centre(config: RunConfig) -> _Centre:
    """The public test data and the model that is scored on them."""
    corpus = load_corpus(config.data, config.task, config.seed)
    test = tokenise(corpus.test, load_tokenizer(config.model.name), config.data.max_length)
    model = load_model(config.model, config.task, config.lora, corpus.classes, config.seed)

    def score(adapters: Adapters) -> dict[str, Any]:
        model.load(adapters)
        found = evaluate(model, test)
        return {"metric": found.metric, "score": found.value, "loss": found.loss}

    first = first_state(config, model, build(config.method, config.lora))
    return _Centre(classes=corpus.classes, first=first, score=score)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """Who takes part, decided once. run: a name no other run has, since ledgers go by it."""

    run: str
    members: tuple[Member, ...]


def _roster(grid: Grid, config: RunConfig, run_dir: Path, classes: tuple[str, ...]) -> tuple[Roster, Nodes]:
    path = run_dir / "roster.json"
    known: dict[str, int] = {}
    nodes = Nodes(grid, lambda hello: _fits(hello, classes, known))
    if path.exists():
        words = json.loads(path.read_text())
        known.update(words["members"])
        log.info("waiting for %s", sorted(known))
        ends = time.monotonic() + config.federation.deadline_s
        meet(nodes, lambda hellos: _enough(hellos, known, ends, config.federation.min_clients))
    else:
        wanted = getattr(config.data.partition, "clients", None)
        if wanted is None:
            raise ConfigError(
                "data.partition.clients: a server waits for that many nodes; write kind: iid and a number"
            )
        log.info("waiting for %d nodes", wanted)
        meet(nodes, lambda hellos: len(hellos) >= wanted)
        known.update({client: hello.records for client, hello in sorted(nodes.hellos.items())})
        words = {"run": f"{config_digest(config)[:16]}-{secrets.token_hex(4)}", "members": known}
        write_durably(path, json.dumps(words, indent=2) + "\n")
    members = tuple(Member(client=client, examples=records) for client, records in sorted(known.items()))
    return Roster(run=words["run"], members=members), nodes


def _enough(hellos: Mapping[str, Hello], known: Mapping[str, int], ends: float, least: int) -> bool:
    """Everybody of the roster, or after the time that a round gets, as many as a round needs."""
    back = len(hellos.keys() & known.keys())
    return back == len(known) or (back >= least and time.monotonic() >= ends)


def _fits(hello: Hello, classes: tuple[str, ...], known: Mapping[str, int]) -> bool:
    if hello.classes != classes:
        log.error(
            "%r has classes %s, this run %s; list the same in its node.yaml",
            hello.client,
            hello.classes,
            classes,
        )
        return False
    if known and known.get(hello.client) != hello.records:
        log.error("%r with %d records is not on the roster %s", hello.client, hello.records, dict(known))
        return False
    return True


class Reported:
    """A Cohort whose updates' spent events are in a journal before anybody uses the update."""

    def __init__(self, cohort: Cohort, journal: Path) -> None:
        self.cohort = cohort
        self.journal = journal

    def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterator[Reply]:
        """See Cohort. An update whose account of itself makes no sense counts as failed."""
        for reply in self.cohort.ask(clients, request):
            if isinstance(reply, Refusal):
                yield reply
            elif reply.spent is None or not _sound(reply.spent):
                log.error("%s says it spent %s; its update is dropped", reply.client, reply.spent)
                failed = RefusalReason.FAILED
                yield Refusal(client=reply.client, run=reply.run, round=reply.round, reason=failed)
            else:
                self._write(reply, reply.spent)
                yield reply

    def close(self) -> None:
        """See Cohort."""
        self.cohort.close()

    def _write(self, update: ClientUpdate, spent: DpEvent) -> None:
        event = [spent.noise_multiplier, spent.sample_rate, spent.steps]
        append_durably(
            self.journal, json.dumps({"client": update.client, "round": update.round, "spent": event}) + "\n"
        )


def _sound(event: DpEvent) -> bool:
    return 0 < event.noise_multiplier < math.inf and 0 < event.sample_rate <= 1 and event.steps >= 1


def reported_events(journal: Path, members: Sequence[Member]) -> dict[str, tuple[DpEvent, ...]]:
    """What each member said it spent, one event a round however often the reply came."""
    found: dict[tuple[str, int], DpEvent] = {}
    for text in journal.read_text().splitlines(keepends=True) if journal.exists() else ():
        if not text.endswith("\n"):
            continue  # torn by a crash: its update was not used and will be sent again
        words = json.loads(text)
        noise, rate, steps = words["spent"]
        event = DpEvent(noise_multiplier=noise, sample_rate=rate, steps=steps)
        found[words["client"], words["round"]] = event
    return {
        member.client: tuple(event for (client, _), event in sorted(found.items()) if client == member.client)
        for member in members
    }


def summary(config: RunConfig, members: Sequence[Member], run_dir: Path) -> dict[str, Any]:
    """summary.json of a real federation; epsilon as far as the replies tell."""
    state, _ = Store(run_dir).load()
    lines = run_rounds(run_dir)
    seconds = sum(line["seconds"] for line in lines)
    took_part = {m.client: sum(m.client in line["answered"] for line in lines) for m in members}
    return {
        "rounds_completed": state.round,
        "clients": len(members),
        "participations": took_part,
        "metric": lines[-1]["metric"],
        "score": lines[-1]["score"],
        "score_before": lines[0]["score"],
        **privacy_summary(config.privacy, reported_events(run_dir / "spent.jsonl", members)),
        "epsilon_source": "reported by the nodes; each node's own ledger is the authority",
        "noise_source": "each node's own",
        "method": config.method.name,
        "beta": config.method.stale.beta,
        "seconds": round(seconds, 1),
        "client_rounds_per_second": round(sum(took_part.values()) / seconds, 3) if seconds else None,
        "bytes_up_per_client_round": None,
        "bytes_down_per_client_round": None,
        "state_sha256": state_digest(state),
        "execution": "flower, one node for each data owner",
        "versions": versions(),
    }
