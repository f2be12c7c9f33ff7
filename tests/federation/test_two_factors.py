"""Methods that train A and B, or leave their row space: what the server makes of a round, against the rule in full."""

import math
from dataclasses import replace

import pytest
import torch

from fedlora.config.method import (
    Fair,
    FedAsk,
    FedEx,
    FedIt,
    FedSa,
    FlexLora,
    FLora,
    Method,
    Periodic,
    RoLora,
    Switch,
)
from fedlora.federation.absorb import absorb
from fedlora.federation.gather import gather
from fedlora.federation.plan import Roll
from fedlora.federation.remembered import Remembered
from fedlora.federation.work import work
from fedlora.methods import build
from fedlora.values import Delta

BOTH = [
    FedIt(name="fedit"),
    FedEx(name="fedex"),
    FLora(name="flora"),
    FlexLora(name="flexlora"),
    Fair(name="lora-fair", penalty=0.05),
]
SCALE = 2.0  # lora_alpha 6 over rank 3


def clients_delta(state, side, draw) -> Delta:
    def like(tensor):
        return torch.randn(tensor.shape, generator=draw, dtype=torch.float64)

    sites = sorted(state.adapters.sites)
    return Delta(
        basis=state.adapters.basis,
        sites={} if side == "a" else {s: like(state.adapters.sites[s].b) for s in sites},
        a={} if side == "b" else {s: like(state.adapters.sites[s].a) for s in sites},
        head={name: like(value) for name, value in state.adapters.head.items()},
    )


def changes(state) -> dict[str, torch.Tensor]:
    """What each site adds to its weight."""
    found = {}
    for site, factors in state.adapters.sites.items():
        found[site] = SCALE * factors.b @ factors.a + (0 if factors.rest is None else factors.rest)
    return found


class Played:
    """Rounds of four clients of unequal weight, three of them asked, with their updates kept."""

    def __init__(self, lab, config: Method, init="orthonormal", **federation):
        self.method = build(config, lab.lora(init), 5)
        self.federation = lab.federation(**{"cohort": 3, "weighting": "examples", **federation})
        self.lab, self.draw = lab, torch.Generator().manual_seed(1)
        self.members = lab.members(4)
        self.state = lab.start(self.method)

    def round(self):
        """(state before, {client: (weight among participants, delta)}, state after)"""
        before = self.state
        plan = Roll.of(self.members, self.federation).plan(before.round + 1, run="r", seed=3)
        side = self.method.side(plan.round)
        deltas = {client: clients_delta(before, side, self.draw) for client in plan.cohort}
        replies = [self.lab.update(client, plan, delta) for client, delta in deltas.items()]
        heard = gather(
            before, plan, replies, memory=Remembered(), method=self.method, federation=self.federation
        )
        assert not heard.report.rejected
        self.state = absorb(before, heard, method=self.method, federation=self.federation).state
        total = sum(plan.weight[client] for client in deltas)
        return before, {c: (plan.weight[c] / total, delta) for c, delta in deltas.items()}, self.state


def rule(before, heard, site):
    """Of one site: mean of A, mean of B, mean of B A over clients, each client's product formed."""
    old = before.adapters.sites[site]
    pairs = [
        (weight, old.b + delta.sites.get(site, 0.0), old.a + delta.a.get(site, 0.0))
        for weight, delta in heard.values()
    ]
    mean_b, mean_a = sum(w * b for w, b, _ in pairs), sum(w * a for w, _, a in pairs)
    return mean_a, mean_b, sum(w * b @ a for w, b, a in pairs)


def close(x, y):
    return torch.allclose(x, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("init", ["orthonormal", "kaiming"])
@pytest.mark.parametrize("config", BOTH, ids=lambda config: config.name)
def test_three_rounds_follow_the_rule_written_out(lab, config, init):
    played = Played(lab, config, init)
    for _ in range(3):
        before, heard, after = played.round()
        weights = [weight for weight, _ in heard.values()]
        assert len(set(weights)) == 3 and sum(weights) == pytest.approx(1)
        for site, new in after.adapters.sites.items():
            a, b, product = rule(before, heard, site)
            rest = before.adapters.sites[site].rest
            rest = torch.zeros_like(product) if rest is None else rest
            match config.name:
                case "fedit":
                    assert close(new.a, a) and close(new.b, b) and new.rest is None
                case "fedex":
                    assert close(new.a, a) and close(new.b, b)
                    assert close(new.rest + SCALE * b @ a, rest + SCALE * product)
                case "flora":
                    assert not new.b.any() and close(new.rest, rest + SCALE * product)
                    assert not close(new.a, before.adapters.sites[site].a)
                case "flexlora":
                    u, s, v = torch.linalg.svd(product)
                    assert close(new.b @ new.a, u[:, :3] * s[:3] @ v[:3]) and new.rest is None
                    assert close(new.a @ new.a.T, torch.eye(3, dtype=torch.float64))
                case "lora-fair":
                    assert close(new.a, a) and new.rest is None
                    moved = (new.b - b).clone().requires_grad_()
                    cost = (product - (b + moved) @ a).square().sum() + 0.05 * moved.square().sum()
                    (slope,) = torch.autograd.grad(cost, moved)
                    assert slope.abs().max() < 1e-9 and (new.b - b).abs().max() > 1e-3
        mean_head = sum(weight * delta.head["weight"] for weight, delta in heard.values())
        assert close(after.adapters.head["weight"], before.adapters.head["weight"] + mean_head)


@pytest.mark.parametrize("config", BOTH, ids=lambda config: config.name)
def test_a_servers_rate_is_as_if_each_client_had_gone_that_share_of_its_way(lab, config):
    """Of methods that look at products: their changes shrink in both factors."""
    rate = 0.25
    slow = Played(lab, config, server={"name": "sgd", "lr": rate})
    _, heard, after = slow.round()
    short = {
        client: (
            weight,
            Delta(
                basis=delta.basis,
                sites={site: rate * value for site, value in delta.sites.items()},
                a={site: rate * value for site, value in delta.a.items()},
                head={name: rate * value for name, value in delta.head.items()},
            ),
        )
        for client, (weight, delta) in heard.items()
    }
    plain = Played(lab, config)
    plan = Roll.of(plain.members, plain.federation).plan(1, run="r", seed=3)
    replies = [lab.update(client, plan, delta) for client, (_, delta) in short.items()]
    told = gather(
        plain.state, plan, replies, memory=Remembered(), method=plain.method, federation=plain.federation
    )
    wanted = absorb(plain.state, told, method=plain.method, federation=plain.federation).state
    x, y = changes(after), changes(wanted)
    assert all(close(x[site], y[site]) for site in x)


@pytest.mark.parametrize("participation", ["normalised", "importance"])
def test_a_round_of_a_alone_needs_no_head(lab, participation):
    method = build(RoLora(name="rolora"), lab.lora(), 5)
    federation = lab.federation(cohort=2, participation=participation)
    members, draw = lab.members(2), torch.Generator().manual_seed(4)
    state = lab.start(method)
    state = replace(state, adapters=replace(state.adapters, head={}), memory=replace(state.memory, head={}))
    for _ in range(2):
        plan = Roll.of(members, federation).plan(state.round + 1, run="r", seed=3)
        delta = clients_delta(state, method.side(plan.round), draw)
        replies = [lab.update(member.client, plan, delta) for member in members]
        before = state
        heard = gather(state, plan, replies, memory=Remembered(), method=method, federation=federation)
        state = absorb(state, heard, method=method, federation=federation).state
    for site, factors in state.adapters.sites.items():
        assert close(factors.a, before.adapters.sites[site].a + delta.a[site])


def test_rolora_keeps_its_a_when_nobody_answered(lab):
    played = Played(lab, RoLora(name="rolora", refactor=True))
    first = played.state
    plan = Roll.of(played.members, played.federation).plan(1, run="r", seed=3)
    heard = gather(first, plan, [], memory=Remembered(), method=played.method, federation=played.federation)
    after = absorb(first, heard, method=played.method, federation=played.federation).state
    assert all(torch.equal(after.adapters.sites[s].a, f.a) for s, f in first.adapters.sites.items())


@pytest.mark.parametrize("cohort", [3, {"probability": 0.6}], ids=["three", "some"])
def test_fedsas_b_is_the_mean_of_all_clients_own_and_its_a_moves_by_the_mean_of_those_heard(lab, cohort):
    played = Played(lab, FedSa(name="fedsa"), cohort=cohort)
    share = {member.client: (index + 1) / 10 for index, member in enumerate(played.members)}
    own = {
        client: {site: torch.zeros_like(f.b) for site, f in played.state.adapters.sites.items()}
        for client in share
    }
    sizes = set()
    for _ in range(8):
        before, heard, after = played.round()
        sizes.add(len(heard))
        for client, (_, delta) in heard.items():
            own[client] = {site: b + delta.sites[site] for site, b in own[client].items()}
        for site, new in after.adapters.sites.items():
            assert close(new.b, sum(share[client] * own[client][site] for client in share))
            assert close(new.a, rule(before, heard, site)[0] if heard else before.adapters.sites[site].a)
            assert new.rest is None
        if heard:
            mean_head = sum(weight * delta.head["weight"] for weight, delta in heard.values())
            assert close(after.adapters.head["weight"], before.adapters.head["weight"] + mean_head)
    assert sizes == {3} if cohort == 3 else len(sizes) > 2


def test_fedsa_asks_each_client_to_go_on_from_its_own_b_and_no_other_method_does(lab):
    for config in (*BOTH, RoLora(name="rolora"), FedAsk(name="fedask"), FedSa(name="fedsa")):
        method = build(config, lab.lora(), 5)
        asked = work(1, lab.federation(), method)
        assert (asked.side, asked.own_b) == (method.side(1), config.name == "fedsa")


def test_the_mean_of_products_is_not_the_product_of_means(lab):
    before, heard, after = Played(lab, BOTH[0]).round()
    _, _, product = rule(before, heard, "x")
    assert (changes(after)["x"] - SCALE * product).abs().max() > 0.1


def test_exact_methods_end_in_one_model_after_a_round(lab):
    found = []
    for config in (FedEx(name="fedex"), FLora(name="flora")):
        _, _, after = Played(lab, config).round()
        found.append(changes(after))
    assert all(close(found[0][site], found[1][site]) for site in found[0])


@pytest.mark.parametrize(
    "config", [*BOTH, RoLora(name="rolora"), FedSa(name="fedsa")], ids=lambda config: config.name
)
def test_where_a_moves_a_new_frame_begins_and_an_update_of_the_old_one_cannot_count(lab, config):
    played = Played(lab, config)
    for _ in range(2):
        before, heard, after = played.round()
    assert after.adapters.basis > before.adapters.basis
    assert [gauges.basis for gauges in after.gauges] == [after.adapters.basis]
    assert not after.remembered and not any(value.any() for value in after.memory.sites.values())
    for site, frame in after.frame.items():
        a = after.adapters.sites[site].a
        assert close(a @ frame.T @ frame, a)  # it spans the rows that are there now
    plan = Roll.of(played.members, played.federation).plan(after.round + 1, run="r", seed=3)
    late = [played.lab.update(client, plan, delta) for client, (_, delta) in heard.items()]
    late = [type(one)(**{**vars_of(one), "round": after.round}) for one in late]
    told = gather(after, plan, late, memory=Remembered(), method=played.method, federation=played.federation)
    assert not told.heard and set(told.report.rejected) == set(heard)


def vars_of(update):
    return {name: getattr(update, name) for name in update.__dataclass_fields__}


@pytest.mark.parametrize("refactor", [False, True])
def test_rolora_moves_one_factor_in_turn_and_each_mean_is_exact(lab, refactor):
    played = Played(lab, RoLora(name="rolora", refactor=refactor))
    for number in range(1, 5):
        before, heard, after = played.round()
        for site, new in after.adapters.sites.items():
            _, _, product = rule(before, heard, site)
            assert close(new.b @ new.a, product)
            assert all((site in delta.sites) == bool(number % 2) for _, delta in heard.values())
            assert all((site in delta.a) == (number % 2 == 0) for _, delta in heard.values())
            if refactor:
                frozen = new.b.T if number % 2 else new.a  # the next round trains the other
                assert close(frozen @ frozen.T, torch.eye(3, dtype=torch.float64))
            elif number % 2:
                assert torch.equal(new.a, before.adapters.sites[site].a)
            else:
                assert torch.equal(new.b, before.adapters.sites[site].b)


def test_fedask_shares_the_singular_values_and_keeps_product_and_row_space(lab):
    played = Played(lab, FedAsk(name="fedask"))
    for _ in range(3):
        before, heard, after = played.round()
        for site, new in after.adapters.sites.items():
            _, _, product = rule(before, heard, site)
            assert close(new.b @ new.a, product)
            values = torch.diag(torch.linalg.svdvals(product)[:3])
            assert close(new.b.T @ new.b, values) and close(new.a @ new.a.T, values)
            frame = before.frame[site]
            assert close(new.a @ frame.T @ frame, new.a) and torch.equal(frame, after.frame[site])
    assert len(after.gauges) > 1


def test_fedasks_row_space_survives_a_product_that_lost_a_direction(lab):
    played = Played(lab, FedAsk(name="fedask"))
    b = torch.zeros(7, 3, dtype=torch.float64)
    b[:, 0] = 1.0
    thin = dict(played.state.adapters.sites)
    thin["x"] = type(thin["x"])(a=thin["x"].a, b=b)
    adapters = type(played.state.adapters)(basis=0, scale=SCALE, sites=thin, head=played.state.adapters.head)
    moved = played.method.subspace.move(adapters, 1)
    assert close(moved.sites["x"].b @ moved.sites["x"].a, b @ thin["x"].a)
    assert torch.linalg.matrix_rank(moved.sites["x"].a) == 3
    assert torch.equal(moved.sites["y"].b, thin["y"].b)  # a product of zero has nothing to share


@pytest.mark.parametrize("init", ["orthonormal", "kaiming"])
def test_periodic_unloads_keeps_the_model_and_goes_elsewhere(lab, init):
    played = Played(lab, Periodic(name="periodic", restart_every=2), init)
    for number in range(1, 5):
        before, heard, after = played.round()
        for site, new in after.adapters.sites.items():
            _, _, product = rule(before, heard, site)
            kept = before.adapters.sites[site].rest
            assert close(changes(after)[site], SCALE * product + (0 if kept is None else kept))
            old = before.adapters.sites[site].a
            if number % 2:
                assert torch.equal(new.a, old) and torch.equal(after.frame[site], before.frame[site])
                continue
            assert not new.b.any() and new.a.shape == old.shape
            assert torch.linalg.matrix_rank(torch.cat([new.a, old])) == 6
            if init == "orthonormal":
                assert close(new.a @ new.a.T, torch.eye(3, dtype=torch.float64))
            else:
                assert new.a.abs().max() <= 1 / math.sqrt(new.a.shape[1])


def test_two_restarts_of_a_run_draw_other_directions_and_another_seed_others_again(lab):
    played = Played(lab, Periodic(name="periodic", restart_every=1))
    first, second = played.round()[2], played.round()[2]
    other = build(Periodic(name="periodic", restart_every=1), lab.lora(), 6)
    again = other.subspace.move(lab.start(other).adapters, 1)
    drawn = [state.adapters.sites["x"].a for state in (first, second)] + [again.sites["x"].a]
    assert all(not close(x, y) for n, x in enumerate(drawn) for y in drawn[:n])


def test_switch_changes_its_weakest_rows_only(lab):
    played = Played(lab, Switch(name="switch", restart_every=1, rows=1))
    for _ in range(3):
        before, heard, after = played.round()
        for site, new in after.adapters.sites.items():
            _, _, product = rule(before, heard, site)
            kept = before.adapters.sites[site].rest
            assert close(changes(after)[site], SCALE * product + (0 if kept is None else kept))
            u, s, v = torch.linalg.svd(product)
            assert close(new.b @ new.a, u[:, :2] * s[:2] @ v[:2])  # the two strongest stay
            assert not new.b[:, 2].any()
            assert close(new.a @ new.a.T, torch.eye(3, dtype=torch.float64))
            old = before.adapters.sites[site].a
            assert torch.linalg.matrix_rank(torch.cat([new.a, old])) == 4


def test_an_update_that_lacks_its_a_or_brings_one_unasked_is_rejected(lab):
    for config, stray in ((FedIt(name="fedit"), "b"), (RoLora(name="rolora"), "both")):
        played = Played(lab, config)
        plan = Roll.of(played.members, played.federation).plan(1, run="r", seed=3)
        delta = clients_delta(played.state, stray, played.draw)
        told = gather(
            played.state, plan, [lab.update(plan.cohort[0], plan, delta)],
            memory=Remembered(), method=played.method, federation=played.federation,
        )  # fmt: skip
        assert not told.heard and plan.cohort[0] in told.report.rejected


def test_a_wild_number_in_a_is_rejected(lab):
    played = Played(lab, FedIt(name="fedit"))
    plan = Roll.of(played.members, played.federation).plan(1, run="r", seed=3)
    delta = clients_delta(played.state, "both", played.draw)
    delta.a["y"][0, 0] = float("nan")
    told = gather(
        played.state, plan, [lab.update(plan.cohort[0], plan, delta)],
        memory=Remembered(), method=played.method, federation=played.federation,
    )  # fmt: skip
    assert "not finite" in told.report.rejected[plan.cohort[0]]


@pytest.mark.parametrize("config", BOTH, ids=lambda config: config.name)
def test_a_round_in_which_nobody_answers_leaves_the_model_as_it_was(lab, config):
    played = Played(lab, config)
    played.round()
    before = played.state
    plan = Roll.of(played.members, played.federation).plan(2, run="r", seed=3)
    heard = gather(before, plan, [], memory=Remembered(), method=played.method, federation=played.federation)
    after = absorb(before, heard, method=played.method, federation=played.federation).state
    x, y = changes(before), changes(after)
    assert all(close(x[site], y[site]) for site in x)
