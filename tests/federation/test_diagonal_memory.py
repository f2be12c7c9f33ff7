"""Singular values lie in a frame of their own: nothing that is remembered, mixed or late mixes one with another."""

import pytest
import torch

from fedlora.algebra.deltas import from_frame, into_frame
from fedlora.config.method import FedSb, Stale, SvFit
from fedlora.config.schema import Lora
from fedlora.federation.absorb import start
from fedlora.federation.plan import plan
from fedlora.federation.remembered import Remembered
from fedlora.methods import build
from fedlora.methods.subspace import Public
from fedlora.values import Delta

RANK = 3
SHAPES = {"x": (7, 9), "y": (5, 6)}


def frames():
    """Directions whose orthonormality is float32's, as a run's are."""
    draw = torch.Generator().manual_seed(1)

    def rows(size):
        return torch.linalg.qr(torch.randn(size, RANK, generator=draw, dtype=torch.float64)).Q.T

    return {
        s: Public(weight_rows=rows(d_in), weight_columns=rows(d_out)) for s, (d_out, d_in) in SHAPES.items()
    }


def begun(method, trains):
    lora = Lora(r=RANK, lora_alpha=RANK, target_modules=["query"], init="principal", trains=trains)
    built = build(method, lora, 7)
    state = start(
        SHAPES, head={"weight": torch.zeros(2, 4)}, lora_cfg=lora, method=built, dtype=torch.float32,
        public=frames(),
    )  # fmt: skip
    return built, state


def drawn(state, draw):
    shapes = {site: factors.b.shape for site, factors in state.adapters.sites.items()}
    return Delta(
        basis=0,
        sites={site: torch.randn(shape, generator=draw) for site, shape in shapes.items()},
        head={"weight": torch.randn(2, 4, generator=draw)},
    )


def test_an_update_comes_back_from_the_frame_bit_for_bit():
    _, state = begun(SvFit(name="svfit"), "singular-values")
    update = drawn(state, torch.Generator().manual_seed(2))
    (gauges,) = state.gauges
    kept = into_frame(update, gauges)
    for site, value in update.sites.items():
        assert value.shape == (1, RANK)
        assert torch.equal(kept.sites[site], value)
        assert torch.equal(from_frame(kept, gauges).sites[site], value)
    _, square = begun(FedSb(name="fedsb"), "core")  # a core's rows may turn, by what rounding leaves
    assert not torch.equal(square.gauges[0].sites["x"], torch.eye(RANK))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_round_moves_singular_values_as_it_moves_the_diagonal_of_cores(lab, beta):
    stale = Stale(beta=beta)
    small = begun(SvFit(name="svfit", stale=stale), "singular-values")
    square = begun(FedSb(name="fedsb", stale=stale), "core")
    federation, ends = lab.federation(cohort=2, server={"name": "momentum", "lr": 0.7}), []
    for method, state in (small, square):
        draw, memory = torch.Generator().manual_seed(3), Remembered()
        for _ in range(4):
            planned = plan(state, lab.members(4), run="run", federation=federation, seed=7)
            replies = []
            for client in planned.cohort:
                update = drawn(small[1], draw)
                if method.trains == "core":
                    sites = {site: torch.diag(value[0]) for site, value in update.sites.items()}
                    update = Delta(basis=0, sites=sites, head=update.head)
                replies.append(lab.update(client, planned, update))
            state = lab.absorb(
                state, planned, replies, memory=memory, method=method, federation=federation
            ).state
        ends.append(state)
    for site in SHAPES:
        values, core = (state.adapters.sites[site].b for state in ends)
        assert float(values.abs().min()) > 0.01
        torch.testing.assert_close(values[0], core.diagonal(), rtol=1e-5, atol=1e-5)
