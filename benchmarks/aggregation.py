"""The server's arithmetic: how fast a round's updates become one, as a share of what the memory can give.

    python benchmarks/aggregation.py --quick     1,000 updates of 0.15, 0.3 and 3 MB, five repeats
    python benchmarks/aggregation.py --full      the same, fifteen repeats, and 1,000 of 1.6 MB

stream: `algebra.mixing.RunningMix.add`, what a round does with each update: names and shapes compared, one pass.
checked: the same behind `federation.sift`, which looks at every number first.
gemv: all updates in one matrix, times their weights: the best that could be, and all of them in memory.
lists: layer by layer, a list of weighted copies summed, as published FedSVD code does.
Arms alternate in one process, in an order that swaps. What the memory gives is a sum over the same matrix in the same
repeat; the figure is the median share of it that `stream` reaches at 3 MB.
Writes benchmarks/results/aggregation.json.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fedlora.algebra.flat import Layout
from fedlora.algebra.mixing import RunningMix
from fedlora.federation.sift import _fault_of_tensors
from fedlora.values import FRAME, Adapters, Delta, Factors, Gauges

RESULTS = Path(__file__).parent / "results"
GOAL = 0.6
CLIENTS, RANK = 1000, 8
SHAPES = {"0.15 MB": (12, 384), "0.3 MB": (24, 384), "3 MB": (48, 1953)}
FULL = {**SHAPES, "1.6 MB": (48, 1024)}
"""Adapted sites and d_out of each; MiniLM with query and value is the first."""


def main() -> int:
    """Times all arms at all sizes, prints the table, returns 1 when the goal is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    scale = parser.add_mutually_exclusive_group(required=True)
    scale.add_argument("--quick", action="store_true")
    scale.add_argument("--full", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes, repeats = (SHAPES, 5) if given.quick else (FULL, 15)
    rows = {size: measured(*shape, repeats) for size, shape in sizes.items()}
    result = {
        "clients": CLIENTS,
        "rows": rows,
        "load": os.getloadavg()[0],
        "cpu": platform.processor(),
        "torch": torch.__version__,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "aggregation.json").write_text(json.dumps(result, indent=2) + "\n")
    return report(rows)


def measured(sites: int, d_out: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each arm, by repeat, and `read`: of one sum over the same matrix."""
    names = [f"encoder.layer.{number:02d}.attention.self.query" for number in range(sites)]
    memory = Delta(basis=FRAME, sites={name: torch.zeros(d_out, RANK) for name in names})
    layout = Layout.of(memory)
    matrix = torch.randn(CLIENTS, layout.numbers)
    updates = [layout.delta_of(row, 0) for row in matrix]
    arms = _arms(memory, matrix, updates)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        order = list(arms) if repeat % 2 else list(reversed(arms))
        for name in order:
            began = time.perf_counter()
            arms[name]()
            if repeat:  # the first is for warming up
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _arms(memory: Delta, matrix: torch.Tensor, updates: list[Delta]) -> dict[str, Callable[[], object]]:
    gauges = {0: Gauges(basis=0, sites={name: torch.eye(RANK) for name in memory.sites})}
    zeros = {name: Factors(a=torch.zeros(RANK, RANK), b=b) for name, b in memory.sites.items()}
    adapters = Adapters(basis=0, scale=1.0, sites=zeros)
    weights = torch.full((CLIENTS,), 1 / CLIENTS)

    def stream() -> None:
        mix = RunningMix(memory, gauges)
        for update in updates:
            mix.add(update, 1 / CLIENTS)

    def checked() -> None:
        mix = RunningMix(memory, gauges)
        for update in updates:
            assert _fault_of_tensors(update, adapters) is None
            mix.add(update, 1 / CLIENTS)

    def lists() -> None:
        for name in memory.sites:
            np.sum([update.sites[name].numpy() * (1 / CLIENTS) for update in updates], axis=0)

    return {
        "read": lambda: matrix.sum(),
        "gemv": lambda: weights @ matrix,
        "stream": stream,
        "checked": checked,
        "lists": lists,
    }


def report(rows: dict[str, dict[str, list[float]]]) -> int:
    """Prints each arm's median share of the read bandwidth, and last the figure against its goal."""
    print(f"{CLIENTS} updates into one, one thread; median share of a mere read of the same numbers\n")
    print(f"{'update':>8s} " + " ".join(f"{name:>9s}" for name in ("gemv", "stream", "checked", "lists")))
    for size, seconds in rows.items():
        shares = [share_of_read(seconds, name) for name in ("gemv", "stream", "checked", "lists")]
        print(f"{size:>8s} " + " ".join(f"{share:9.0%}" for share in shares))
    share = share_of_read(rows["3 MB"], "stream")
    print(f"\nthe stream runs at {share:.0%} of what the memory gives at 3 MB an update (goal {GOAL:.0%})")
    return 0 if share >= GOAL else 1


def share_of_read(seconds: dict[str, list[float]], arm: str) -> float:
    """The median over repeats of a read's time in that of the arm."""
    pairs = zip(seconds["read"], seconds[arm], strict=True)
    return statistics.median(read / took for read, took in pairs)


if __name__ == "__main__":
    sys.exit(main())
