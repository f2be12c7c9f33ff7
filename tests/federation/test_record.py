"""A remembered update as bytes: of one length, exact where it says so, rounded once and for all where it does not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fedlora.errors import BasisError, ShapeError
from fedlora.federation.record import Codec
from fedlora.values import FRAME, Delta
from tests.federation.deltas import as_kept, same

KEPT = ("float32", "bfloat16", "int8")
FLOATS = {torch.float32: 32, torch.float64: 64}


@st.composite
def deltas(draw):
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    numbers = st.floats(-(2.0**100), 2.0**100, width=FLOATS[dtype])

    def tensor(rows, columns):
        flat = draw(st.lists(numbers, min_size=rows * columns, max_size=rows * columns))
        return torch.tensor(flat, dtype=dtype).reshape(rows, columns)

    shapes = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=3))
    sites = {f"site-{number}": tensor(*shape) for number, shape in enumerate(shapes)}
    return Delta(basis=FRAME, sites=sites, head={"weight": tensor(2, 2)} if draw(st.booleans()) else {})


def tensors(delta):
    return [*delta.sites.values(), *delta.head.values()]


@given(deltas(), st.sampled_from(KEPT))
def test_what_is_kept_is_rounded_once_and_for_all(delta, kept):
    codec = Codec.of(delta, kept)
    once = codec.decode(codec.encode(delta))
    assert same(once, as_kept(delta, kept))
    assert same(as_kept(once, kept), once)
    assert codec.encode(once) == codec.encode(codec.decode(codec.encode(once)))
    assert Codec.of(once, kept) == codec == Codec.read(codec.text)


@given(deltas())
def test_float32_stands_for_the_runs_own_precision_and_rounds_nothing(delta):
    codec = Codec.of(delta, "float32")
    assert same(codec.decode(codec.encode(delta)), delta)


@given(deltas())
def test_int8_is_off_by_half_a_unit_at_most_and_its_unit_is_a_power_of_two_of_the_largest_entry(delta):
    for before, after in zip(tensors(delta), tensors(as_kept(delta, "int8")), strict=True):
        if before.numel():
            largest = before.double().abs().max()
            # The least power of two with the largest entry at most 127 units is under 2/127 of it; subnormals vanish.
            unit = max(float(largest) * 2 / 127, torch.finfo(before.dtype).smallest_normal)
            assert float((after.double() - before.double()).abs().max()) <= unit / 2
            assert bool(after.isfinite().all())


@pytest.mark.parametrize(("kept", "each", "more"), [("float32", 4, 0), ("bfloat16", 2, 0), ("int8", 1, 2)])
def test_a_record_has_the_bytes_that_the_schema_tells(kept, each, more):
    delta = Delta(
        basis=FRAME, sites={"x": torch.randn(7, 3), "y": torch.randn(5, 3)}, head={"w": torch.randn(2, 4)}
    )
    codec = Codec.of(delta, kept)
    assert codec.size == len(codec.encode(delta)) == each * (21 + 15 + 8) + more * 3


def test_powers_of_two_and_whole_multiples_of_them_survive_eight_bits():
    whole = torch.arange(-127, 128, dtype=torch.float32).reshape(-1, 1)
    for unit in (2.0**-40, 1.0, 2.0**60):
        delta = Delta(basis=FRAME, sites={"x": unit * whole})
        assert same(as_kept(delta, "int8"), delta)


def test_another_basis_another_name_shape_or_dtype_is_refused():
    delta = Delta(basis=FRAME, sites={"x": torch.zeros(3, 2)})
    codec = Codec.of(delta, "float32")
    with pytest.raises(BasisError):
        codec.encode(Delta(basis=0, sites=delta.sites))
    for sites in ({"y": torch.zeros(3, 2)}, {"x": torch.zeros(2, 3)}, {"x": torch.zeros(3, 2).double()}, {}):
        with pytest.raises(ShapeError, match="other tensors than the run's"):
            codec.encode(Delta(basis=FRAME, sites=sites))
    with pytest.raises(ShapeError, match="23 bytes, need 24"):
        codec.decode(b"\0" * 23)


def test_bfloat16_is_within_its_own_rounding():
    delta = Delta(basis=FRAME, sites={"x": torch.randn(50, 4, generator=torch.Generator().manual_seed(1))})
    assert_close(as_kept(delta, "bfloat16").sites["x"], delta.sites["x"], rtol=2**-8, atol=0)
