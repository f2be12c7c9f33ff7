"""A data owner's node that was never asked, the first thing a server asks of it, and processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlora.config.node import NodeConfig
from fedlora.values import TrainRequest
from tests.deploy.nodes import first_request, node_config
from tests.deploy.processes import Processes


@pytest.fixture
def config(tmp_path, tiny_encoder, topic_files) -> NodeConfig:
    return node_config(tmp_path, tiny_encoder, topic_files[0])


@pytest.fixture
def request_one(config) -> TrainRequest:
    return first_request(config)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    found = Processes(tmp_path)
    yield found
    found.stop()
