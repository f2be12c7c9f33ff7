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


def touch_a_wall() -> None:
    x = before_a_wall(torch.ones(3))
    print(ctypes.c_float.from_address(x.data_ptr() + x.numel() * x.element_size()).value)


def gradient() -> None:
    from fedlora.kernels.triton_ops import per_example_gradient_into

    for tokens, m, r in ((35, 67, 5), (64, 64, 16), (1, 3, 1)):
        dy, h = before_a_wall(torch.ones(2, tokens, m)), before_a_wall(torch.ones(2, tokens, r))
        per_example_gradient_into(before_a_wall(torch.ones(2, m, r)), dy, h)


def norms() -> None:
    from fedlora.kernels.triton_ops import squared_norms

    for numbers in (1, 1500, 8192, 9000):
        squared_norms(before_a_wall(torch.ones(2, numbers)))


def weighted() -> None:
    from fedlora.kernels.triton_ops import add_weighted

    for k, n, numbers in ((1, 1, 1), (3, 3, 1500), (33, 2, 70)):
        sums, rows = torch.ones(k, numbers).double(), torch.ones(n, numbers)
        add_weighted(before_a_wall(sums), before_a_wall(rows), before_a_wall(torch.ones(k, n).double()))


def product() -> None:
    from fedlora.kernels.triton_ops import add_product

    for tokens, m, r in ((35, 67, 5), (64, 64, 16), (1, 3, 1)):
        y, h = before_a_wall(torch.ones(3, tokens, m)), before_a_wall(torch.ones(3, tokens, r))
        add_product(y, h, before_a_wall(torch.ones(m, r)), before_a_wall(torch.ones(m)))
        for owners in ([0, 1, 0], [1, 2, -1]):
            weight, bias = before_a_wall(torch.ones(2, m, r)), before_a_wall(torch.ones(2, m))
            add_product(y, h, weight, bias, before_a_wall(torch.tensor(owners)))


def ended(what: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(Path(__file__).parents[place]) for place in (2, 0))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    code = f"import test_triton_bounds as here; here.{what}(); print('whole')"
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_wall_stands():
    assert ended("touch_a_wall").returncode < 0  # a signal


@pytest.mark.parametrize("what", ["gradient", "norms", "weighted", "product"])
def test_nothing_is_touched_past_the_end(what):
    pytest.importorskip("triton")
    done = ended(what)
    assert done.stdout == "whole\n", (done.returncode, done.stderr[-2000:])
