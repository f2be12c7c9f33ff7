"""What the commands for data owners are tried on."""

from pathlib import Path

import pytest

from tests.deploy.node_text import node_text


@pytest.fixture
def node(tmp_path: Path, tiny_encoder: Path, topic_files: tuple[Path, Path]) -> Path:
    """A node.yaml that declares 400 records, of which there are 360."""
    path = tmp_path / "node.yaml"
    path.write_text(node_text(tmp_path, tiny_encoder, topic_files[0], records=400))
    return path
