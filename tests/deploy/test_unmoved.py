"""Which ledgers a round moves: those of who was asked, in full, while they answer. The server's work moves none."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

import fedlora
from fedlora.federation import loop
from fedlora.privacy.ledger import read_ledger
from fedlora.runtime.simulate import simulate

ROOT = Path(fedlora.__file__).parent

Ledgers = dict[str, bytes]


class Witnessed:
    """A simulation of three clients of which two are asked a round, FedSVD with stale mixing; all ledgers, always."""

    def __init__(self, config, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run_dir = run_dir
        self.steps: list[tuple[str, set[str], Ledgers, Ledgers]] = []
        self._gathered, self._absorbed = loop.gather, loop.absorb
        self._answered: Ledgers = {}
        self._began: Ledgers = {}
        self.meddle: Callable[[], None] = lambda: None
        monkeypatch.setattr(loop, "gather", self._gather)
        monkeypatch.setattr(loop, "absorb", self._absorb)
        self.config = config

    def run(self) -> list[tuple[str, set[str], Ledgers, Ledgers]]:
        simulate(self.config, self.run_dir, lambda event: None)
        return self.steps

    def ledgers(self) -> Ledgers:
        return {path.stem: path.read_bytes() for path in sorted((self.run_dir / "ledgers").glob("*.jsonl"))}

    def _gather(self, state, plan, replies, **how):
        replies = list(replies)
        self._answered = self.ledgers()
        self.steps.append(("asked", set(plan.cohort), self._began, self._answered))
        for _ in range(3):  # the same stored updates again, as often as one likes
            self._gathered(state, plan, replies, **how)
        return self._gathered(state, plan, replies, **how)

    def _absorb(self, state, gathered, **how):
        for _ in range(3):
            self._absorbed(state, gathered, **how)
        self.meddle()
        self._began = self.ledgers()
        self.steps.append(("absorbed", set(gathered.report.asked), self._answered, self._began))
        return self._absorbed(state, gathered, **how)


@pytest.fixture
def witnessed(tiny_config, tmp_path, monkeypatch) -> Witnessed:
    config = tiny_config(federation__rounds=4, method__stale={"beta": 0.5}, privacy__max_participations=4)
    return Witnessed(config, tmp_path / "run", monkeypatch)


def test_absorbing_mixing_stale_updates_and_moving_the_subspace_change_no_ledger(witnessed):
    absorbed = [(before, after) for what, _, before, after in witnessed.run() if what == "absorbed"]
    assert len(absorbed) == 4
    assert all(before == after for before, after in absorbed)


def test_a_server_that_writes_a_ledger_is_found_out(witnessed):
    def write() -> None:
        path = next((witnessed.run_dir / "ledgers").glob("*.jsonl"))
        path.write_bytes(path.read_bytes() + b" ")

    witnessed.meddle = write
    absorbed = [(before, after) for what, _, before, after in witnessed.run() if what == "absorbed"]
    assert any(before != after for before, after in absorbed)


def test_who_is_not_asked_pays_nothing_and_who_is_asked_pays_in_full(witnessed):
    paid: dict[str, int] = {}
    for what, asked, before, after in witnessed.run():
        if what == "absorbed":
            continue
        moved = {client for client in after if after[client] != before.get(client)}
        assert moved == asked and len(asked) == 2
        for client in asked:
            paid[client] = paid.get(client, 0) + 1
    assert len(paid) == 3
    for client, rounds in paid.items():
        debits = read_ledger(witnessed.run_dir / "ledgers" / f"{client}.jsonl").debits
        assert len(debits) == rounds
        # The rate is that of the records alone: being one of two clients in three buys nothing.
        assert {event.sample_rate for debit in debits for event in debit.events} == {
            min(1.0, witnessed.config.federation.batch_size / _records(witnessed, client))
        }
        assert {event.steps for debit in debits for event in debit.events} == {2}


def _records(witnessed: Witnessed, client: str) -> int:
    from fedlora.runtime.prepare import prepare

    return len(prepare(witnessed.config, lambda event: None).clients.examples[client])


FORBIDDEN = tuple(
    f"fedlora.{room}"
    for room in (
        "data",
        "training",
        "runtime",
        "runs",
        "deploy",
        "provision",
        "transport",
        "monitor",
        "doctor",
    )
)


def test_the_servers_mathematics_reach_neither_records_nor_ledgers():
    """What is post-processing cannot be anything else: it imports no way to a record or a ledger."""
    for room in ("federation", "methods", "algebra"):
        assert (ROOT / room).is_dir()
        for path in (ROOT / room).glob("*.py"):
            for module in _imported(path):
                assert not module.startswith(FORBIDDEN), path
                assert "ledger" not in module and "budget" not in module, path


def _imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    named |= {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
    return named | {node.module or "" for node in froms}
