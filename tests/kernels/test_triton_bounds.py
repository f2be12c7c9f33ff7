"""The Triton kernels touch no byte beyond their operands.

A lane that is not masked would read what lies behind a tensor and throw it away: no result would show it. Here what
lies behind is a page without permission, and whoever touches it is ended by the system: hence a process of its own.
"""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or sys.platform != "linux",
    reason="the interpreter and Linux's pages are needed",
)


def before_a_wall(x: Tensor) -> Tensor:
    """x in memory whose next byte may not be touched."""
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    pages = -(-size // page)
    room = mmap.mmap(-1, (pages + 1) * page)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(room)) + pages * page
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(page), 0) == 0
    flat = torch.frombuffer(room, dtype=x.dtype, count=x.numel(), offset=pages * page - size)
    return flat.view(x.shape).copy_(x)


def touch(x: Tensor) -> None:
    print(ctypes.c_float.from_address(x.data_ptr() + x.numel() * x.element_size()).value)


def touch_a_wall() -> None:
    touch(before_a_wall(torch.ones(3)))


class Walled(TorchDispatchMode):
    """What is made empty within lies before a wall, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        empty = func is torch.ops.aten.empty.memory_format and made.numel()
        return before_a_wall(made) if empty else made


def touch_a_wall_behind_what_is_made() -> None:
    with Walled():
        touch(torch.empty(3, dtype=torch.float64))


def gradient() -> None:
    from fedlora.kernels.triton_ops import per_example_gradient_into

    for tokens, m, r in ((35, 67, 5), (64, 64, 16), (1, 3, 1)):
        dy, h = before_a_wall(torch.ones(2, tokens, m)), before_a_wall(torch.ones(2, tokens, r))
        per_example_gradient_into(before_a_wall(torch.ones(2, m, r)), dy, h)
        per_example_gradient_into(before_a_wall(torch.ones(2, r, m)).transpose(1, 2), dy, h)


def norms() -> None:
    from fedlora.kernels.triton_ops import norms

    for numbers in (1, 1500, 8192, 9000):
        rows = before_a_wall(torch.ones(2, numbers))
        with Walled():
            norms(rows)


def weighted() -> None:
    from fedlora.kernels.triton_ops import weighted_sums

    for k, n, numbers in ((1, 1, 1), (3, 3, 1500), (33, 2, 70)):
        rows, shares = before_a_wall(torch.ones(n, numbers)), before_a_wall(torch.ones(k, n).double())
        with Walled():
            weighted_sums(rows, shares)


def ended(what: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(Path(__file__).parents[place]) for place in (2, 0))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    code = f"import test_triton_bounds as here; here.{what}(); print('whole')"
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("what", ["touch_a_wall", "touch_a_wall_behind_what_is_made"])
def test_the_walls_stand(what):
    assert ended(what).returncode < 0  # a signal


@pytest.mark.parametrize("what", ["gradient", "norms", "weighted"])
def test_nothing_is_touched_past_the_end(what):
    pytest.importorskip("triton")
    done = ended(what)
    assert done.stdout == "whole\n", (done.returncode, done.stderr[-2000:])
