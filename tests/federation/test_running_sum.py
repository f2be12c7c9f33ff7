"""The running sum is that of what is recalled, whoever answers, joins, leaves or is forgotten, however it is kept."""

from itertools import count

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fedlora.algebra.deltas import add, scale
from fedlora.algebra.mixing import RunningMix
from fedlora.federation.absorb import forget
from fedlora.federation.memory import StaleMemory
from fedlora.federation.plan import weights
from fedlora.values import FRAME, Member, RoundPlan

CLIENTS = 5
STEPS = st.one_of(
    st.lists(st.integers(0, CLIENTS - 1), min_size=1, max_size=3, unique=True),  # these answer
    st.sampled_from(["join", "leave", "forget"]),
)


class Server:
    """What a server does with its memory; replies in, checkpoints out."""

    def __init__(self, lab, path, kept, beta=0.5):
        self.lab, self.memory, self.method = lab, StaleMemory(path, kept), lab.method(beta=beta)
        self.state = lab.start(self.method, dtype=torch.float32)
        self.members = [Member(client=f"client-{n}", examples=10 * (n + 1)) for n in range(CLIENTS)]
        self.draw, self.names = torch.Generator().manual_seed(3), count()

    @property
    def weight(self):
        return weights(self.members, "examples")

    def step(self, what):
        if what == "join":
            self.members.append(Member(client=f"new-{next(self.names)}", examples=25))
            self.state = self.lab.admit(self.state, self.weight[self.members[-1].client])
        elif what in ("leave", "forget") and len(self.members) > 1:
            self.gone(self.members[len(self.members) // 2].client, what)
        elif isinstance(what, list):
            self.answered([self.members[n % len(self.members)].client for n in what])

    def gone(self, client, how):
        at = self.state.remembered.get(client)
        held = None if at is None else self.memory.recall(client, at)
        self.state = forget(self.state, client, held, self.weight[client])
        self.members = [member for member in self.members if member.client != client]
        if how == "forget":
            self.memory.forget(client)

    def answered(self, clients):
        planned = RoundPlan(
            run="run",
            round=self.state.round + 1,
            cohort=tuple(sorted(set(clients))),
            probability=dict.fromkeys(self.weight, 0.5),
            weight=self.weight,
        )
        replies = [
            self.lab.update(client, planned, self.lab.delta(self.state, self.draw))
            for client in planned.cohort
        ]
        federation = self.lab.federation()
        self.state = self.lab.absorb(
            self.state, planned, replies, memory=self.memory, method=self.method, federation=federation
        ).state
        self.memory.commit()
        self.memory.prune(2)

    def check(self):
        total = scale(self.state.memory, 0.0)
        for client, at in self.state.remembered.items():
            own = self.state.own[client].beta if self.state.own else 1.0
            total = add(total, self.memory.recall(client, at), own * self.weight[client])
        for found, wanted in zip(_tensors(self.state.memory), _tensors(total), strict=True):
            # Some tens of float64 sums, each scaled by 1 / (1 - weight) a few times.
            assert_close(found, wanted, rtol=0, atol=1e-12)


def _tensors(delta):
    return [*delta.sites.values(), *delta.head.values()]


@pytest.mark.parametrize(
    ("kept", "beta"),
    [("float32", 0.5), ("bfloat16", 0.5), ("int8", 0.5), ("float32", "adaptive-by-client")],
)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=12))
def test_the_sum_is_that_of_weight_times_what_is_recalled_after_any_history(
    lab, tmp_path_factory, kept, beta, steps
):
    server = Server(lab, tmp_path_factory.mktemp("memory") / "memory.sqlite", kept, beta)
    for what in steps:
        server.step(what)
        server.check()


@pytest.mark.parametrize("kept", ["bfloat16", "int8"])
def test_a_sum_of_what_was_sent_is_not_that_of_what_is_kept(lab, tmp_path, kept):
    """Which is why `keep` tells what will be recalled."""
    server = Server(lab, tmp_path / "memory.sqlite", kept)
    real = server.memory.keep
    server.memory.keep = lambda client, at, update: (real(client, at, update), update)[1]
    server.step([0, 1])
    with pytest.raises(AssertionError, match="not close"):
        server.check()


def test_ten_thousand_replacements_leave_the_sum_where_it_was(lab):
    draw = torch.Generator().manual_seed(1)
    state = lab.start(lab.method(beta=0.5), dtype=torch.float32)
    memory, held = state.memory, {}
    for number in range(10_000):
        client, new = number % 10, lab.delta(state, draw, FRAME)
        mix = RunningMix(memory, {})
        mix.replace(new, held.get(client), factor=0.1, weight=0.1)
        memory, held[client] = mix.memory(), new
    for delta in held.values():
        memory = add(memory, delta, -0.1)
    # 20,000 sums of numbers near 1, each off by an eps of 2e-16 at most.
    assert max(float(tensor.abs().max()) for tensor in _tensors(memory)) < 20_000 * 2.3e-16
