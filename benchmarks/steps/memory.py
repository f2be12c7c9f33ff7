"""The peak of one arm, in this process alone: python -m steps.memory DIRECTORY BOUND ARM whole|checkpointed."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from steps.measure import LR, NOISE, peak_mb
from steps.problems import problem_in
from steps.variants import build

BENCHMARKS = Path(__file__).parents[1]

GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_TRIM_THRESHOLD_": "0"}
"""glibc's: freed tensors leave the process at once, so that its high-water mark is the step's and not a heap's."""


def peak_of(directory: Path, bound: float, arm: str, *, checkpointed: bool) -> dict[str, Any]:
    """step_mb and resident_mb of an arm, from a process of its own; `failed` says why not."""
    paths = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])
    environment = {**os.environ, **GIVEN_BACK, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    how = "checkpointed" if checkpointed else "whole"
    command = [sys.executable, "-m", "steps.memory", str(directory), repr(bound), arm, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints the peak of the second step: the first packs weights and fills caches that stay."""
    torch.set_num_threads(1)
    directory, bound, arm, how = sys.argv[1:]
    problem = problem_in(Path(directory))
    variant = build(arm, problem, Path(directory), float(bound), {})
    if how == "checkpointed":
        # transformers checkpoints in training mode only; there is no dropout that would differ
        variant.model.train()
        variant.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})  # pyright: ignore
    step = partial(variant.step, NOISE, LR)
    step()
    step_mb, resident_mb = peak_mb(step, problem.device)
    print(json.dumps({"step_mb": step_mb, "resident_mb": resident_mb}))


if __name__ == "__main__":
    main()
