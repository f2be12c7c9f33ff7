"""Every table of kernels gives what plain torch defines, and one that breaks is told of and left."""

import importlib.util
import inspect
import logging
import sys
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fedlora.kernels
from fedlora.errors import ConfigError, ShapeError
from fedlora.kernels import packed, torch_ops
from fedlora.kernels.table import Ops, WithFallback, chosen, ops_for

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NAMES = sorted(name for name in vars(Ops) if not name.startswith("_"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operands(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Tensor, ...]]:
    """What each function is called with; one that writes does so into the first, which holds nothing yet."""
    draw = torch.Generator().manual_seed(0)
    dy, h = (torch.randn(3, 7, size, generator=draw, dtype=dtype).to(DEVICE) for size in (5, 4))
    rows = torch.randn(3, 30, generator=draw, dtype=dtype).to(DEVICE)
    shares = torch.rand(2, 3, generator=draw, dtype=torch.float64).to(DEVICE)
    room = torch.full((3, 30), float("nan"), dtype=dtype, device=DEVICE)
    return {
        "norms": (rows,),
        "per_example_bias_gradient_into": (room[:, 20:25], dy),
        "per_example_gradient_into": (room[:, :20].unflatten(1, (4, 5)).transpose(1, 2), dy, h),
        "weighted_sums": (rows, shares),
    }


def result(ops: object, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    given = operands(dtype)[name]
    returned = getattr(ops, name)(*given)
    assert (returned is None) == name.endswith("_into")
    return given[0] if returned is None else returned


class Breaking:
    """Fails on purpose, having spoilt what it was to write."""

    def __init__(self, error: Exception) -> None:
        self.error, self.calls = error, Counter()

    def per_example_gradient_into(self, out: Tensor, dy: Tensor, h: Tensor) -> None:
        self._fail("per_example_gradient_into", out)

    def per_example_bias_gradient_into(self, out: Tensor, dy: Tensor) -> None:
        self._fail("per_example_bias_gradient_into", out)

    def norms(self, rows: Tensor) -> Tensor:
        return self._fail("norms")

    def weighted_sums(self, rows: Tensor, shares: Tensor) -> Tensor:
        return self._fail("weighted_sums")

    def _fail(self, name: str, *outs: Tensor) -> Tensor:
        self.calls[name] += 1
        for out in outs:
            out.fill_(7.0)
        raise self.error


@pytest.mark.parametrize("kernels", ["auto", "torch", "onednn"])
def test_cores_compute_in_plain_torch(kernels):
    assert ops_for(kernels, CPU) is torch_ops


@pytest.mark.parametrize("kernels", ["torch", "onednn"])
def test_a_gpu_computes_in_plain_torch_where_told_to(kernels):
    assert ops_for(kernels, GPU) is torch_ops


def test_triton_on_cores_is_refused_with_the_next_move():
    with pytest.raises(ConfigError, match="triton, but clients train on cpu; write kernels: auto"):
        ops_for("triton", CPU)


def test_a_gpu_computes_in_triton_and_falls_back_only_where_nobody_asked_for_triton():
    triton_ops = pytest.importorskip("fedlora.kernels.triton_ops")
    chosen = ops_for("auto", GPU)
    assert isinstance(chosen, WithFallback) and chosen.fast is triton_ops and not chosen.failed
    assert ops_for("triton", GPU) is triton_ops


def test_without_triton_a_gpu_computes_in_plain_torch_and_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "fedlora.kernels.triton_ops", raising=False)
    monkeypatch.delattr(fedlora.kernels, "triton_ops", raising=False)
    assert ops_for("auto", GPU) is torch_ops
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with pytest.raises(ConfigError, match="install triton, or write kernels: auto"):
        ops_for("triton", GPU)


@pytest.mark.parametrize("module", ["torch_ops", "triton_ops"])
def test_every_table_has_every_function_with_the_same_parameters(module):
    ops = pytest.importorskip(f"fedlora.kernels.{module}")
    assert sorted(operands()) == NAMES
    for name in NAMES:
        wanted = inspect.signature(getattr(Ops, name))
        wanted = wanted.replace(parameters=list(wanted.parameters.values())[1:])  # without self
        assert inspect.signature(getattr(ops, name)) == wanted, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_triton_gives_what_plain_torch_gives(name, dtype):
    triton_ops = pytest.importorskip("fedlora.kernels.triton_ops")
    for ops in (triton_ops, WithFallback(triton_ops)):
        got, wanted = result(ops, name, dtype), result(torch_ops, name, dtype)
        # Sums of at most 30 numbers of about 1.
        precise = dtype == torch.float64 or not name.endswith("_into")
        tolerance = 1e-13 if precise else 1e-5
        assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    assert isinstance(ops, WithFallback) and not ops.failed


@pytest.mark.parametrize("name", NAMES)
def test_after_a_failure_plain_torch_computes_which_is_told_once(name, caplog):
    fast = Breaking(RuntimeError("ptxas died"))
    ops = WithFallback(fast)
    with caplog.at_level(logging.INFO):
        for later in [name, *NAMES]:
            assert torch.equal(result(ops, later), result(torch_ops, later)), later
    assert fast.calls == {name: 1}
    (record,) = caplog.records
    assert record.levelname == "ERROR" and name in record.getMessage()
    assert "RuntimeError" in record.getMessage()


@pytest.mark.parametrize(
    "error", [ShapeError("of the caller"), torch.cuda.OutOfMemoryError("full")], ids=repr
)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_fault_of_the_kernels_is_raised_and_they_stay(name, error, caplog):
    fast = Breaking(error)
    ops = WithFallback(fast)
    for _ in range(2):
        with pytest.raises(type(error)) as raised:
            result(ops, name)
        assert raised.value is error
    assert fast.calls == {name: 2} and not ops.failed and not caplog.records


@pytest.mark.parametrize(
    ("kernels", "device", "dtype", "packs", "triton", "wanted"),
    [
        ("auto", "cpu", "float32", True, True, "onednn"),
        ("auto", "cpu", "float32", False, True, "torch"),
        ("auto", "cpu", "bfloat16", True, True, "torch"),
        ("torch", "cpu", "float32", True, True, "torch"),
        ("auto", "cuda", "float32", True, True, "triton"),
        ("auto", "cuda", "bfloat16", True, False, "torch"),
        ("torch", "cuda", "float32", True, True, "torch"),
    ],
)
def test_a_summary_can_say_what_computed(monkeypatch, kernels, device, dtype, packs, triton, wanted):
    monkeypatch.setattr(packed, "available", lambda: packs)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
    assert chosen(kernels, device, dtype) == wanted
