"""A delta and its flat vector are the same numbers."""

import pytest
import torch

from fedlora.algebra.deltas import trainable
from fedlora.algebra.flat import Layout
from fedlora.errors import ShapeError
from fedlora.values import Adapters, Delta, Factors


def delta() -> Delta:
    return Delta(
        basis=3,
        sites={"y": torch.randn(4, 2), "x": torch.randn(3, 2)},
        head={"head.weight": torch.randn(2, 5), "head.bias": torch.randn(2)},
    )


def test_there_and_back_is_the_same_delta_in_whatever_order_its_tensors_were_listed():
    one = delta()
    turned = Delta(basis=3, sites=dict(reversed(one.sites.items())), head=dict(reversed(one.head.items())))
    layout = Layout.of(one)
    assert layout == Layout.of(turned) and layout.numbers == 26
    assert torch.equal(layout.flat(one), layout.flat(turned))
    back = layout.delta_of(layout.flat(one), basis=3)
    assert back.basis == 3
    assert all(torch.equal(back.sites[site], one.sites[site]) for site in one.sites)
    assert all(torch.equal(back.head[name], one.head[name]) for name in one.head)


def test_what_adapters_train_has_the_layout_of_what_adds_to_it():
    one = delta()
    sites = {site: Factors(a=torch.randn(2, 7), b=b) for site, b in one.sites.items()}
    adapters = Adapters(basis=0, scale=1.0, sites=sites, head=one.head)
    assert Layout.of(trainable(adapters)) == Layout.of(one)
    both = Layout.of(trainable(adapters, "both"))
    assert both.numbers == Layout.of(one).numbers + len(sites) * 14
    assert Layout.of(trainable(adapters, "a")).numbers == both.numbers - sum(
        b.numel() for b in one.sites.values()
    )


def test_a_delta_of_a_and_b_comes_back_from_its_row():
    a = {"x": torch.arange(6.0).view(2, 3), "y": torch.ones(2, 3)}
    one = Delta(
        basis=3, sites={"x": torch.randn(4, 2), "y": torch.randn(4, 2)}, head={"w": torch.ones(2)}, a=a
    )
    layout = Layout.of(one)
    back = layout.delta_of(layout.flat(one).clone(), 3)
    assert torch.equal(back.a["x"], a["x"]) and torch.equal(back.sites["y"], one.sites["y"])
    with pytest.raises(ShapeError, match="A of 2"):
        layout.flat(Delta(basis=3, sites=one.sites, head=one.head))


def test_what_lies_in_one_row_is_not_copied_and_what_does_not_is():
    one = delta()
    layout = Layout.of(one)
    row = layout.flat(one)
    assert layout.flat(layout.delta_of(row, 3)).data_ptr() == row.data_ptr()
    matrix = torch.randn(2, layout.numbers)
    assert torch.equal(layout.flat(layout.delta_of(matrix[1], 3)), matrix[1])
    views = layout.delta_of(row, 3)
    swapped = Delta(basis=3, sites=views.sites, head={**views.head, "head.bias": torch.ones(2)})
    assert layout.flat(swapped).tolist() != row.tolist()
    assert layout.flat(swapped)[layout.numbers - 12 :][:2].tolist() == [1.0, 1.0]


def test_a_delta_is_written_into_its_row_and_into_no_other():
    one = delta()
    layout = Layout.of(one)
    rows = torch.zeros(3, layout.numbers)
    layout.write(one, rows[1])
    assert torch.equal(rows[1], layout.flat(one))
    assert not rows[0].any() and not rows[2].any()
    with pytest.raises(ShapeError, match="1 sites"):
        layout.write(Delta(basis=3, sites={"x": torch.zeros(3, 2)}), rows[0])


def test_another_shape_is_refused():
    layout = Layout.of(delta())
    with pytest.raises(ShapeError, match="25"):
        layout.delta_of(torch.zeros(25), 3)
    other = Delta(basis=3, sites={"x": torch.zeros(3, 2)})
    with pytest.raises(ShapeError, match="1 sites"):
        layout.flat(other)


def test_neighbours_in_memory_that_are_no_row_are_copied():
    one = delta()
    layout = Layout.of(one)
    views = layout.delta_of(layout.flat(one), 3)
    turned = Delta(
        basis=3, sites={**views.sites, "x": views.sites["x"].t().contiguous().t()}, head=views.head
    )
    assert not turned.sites["x"].is_contiguous()
    assert torch.equal(layout.flat(turned), layout.flat(one))
    bits = layout.delta_of(layout.flat(one).view(torch.int32), 3)
    mixed = Delta(basis=3, sites={"x": bits.sites["x"], "y": views.sites["y"]}, head=views.head)
    assert torch.equal(layout.flat(mixed)[:6], bits.sites["x"].flatten().float())


def test_missing_and_added_names_are_refused():
    one = delta()
    for changed in (
        Delta(basis=3, sites={"x": one.sites["x"], "z": one.sites["y"]}, head=one.head),
        Delta(basis=3, sites=one.sites, head={**one.head, "more": torch.zeros(1)}),
        Delta(basis=3, sites={**one.sites, "x": torch.zeros(2, 3)}, head=one.head),
    ):
        with pytest.raises(ShapeError):
            Layout.of(one).flat(changed)
