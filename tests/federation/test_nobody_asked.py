"""A round in which nobody was asked leaves the model where it is, as `absorb` says where beta is 0."""

import pytest
import torch

from fedlora.federation.plan import plan
from fedlora.values import RoundPlan


@pytest.mark.parametrize(
    ("server", "more"),
    [
        ({"name": "sgd"}, {}),
        ({"name": "momentum", "lr": 0.1}, {}),
        ({"name": "adam", "lr": 0.1}, {}),
        ({"name": "sgd"}, {"soft_threshold": 0.05}),
    ],
)
def test_a_round_without_a_cohort_moves_nothing(lab, server, more):
    method, federation = lab.method("fedsvd", **more), lab.federation(server=server)
    state, draw = lab.start(method), torch.Generator().manual_seed(1)
    planned = plan(state, lab.members(2), run="run", federation=federation, seed=7)
    replies = [lab.update(client, planned, lab.delta(state, draw)) for client in planned.cohort]
    state = lab.absorb(state, planned, replies, method=method, federation=federation).state
    empty = RoundPlan(run="run", round=2, cohort=(), probability=planned.probability, weight=planned.weight)
    after = lab.absorb(state, empty, [], method=method, federation=federation).state
    for name, product in lab.products(state).items():
        assert torch.allclose(lab.products(after)[name], product, rtol=0, atol=1e-9)
