"""The round loop: plan, ask, gather, absorb, score, commit. The same one in every runtime."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fedlora.config.schema import Federation
from fedlora.errors import FedLoraError
from fedlora.federation.absences import require_enough
from fedlora.federation.absorb import Absorbed, absorb
from fedlora.federation.cohort import Cohort
from fedlora.federation.gather import gather
from fedlora.federation.guards import require_finite_score, require_sound
from fedlora.federation.lengths import lengths
from fedlora.federation.plan import Roll
from fedlora.federation.store import Store
from fedlora.federation.work import request_of
from fedlora.methods import Method
from fedlora.values import Adapters, Member, Origin, ServerState

Score = Callable[[Adapters], dict[str, Any]]
"""Scores adapters on public test data: {metric, score, loss, epsilon_max}, and what else is to stand in the line."""

Stored = Callable[[ServerState], None]
"""Is given every state once it is on disk, and the newest again when a run goes on."""

Told = Callable[[int], dict[str, Any]]
"""What else is to stand in a round's line."""


def rounds(
    state: ServerState,
    *,
    origin: Origin,
    seed: int,
    members: Sequence[Member],
    method: Method,
    federation: Federation,
    cohort: Cohort,
    store: Store,
    score: Score,
    told: Told = lambda round_: {},
    stored: Stored = lambda state: None,
    max_grad_norm: float | None = None,
) -> Iterator[tuple[ServerState, dict[str, Any]]]:
    """Goes on from `state` to the last round; each pair it yields is already on disk.

    `max_grad_norm` is every client's clip, if it is known: with it a line says how much noise is in each update.

    Yields:
        The state after a round and that round's line of rounds.jsonl.

    Raises:
        IncompleteError: fewer than federation.min_clients answered; all that is left of the round is who did not, and
            it can be done again.
        PrivacyError: likewise, and no doing again helps: clients refused for their budgets.
        GuardError: the model did not move, or is not finite, or nor is its score; likewise.
    """
    try:
        roll = Roll.of(members, federation)
        stored(state)
        while state.round < federation.rounds:
            began = time.monotonic()
            planned = roll.plan(state.round + 1, run=origin.run, seed=seed)
            store.save_plan(planned)
            request = request_of(origin, planned.round, state.adapters, federation, method)
            replies = cohort.ask(planned.cohort, request) if planned.cohort else ()
            gathered = gather(
                state, planned, replies,
                memory=store.memory, method=method, federation=federation, enough=federation.enough,
            )  # fmt: skip
            absorbed = absorb(state, gathered, method=method, federation=federation)
            _require_enough(absorbed, store, federation)
            before, state = state, absorbed.state
            due = state.round % federation.evaluate_every == 0 or state.round == federation.rounds
            scored = score(state.adapters) if due else {}
            require_sound(before, gathered, state, scored, federation)
            line = _line(absorbed, scored, time.monotonic() - began)
            line |= lengths(absorbed.report.released, federation, max_grad_norm) | told(state.round)
            store.commit(absorbed, line)
            stored(state)
            yield state, line
    finally:
        store.close()  # what an unfinished round has kept never was


def _require_enough(absorbed: Absorbed, store: Store, federation: Federation) -> None:
    report = absorbed.report
    kept = f"the model of round {report.round - 1} is kept, and can be exported as it stands"
    try:
        require_enough(report, federation, kept)
    except FedLoraError:
        store.save_missed(report)
        raise


def line_zero(scored: dict[str, Any]) -> dict[str, Any]:
    """The line of the zero-step model, before anybody was asked.

    Raises:
        GuardError: its score is no number.
    """
    require_finite_score(0, scored, "nothing was trained")
    nobody: dict[str, Any] = {"asked": [], "answered": [], "refused": {}, "rejected": {}, "accuracy_told": {}}
    return {"round": 0, **nobody, **scored, "seconds": 0.0}


def _line(absorbed: Absorbed, scored: dict[str, Any], seconds: float) -> dict[str, Any]:
    report = absorbed.report
    return {
        "round": report.round,
        "asked": list(report.asked),
        "answered": list(report.answered),
        "refused": dict(report.refused),
        "rejected": dict(report.rejected),
        "accuracy_told": dict(report.accuracy),
        "metric": scored.get("metric"),
        "score": scored.get("score"),
        "loss": scored.get("loss"),
        "epsilon_max": scored.get("epsilon_max"),
        "seconds": round(seconds, 3),
        **scored,
    }
