"""A hundred thousand simulated clients: what a round, the driver's memory and a crash cost beside a thousand.

    python benchmarks/many_clients.py --quick     a minute: 1,000 and 3,000 clients, 5 rounds, one crash
    python benchmarks/many_clients.py --full      both runtimes at 1,000 and 100,000 clients, 20 rounds, three crashes

A tiny random BERT, two records a client, FedStale with beta 0.3, 200 clients asked a round: `fedlora simulate` in a
process of its own, with its children. Three pairs of runs in each runtime, the same but for the number of clients:

narrow    private, an adapter of some kB. Goal: 100,000 clients take less than 600 s from nothing to the report. Then
          all processes of such a run are killed with SIGKILL at random moments, and `fedlora resume` goes on until it
          is finished: the same state_sha256 as where nobody was killed.
open      the same without privacy. Goal: the median round that is not scored takes at most 1.2 times that at 1,000.
          Without ledgers, since a client's first debit makes its ledger, which takes two fsyncs more: of 100,000 nearly
          all are asked for the first time, of 1,000 soon none. That is a cost of the cohort, and of the disk.
wide      private, an adapter of 0.3 MB. Goal: the driver's peak memory (VmHWM) is at most 1.2 times that at 1,000.

Beside them: seconds until the first round begins, and the driver's own processor time in a round. On a machine that
does other things too, the clock says little: run it alone.

Writes benchmarks/results/many_clients.json; returns 1 when a goal is missed.
"""

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

RESULTS = Path(__file__).parent / "results"
MOST_SECONDS, MOST_GROWTH = 600.0, 1.2
RECORDS, BETA, WORKERS = 2, 0.3, 2
KINDS: tuple[Literal["narrow", "open", "wide"], ...] = ("narrow", "open", "wide")
HIDDEN, WORDS = 16, 60
MEGABYTES = 0.3
WIDE_RANK = 16
"""With sites as wide as MEGABYTES asks for; the narrow model has rank 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run. kind: see above."""

    clients: int
    cohort: int
    rounds: int
    runtime: str
    kind: Literal["narrow", "open", "wide"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a finished run cost. round_s, round_cpu_s: medians of the rounds that are not scored."""

    case: Case
    seconds: float
    preparing_s: float
    round_s: float
    round_cpu_s: float
    peak_mb: float
    state_sha256: str


def main() -> int:
    """Runs every case, prints the table, returns 1 when a goal is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    scale = parser.add_mutually_exclusive_group(required=True)
    scale.add_argument("--quick", action="store_true")
    scale.add_argument("--full", action="store_true")
    parser.add_argument("--runtime", choices=("local", "ray"), action="append")
    given = parser.parse_args()
    few, many, cohort, rounds, crashes = (
        (1_000, 3_000, 20, 5, 1) if given.quick else (1_000, 100_000, 200, 20, 3)
    )
    found: list[Measured] = []
    missed: list[str] = []
    for runtime, kind in product(given.runtime or ("local", "ray"), KINDS):
        with tempfile.TemporaryDirectory() as folder:
            cases = [
                Case(clients=clients, cohort=cohort, rounds=rounds, runtime=runtime, kind=kind)
                for clients in (few, many)
            ]
            small, large = (measured(case, Path(folder)) for case in cases)
            found += [small, large]
            missed += _missed(small, large)
            if kind == "narrow":
                again = crashed(large.case, Path(folder), crashes, large.seconds)
                print(f"{runtime}: killed {crashes} times, state {again[:12]}", flush=True)
                missed += [f"{runtime}: another state after crashes"] * (again != large.state_sha256)
    RESULTS.mkdir(exist_ok=True)
    words = {"missed": missed, "runs": [asdict(run) for run in found]}
    (RESULTS / "many_clients.json").write_text(json.dumps(words, indent=2) + "\n")
    print("\n".join(missed) or "every goal is reached")
    return 1 if missed else 0


def _missed(small: Measured, large: Measured) -> list[str]:
    goal, reached, most = {
        "narrow": ("seconds", large.seconds, MOST_SECONDS),
        "open": ("round", large.round_s / small.round_s, MOST_GROWTH),
        "wide": ("memory", large.peak_mb / small.peak_mb, MOST_GROWTH),
    }[large.case.kind]
    said = f"{large.case.runtime}, {large.case.clients:,} clients: {goal} {reached:.3g}, at most {most:g}"
    print(said, flush=True)
    return [said] if reached > most else []


def measured(case: Case, scratch: Path) -> Measured:
    """The run, from nothing to its report."""
    run_dir = scratch / f"run-{case.clients}-{case.kind}"
    began = time.monotonic()
    process = _started("simulate", str(made(case, scratch)), "--run-dir", str(run_dir))
    moments, said, watch = [], [], Watch(process.pid)
    assert process.stderr is not None
    for line in process.stderr:
        watch.look()
        if re.match(r"[\d,]+ clients, |round \d+/", line):
            moments.append((time.monotonic(), watch.cpu_s, " accuracy " in line))
        said.append(line)
    assert process.wait() == 0, "".join(said)
    plain = [(now, before) for before, now in pairwise(moments) if not now[2]][1:]
    found = Measured(
        case=case,
        seconds=time.monotonic() - began,
        preparing_s=moments[0][0] - began,
        round_s=statistics.median(now[0] - before[0] for now, before in plain),
        round_cpu_s=statistics.median(now[1] - before[1] for now, before in plain),
        peak_mb=watch.peak_mb,
        state_sha256=_state(run_dir),
    )
    print(found, flush=True)
    return found


def crashed(case: Case, scratch: Path, times: int, usual_s: float) -> str:
    """state_sha256 of the same run, killed so many times and resumed each time."""
    run_dir, draw = scratch / "crashed", random.Random(case.clients)
    command = ("simulate", str(made(case, scratch)), "--run-dir", str(run_dir))
    for _ in range(times):
        process = _started(*command)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=draw.uniform(0.2, 0.9) * usual_s)
        _kill(process)
        if (run_dir / "config.yaml").exists():
            command = ("resume", str(run_dir))
    process = _started(*command)
    _, said = process.communicate()
    assert process.returncode == 0, said
    return _state(run_dir)


def _started(*words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "fedlora", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _kill(process: "subprocess.Popen[str]") -> None:
    """Nothing is left of it and of what it started."""
    for pid in [process.pid, *descendants(process.pid)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def descendants(pid: int) -> Iterator[int]:
    """The process's children and theirs, oldest first."""
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, tasks.read_text().split()):
                yield child
                yield from descendants(child)


class Watch:
    """What the system says of a process, as of the last look."""

    def __init__(self, pid: int) -> None:
        self._path = Path(f"/proc/{pid}")
        self.peak_mb, self.cpu_s = 0.0, 0.0

    def look(self) -> None:
        """It is looked at now, if it is still there."""
        with suppress(OSError, AttributeError):
            found = re.search(r"VmHWM:\s+(\d+) kB", (self._path / "status").read_text())
            self.peak_mb = int(found[1]) / 1000  # pyright: ignore[reportOptionalSubscript]
            fields = (self._path / "stat").read_text().rpartition(")")[2].split()
            self.cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _state(run_dir: Path) -> str:
    return json.loads((run_dir / "summary.json").read_text())["state_sha256"]


def made(case: Case, scratch: Path) -> Path:
    """The config of the case; what it names is made where it is missing."""
    model, train = scratch / f"model-{case.kind}", scratch / f"train-{case.clients}.jsonl"
    if not model.exists():
        _save_model(model, case.kind == "wide")
    for path, count in ((train, RECORDS * case.clients), (scratch / "test.jsonl", 100)):
        if not path.exists():
            with path.open("w") as file:
                file.writelines(_records(count))
    path = scratch / f"config-{case.clients}-{case.kind}.yaml"
    path.write_text(yaml.safe_dump(_config(case, model, train, scratch / "test.jsonl")))
    return path


def _records(count: int) -> Iterator[str]:
    draw = np.random.default_rng(count)
    for number, words in enumerate(draw.integers(WORDS, size=(count, 6)).tolist()):
        text = " ".join(f"word{word}" for word in words)
        yield json.dumps({"text": text, "label": ("north", "south")[number % 2]}) + "\n"


def _config(case: Case, model: Path, train: Path, test: Path) -> dict[str, object]:
    rank = WIDE_RANK if case.kind == "wide" else 2
    privacy = {
        "target_epsilon": 8.0,
        "target_delta": 1e-5,
        "max_grad_norm": 1.0,
        "max_participations": case.rounds,
    }
    return {
        "seed": 1,
        "model": {"name": str(model)},
        "task": {"kind": "sequence-classification"},
        "lora": {"r": rank, "lora_alpha": rank, "target_modules": ["intermediate.dense"]},
        "data": {
            "source": "files",
            "train": str(train),
            "test": str(test),
            "text": "text",
            "label": "label",
            "max_length": 16,
            "partition": {"kind": "iid", "clients": case.clients},
        },
        "federation": {
            "rounds": case.rounds,
            "cohort": case.cohort,
            "local_steps": 1,
            "batch_size": RECORDS,
            "optimizer": {"name": "sgd", "lr": 0.1},
            "evaluate_every": 5,
        },
        "method": {"name": "fedsvd", "stale": {"beta": BETA}},
        "privacy": "none" if case.kind == "open" else privacy,
        "runtime": {"kind": case.runtime, **({"workers": WORKERS} if case.runtime == "ray" else {})},
        "output": str(model.parent / "run"),
    }


def _save_model(path: Path, wide: bool) -> None:
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    path.mkdir()
    vocabulary: Sequence[str] = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *(f"word{n}" for n in range(WORDS)),
    ]
    (path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=str(path / "vocab.txt")).save_pretrained(path)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=round(MEGABYTES * 1e6 / 4 / WIDE_RANK) if wide else 2 * HIDDEN,
        max_position_embeddings=32,
    )
    torch.manual_seed(11)
    BertModel(config).save_pretrained(path)


if __name__ == "__main__":
    sys.exit(main())
