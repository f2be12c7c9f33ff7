"""Which kind of YAML a file is: a run's or a data owner's."""

from collections.abc import Sequence
from pathlib import Path

from fedlora.config.load import origins_of
from fedlora.config.node import NodeConfig
from fedlora.config.schema import RunConfig


def is_node(path: Path | str, overrides: Sequence[str] = ()) -> bool:
    """Whether more of its keys are those of a node.yaml than those of a run.yaml.

    Raises:
        ConfigError: it cannot be read, or is no YAML.
    """
    written = {key[0] for key in origins_of(path, overrides) if key}
    nodes, runs = set(NodeConfig.model_fields), set(RunConfig.model_fields)
    return len(written & (nodes - runs)) > len(written & (runs - nodes))
