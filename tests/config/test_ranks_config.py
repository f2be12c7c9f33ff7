"""Who trains fewer columns of B than others, and with what that cannot go."""

import pytest

from fedlora.config.load import _computed, config_digest, load_node
from fedlora.errors import ConfigError

ONE = {"federation__ranks": {"client-0": 1}}

NODE = """
client: clinic
data: {source: files, train: t.tsv, text: sentence, label: topic, max_length: 16}
declared_records: 360
classes: [weather, music]
model: {name: m}
task: {kind: sequence-classification}
lora: {r: 4, lora_alpha: 4, target_modules: [query]}
work: {batch_size: 16, local_steps: 2, optimizer: {name: sgd, lr: 1.0}}
ledger: ledger.jsonl
budget: {target_epsilon: 8.0, target_delta: 1.0e-5, max_participations: 3}
max_grad_norm: 1.0
min_noise_multiplier: 0.3
"""


def test_ranks_are_part_of_what_a_run_computes_and_without_any_it_is_what_it_was(tiny_config):
    plain = tiny_config()
    assert plain.federation.ranks is None
    assert "ranks" not in _computed(plain)["federation"]  # or no run of before could go on
    assert config_digest(tiny_config(**ONE)) != config_digest(plain)
    assert config_digest(tiny_config(federation__ranks={"client-0": 2})) != config_digest(tiny_config(**ONE))


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"federation__ranks": {"client-0": 3}}, r"ranks: client-0 3, but lora\.r is 2; write 2 or less"),
        ({"federation__ranks": {"client-0": 0}}, r"federation\.ranks"),
        ({"federation__ranks": {}}, r"federation\.ranks"),
        ({**ONE, "method": {"name": "fedsb"}, "lora__trains": "core"}, r"ranks: .* lora\.trains is core; write null"),
        ({**ONE, "method": {"name": "fedit"}, "lora__trains": "ab"}, r"ranks: .* lora\.trains is ab; write null"),
        ({**ONE, "method": {"name": "periodic", "restart_every": 2}}, r"ranks: periodic takes A out .*; write null"),
        ({**ONE, "method": {"name": "switch", "restart_every": 2}}, r"ranks: switch takes A out .*route: lq"),
        ({**ONE, "method": {"name": "fedsvd", "route": "dense"}}, r"ranks: fedsvd takes A out .*; write null"),
        ({**ONE, "method__stale": {"beta": 0.5}}, r"ranks: method\.stale\.beta is 0\.5.*; write beta 0"),
        ({**ONE, "method__stale": {"beta": "adaptive"}}, r"ranks: method\.stale\.beta is adaptive.*; write beta 0"),
        (
            {**ONE, "federation__server": {"name": "momentum", "lr": 1.0, "momentum": 0.9}},
            r"ranks: federation\.server\.name is momentum.*; write sgd",
        ),
        (
            {**ONE, "federation__optimizer__precondition": "allora"},
            r"ranks: allora is of all columns at once; write precondition: none",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_with_ranks_is_refused_with_what_to_write(tiny_config, changes, wrong):
    with pytest.raises(ConfigError, match=wrong):
        tiny_config(**changes)


@pytest.mark.parametrize("method", [{"name": "fedsvd"}, {"name": "fedask"}, {"name": "ffa"}])
def test_methods_that_keep_a_within_its_row_space_take_ranks(tiny_config, method):
    assert tiny_config(**ONE, method=method).federation.ranks == {"client-0": 1}


def test_a_node_names_its_own_rank_within_the_adapters(tmp_path):
    path = tmp_path / "node.yaml"
    path.write_text(NODE)
    assert load_node(path).rank is None
    assert load_node(path, ["rank=3"]).rank == 3
    for overrides, wrong in (
        (["rank=5"], r"rank: clinic 5, but lora\.r is 4; write 4 or less"),
        (["rank=2", "lora.trains=core"], r"rank: .* lora\.trains is core"),
        (["rank=2", "work.optimizer.precondition=lora-pro"], r"rank: lora-pro is of all columns"),
    ):
        with pytest.raises(ConfigError, match=wrong):
            load_node(path, overrides)
