"""What an adapter's section can say, and what it cannot say together with the rest."""

import pytest

from fedlora.config.load import config_digest
from fedlora.config.ranks import largest_rank, rank_of
from fedlora.errors import ConfigError


def test_keys_that_came_later_leave_older_runs_what_they_were(tiny_config):
    later = {"lora__rank_pattern": None, "lora__from_adapter": None, "export_every": None}
    assert config_digest(tiny_config(**later)) == config_digest(tiny_config())
    changed = [
        {"lora__rank_pattern": {"query": 1}},
        {"lora__from_adapter": "x"},
        {"lora__target_modules": "all-linear"},
    ]
    assert len({config_digest(tiny_config(**change)) for change in [{}, *changed]}) == 4


def test_a_layer_has_the_rank_of_the_first_pattern_that_ends_its_path(tiny_config):
    lora = tiny_config(lora__rank_pattern={"1.query": 9, "query": 1}).lora
    ranks = [
        rank_of(lora, site) for site in ("layer.1.query", "layer.0.query", "layer.0.value", "layer.1.xquery")
    ]
    assert ranks == [9, 1, 2, 2] and largest_rank(lora) == 9 and largest_rank(tiny_config().lora) == 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"lora__rank_pattern": {"query": 1}, "federation__ranks": {"client-0": 1}},
            "lora.rank_pattern is set",
        ),
        ({"lora__rank_pattern": {"(": 1}}, "no regular expression"),
        ({"lora__rank_pattern": {"query": 0}}, "lora.rank_pattern"),
        ({"lora__target_modules": "most"}, "lora.target_modules"),
        ({"export_every": 0}, "export_every"),
    ],
)
def test_what_cannot_be_is_refused(tiny_config, changes, told):
    with pytest.raises(ConfigError, match=told):
        tiny_config(**changes)
