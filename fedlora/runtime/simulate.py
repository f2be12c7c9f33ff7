"""The main job: a whole run on simulated clients, from a config to a finished run directory; and going on with one."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedlora.config.load import dump_config, require_same
from fedlora.config.schema import RunConfig
from fedlora.disk import write_durably
from fedlora.errors import ConfigError
from fedlora.federation.cohort import Cohort
from fedlora.federation.events import Listener, Note, RoundDone, RunDone, RunStarted, Stage
from fedlora.federation.guards import Guarded
from fedlora.federation.loop import Score, Stored, line_zero, rounds
from fedlora.federation.store import Store
from fedlora.privacy.noise import SEEDED
from fedlora.runs.beginning import record_beginning
from fedlora.runs.evidence import require_debits
from fedlora.runs.forgetting import remaining
from fedlora.runs.inputs import record_inputs
from fedlora.runs.own_b import require_own_b
from fedlora.runs.partition_picture import save_picture
from fedlora.runs.promise import Spending
from fedlora.runs.rundir import (
    STATES,
    drop_digest_of_records,
    finished_summary,
    locked,
    require_ours,
    restore_classes,
    run_config,
    run_rounds,
    save_classes,
)
from fedlora.runs.summary import write_summary
from fedlora.runtime.check.measured import notes
from fedlora.runtime.cores import usable_cores
from fedlora.runtime.host import HostSetup
from fedlora.runtime.prepare import Prepared, Shared, prepare
from fedlora.runtime.summarise import summarise
from fedlora.runtime.world.clock import told
from fedlora.runtime.world.cohort import VirtualCohort
from fedlora.tracking.telling import tracked
from fedlora.training.guards import clip_note, clipped, require_gradients
from fedlora.training.tasks import evaluate
from fedlora.values import Adapters, ServerState

Start = Callable[[HostSetup, Listener], Cohort]
"""Starts a runtime for the clients of a run."""


def simulate(
    config: RunConfig,
    run_dir: Path,
    listener: Listener,
    start: Start | None = None,
    *,
    scoring_threads: int | None = None,
    shared: Shared | None = None,
    stored: Stored = lambda state: None,
) -> Path:
    """`run_dir` holds the finished run of `config`. Nothing is written before all that can be checked is right.

    Args:
        config: the run.
        run_dir: is made where it is missing.
        listener: told of what happens.
        start: None starts the runtime that the config names.
        scoring_threads: of the server while it scores; None takes all cores, which clients leave idle meanwhile.
        shared: with runs side by side, see `prepare`.
        stored: see `federation.loop`.

    Raises:
        ConfigError: the directory holds another run, an unfinished one, or something else; none is touched.
    """
    if (run_dir / "config.yaml").exists():
        _refuse_existing(config, run_dir)
        return run_dir
    require_ours(run_dir)
    prepared = prepare(config, listener, shared)
    for note in notes(prepared):
        listener(Note(words=note))
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir):
        save_classes(run_dir, prepared.clients.classes)
        save_picture(run_dir, config.data.partition.kind, prepared.clients.examples, prepared.clients.classes)
        write_durably(run_dir / "config.yaml", dump_config(config))  # last: it makes this a run
        with tracked(config, run_dir, listener) as told_too:
            _drive(prepared, run_dir, told_too, start, scoring_threads, stored)
    return run_dir


def resume(
    run_dir: Path,
    listener: Listener,
    start: Start | None = None,
    *,
    scoring_threads: int | None = None,
    shared: Shared | None = None,
    stored: Stored = lambda state: None,
) -> Path:
    """`run_dir` holds the finished run it was meant to; a finished one is left alone. The rest: see `simulate`.

    Raises:
        ConfigError: the base model, the records or the adapter that it began with are others now.
    """
    config = run_config(run_dir)
    if finished_summary(run_dir) is not None:
        return run_dir
    with locked(run_dir):
        prepared = prepare(config, listener, shared)
        with tracked(config, run_dir, listener) as told_too:
            _drive(prepared, run_dir, told_too, start, scoring_threads, stored)
    return run_dir


def _refuse_existing(config: RunConfig, run_dir: Path) -> None:
    require_same(run_config(run_dir), config, run_dir)
    if finished_summary(run_dir) is None:
        raise ConfigError(f"{run_dir} holds this run, unfinished; go on with: fedlora resume {run_dir}")


def _drive(
    prepared: Prepared,
    run_dir: Path,
    listener: Listener,
    start: Start | None,
    scoring_threads: int | None,
    stored: Stored,
) -> None:
    """Rounds from the newest checkpoint, or from none, to the last; then the summary."""
    record_beginning(prepared.config, run_dir)
    clients = prepared.clients
    record_inputs(prepared.config, run_dir, test=clients.test, train=clients.examples.examples)
    restore_classes(run_dir, clients.classes)
    noise = None if prepared.config.privacy == "none" else SEEDED
    store = Store(run_dir, prepared.origin.run, noise, prepared.config.method.stale.dtype)
    score = _scorer(prepared, run_dir, scoring_threads or usable_cores())
    state = prepared.first_state() if store.is_empty() else None
    require_gradients(prepared.model, store.load()[0].adapters if state is None else state.adapters)
    prepared.spare_the_model()
    if state is not None:
        listener(Stage(name="scoring the zero-step model"))
        store.begin(state, line_zero(score(state.adapters)))
    state = store.recover()
    require_debits(prepared.config, run_dir)
    if prepared.method.own_b:
        require_own_b(run_dir, [member.client for member in remaining(run_dir, prepared.clients.members)])
    setup = prepared.save_for_hosts(run_dir)
    prepared = prepared.without_records()
    try:
        cohort = _in_world(_cohort(setup, prepared, listener, start), prepared, run_dir, state.round)
        try:
            _run_rounds(prepared, state, cohort, store, score, listener, run_dir, stored)
        finally:
            cohort.close()
    finally:
        shutil.rmtree(setup.holdings, ignore_errors=True)
    shutil.rmtree(run_dir / STATES, ignore_errors=True)
    listener(Stage(name="writing the summary"))
    summary = summarise(prepared, run_dir, setup.together, scoring_threads or usable_cores())
    drop_digest_of_records(run_dir)
    write_summary(run_dir, summary)
    if (note := clip_note(run_rounds(run_dir), prepared.config.privacy)) is not None:
        listener(Note(words=note))
    listener(RunDone(summary=summary))


def _run_rounds(
    prepared: Prepared,
    state: ServerState,
    cohort: Cohort,
    store: Store,
    score: Score,
    listener: Listener,
    run_dir: Path,
    stored: Stored,
) -> None:
    config = prepared.config
    members = remaining(run_dir, prepared.clients.members)
    clip = None if config.privacy == "none" else config.privacy.max_grad_norm
    first = state.round
    listener(
        RunStarted(
            clients=len(members),
            rounds=config.federation.rounds,
            private=config.privacy != "none",
            run_dir=run_dir,
        )
    )
    spent_s = 0.0
    for after, line in rounds(
        state,
        origin=prepared.origin,
        seed=config.seed,
        members=members,
        method=prepared.method,
        federation=config.federation,
        cohort=Guarded(cohort, config.federation, clip),
        store=store,
        score=score,
        told=lambda number: {"world": told(run_dir, number)} if config.world else {},
        stored=stored,
        max_grad_norm=clip,
    ):
        spent_s += line["seconds"]
        left = config.federation.rounds - after.round
        listener(RoundDone(round=line, eta_s=left * spent_s / (after.round - first)))


def _scorer(prepared: Prepared, run_dir: Path, threads: int) -> Score:
    """Scores adapters on the public test data, and says what the ledgers have spent by then."""
    privacy = prepared.config.privacy
    spending = Spending(privacy, run_dir)

    def score(adapters: Adapters) -> dict[str, Any]:
        prepared.model.load(adapters)
        torch.set_num_threads(threads)  # clients are idle while the server scores
        found = evaluate(prepared.model, prepared.clients.test)
        share = clipped(prepared.model, prepared.clients.test, privacy)
        torch.set_num_threads(prepared.config.runtime.threads)
        spent = spending.epsilon_max()
        return {
            "metric": found.metric,
            "score": found.value,
            "loss": found.loss,
            "epsilon_max": spent,
            **share,
        }

    return score


def _cohort(setup: HostSetup, prepared: Prepared, listener: Listener, start: Start | None) -> Cohort:
    """Where the clients of this run live. Each runtime is imported only by the run that uses it."""
    kind = setup.config.runtime.kind
    listener(Stage(name=f"starting the {kind} runtime"))
    if start is not None:
        return start(setup, listener)
    match kind:
        case "local":
            from fedlora.runtime.local import LocalCohort

            return LocalCohort(setup, listener, prepared.model)
        case "ray":
            from fedlora.runtime.ray import RayCohort

            return RayCohort(setup, listener)
        case "flower":
            from fedlora.runtime.flower import SimulatedCohort

            return SimulatedCohort(setup, listener)


def _in_world(inner: Cohort, prepared: Prepared, run_dir: Path, completed: int) -> Cohort:
    """The clients as the config's world lets them take part; as they are where it has none."""
    if prepared.world is None:
        return inner
    federation = prepared.config.federation
    try:
        return VirtualCohort(
            inner, world=prepared.world, federation=federation, run_dir=run_dir, completed=completed
        )
    except BaseException:
        inner.close()
        raise
