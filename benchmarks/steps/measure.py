"""Equality first, then times in alternation, peaks in processes of their own, and what the device could do at best."""

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedlora.kernels.packed import available
from fedlora.training.checkpoints import DTYPES
from steps.arms import MICRO, PEFT, is_plain
from steps.problems import Problem
from steps.variants import Variant, reset

NOISE, LR = 1.0, 1e-6
"""Of timed steps; at this rate the weights stay where they are."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Of a clipped sum, relative. bfloat16 has three digits and each variant rounds in batches of its own."""

LEAST_S = {"cpu": 0.3, "cuda": 0.05}
"""So long one timing lasts at least, of as many steps as that takes."""

SIZES = ((512, 512, 512), (1024, 1024, 1024), (2048, 1536, 384), (2048, 2048, 2048))
"""Of the products (m, n, k) whose best rate counts as the device's."""


def clipped_sum(variant: Variant, problem: Problem, bound: float) -> Tensor:
    """What one step without noise sums, read off the weights, all in one (numbers,) float64; they are put back."""
    reset(variant.trained)
    before = {name: parameter.detach().clone() for name, parameter in variant.trained.items()}
    lr = 1.0 / bound  # as long a step as the weights bear digits for
    variant.step(0.0, lr)
    moved = [(before[name] - variant.trained[name].detach()).flatten() for name in sorted(before)]
    reset(variant.trained)
    return torch.cat(moved).double() * problem.records / lr


def disagreements(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """How far each arm's sum is off, relative: private ones from microbatches of one, plain ones from PEFT's."""
    found = {}
    for arm, total in sums.items():
        right = sums[PEFT if is_plain(arm) else MICRO]
        found[arm] = float((total - right).norm() / right.norm())
    return found


def seconds(step: Callable[[], object], steps: int, device: str) -> float:
    """Of one of `steps` steps in a row: of this process on a CPU, the median between events on a GPU."""
    if device == "cpu":
        began = time.process_time()
        for _ in range(steps):
            step()
        return (time.process_time() - began) / steps
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) / 1e3 for a, b in pairwise(marks))


def timed(variants: Mapping[str, Variant], problem: Problem, repeats: int) -> dict[str, list[float]]:
    """Seconds of a step by arm and repeat; arms follow each other, backwards in every second repeat."""
    for variant in variants.values():
        variant.step(NOISE, LR)  # loads kernels and warms caches
    once = seconds(lambda: variants[PEFT].step(NOISE, LR), 1, problem.device)
    steps = max(1, math.ceil(LEAST_S[problem.device] / once))
    found: dict[str, list[float]] = {arm: [] for arm in variants}
    for repeat in range(repeats):
        for arm in variants if repeat % 2 == 0 else reversed(variants):
            gc.collect()
            variant = variants[arm]
            found[arm].append(seconds(lambda v=variant: v.step(NOISE, LR), steps, problem.device))
    return found


def flops_of(variant: Variant) -> int:
    """Floating-point operations of one step, as torch counts them: those of matrix products, attention's too."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        variant.step(0.0, LR)
    return counter.get_total_flops()


def best_rate(device: str, dtype: str) -> float:
    """Floating-point operations a second of the fastest matrix product here, by any library that torch has."""
    rates = []
    for m, n, k in SIZES:
        x, w = (torch.randn(*size, device=device, dtype=DTYPES[dtype]) for size in ((m, k), (n, k)))
        for product in _products(x, w):
            product()
            rates += [2 * m * n * k / seconds(product, 1, device) for _ in range(3)]
    return max(rates)


def _products(x: Tensor, w: Tensor) -> Sequence[Callable[[], Tensor]]:
    found = [lambda: torch.mm(x, w.t())]
    if x.device.type == "cpu" and available():
        packed = torch.ops.mkldnn._reorder_linear_weight(w, None)
        found.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    return found


def peak_mb(step: Callable[[], object], device: str) -> tuple[float, float]:
    """(MB that a step needs at most beyond what is there before it, MB that were there before).

    On a CPU both are resident pages, and the process must give freed memory back at once: see `steps.memory`.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6, before / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from what is resident now
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before, before


def _resident(word: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{word}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/self/status of {os.uname().release} has no {word}; peaks need Linux")


def device_name(device: str) -> str:
    """What it calls itself."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else os.uname().machine}, one of {os.cpu_count()} cores"
