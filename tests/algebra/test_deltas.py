"""Deltas: vectors within a basis, carried exactly between a basis and the frame."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fedlora.algebra.deltas import add, applied, from_frame, into_frame, joint_norm, scale, zeros_like
from fedlora.algebra.factors import orthonormalise, refactorise
from fedlora.errors import BasisError, ShapeError
from fedlora.values import FRAME, Adapters, Delta, Factors, Gauges

LAWS = settings(derandomize=True, max_examples=40, deadline=None)


@st.composite
def carried(draw):
    """(adapters, delta, frame, gauges) of two sites and a head, in a basis of random, not orthonormal, A."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    r = draw(st.integers(1, 4))

    def gaussian(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # L = identity + strictly lower: never close to singular, never a rotation.
    frame = {site: orthonormalise(gaussian(r, 7)).q for site in ("x", "y")}
    mixing = {site: torch.eye(r, dtype=torch.float64) + gaussian(r, r).tril(-1) for site in frame}
    sites = {site: Factors(a=mixing[site] @ frame[site], b=gaussian(5, r)) for site in frame}
    head = {"weight": gaussian(3, 5)}
    adapters = Adapters(basis=4, scale=1.0, sites=sites, head=head)
    delta = Delta(basis=4, sites={site: gaussian(5, r) for site in frame}, head={"weight": gaussian(3, 5)})
    return adapters, delta, frame, Gauges(basis=4, sites=mixing)


@LAWS
@given(carried())
def test_the_frame_is_only_a_way_to_write_it(case):
    adapters, delta, frame, gauges = case
    inside = into_frame(delta, gauges)
    assert inside.basis == FRAME
    for site in frame:
        assert_close(inside.sites[site] @ frame[site], delta.sites[site] @ adapters.sites[site].a)
    back = from_frame(inside, gauges)
    assert back.basis == 4
    for site in frame:
        assert_close(back.sites[site], delta.sites[site], rtol=1e-9, atol=1e-9)
    assert torch.equal(back.head["weight"], delta.head["weight"])


@LAWS
@given(carried())
def test_a_transpose_would_not_do_where_a_gauge_is_no_rotation(case):
    _, delta, _, gauges = case
    inside = into_frame(delta, gauges)
    naive = {site: inside.sites[site] @ gauges.sites[site].T for site in gauges.sites}
    if any(gauge.shape[0] > 1 for gauge in gauges.sites.values()):
        assert any(not torch.allclose(naive[site], delta.sites[site]) for site in naive)


def test_rebasing_through_the_frame_is_the_gauge_of_the_refactorisation():
    generator = torch.Generator().manual_seed(0)
    a, b, old = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 9), (6, 3), (6, 3))
    )
    frame, new = orthonormalise(a).q, refactorise(a, b)
    before = Gauges(basis=0, sites={"x": a @ frame.T})
    after = Gauges(basis=1, sites={"x": new.a @ frame.T})
    rebased = from_frame(into_frame(Delta(basis=0, sites={"x": old}), before), after)
    assert_close(rebased.sites["x"], old @ new.gauge)


@LAWS
@given(carried(), st.floats(-3, 3))
def test_deltas_are_vectors(case, c):
    adapters, delta, _, gauges = case
    zero = zeros_like(adapters)
    assert_same(add(zero, delta), delta)
    assert_same(add(delta, delta, -1.0), zero)
    assert_same(add(zero, delta, c), scale(delta, c))
    assert_same(into_frame(scale(delta, c), gauges), scale(into_frame(delta, gauges), c))
    assert math.isclose(joint_norm(scale(delta, c)), abs(c) * joint_norm(delta), rel_tol=1e-12, abs_tol=1e-12)


def assert_same(x, y):
    assert x.basis == y.basis
    assert_close(dict(x.sites), dict(y.sites))
    assert_close(dict(x.head), dict(y.head))


def test_the_norm_is_joint_over_sites_and_head():
    delta = Delta(
        basis=0,
        sites={"x": torch.full((2, 2), 1.0), "y": torch.full((1, 3), 2.0)},
        head={"bias": torch.tensor([3.0])},
    )
    assert joint_norm(delta) == 5.0  # 4 * 1 + 3 * 4 + 9 = 25


def test_applied_moves_b_and_head_and_nothing_else():
    a, b = torch.ones(1, 2), torch.ones(3, 1)
    adapters = Adapters(basis=2, scale=0.5, sites={"x": Factors(a=a, b=b)}, head={"bias": torch.ones(2)})
    moved = applied(adapters, Delta(basis=2, sites={"x": 2 * torch.ones(3, 1)}, head={"bias": torch.ones(2)}))
    assert torch.equal(moved.sites["x"].b, torch.full((3, 1), 3.0))
    assert torch.equal(moved.head["bias"], torch.full((2,), 2.0))
    assert moved.sites["x"].a is a
    assert (moved.basis, moved.scale) == (2, 0.5)
    assert torch.equal(b, torch.ones(3, 1))  # frozen values stay as they were


def test_bases_do_not_mix():
    one = Delta(basis=1, sites={"x": torch.ones(2, 2)})
    two = Delta(basis=2, sites={"x": torch.ones(2, 2)})
    gauges = Gauges(basis=2, sites={"x": torch.eye(2)})
    adapters = Adapters(basis=2, scale=1.0, sites={"x": Factors(a=torch.ones(2, 3), b=torch.ones(2, 2))})
    for call in (
        lambda: add(one, two),
        lambda: into_frame(one, gauges),
        lambda: from_frame(one, gauges),
        lambda: applied(adapters, one),
    ):
        with pytest.raises(BasisError, match="1"):
            call()


def test_other_names_or_shapes_do_not_add():
    x = Delta(basis=1, sites={"x": torch.ones(2, 2)})
    with pytest.raises(ShapeError, match="'y'"):
        add(x, Delta(basis=1, sites={"x": torch.ones(2, 2), "y": torch.ones(2, 2)}))
    with pytest.raises(ShapeError, match=r"\(2, 1\)"):
        add(x, Delta(basis=1, sites={"x": torch.ones(2, 1)}))  # torch would broadcast
    with pytest.raises(ShapeError, match="'x'"):
        into_frame(x, Gauges(basis=1, sites={}))
