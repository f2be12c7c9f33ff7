"""Updates on disk: recalled as kept, all of a round or none, only as many as are needed, and gone when forgotten."""

import os
import signal
import sqlite3
import subprocess
import sys
import tracemalloc

import pytest
import torch

from fedlora.errors import ConfigError, IncompleteError
from fedlora.federation.memory import StaleMemory
from fedlora.federation.store import Store
from fedlora.values import FRAME, Delta
from tests.federation.deltas import as_kept, same


def delta(number, size=40):
    """Another one for each number."""
    draw = torch.Generator().manual_seed(number)
    return Delta(
        basis=FRAME,
        sites={"x": torch.randn(size, 3, generator=draw), "y": torch.randn(4, 3, generator=draw)},
        head={"weight": torch.randn(2, 4, generator=draw)},
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "memory.sqlite"


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "int8"])
def test_what_is_recalled_is_what_keep_said_in_any_process(path, kept):
    memory = StaleMemory(path, kept)
    said = {
        client: memory.keep(client, 3, delta(n)) for n, client in enumerate(["a", "b", "..", "", "ü" * 300])
    }
    memory.commit()
    memory.close()
    again = StaleMemory(path, kept)
    for n, client in enumerate(said):
        assert same(again.recall(client, 3), said[client])
        assert same(said[client], as_kept(delta(n), kept))


def test_names_stay_in_the_file(path):
    memory = StaleMemory(path)
    for name in ("../../victim", "/etc/x", "a/b", "%", "' OR 1=1; --"):
        memory.keep(name, 1, delta(1))
    memory.commit()
    assert [found.name for found in path.parent.parent.rglob("*")] == ["run", "memory.sqlite"]
    assert same(memory.recall("' OR 1=1; --", 1), delta(1))


def test_a_round_that_was_not_committed_never_was(path):
    memory = StaleMemory(path)
    memory.keep("a", 1, delta(1))
    memory.commit()
    memory.keep("a", 2, delta(2))
    memory.keep("b", 2, delta(3))
    assert same(memory.recall("b", 2), delta(3))  # to this process only
    memory.close()
    assert same(memory.recall("a", 1), delta(1))
    for client in ("a", "b"):
        with pytest.raises(
            IncompleteError, match=f"'{client}', round 2, is missing; restore the file, or start"
        ):
            memory.recall(client, 2)


DIES = """
import os, signal, sys
from pathlib import Path
from fedlora.federation import memory as module
from tests.federation.test_stale_memory import BIG, delta
memory = module.StaleMemory(Path(sys.argv[1]))
memory.settle({f"client-{n}": 1 for n in range(50)})
for n in range(50):
    if n == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    memory.keep(f"client-{n}", 2, delta(200 + n, BIG))
memory.commit()
os.kill(os.getpid(), signal.SIGKILL)
"""


BIG = 36_000


@pytest.mark.parametrize("after", [1, 49, 50])
def test_a_kill_in_mid_round_leaves_the_round_before_also_where_records_were_written_over(path, after):
    """50 records of 0.4 MB are more than the cache has room for, so the file is written before the commit."""
    memory = StaleMemory(path)
    for at in (0, 1):
        for n in range(50):
            memory.keep(f"client-{n}", at, delta(100 * at + n, BIG))
        memory.commit()
    memory.close()
    size = path.stat().st_size
    died = subprocess.run([sys.executable, "-c", DIES, str(path), str(after)], cwd=os.getcwd(), check=False)  # noqa: PTH109
    assert died.returncode == -signal.SIGKILL
    at = 2 if after == 50 else 1
    for n in range(50):
        assert same(memory.recall(f"client-{n}", at), delta(100 * at + n, BIG))
    if after < 50:
        with pytest.raises(IncompleteError, match="missing"):
            memory.recall("client-0", 2)
    assert path.stat().st_size == size
    memory.keep("client-0", 3, delta(0, BIG))
    memory.commit()
    assert [found.name for found in path.parent.iterdir()] == ["memory.sqlite"]


def test_a_record_is_written_over_only_when_no_kept_checkpoint_refers_to_it(path):
    """Two checkpoints are kept, as the store does; every record that either refers to can be recalled throughout."""
    memory, draw = StaleMemory(path), torch.Generator().manual_seed(5)
    checkpoints, sizes = [{}], []
    for round_ in range(1, 40):
        cohort = torch.randperm(6, generator=draw)[:2].tolist()
        for client in cohort:
            memory.keep(str(client), round_, delta(10 * round_ + client))
            for words in checkpoints:
                for other, at in words.items():
                    assert same(memory.recall(other, at), delta(10 * at + int(other)))
        memory.commit()
        checkpoints = [*checkpoints, {**checkpoints[-1], **{str(c): round_ for c in cohort}}][-2:]
        memory.prune(2)
        if round_ % 7 == 0:  # a new process
            memory.close()
            memory.settle(checkpoints[-1], checkpoints)
        sizes.append(_places(path))
    # One a client, two of the round before and two of this one.
    assert sizes[-1] <= 6 + 2 * 2
    assert sizes[-1] == max(sizes)


def test_rounds_without_anybody_give_back_what_was_replaced(path):
    memory = StaleMemory(path)
    for round_ in (1, 2, 3, 3, 4):
        if round_ != 3:
            memory.keep("a", round_, delta(round_))
        memory.commit()
        memory.prune(2)
    assert _places(path) == 2


def test_a_round_done_again_by_other_clients_loses_nobodys_record(path):
    """A crash after the memory's commit and before the checkpoint's rename; the second time another one answers."""
    memory = StaleMemory(path)
    for client in ("a", "b"):
        memory.keep(client, 1, delta(ord(client)))
    memory.commit()
    memory.keep("a", 2, delta(2))
    memory.commit()
    memory.close()
    state = {"a": 1, "b": 1}
    memory.settle(state)
    for round_ in range(2, 9):
        memory.keep("b", round_, delta(round_))
        memory.commit()
        memory.prune(2)
        assert same(memory.recall("a", 1), delta(ord("a")))
        assert same(memory.recall("b", round_), delta(round_))


def test_of_ten_thousand_clients_only_those_heard_take_room(path):
    """File and memory grow with the clients that took part, and memory not even with them."""
    memory, rounds, cohort = StaleMemory(path), 5, 40
    draw = torch.Generator().manual_seed(2)
    heard, peaks = {}, []
    for round_ in range(1, rounds + 1):
        tracemalloc.start()
        for client in torch.randperm(10_000, generator=draw)[:cohort].tolist():
            memory.keep(f"client-{client:05d}", round_, delta(client, 2000))
            heard[client] = round_
        memory.commit()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        memory.prune(2)
    record = 4 * (2000 * 3 + 12 + 8)
    # A page at most is wasted a record, and a few are for names.
    assert len(heard) * record < path.stat().st_size < rounds * cohort * (record + 32_768) + 10 * 32_768
    # Not one more record than in the first round: 40 of them are 1 MB.
    assert max(peaks) < peaks[0] + record
    assert max(peaks) < 10 * record
    for client, round_ in heard.items():
        assert same(memory.recall(f"client-{client:05d}", round_), delta(client, 2000))


def test_forgetting_leaves_no_byte_of_the_client(path):
    memory = StaleMemory(path)
    mine = [torch.full((4000, 3), float(n) + 0.123) for n in range(1, 5)]
    for round_ in range(1, 5):  # its older records lie in places that are free, or wait to be
        memory.keep("the-withdrawn-one", round_, Delta(basis=FRAME, sites={"x": mine[round_ - 1]}))
        memory.keep("b", round_, Delta(basis=FRAME, sites={"x": torch.full((4000, 3), float(round_))}))
        memory.commit()
        memory.prune(2)

    def there():
        held = path.read_bytes()
        return [b"the-withdrawn-one" in held, *(tensor[:2].numpy().tobytes() in held for tensor in mine)]

    assert there()[0] and there()[-1]
    assert memory.forget("the-withdrawn-one") >= 2
    assert not any(there())
    assert [found.name for found in path.parent.iterdir()] == ["memory.sqlite"]
    assert memory.forget("the-withdrawn-one") == 0
    assert float(memory.recall("b", 4).sites["x"][0, 0]) == 4.0
    with pytest.raises(IncompleteError, match="missing"):
        memory.recall("the-withdrawn-one", 4)
    memory.keep("c", 5, Delta(basis=FRAME, sites={"x": mine[0]}))
    memory.commit()
    assert same(memory.recall("c", 5), Delta(basis=FRAME, sites={"x": mine[0]}))


def test_forgetting_where_nothing_was_kept_makes_no_file(path):
    assert StaleMemory(path).forget("a") == 0
    assert not path.exists()
    with pytest.raises(IncompleteError, match="'a', round 3, is missing"):
        StaleMemory(path).recall("a", 3)
    assert not path.exists()


def _places(path):
    with sqlite3.connect(path) as raw:
        return raw.execute("SELECT count(*) FROM value").fetchone()[0]


def damage(path, where):
    with path.open("r+b") as file:
        file.seek(where)
        byte = file.read(1)
        file.seek(where)
        file.write(bytes([byte[0] ^ 1]))


def test_a_flipped_bit_in_a_record_is_found_and_named(path):
    memory = StaleMemory(path)
    marked = Delta(basis=FRAME, sites={"x": torch.full((4000, 3), 0.777)})
    memory.keep("a", 1, marked)
    memory.keep("b", 1, delta_like(marked))
    memory.commit()
    memory.close()
    damage(path, path.read_bytes().index(marked.sites["x"].numpy().tobytes()[:400]) + 100)
    with pytest.raises(IncompleteError, match="'a', round 1, is damaged; restore the file"):
        memory.recall("a", 1)
    assert same(memory.recall("b", 1), delta_like(marked))


def delta_like(marked):
    return Delta(basis=FRAME, sites={"x": torch.zeros_like(marked.sites["x"])})


def test_one_clients_record_is_not_taken_for_anothers(path):
    memory = StaleMemory(path)
    for client in ("a", "b"):
        memory.keep(client, 1, delta(ord(client)))
    memory.commit()
    memory.close()
    with sqlite3.connect(path) as raw:
        for before, after in (("a", "between"), ("b", "a"), ("between", "b")):
            raw.execute("UPDATE place SET client = ? WHERE client = ?", (after, before))
    with pytest.raises(IncompleteError, match="'a', round 1, is damaged"):
        memory.recall("a", 1)


def test_a_file_that_is_none_or_is_cut_says_so(path):
    path.parent.mkdir()
    path.write_bytes(b"no database at all, but long enough to be looked at" * 100)
    with pytest.raises(IncompleteError, match=r"is damaged .*restore it, or start again"):
        StaleMemory(path).recall("a", 1)
    path.unlink()
    memory = StaleMemory(path)
    for n in range(20):
        memory.keep(str(n), 1, delta(n, 4000))
    memory.commit()
    memory.close()
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(IncompleteError, match=r"damaged|missing"):
        memory.recall("19", 1)


def test_a_file_of_another_dtype_or_a_newer_format_is_refused(path):
    memory = StaleMemory(path, "int8")
    memory.keep("a", 1, delta(1))
    memory.commit()
    memory.close()
    with pytest.raises(ConfigError, match=r"keeps updates as int8, method.stale.dtype says float32"):
        StaleMemory(path).recall("a", 1)
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE layout SET format = 2")
    with pytest.raises(ConfigError, match="format 2, this fedlora reads up to 1; update fedlora"):
        StaleMemory(path, "int8").recall("a", 1)


def test_a_run_that_an_earlier_fedlora_began_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "memory" / "client-0").mkdir(parents=True)
    with pytest.raises(
        ConfigError, match="an earlier fedlora kept its updates there; finish this run with that one"
    ):
        Store(tmp_path).recover()
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]


def test_commits_outlive_a_power_cut_by_sqlites_own_promise(path):
    """SQLite syncs beside Python, so that no test here sees it do so: what it is told is what can be looked at."""
    memory = StaleMemory(path)
    memory.keep("a", 1, delta(1))
    told = {
        name: memory._opened.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("synchronous", "journal_mode", "secure_delete", "cache_size", "page_size")
    }
    assert told == {
        "synchronous": 3,
        "journal_mode": "delete",
        "secure_delete": 1,
        "cache_size": -16384,
        "page_size": 32768,
    }
