"""Factors: a change of basis moves coordinates and nothing else."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fedlora.algebra.factors import merge, orthonormalise, refactorise
from fedlora.errors import ShapeError
from fedlora.values import Factors

LAWS = settings(derandomize=True, max_examples=80, deadline=None)
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def of_rank(rows, columns, rank, generator):
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    return left @ torch.randn(rank, columns, generator=generator, dtype=torch.float64)


@st.composite
def factors(draw):
    """(a, b, x): sides 1..24, ranks of a and b from 0 to r, scales over eight decades."""
    r = draw(st.integers(1, 6))
    m, n = draw(st.integers(r, 24)), draw(st.integers(r, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    a = of_rank(r, n, draw(st.integers(0, r)), generator)
    b = of_rank(m, r, draw(st.integers(0, r)), generator) * 10.0 ** draw(st.integers(-6, 2))
    return a, b, torch.randn(m, r, generator=generator, dtype=torch.float64)


def spans(rows, a):
    """Whether row(a) lies in the span of orthonormal rows."""
    return torch.allclose(a @ rows.T @ rows, a, rtol=1e-9, atol=1e-9 * max(1.0, float(a.abs().max())))


@LAWS
@given(factors())
def test_refactorise_is_a_change_of_basis(case):
    a, b, x = case
    new = refactorise(a, b)
    assert_close(new.b @ new.a, b @ a, **EXACT)  # the model does not move
    assert_close((x @ new.gauge) @ new.a, x @ a, **EXACT)  # remembered updates survive
    assert_close(b @ new.gauge, new.b, **EXACT)  # b itself is one of the things that stood left of a


@LAWS
@given(factors())
def test_refactorised_factors_are_those_of_an_svd(case):
    a, b, _ = case
    new = refactorise(a, b)
    r = a.shape[0]
    norms = new.b.norm(dim=0)
    assert_close(new.a @ new.a.T, torch.eye(r, dtype=torch.float64))
    assert_close(
        new.b.T @ new.b, torch.diag(norms.square()), rtol=1e-9, atol=1e-9 * float(norms.max() ** 2 + 1)
    )
    assert_close(norms, torch.linalg.svdvals(b @ a)[:r], **EXACT)
    assert bool((norms.diff() <= 1e-9 * (1 + norms[0])).all())


@LAWS
@given(factors())
def test_the_row_space_never_shrinks(case):
    a, b, _ = case
    assert spans(refactorise(a, b).a, a)
    assert spans(refactorise(a, torch.zeros_like(b)).a, a)


def test_a_dense_svd_of_the_product_does_shrink_it():
    # The break of the law above: what the LQ detour is for.
    generator = torch.Generator().manual_seed(0)
    a, b = of_rank(6, 40, 6, generator), of_rank(50, 6, 2, generator)
    dense = torch.linalg.svd(b @ a).Vh[:6]
    assert not spans(dense, a)
    assert spans(refactorise(a, b).a, a)


def test_the_row_space_stays_over_a_thousand_rounds_in_float32():
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(4, 32, generator=generator)
    frame, b = orthonormalise(a).q.double(), torch.zeros(16, 4)
    for _ in range(1000):
        a = refactorise(a, b).a
        b = torch.randn(16, 4, generator=generator)
    outside = a.double() - a.double() @ frame.T @ frame
    assert float(outside.norm()) < 1000 * torch.finfo(torch.float32).eps  # roundings add up at worst linearly


@LAWS
@given(factors())
def test_float32_keeps_the_model_to_its_own_precision(case):
    a, b, _ = (tensor.float() for tensor in case)
    new = refactorise(a, b)
    before = b.double() @ a.double()
    assert new.a.dtype == new.b.dtype == new.gauge.dtype == torch.float32
    scale = float(b.double().norm() * a.double().norm())  # what the product could be without cancellation
    assert float((new.b.double() @ new.a.double() - before).norm()) <= 1e-6 * scale
    assert_close(new.a @ new.a.T, torch.eye(a.shape[0]), rtol=0, atol=2e-6)


def test_b_a_is_kept_to_1e_6_relative_at_the_sizes_of_a_transformer():
    generator = torch.Generator().manual_seed(2)
    a = (torch.rand(8, 384, generator=generator) * 2 - 1) / math.sqrt(384)
    b = torch.randn(384, 8, generator=generator)
    new = refactorise(a, b)
    before = b.double() @ a.double()
    assert float((new.b.double() @ new.a.double() - before).norm() / before.norm()) < 1e-6


@LAWS
@given(factors())
def test_signs_are_the_tensors_own(case):
    a, b, _ = case
    new = refactorise(a, b)
    largest = new.a.gather(1, new.a.abs().argmax(dim=1, keepdim=True))
    assert bool((largest > 0).all())
    again = refactorise(a, b)
    assert torch.equal(new.a, again.a)
    assert torch.equal(new.b, again.b)


def separated(seed):
    """Factors whose singular values lie apart, so that the SVD is unique up to sign."""
    generator = torch.Generator().manual_seed(seed)
    q = orthonormalise(torch.randn(5, 20, generator=generator, dtype=torch.float64)).q
    u = orthonormalise(torch.randn(5, 12, generator=generator, dtype=torch.float64)).q.T
    return q, u * torch.tensor([16.0, 8.0, 4.0, 2.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
def test_the_same_product_ends_in_the_same_factors(seed):
    a, b = separated(seed)
    new = refactorise(a, b)
    mixing = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    flip = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    for other_a, other_b in (
        (-a, -b),
        (flip[:, None] * a, b * flip),
        (mixing @ a, b @ torch.linalg.inv(mixing)),
        (new.a, new.b),  # refactorising twice
    ):
        other = refactorise(other_a, other_b)
        assert_close(other.a, new.a, **EXACT)
        assert_close(other.b, new.b, **EXACT)


def test_equal_entries_are_decided_by_the_first():
    a = torch.tensor([[-0.5, 0.5, 0.5, -0.5]], dtype=torch.float64)
    assert_close(refactorise(a, torch.ones(3, 1, dtype=torch.float64)).a, -a)


@LAWS
@given(factors())
def test_orthonormalise_is_exact_at_any_rank(case):
    a = case[0]
    found = orthonormalise(a)
    assert_close(found.q @ found.q.T, torch.eye(a.shape[0], dtype=torch.float64))
    assert_close(found.l @ found.q, a, **EXACT)
    assert torch.equal(found.l, found.l.tril())
    assert bool((found.l.diagonal() >= 0).all())


def test_orthonormalise_leaves_orthonormal_rows_alone():
    q = orthonormalise(torch.randn(4, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).q
    found = orthonormalise(q)
    assert_close(found.q, q)
    assert_close(found.l, torch.eye(4, dtype=torch.float64))


def test_orthonormalise_of_nothing_still_has_orthonormal_rows():
    found = orthonormalise(torch.zeros(3, 5))
    assert_close(found.q @ found.q.T, torch.eye(3))
    assert torch.equal(found.l, torch.zeros(3, 3))


def test_merge_adds_the_scaled_product():
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(6, 7, generator=generator)
    pair = Factors(a=torch.randn(2, 7, generator=generator), b=torch.randn(6, 2, generator=generator))
    assert_close(merge(weight, pair, 0.5), weight + 0.5 * pair.b @ pair.a)
    assert merge(weight.bfloat16(), pair, 0.5).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "values"),
    [
        (lambda: orthonormalise(torch.zeros(4, 3)), "(4, 3)"),
        (lambda: orthonormalise(torch.zeros(4)), "(4,)"),
        (lambda: refactorise(torch.zeros(2, 9), torch.zeros(9, 3)), "(2, 9)"),
        (lambda: refactorise(torch.zeros(4, 9), torch.zeros(3, 4)), "rank 4"),
        (lambda: refactorise(torch.zeros(4, 3), torch.zeros(9, 4)), "rank 4"),
        (lambda: merge(torch.zeros(2, 2), Factors(a=torch.zeros(1, 3), b=torch.zeros(2, 1)), 1.0), "(2, 3)"),
    ],
)
def test_shapes_that_cannot_be_are_named(call, values):
    with pytest.raises(ShapeError) as caught:
        call()
    assert values in str(caught.value)
