"""A run that trains cores: the same laws, runtimes and export as one that trains B."""

import json

import pytest
import torch

from fedlora.errors import ConfigError
from fedlora.export.peft_directory import write_adapter
from fedlora.federation.store import Store
from fedlora.runtime import prepare
from fedlora.runtime.simulate import simulate

CORE = {"method": {"name": "fedsb", "left": "orthonormal"}, "lora__trains": "core"}


def ran(config, run_dir):
    simulate(config, run_dir, lambda event: None)
    state, _ = Store(run_dir).load()
    return state, json.loads((run_dir / "summary.json").read_text())


def products(state):
    return {
        site: (f.b if f.left is None else f.left @ f.b) @ f.a for site, f in state.adapters.sites.items()
    } | dict(state.adapters.head)


@pytest.fixture
def same_draws(monkeypatch):
    """Runs of different configs draw the same records: a run's name decides what it draws."""
    monkeypatch.setattr(prepare, "run_name", lambda config: "0" * 16)


@pytest.mark.usefixtures("same_draws")
def test_between_square_frames_a_core_is_ffa_lora(tiny_config, tmp_path):
    common = {"model__dtype": "float64", "privacy": "none", "lora__r": 32, "lora__lora_alpha": 32}
    core, _ = ran(tiny_config(**CORE, **common), tmp_path / "core")
    ffa, _ = ran(tiny_config(method={"name": "ffa"}, **common), tmp_path / "ffa")
    x, y = products(core), products(ffa)
    assert x.keys() == y.keys()
    for name in x:
        assert torch.allclose(x[name], y[name], rtol=0, atol=1e-11)
    assert max(float(value.abs().max()) for value in x.values()) > 1e-2


@pytest.mark.usefixtures("same_draws")
@pytest.mark.parametrize("left", ["orthonormal", "principal"])
def test_a_first_step_is_ffas_seen_through_the_left_frame(tiny_config, tmp_path, left):
    common = {
        "model__dtype": "float64",
        "privacy": "none",
        "federation__rounds": 1,
        "federation__local_steps": 1,
        "task__head": "frozen",  # one that begins at zero passes no gradient in the first step
    }
    method = {"name": "fedsb", "left": left}
    core, _ = ran(tiny_config(**{**CORE, "method": method}, **common), tmp_path / "core")
    ffa, _ = ran(tiny_config(method={"name": "ffa"}, **common), tmp_path / "ffa")
    for site, factors in core.adapters.sites.items():
        assert factors.left.shape == (32, 2)
        assert torch.allclose(factors.b, factors.left.T @ ffa.adapters.sites[site].b, rtol=0, atol=1e-12)
        assert float(factors.b.abs().max()) > 1e-5


def test_a_private_core_sends_its_numbers_only_and_exports_a_plain_adapter(tiny_config, tmp_path):
    b_state, b_summary = ran(tiny_config(method={"name": "ffa"}), tmp_path / "b")
    core, summary = ran(tiny_config(**CORE), tmp_path / "core")
    head = sum(value.numel() for value in core.adapters.head.values())
    assert sum(f.b.numel() for f in core.adapters.sites.values()) == 4 * 2 * 2
    assert sum(value.numel() for value in core.memory.sites.values()) == 4 * 2 * 2
    saved = b_summary["bytes_up_per_client_round"] - summary["bytes_up_per_client_round"]
    assert 0 <= saved - 4 * (4 * 32 * 2 - 4 * 2 * 2) < 64  # shapes are written in the header
    assert head and b_state.adapters.head.keys() == core.adapters.head.keys()
    assert summary["epsilon_max"] <= 8.0
    # writing it has compared the logits of plain transformers and PEFT with the run's own
    classes = tuple(json.loads((tmp_path / "core" / "classes.json").read_text()))
    path = write_adapter(
        tmp_path / "adapter",
        config=tiny_config(**CORE),
        adapters=core.adapters,
        classes=classes,
        summary=summary,
    )
    written = json.loads((path / "adapter_config.json").read_text())
    assert (written["r"], written["peft_type"]) == (2, "LORA")


@pytest.mark.slow  # Ray starts
def test_cores_end_in_one_state_in_every_runtime_with_memory_and_late_replies(tiny_config, tmp_path):
    changes = {**CORE, "method": {**CORE["method"], "stale": {"beta": 0.5}}}
    local, first = ran(tiny_config(**changes), tmp_path / "local")
    _, second = ran(tiny_config(**changes, runtime={"kind": "ray", "workers": 2}), tmp_path / "ray")
    assert first["state_sha256"] == second["state_sha256"]
    together, third = ran(
        tiny_config(**changes, runtime={"kind": "local", "clients_together": 2}), tmp_path / "two"
    )
    assert "share a forward pass" in third["execution"] and "kernels" in first["execution"]
    for name, value in products(local).items():
        assert torch.allclose(value, products(together)[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{"lora__trains": "core"}, {"method": {"name": "fedsb"}}])
def test_a_method_and_an_adapter_that_do_not_fit_are_refused(tiny_config, changes):
    with pytest.raises(ConfigError, match=r"lora\.trains: .* write (b|core)"):
        tiny_config(**changes)
