"""Whatever product a run begins from, it begins from exactly that."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fedlora.algebra.factors import orthonormalise, whole
from fedlora.algebra.warm import begun_with
from fedlora.errors import ShapeError
from fedlora.values import Factors


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def beginnings(draw):
    """Own factors, whole or with a frame, and theirs of no higher rank, perhaps deficient, of the same sides."""
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    r = draw(st.integers(1, min(m, n)))
    k, seed = draw(st.integers(1, r)), draw(st.integers(0, 2**16))
    a, b = drawn(seed, k, n), drawn(seed + 1, m, k)
    if draw(st.booleans()):
        a[-1], b[:, 0] = a[0], 0.0
    own = Factors(a=orthonormalise(drawn(seed + 2, r, n)).q, b=torch.zeros(m, r, dtype=torch.float64))
    if draw(st.booleans()):
        left = orthonormalise(drawn(seed + 3, r, m)).q.T
        own = Factors(a=own.a, b=torch.zeros(r, r, dtype=torch.float64), left=left)
    return own, Factors(a=a, b=b)


@given(beginnings())
def test_a_run_begins_with_the_product_and_with_orthonormal_rows_and_columns(case):
    own, theirs = case
    got = begun_with(own, theirs)
    assert got.a.shape == own.a.shape and got.b.shape == own.b.shape
    assert_close(whole(got).b @ got.a, theirs.b @ theirs.a, rtol=1e-9, atol=1e-9)
    assert_close(got.a @ got.a.T, torch.eye(len(own.a), dtype=torch.float64), rtol=0, atol=1e-9)
    if own.left is not None:
        assert got.left is not None
        assert_close(got.left.T @ got.left, torch.eye(len(own.a), dtype=torch.float64), rtol=0, atol=1e-9)


def test_rows_that_are_orthonormal_already_are_taken_to_the_bit():
    a = orthonormalise(drawn(1, 3, 9)).q.float()
    theirs = Factors(a=a, b=drawn(2, 5, 3).float())
    got = begun_with(Factors(a=torch.eye(3, 9), b=torch.zeros(5, 3)), theirs)
    assert torch.equal(got.a, theirs.a) and torch.equal(got.b, theirs.b)


def test_a_lower_rank_is_filled_up_with_directions_of_the_runs_own():
    own = Factors(a=torch.eye(3, 8), b=torch.zeros(6, 3))
    theirs = Factors(a=torch.eye(8)[7:], b=torch.ones(6, 1))
    got = begun_with(own, theirs)
    assert_close(got.a[1:].abs().sum(0), torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0]))
    assert not got.b[:, 1:].any()


def test_what_cannot_be_held_is_refused():
    own = Factors(a=torch.eye(2, 8), b=torch.zeros(6, 2))
    with pytest.raises(ShapeError, match="rank 3"):
        begun_with(own, Factors(a=torch.ones(3, 8), b=torch.ones(6, 3)))
    with pytest.raises(ShapeError, match=r"\(6, 9\)"):
        begun_with(own, Factors(a=torch.ones(1, 9), b=torch.ones(6, 1)))
    diagonal = Factors(a=own.a, b=torch.zeros(1, 2), left=torch.eye(6, 2))
    with pytest.raises(ShapeError, match="singular values"):
        begun_with(diagonal, Factors(a=torch.ones(1, 8), b=torch.ones(6, 1)))
