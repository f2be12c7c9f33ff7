"""Nodes to be killed, cut off and starved: one model is loaded for all of them."""

from itertools import count

import pytest

from fedlora.deploy.node import DeployedNode
from fedlora.privacy.budget import Budget, would_exceed
from fedlora.training.client import participation
from tests.deploy.nodes import first_request, node_config
from tests.faults.kills import PARTICIPATIONS, Site


@pytest.fixture(scope="session")
def new_site(tiny_encoder, topic_files, tmp_path_factory):
    """Makes sites that share one loaded model; called, it gives a site that was never asked."""
    folder = tmp_path_factory.mktemp("sites")
    config = node_config(folder, tiny_encoder, topic_files[0], PARTICIPATIONS)
    request, loaded, numbers = first_request(config), DeployedNode(config), count()
    sampling, mechanism = loaded._terms
    events = participation(mechanism, sampling, None, 2)
    for steps in (1, 2):
        assert not would_exceed(
            [events] * (steps - 1), events, Budget.of(config.budget)
        )  # remembered by forks
    assert len(loaded._examples) and loaded._fingerprint and loaded._model

    def build() -> Site:
        return Site(config, request, folder / f"site-{next(numbers)}", loaded)

    return build
