"""What the server's optimisers make of mixed updates: their own rules, whatever the basis, through every round."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from fedlora.algebra.deltas import into_frame, scale
from fedlora.config import schema
from fedlora.federation.absorb import forget
from fedlora.federation.plan import plan
from fedlora.federation.remembered import Remembered
from fedlora.federation.store import Store, state_digest
from fedlora.methods.server import Momentum, Sgd, server_optimizer
from fedlora.values import FRAME, Delta

ROUNDS = 6
SERVERS = {
    "sgd": {"name": "sgd", "lr": 0.7},
    "momentum": {"name": "momentum", "lr": 0.5, "momentum": 0.8},
    "adam": {"name": "adam", "lr": 0.1, "beta_1": 0.9, "beta_2": 0.95, "tau": 0.05},
}


def in_basis(delta, state):
    """The same change of the model, in coordinates of the state's basis."""
    gauge = state.gauges[-1].sites
    dtype = state.adapters.head["weight"].dtype
    sites = {
        site: (value @ torch.linalg.inv(gauge[site].double())).to(dtype)
        for site, value in delta.sites.items()
    }
    head = {name: value.to(dtype) for name, value in delta.head.items()}
    return Delta(basis=state.adapters.basis, sites=sites, head=head)


def moves(lab, federation):
    """A round's update of the only client, in the frame; drawn from one first state, whatever the method."""
    draw, like = torch.Generator().manual_seed(5), lab.start(lab.method("ffa"))
    return [lab.delta(like, draw, FRAME) for _ in range(federation.rounds)]


def ran(lab, method, server, *, store=None, dtype=torch.float64):
    """The state after each round in which one client sends what `moves` says."""
    federation = lab.federation(rounds=ROUNDS, cohort=1, server=server)
    state = lab.start(method, dtype=dtype)
    for told in moves(lab, federation):
        if store is not None and not store.is_empty():
            state = store.load()[0]
        planned = plan(state, lab.members(1), run="run", federation=federation, seed=7)
        absorbed = lab.absorb(
            state, planned, [lab.update("client-0", planned, in_basis(told, state))],
            memory=Remembered(), method=method, federation=federation,
        )  # fmt: skip
        state = absorbed.state
        if store is not None:
            store.checkpoints.mkdir(exist_ok=True)
            store.commit(absorbed, {"round": state.round})
        yield state


def theirs(name, pseudo_gradients):
    """The paths of torch's own optimiser on one number array, from zero."""
    point = torch.nn.Parameter(torch.zeros_like(pseudo_gradients[0]))
    words = SERVERS[name]
    momentum = words.get("momentum", 0.0)
    optimizer = torch.optim.SGD([point], lr=words["lr"], momentum=momentum)
    for moved in pseudo_gradients:
        point.grad = -moved
        optimizer.step()
        yield point.detach().clone()


@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_sgd_and_momentum_are_torchs_on_the_frames_coordinates(lab, name):
    told = moves(lab, lab.federation(rounds=ROUNDS))
    for site in lab.shapes:
        states = ran(lab, lab.method("fedsvd"), SERVERS[name])
        for state, point in zip(states, theirs(name, [one.sites[site] for one in told]), strict=True):
            assert_close(lab.products(state)[site], point @ state.frame[site], rtol=1e-10, atol=1e-10)


def test_adam_is_the_papers_rule_on_the_frames_coordinates(lab):
    words = SERVERS["adam"]
    told = moves(lab, lab.federation(rounds=ROUNDS))
    for name in ("x", "weight"):
        steps = [one.sites[name] if name in one.sites else one.head[name] for one in told]
        m, v, point = 0.0, words["tau"] ** 2, 0.0
        for state, step in zip(ran(lab, lab.method("fedsvd"), words), steps, strict=True):
            m = words["beta_1"] * m + (1 - words["beta_1"]) * step
            v = words["beta_2"] * v + (1 - words["beta_2"]) * step**2
            point = point + words["lr"] * m / (v**0.5 + words["tau"])
            product = point @ state.frame[name] if name in state.frame else point
            assert_close(lab.products(state)[name], product, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("server", sorted(SERVERS))
@pytest.mark.parametrize("refactor_every", [1, 3])
def test_with_refactorisation_the_model_is_ffa_orthonormals(lab, server, refactor_every):
    """Bases turn, the model does not notice; coordinates do."""
    turned = ran(lab, lab.method("fedsvd", refactor_every=refactor_every), SERVERS[server])
    frozen = ran(lab, lab.method("ffa"), SERVERS[server])
    for one, other in zip(turned, frozen, strict=True):
        for name, product in lab.products(one).items():
            assert_close(product, lab.products(other)[name], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(one.adapters.sites["x"].b, other.adapters.sites["x"].b, atol=1e-2)


def test_an_adam_that_took_bs_own_coordinates_would_notice(lab):
    """The break: squares do not turn with the basis."""
    state = list(ran(lab, lab.method("fedsvd"), SERVERS["adam"]))[1]
    adam = server_optimizer(lab.federation(server=SERVERS["adam"]).server)
    told = lab.delta(state, torch.Generator().manual_seed(1))
    gauges = state.gauges[-1]
    right, _ = adam.step(told, (), gauges)
    identity = replace(gauges, sites={site: torch.eye(3, dtype=torch.float64) for site in gauges.sites})
    wrong, _ = adam.step(told, (), identity)
    assert float((right.sites["x"] - wrong.sites["x"]).norm() / right.sites["x"].norm()) > 0.05


def test_momentum_0_is_sgd_to_the_bit_and_sgd_at_1_leaves_every_bit(lab):
    for dtype in (torch.float32, torch.float64):
        plain, none = (
            [state_digest(state) for state in ran(lab, lab.method("fedsvd"), server, dtype=dtype)]
            for server in ({"name": "sgd", "lr": 0.7}, {"name": "momentum", "lr": 0.7, "momentum": 0.0})
        )
        assert plain == none
    state = lab.start(lab.method())
    told = lab.delta(state, torch.Generator().manual_seed(1))
    moved, _ = Sgd(lr=1.0).step(told, (), state.gauges[-1])
    assert all(torch.equal(moved.sites[site], told.sites[site]) for site in lab.shapes)


def test_momentum_goes_on_where_nobody_answers(lab):
    state = lab.start(lab.method("ffa"))
    told = lab.delta(state, torch.Generator().manual_seed(1))
    rule = Momentum(lr=1.0, momentum=0.5)
    _, moments = rule.step(told, (), state.gauges[-1])
    moved, after = rule.step(scale(told, 0.0), moments, state.gauges[-1])
    framed = into_frame(told, state.gauges[-1])
    for site in lab.shapes:
        assert_close(moved.sites[site], 0.5 * told.sites[site])
        assert_close(after[0].sites[site], 0.5 * framed.sites[site])


@pytest.mark.parametrize("server", sorted(SERVERS))
def test_a_stop_after_every_round_changes_no_bit(lab, tmp_path, server):
    method = lab.method("fedsvd")
    whole = [state_digest(state) for state in ran(lab, method, SERVERS[server], dtype=torch.float32)]
    stopped = ran(lab, method, SERVERS[server], dtype=torch.float32, store=Store(tmp_path))
    assert [state_digest(state) for state in stopped] == whole


@pytest.mark.parametrize("server", ["momentum", "adam"])
def test_once_a_client_is_forgotten_the_server_begins_anew(lab, server):
    *_, last = ran(lab, lab.method("fedsvd"), SERVERS[server])
    assert last.moments
    assert forget(last, "client-0", None, 1.0).moments == ()


def test_every_server_of_the_schema_is_built():
    for words in itertools.chain(SERVERS.values(), [{"name": "sgd"}]):
        federation = schema.Federation.model_validate(
            {
                "rounds": 1,
                "cohort": 1,
                "local_steps": 1,
                "batch_size": 1,
                "optimizer": {"name": "sgd", "lr": 1.0},
                "server": words,
            }
        )
        built = server_optimizer(federation.server)
        assert all(getattr(built, key) == value for key, value in words.items() if key != "name")
