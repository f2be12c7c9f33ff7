"""A federation of two nodes that keeps running while its links are bad, and what must hold of it at any moment."""

import contextlib
import json
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedlora.deploy.replay import replay
from fedlora.federation.store import Store, state_digest
from tests.deploy.federation import Federation
from tests.deploy.processes import lives
from tests.faults.proxy import FaultProxy, Way

DEADLINE_S = 10.0
"""Of a round: short for those that are to miss it, and enough for the others on a machine that is not busy."""
ROUNDS = 90
"""More than all scenarios together need."""
PATIENCE_S = 120.0
"""For what takes seconds, on a machine that is busy."""
ATTEMPTS = 6
"""A fault that is to meet a round at one moment may come too late for it; then the next round will do."""
NEAR, OTHER = 0, 1
"""The node whose link is made bad, and the one whose link stays well."""
GRACE_S = 10.0
"""What a container engine gives a process between SIGTERM and SIGKILL."""


class Running:
    """All processes, with a proxy before the SuperLink for one node and another for the rest."""

    def __init__(self, folder: Path, model: Path, files: tuple[Path, Path], **federation: Any) -> None:
        """Nothing is started yet."""
        run_yaml(folder, model, files)
        given = {"rounds": ROUNDS, "deadline_s": DEADLINE_S, "keep_gauges": 3, **federation}
        self.federation = Federation(folder, files[0], **given)
        self.fleet, self.control = FaultProxy(self.federation.link), FaultProxy(self.federation.link)
        self.federation.links = [self.fleet.port, self.control.port]

    def start(self) -> None:
        """Everything is started, and the first round is done."""
        self.federation.start_link()
        self.serve("server")
        self.federation.start_nodes()
        self.wait(lambda: self.committed() >= 1)

    def serve(self, name: str) -> "subprocess.Popen[bytes]":
        """`fedlora serve`, through the proxy."""
        at, self.federation.link = self.federation.link, self.control.port
        self.server = self.federation.serve(name)
        self.federation.link = at
        return self.server

    def wait(self, condition: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
        """Fails with every log unless the condition comes true in time."""
        assert self.within(seconds, condition), self.federation.processes.logs()

    def within(self, seconds: float, condition: Callable[[], bool]) -> bool:
        """Whether it came true in time."""
        ends = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > ends:
                return condition()
            time.sleep(0.02)
        return True

    def lines(self) -> dict[int, dict[str, Any]]:
        """Of rounds.jsonl, whole ones, by their round."""
        return {line["round"]: line for line in _whole(self.federation.run_dir / "rounds.jsonl")}

    def committed(self) -> int:
        """The last round that is done; -1 before the zeroth."""
        return len(self.lines()) - 1

    def journal(self) -> list[dict[str, Any]]:
        """Of spent.jsonl."""
        return _whole(self.federation.run_dir / "spent.jsonl")

    def heard(self, number: int = NEAR) -> dict[int, int]:
        """In which round the answers of a node were heard, by the round that they are for."""
        client = self.federation.client(number)
        return {line["round"]: line["heard"] for line in self.journal() if line["client"] == client}

    def paid(self, number: int = NEAR) -> set[int]:
        """The rounds that a node has debits for."""
        ledger = self.federation.ledger(number)
        return set() if ledger is None else {debit.round for debit in ledger.debits}

    def released(self, number: int = NEAR) -> set[int]:
        """The rounds that a node has an answer to."""
        ledger = self.federation.ledger(number)
        if ledger is None:
            return set()
        return {debit.round for debit in ledger.debits if ledger.released(debit.seq) is not None}

    def settle(self) -> int:
        """The newest round, answered by both in time: nothing of an earlier fault is under way any more."""
        start = self.committed()

        def settled() -> bool:
            newest = self.committed()
            return newest > start and all(self.heard(n).get(newest) == newest for n in (0, 1))

        self.wait(settled)
        return self.committed()

    def struck(self, mark: bytes, *, held: Sequence[Way] = (), lost: Sequence[Way] = ()) -> int:
        """The near node had paid for this round when the link failed, at the request that bears the mark."""
        for _ in range(ATTEMPTS):
            self.settle()
            self.fleet.arm(mark, held=held, lost=lost)
            self.wait(lambda: self.fleet.struck)
            number = max(self.released())
            if number not in self.heard():
                return number
            self.fleet.heal()  # a slow node is asked twice, and this was its second answer
        raise AssertionError(self.federation.processes.logs())

    def goes_on(self, number: int = NEAR, rounds: int = 1) -> None:
        """The node is heard for so many rounds that have not begun yet."""
        newest = self.committed() + 1
        self.wait(lambda: sum(round_ > newest for round_ in self.heard(number)) >= rounds)

    def restart(self, name: str) -> int:
        """SIGTERM, and started again once it has ended in its grace: with which status, is what this tells."""
        process = self.federation.processes.started[name]
        process.send_signal(signal.SIGTERM)
        status = process.wait(GRACE_S)
        kind, _, number = name.partition("-")
        start = {"executor": self.federation.start_executor, "supernode": self.federation.start_supernode}
        start[kind](int(number))
        return status

    def violations(self) -> list[str]:
        """Every promise that ledgers, journal and rounds break as they are now."""
        journal, lines = self.journal(), self.lines()
        found = [] if list(lines) == list(range(len(lines))) else [f"rounds {list(lines)} are out of order"]
        told = Counter((line["client"], line["round"]) for line in journal)
        found += [f"{whose} was heard {times} times" for whose, times in told.items() if times > 1]
        for number in range(2):
            found += self._unpaid(number, journal)
        for line in journal:
            client, heard = line["client"], line["heard"]
            if heard < line["round"] or heard > len(lines):
                found.append(f"{client} answered round {line['round']} in round {heard}")
            if heard in lines and client not in [*lines[heard]["answered"], *lines[heard]["rejected"]]:
                found.append(f"{client}'s answer to round {line['round']} is in no line of round {heard}")
        counted = {(line["client"], line["heard"]) for line in journal}
        for line in lines.values():
            ghosts = [client for client in line["answered"] if (client, line["round"]) not in counted]
            found += [f"{client} counted in round {line['round']} and was not heard" for client in ghosts]
        return found

    def _unpaid(self, number: int, journal: list[dict[str, Any]]) -> list[str]:
        client, ledger = self.federation.client(number), self.federation.ledger(number)
        if ledger is None:
            return [f"{client} has no ledger"]
        released = {
            payload: debit.round
            for debit in ledger.debits
            if (payload := ledger.released(debit.seq)) is not None
        }
        twice = [number for number, times in Counter(released.values()).items() if times > 1]
        mine = [line for line in journal if line["client"] == client]
        unpaid = [line["round"] for line in mine if released.get(line["payload"]) != line["round"]]
        return [
            *(f"{client} released round {number} twice" for number in twice),
            *(
                f"{client} was heard for round {number}, which its ledger did not release"
                for number in unpaid
            ),
        ]

    def end(self) -> None:
        """Nothing runs any more; directory and ledgers stay."""
        self.fleet.heal()
        for name in ("server", "again"):
            if (
                process := self.federation.processes.started.get(name)
            ) is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(30)
        self.federation.stop()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            until_gone(self.federation.worker())

    def close(self) -> None:
        """See `end`; the proxies are gone too."""
        self.end()
        self.fleet.close()
        self.control.close()

    def replays(self) -> bool:
        """Played again from config, plans and journal, the run ends in the state that it is in."""
        state, _ = Store(self.federation.run_dir).load()
        *_, last = replay(self.federation.run_dir)
        return last == (state.round, state_digest(state))


def until_gone(pid: int) -> None:
    """The process is gone soon."""
    ends = time.monotonic() + 10
    while lives(pid):
        assert time.monotonic() < ends
        time.sleep(0.05)


def started(folder: Path, model: Path, files: tuple[Path, Path], **federation: Any) -> Iterator[Running]:
    """For a fixture: one that runs, gone afterwards."""
    running = Running(folder, model, files, **federation)
    try:
        running.start()
        yield running
    finally:
        running.close()


def _whole(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that another process appends to."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def run_yaml(folder: Path, model: Path, files: tuple[Path, Path]) -> None:
    """What a Federation in this folder begins with."""
    train, test = map(str, files)
    columns = {"text": "sentence", "label": "topic", "max_length": 16}
    work = {"local_steps": 2, "batch_size": 16, "optimizer": {"name": "sgd", "lr": 1.0}}
    budget = {"target_epsilon": 8.0, "target_delta": 1e-5, "max_participations": ROUNDS}
    run = {
        "seed": 7,
        "model": {"name": str(model)},
        "task": {"kind": "sequence-classification"},
        "lora": {"r": 2, "lora_alpha": 2, "target_modules": ["query", "value"]},
        "data": {"source": "files", "train": train, "test": test, **columns},
        "federation": {"rounds": ROUNDS, "cohort": 2, **work},
        "method": {"name": "fedsvd"},
        "privacy": {**budget, "max_grad_norm": 1.0},
        "output": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
