"""A federation of processes that are killed at random moments and started again, and a judge of what it leaves.

The judge reads what lies on disk at the end: the server's round log, plans and journal, and each node's ledger.
"""

import json
import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.schema import RunConfig
from fedlora.disk import whole_lines
from fedlora.federation.loop import line_zero, rounds
from fedlora.federation.store import Store, state_digest
from fedlora.privacy.accountants import agreed_epsilon
from fedlora.privacy.ledger_format import Contents, events_of
from fedlora.runs.rundir import SPENT, load_roster
from fedlora.runtime.local import LocalCohort
from fedlora.runtime.prepare import prepare
from fedlora.values import Reply, TrainRequest
from tests.deploy.federation import Federation
from tests.deploy.seeded import SEEDED_NODE

KINDS = ("SuperLink", "supervisor", "server's process", "SuperNode", "executor")

RESTART_S = 1.0
"""Between two starts of what ends by itself: a SuperNode whose old heartbeat still counts, for up to a minute."""

PATIENCE_S = 300.0
"""For the next thing to happen: a round that waits for its deadline, on a machine that does other things too."""

LIFE_S, RECOVERY_S, LAST_S = 3.0, 8.0, 1.0
"""Of a round that is left alone, about; of whatever is started again, without the minute that a SuperNode may be
refused; and less than the last round can take, which no other follows."""

NAMES = {"link": "SuperLink", "server": "supervisor"}
"""What two of the processes are called where people read it."""


@dataclass(kw_only=True)
class Kill:
    """One of them. done_s: until the round that it fell into was done; None: not yet."""

    victim: str
    round: int
    at: float
    done_s: float | None = None

    def __str__(self) -> str:
        after = "never done" if self.done_s is None else f"done {self.done_s:.1f} s later"
        return (
            f"kill -9 of {NAMES.get(self.victim, self.victim)} in round {self.round}: the round was {after}"
        )


class Tended:
    """All processes of a federation, each started again when it ends, as `restart: always` would."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.kills: list[Kill] = []
        self.restarts = Counter[str]()
        self._started: dict[str, float] = {}
        numbers = range(len(federation.nodes))
        self._start: dict[str, Callable[[], object]] = {
            "link": federation.start_link,
            "server": federation.serve,
            **{f"supernode-{n}": lambda n=n: federation.start_supernode(n) for n in numbers},
            **{f"executor-{n}": lambda n=n: federation.start_executor(n, SEEDED_NODE) for n in numbers},
        }

    def start(self) -> None:
        for name in self._start:
            if name == "supernode-0":
                # An unknown key is refused like one that is still online, and would only take the machine's time.
                self.federation.wait(lambda: "registered: " in self.federation.said(), PATIENCE_S)
            self._begin(name)

    def tend(self) -> bool:
        """Whether the run is finished. What ended is started again; the supervisor ends with 0 or by our hand only."""
        now, done = time.monotonic(), self.federation.rounds()
        for kill in self.kills:
            if kill.done_s is None and kill.round in done:
                kill.done_s = now - kill.at
        for name, process in list(self.federation.processes.started.items()):
            status = process.poll()
            if name == "server" and status is not None:
                assert status in (0, -signal.SIGKILL), self.federation.processes.logs()
                if status == 0:
                    return True
            if status is not None and (status == -signal.SIGKILL or now > self._started[name] + RESTART_S):
                self.restarts[name] += 1
                self._begin(name)
        return False

    def until(self, condition: Callable[[], bool], seconds: float = PATIENCE_S) -> bool:
        """Whether it came true before the run was finished; fails with every log if neither does in time."""
        ends = time.monotonic() + seconds
        while not condition():
            if self.tend():
                return condition()
            assert time.monotonic() < ends, self.federation.processes.logs()
            time.sleep(0.02)
        return True

    def open_round(self) -> int | None:
        """The round that is being worked on: its plan is on disk, and it is not done."""
        plans = sorted((self.federation.run_dir / "plans").glob("round-*.json"))
        planned = int(plans[-1].stem.partition("-")[2]) if plans else 0
        return planned if planned not in [0, *self.federation.rounds()] else None

    def alive(self, kind: str) -> list[str]:
        """Who of this kind can be killed now."""
        if kind == "server's process":
            return [kind] if self._worker() is not None else []
        begins = {"SuperLink": "link", "supervisor": "server"}.get(kind, f"{kind.lower()}-")
        started = self.federation.processes.started.items()
        return [name for name, process in started if name.startswith(begins) and process.poll() is None]

    def kill(self, victim: str, round_: int) -> None:
        at = time.monotonic()
        if victim == "server's process":
            pid = self._worker()
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        else:
            self.federation.kill(victim)
        self.kills.append(Kill(victim=victim, round=round_, at=at))

    def _begin(self, name: str) -> None:
        self._started[name] = time.monotonic()
        self._start[name]()

    def _worker(self) -> int | None:
        """The process that works on the run; None if there is none. Its lock is not tried: that could refuse it."""
        with suppress(OSError, ValueError):
            pid = self.federation.worker()
            if "fedlora" in Path(f"/proc/{pid}/cmdline").read_text():  # a zombie's is empty
                return pid
        return None


def kill_at_random(tended: Tended, kills: int, draw: random.Random) -> None:
    """So many kills were made, each within a round, all five kinds in turn in a random order.

    They are spread over all rounds but the last, which takes what is left over.
    """
    for number, kind in enumerate(victims(kills, draw)):
        first = 1 + number * (tended.federation.last - 1) // kills
        while True:
            assert tended.until(lambda due=first: (tended.open_round() or 0) >= due), f"{number} kills in all"
            found = tended.open_round()
            moment = time.monotonic() + draw.random() * _window(tended, found)
            tended.until(lambda at=moment: time.monotonic() >= at)
            alive = tended.alive(kind)
            if found is not None and tended.open_round() == found and alive:
                tended.kill(draw.choice(alive), found)
                break


def _window(tended: Tended, number: int | None) -> float:
    """How long after a look at a round it is good to kill: while it lasts, or while the last kill is got over."""
    if number == tended.federation.last:
        return LAST_S
    return RECOVERY_S if number in [kill.round for kill in tended.kills] else LIFE_S


def victims(kills: int, draw: random.Random) -> list[str]:
    """Kinds, each of them once in every five."""
    return [kind for _ in range(0, kills, len(KINDS)) for kind in draw.sample(KINDS, len(KINDS))][:kills]


def violations(run_dir: Path, ledgers: Mapping[str, Contents], config: RunConfig) -> list[str]:
    """Every promise that a finished run of a server and the ledgers of its nodes break."""
    lines, spent = whole_lines(run_dir / "rounds.jsonl"), whole_lines(run_dir / SPENT)
    found = []
    if [line["round"] for line in lines] != list(range(config.federation.rounds + 1)):
        found.append(f"rounds {[line['round'] for line in lines]} are done")
    twice = [told for told, n in Counter((line["client"], line["round"]) for line in spent).items() if n > 1]
    found += [f"{client} is journalled twice for round {number}" for client, number in twice]
    found += _miscounted(lines, spent)
    roster = load_roster(run_dir)
    assert roster is not None
    for line in spent:
        paid = _released(ledgers[line["client"]], roster.run, line["round"])
        if paid != {line["payload"]}:
            found.append(
                f"{line['client']} released {paid} for round {line['round']}, the server heard {line}"
            )
    for client, contents in ledgers.items():
        for number in range(1, config.federation.rounds + 1):
            if len(_released(contents, roster.run, number)) > 1:
                found.append(f"{client} released round {number} twice")
        found += _overspent(client, contents, config)
    return found


def _miscounted(lines: Sequence[Mapping[str, Any]], spent: Sequence[Mapping[str, Any]]) -> list[str]:
    """Updates that were heard and count in no round, or the other way round.

    Of two updates of one client in one round, which is a late one and that round's own, the newer counts.
    """
    newest: dict[tuple[str, int], int] = defaultdict(int)
    for line in spent:
        key = (line["client"], line["heard"])
        newest[key] = max(newest[key], line["round"])
    answered = Counter((client, line["round"]) for line in lines for client in line["answered"])
    return [
        f"{client} was heard {heard} times in round {number} and counted {counted} times"
        for client, number in sorted(newest.keys() | answered.keys())
        if (heard := int((client, number) in newest)) != (counted := answered[client, number])
    ]


def _released(contents: Contents, run: str, number: int) -> set[str]:
    debits = [debit.seq for debit in contents.debits if (debit.run, debit.round) == (run, number)]
    return {release.payload for release in contents.releases if release.debit in debits}


def _overspent(client: str, contents: Contents, config: RunConfig) -> list[str]:
    assert config.privacy != "none"
    spent = agreed_epsilon(events_of(contents.debits), config.privacy.target_delta, config.privacy.accountant)
    allowed = config.privacy.target_epsilon
    return [f"{client} spent epsilon {spent} of {allowed}"] if spent > allowed else []


def undisturbed(config: RunConfig, run_dir: Path, scratch: Path) -> str:
    """`state_sha256` of a simulation in which nothing is killed and the same clients are heard in the same rounds.

    Its updates are made anew from the seed; of the run it takes no byte but who was heard when.
    """
    heard: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for line in whole_lines(run_dir / SPENT):
        heard[line["heard"]].append((line["client"], line["round"]))
    prepared = prepare(config, lambda event: None)
    clients, setup = prepared.clients, prepared.save_for_hosts(scratch)
    store, state = Store(scratch), prepared.first_state()
    store.begin(state, line_zero({}))
    played = rounds(
        state,
        origin=prepared.origin,
        seed=config.seed,
        members=clients.members,
        method=prepared.method,
        federation=config.federation,
        cohort=Present(LocalCohort(setup, lambda event: None), heard),
        store=store,
        score=lambda adapters: {},
    )
    for state, _ in played:  # noqa: B007 - the last one is wanted
        pass
    return state_digest(state)


class Present:
    """A Cohort in which those answer who were heard, each what it was asked in the round that it answered for."""

    def __init__(self, inner: LocalCohort, heard: Mapping[int, Sequence[tuple[str, int]]]) -> None:
        self.inner, self.heard = inner, heard
        self.requests: dict[int, TrainRequest] = {}

    def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterator[Reply]:
        """See Cohort."""
        self.requests[request.round] = request
        for client, number in self.heard.get(request.round, ()):
            yield from self.inner.ask([client], self.requests[number])

    def close(self) -> None:
        """See Cohort."""


def state_sha256(run_dir: Path) -> str:
    """Of a finished run."""
    return json.loads((run_dir / "summary.json").read_text())["state_sha256"]
