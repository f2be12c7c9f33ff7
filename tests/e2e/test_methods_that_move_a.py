"""Runs of methods that train A, or leave a rest: the same laws, runtimes and export as those that train B."""

import json

import pytest
import torch

from fedlora.cli.app import main
from fedlora.config.load import dump_config
from fedlora.errors import ConfigError
from fedlora.export.peft_directory import write_adapter
from fedlora.federation.store import Store
from fedlora.runtime.check.measured import preview
from fedlora.runtime.simulate import simulate

AB = {"lora__trains": "ab"}
METHODS = {
    "fedit": {**AB, "method": {"name": "fedit"}},
    "fedex": {**AB, "method": {"name": "fedex"}},
    "flora": {**AB, "method": {"name": "flora"}},
    "flexlora": {**AB, "method": {"name": "flexlora"}},
    "lora-fair": {**AB, "method": {"name": "lora-fair"}},
    "rolora": {**AB, "method": {"name": "rolora", "refactor": True}},
    "fedask": {"method": {"name": "fedask"}},
    "periodic": {"method": {"name": "periodic", "restart_every": 2}},
    "switch": {"method": {"name": "switch", "restart_every": 1}},
}


def ran(config, run_dir):
    simulate(config, run_dir, lambda event: None)
    state, _ = Store(run_dir).load()
    return state, json.loads((run_dir / "summary.json").read_text())


@pytest.mark.parametrize("name", METHODS)
def test_a_private_run_keeps_its_budget_and_exports_a_plain_adapter(tiny_config, tmp_path, name):
    config = tiny_config(**METHODS[name])
    state, summary = ran(config, tmp_path / "run")
    assert 0 < summary["epsilon_max"] <= 8.0
    adapters = state.adapters
    assert (name in ("fedex", "flora", "periodic", "switch")) == (
        adapters.sites[sorted(adapters.sites)[0]].rest is not None
    )
    # writing it has compared the logits of plain transformers and PEFT with the run's own
    classes = tuple(json.loads((tmp_path / "run" / "classes.json").read_text()))
    path = write_adapter(
        tmp_path / "adapter", config=config, adapters=adapters, classes=classes, summary=summary
    )
    written = json.loads((path / "adapter_config.json").read_text())
    assert written["lora_alpha"] / written["r"] == adapters.scale


@pytest.mark.slow  # Ray starts for each
@pytest.mark.parametrize("name", ["fedex", "rolora", "switch"])
def test_every_runtime_ends_in_one_state(tiny_config, tmp_path, name):
    _, first = ran(tiny_config(**METHODS[name]), tmp_path / "local")
    _, second = ran(
        tiny_config(**METHODS[name], runtime={"kind": "ray", "workers": 2, "clients_together": 2}),
        tmp_path / "ray",
    )
    if name == "switch":  # B alone is trained, so clients share passes, which rounds otherwise
        assert "share a forward pass" in second["execution"]
        assert second["score"] == pytest.approx(first["score"], abs=0.02)
    else:
        assert first["state_sha256"] == second["state_sha256"]


def test_an_exported_rest_is_scored_with_the_runs_own_config(tiny_config, tmp_path, capfd):
    config = tiny_config(**METHODS["flora"])
    _, summary = ran(config, tmp_path / "run")
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "adapter")]) == 0
    capfd.readouterr()
    given = [str(tmp_path / "adapter"), str(tmp_path / "run.yaml"), "--format", "json"]
    assert main(["evaluate", *given]) == 0
    assert json.loads(capfd.readouterr().out)["score"] == pytest.approx(summary["score"], abs=1e-6)


def test_what_is_told_of_bytes_holds_for_rests_and_for_the_larger_side(tiny_config, tmp_path):
    told = preview(tiny_config(**METHODS["fedex"]), lambda event: None)
    _, summary = ran(tiny_config(**METHODS["fedex"]), tmp_path / "run")
    assert told.bytes_down == summary["bytes_down_per_client_round"]
    both = preview(tiny_config(**METHODS["fedit"]), lambda event: None).bytes_up
    one = preview(tiny_config(**METHODS["rolora"]), lambda event: None).bytes_up
    assert one < both and told.bytes_up == both


def test_clients_move_both_factors_once_b_is_no_longer_zero(tiny_config, tmp_path):
    common = {
        **METHODS["fedit"],
        "privacy": "none",
        "task__head": "frozen",  # one that begins at zero passes no gradient in the first round
        "federation__local_steps": 1,
    }
    once, _ = ran(tiny_config(**common, federation__rounds=1), tmp_path / "once")
    twice, _ = ran(tiny_config(**common, federation__rounds=2), tmp_path / "twice")
    ffa = {**common, "lora__trains": "b", "method": {"name": "ffa"}}
    frozen, _ = ran(tiny_config(**ffa, federation__rounds=1), tmp_path / "ffa")
    for site, factors in twice.adapters.sites.items():
        one = once.adapters.sites[site]
        assert torch.equal(one.a, frozen.adapters.sites[site].a)  # B was zero, so A had no gradient
        assert one.b.abs().max() > 1e-6 and (factors.a - one.a).abs().max() > 1e-9


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": {"name": "fedit"}}, r"lora\.trains: b, but fedit trains A and B; write ab"),
        ({**AB, "method": {"name": "ffa"}}, r"lora\.trains: ab, but ffa trains B alone; write b"),
        (
            {**AB, "method": {"name": "fedex", "stale": {"beta": 0.5}}},
            r"method\.stale\.beta: 0\.5, but fedex .*; write 0",
        ),
        (
            {"method": {"name": "periodic", "restart_every": 2, "stale": {"beta": "adaptive"}}},
            r"method\.stale\.beta: adaptive, but periodic .*; write 0",
        ),
        (
            {
                **METHODS["fedit"],
                "federation__optimizer": {"name": "sgd", "lr": 1.0, "precondition": "lora-pro"},
            },
            r"federation\.optimizer\.precondition: lora-pro .* lora\.trains is ab; write none",
        ),
        (
            {**METHODS["rolora"], "federation__server": {"name": "momentum", "lr": 1.0}},
            r"federation\.server\.name: momentum .* rolora .*; write sgd",
        ),
    ],
)
def test_what_does_not_fit_a_method_that_moves_a_is_refused(tiny_config, changes, says):
    with pytest.raises(ConfigError, match=says):
        tiny_config(**changes)
