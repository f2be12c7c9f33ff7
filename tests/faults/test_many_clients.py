"""Thousands of simulated clients, and a run of them that dies in the middle of a round.

A hundred thousand, killed at random moments: benchmarks/many_clients.py.
"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from fedlora.config.load import dump_config
from fedlora.runtime.simulate import resume, simulate
from tests.conftest import WORDS

CLIENTS, COHORT, ROUNDS = 3_000, 20, 3
PATIENCE_S = 120.0


@pytest.fixture
def thousands(tiny_config, tmp_path):
    """A private FedStale run of clients that hold two short records each."""
    draw = np.random.default_rng(3)
    lines = ["topic\tsentence"]
    for number, words in enumerate(draw.integers(10, size=(2 * CLIENTS, 3)).tolist()):
        topic = list(WORDS)[number % 3]
        lines.append(f"{topic}\t{' '.join(WORDS[topic][word] for word in words)}")
    (tmp_path / "short.tsv").write_text("\n".join(lines) + "\n")
    return tiny_config(
        data__train=str(tmp_path / "short.tsv"),
        data__partition={"kind": "iid", "clients": CLIENTS},
        federation__cohort=COHORT,
        federation__rounds=ROUNDS,
        federation__local_steps=1,
        federation__batch_size=2,
        federation__evaluate_every=ROUNDS,
        method__stale={"beta": 0.3},
    )


def test_a_run_of_thousands_killed_in_a_round_is_resumed_to_the_same_state(thousands, tmp_path):
    whole = simulate(thousands, tmp_path / "whole", lambda event: None)
    (tmp_path / "run.yaml").write_text(dump_config(thousands))
    cut = tmp_path / "cut"
    command = [sys.executable, "-m", "fedlora", "simulate", str(tmp_path / "run.yaml"), "--run-dir", str(cut)]
    with (tmp_path / "said.log").open("wb") as said:
        struck = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
    ends = time.monotonic() + PATIENCE_S
    while debits(cut) < COHORT + COHORT // 3:
        assert time.monotonic() < ends and struck.poll() is None, (tmp_path / "said.log").read_text()
        time.sleep(0.005)
    os.killpg(struck.pid, signal.SIGKILL)
    struck.wait()
    paid = debits(cut)
    assert paid < ROUNDS * COHORT
    resume(cut, lambda event: None)
    assert read(cut / "summary.json")["state_sha256"] == read(whole / "summary.json")["state_sha256"]
    assert debits(cut) == debits(whole) == ROUNDS * COHORT
    one, other = ((path / "ledgers").glob("*.jsonl") for path in (whole, cut))
    assert sorted(path.name for path in one) == sorted(path.name for path in other)


def debits(run_dir) -> int:
    """Lines of all ledgers but the first of each, which names its client."""
    return sum(path.read_bytes().count(b"\n") - 1 for path in (run_dir / "ledgers").glob("*.jsonl"))


def read(path):
    return json.loads(path.read_text())
