"""A server whose disk is full, breaks, or is not its own: it stops with what it has, and goes on when it can."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.deploy import journal as journal_module
from fedlora.disk import whole_lines
from fedlora.federation import store as store_module
from fedlora.federation.absorb import Absorbed
from fedlora.federation.memory import StaleMemory
from fedlora.federation.store import Store
from fedlora.runs.rundir import SPENT, locked
from tests.faults.kills import die
from tests.faults.points import POINTS, around, full_during, nth, state_of_round_2, sync_fails
from tests.faults.server import Served, fixture_of_loaded, fixture_of_served
from tests.faults.test_power import Disk
from tests.faults.test_server import finished, in_mid_round, left
from tests.lanes import mostly_slow

loaded, served = fixture_of_loaded, fixture_of_served

# What is being written in round 2 when the disk is full; and what is there afterwards, as `left` tells it.
FULL = {
    "plan": (Store, "save_plan", nth(2), 40, (1, 2, 1, 1, False)),
    "bytes of a reply": (journal_module, "write_durably", nth(3), 100, (2, 2, 1, 1, False)),
    "line of the journal": (journal_module, "append_durably", nth(3), 30, (2, 2, 1, 1, False)),
    "remembered update": (StaleMemory, "keep", nth(3), 100, (2, 3, 1, 1, False)),
    "remembered updates": (StaleMemory, "commit", nth(2), 100, (2, 4, 1, 1, False)),
    "checkpoint": (Store, "_write_checkpoint", nth(3), 100, (2, 4, 1, 1, True)),
    "words of a checkpoint": (store_module, "write_durably", state_of_round_2, 10, (2, 4, 1, 1, True)),
    "line of the round": (store_module, "append_durably", nth(2), 30, (2, 4, 2, 1, False)),
}
NO_ROOM = ("File too large", "disk I/O error", "disk is full")
"""The system's words, and SQLite's."""


@pytest.mark.fault("F35")
@pytest.mark.parametrize("what", mostly_slow(FULL, "line of the journal", "checkpoint"))
def test_a_server_with_a_full_disk_stops_and_goes_on_from_where_it_was_when_there_is_room(served, what):
    run = served()
    owner, name, is_it, room, there = FULL[what]
    life = run.live(prepare=lambda: full_during(owner, name, is_it, room))
    assert life.status == 1 and any(words in life.error for words in NO_ROOM)
    run.settle()
    assert (in_mid_round if what == "remembered update" else left)(run) == there
    # Nothing is acknowledged that is not on disk.
    assert acknowledged(run) <= ledger_lines(run)
    life = run.live()
    assert life.status == 0, life.error
    assert finished(run) == []
    assert acknowledged(run)


def acknowledged(run: Served) -> set[tuple[str, int, str]]:
    """Whose ledger lines the server said it knows, to the nodes they are of."""
    echoes = [(run.nodes[asked.node].config.client, asked.echo) for asked in run.tape.read("asked")]
    return {(client, echo.seq, echo.head) for client, echo in echoes if echo}


def ledger_lines(run: Served) -> set[tuple[str, int, str]]:
    """Whose ledger lines the journal holds."""
    return {(line["client"], *line["ledger"]) for line in whole_lines(run.run_dir / SPENT)}


# Which fsync fails, and what is there when the process has stopped; the data are in the page cache all the same.
BROKEN = {
    "bytes of a reply": (lambda path: path.name.endswith(".frame.part"), 3, (2, 2, 1, 1, False)),
    "folder of the replies": (lambda path: path.name == "replies", 3, (2, 2, 1, 1, False)),
    "journal": (lambda path: path.name == SPENT, 3, (2, 3, 1, 1, False)),
    "tensors of a checkpoint": (lambda path: path.name == "state.safetensors", 3, (2, 4, 1, 1, True)),
    "words of a checkpoint": (lambda path: path.name == ".state.json.part", 3, (2, 4, 1, 1, True)),
    "folder of a checkpoint": (lambda path: path.name == ".round-000002.part", 1, (2, 4, 1, 1, True)),
    "folder of the checkpoints": (lambda path: path.name == "checkpoints", 3, (2, 4, 2, 1, False)),
    "line of the round": (lambda path: path.name == "rounds.jsonl", 2, (2, 4, 2, 2, False)),
}


@pytest.mark.fault("F36")
@pytest.mark.parametrize(
    "what", mostly_slow(BROKEN, "journal", "tensors of a checkpoint", "line of the round")
)
def test_a_server_whose_fsync_fails_once_stops_and_trusts_no_second_one(served, what):
    run = served()
    file, at, there = BROKEN[what]
    afterwards = run.folder / "synced afterwards"
    life = run.live(prepare=lambda: sync_fails(file, at, afterwards))
    assert life.status == 1 and "Input/output error" in life.error
    assert not afterwards.exists(), afterwards.read_text()
    run.settle()
    assert left(run) == there
    assert acknowledged(run) <= ledger_lines(run)
    life = run.live()
    assert life.status == 0, life.error
    assert finished(run) == []


OTHERS = {
    "noise": {"privacy__target_epsilon": 7.0},
    "clip": {"privacy__max_grad_norm": 0.5},
    "rank": {"lora__r": 1},
    "seed": {"seed": 8},
    "rounds": {"federation__rounds": 5},
}


@pytest.mark.fault("F46")
@pytest.mark.parametrize("what", mostly_slow(OTHERS, "noise"))
def test_a_server_started_again_with_another_config_refuses_and_names_the_directory(served, what):
    run = served()
    assert run.live(prepare=POINTS["S5 refactorised"]).killed
    run.settle()
    files = {path: path.read_bytes() for path in run.run_dir.rglob("*") if path.is_file()}
    mine, asked = run.config, len(run.tape.read("asked"))
    run.config = served(name=f"other-{what}", **OTHERS[what]).config.model_copy(
        update={"output": mine.output}
    )
    life = run.live()
    assert life.status == 1 and life.error.startswith("ConfigError") and str(run.run_dir) in life.error
    assert {path: path.read_bytes() for path in run.run_dir.rglob("*") if path.is_file()} == files
    assert len(run.tape.read("asked")) == asked
    run.config = mine
    assert run.live().status == 0
    assert finished(run) == []


@pytest.mark.fault("F46")
def test_a_server_started_again_with_other_test_records_refuses_and_goes_on_with_the_old(
    served, topic_files, tmp_path
):
    own = Path(shutil.copy(topic_files[1], tmp_path / "own.tsv"))
    run = served(data__test=str(own))
    assert run.live(prepare=POINTS["S5 refactorised"]).killed
    run.settle()
    asked, old = len(run.tape.read("asked")), own.read_text()
    own.write_text(old[: old.rindex("\n", 0, -1) + 1])  # all but the last record
    life = run.live()
    assert life.status == 1 and f"data.test: {own} gives other records" in life.error
    assert len(run.tape.read("asked")) == asked
    own.write_text(old)
    assert run.live().status == 0
    assert finished(run) == []


@pytest.mark.fault("F46")
def test_a_server_started_again_on_a_simulations_directory_refuses(served):
    run = served()
    assert run.live(prepare=POINTS["S5 refactorised"]).killed
    (run.run_dir / "roster.json").unlink()
    life = run.live()
    assert life.status == 1 and "holds a simulation" in life.error


@pytest.mark.fault("F54")
def test_a_second_server_on_the_same_directory_refuses_and_harms_nothing(served):
    run = served()
    run.run_dir.mkdir()
    with locked(run.run_dir):
        life = run.live()
    assert life.status == 1 and "is being worked on by another process" in life.error
    assert run.live().status == 0
    assert finished(run) == []


@pytest.mark.fault("F54")
def test_a_server_whose_roster_is_replaced_by_another_runs_refuses(served):
    run = served()
    assert run.live(prepare=POINTS["S8 line written"]).killed
    run.settle()
    path, asked = run.run_dir / "roster.json", len(run.tape.read("asked"))
    roster = json.loads(path.read_text())
    path.write_text(json.dumps({**roster, "run": "another-run"}))
    life = run.live()
    assert life.status == 1 and "another-run" in life.error
    assert not [said for said in run.tape.read("asked")[asked:] if said.round]
    path.write_text(json.dumps(roster))
    assert run.live().status == 0
    assert finished(run) == []


@pytest.mark.fault("F37")
def test_a_power_cut_after_a_commit_leaves_all_that_the_server_goes_on_from(served):
    run = served()
    run.run_dir.mkdir()
    disk, cut = Disk(run.run_dir), run.folder / "after the cut"

    def cuts(real: Callable[..., None], store: Store, absorbed: Absorbed, line: object) -> None:
        real(store, absorbed, line)
        if absorbed.state.round == 2:
            for path in sorted(run.run_dir.rglob("*")):
                if path.is_file() and (content := disk.read(path)) is not None:
                    there = cut / path.relative_to(run.run_dir)
                    there.parent.mkdir(parents=True, exist_ok=True)
                    there.write_bytes(content)
            die()

    def prepare() -> None:
        os.fsync = disk.fsync
        around(Store, "commit", cuts)
        around(StaleMemory, "commit", lambda real, memory: (real(memory), disk.promised(memory.path)))

    assert run.live(prepare=prepare).killed
    run.settle()
    shutil.rmtree(run.run_dir)
    shutil.copytree(cut, run.run_dir)
    assert left(run) == (2, 4, 2, 2, False)
    life = run.live()
    assert life.status == 0, life.error
    assert finished(run) == []
