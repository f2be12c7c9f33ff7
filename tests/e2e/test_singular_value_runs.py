"""A run that trains singular values: r numbers a site leave a client, and an adapter is plain LoRA all the same."""

import json

import pytest
import torch

from fedlora.algebra.factors import whole
from fedlora.errors import ConfigError
from fedlora.export.peft_directory import write_adapter
from fedlora.federation.store import Store
from fedlora.runtime import prepare
from fedlora.runtime.simulate import simulate

VALUES = {"method": {"name": "svfit"}, "lora__init": "principal", "lora__trains": "singular-values"}
CORE = {"method": {"name": "fedsb", "left": "principal"}, "lora__init": "principal", "lora__trains": "core"}


def ran(config, run_dir):
    simulate(config, run_dir, lambda event: None)
    state, _ = Store(run_dir).load()
    return state, json.loads((run_dir / "summary.json").read_text())


def test_a_first_step_is_the_diagonal_of_a_cores(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "run_name", lambda config: "0" * 16)  # so both draw the same records
    common = {
        "model__dtype": "float64",
        "privacy": "none",
        "federation__rounds": 1,
        "federation__local_steps": 1,
        "task__head": "frozen",  # one that begins at zero passes no gradient in the first step
    }
    values, _ = ran(tiny_config(**VALUES, **common), tmp_path / "values")
    core, _ = ran(tiny_config(**CORE, **common), tmp_path / "core")
    for site, factors in values.adapters.sites.items():
        square = core.adapters.sites[site]
        assert torch.equal(factors.a, square.a) and torch.equal(factors.left, square.left)
        assert torch.allclose(factors.b[0], square.b.diagonal(), rtol=0, atol=1e-12)
        assert float(factors.b.abs().max()) > 1e-6


def test_a_private_run_sends_its_numbers_only_and_exports_a_plain_adapter(tiny_config, tmp_path):
    changes = {
        **VALUES,
        "method": {"name": "svfit", "stale": {"beta": 0.5}},
        "federation__optimizer__lr": 4.0,
    }
    state, summary = ran(tiny_config(**changes), tmp_path / "values")
    assert sum(f.b.numel() for f in state.adapters.sites.values()) == 4 * 2
    assert sum(value.numel() for value in state.memory.sites.values()) == 4 * 2
    assert all(bool((f.b != 0).all()) for f in state.adapters.sites.values())
    assert summary["epsilon_max"] <= 8.0
    # writing it has compared the logits of plain transformers and PEFT with the run's own
    classes = tuple(json.loads((tmp_path / "values" / "classes.json").read_text()))
    config = tiny_config(**changes)
    path = write_adapter(
        tmp_path / "adapter", config=config, adapters=state.adapters, classes=classes, summary=summary
    )
    written = json.loads((path / "adapter_config.json").read_text())
    assert (written["r"], written["peft_type"]) == (2, "LORA")
    for factors in state.adapters.sites.values():
        assert whole(factors).b.shape == (32, 2)
    together, other = ran(
        tiny_config(**changes, runtime={"kind": "local", "clients_together": 2}), tmp_path / "two"
    )
    assert "share a forward pass" in other["execution"]
    for site, factors in state.adapters.sites.items():
        assert torch.allclose(factors.b, together.adapters.sites[site].b, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"lora__trains": "singular-values"}, r"lora\.trains: .* write b"),
        ({"method": {"name": "svfit"}, "lora__init": "principal"}, r"lora\.trains: .* write singular-values"),
        ({**VALUES, "lora__init": "orthonormal"}, r"lora\.init: .* write principal"),
        (
            {**VALUES, "federation__optimizer__precondition": "allora"},
            r"precondition: allora, .*; write none",
        ),
    ],
)
def test_a_method_and_an_adapter_that_do_not_fit_are_refused(tiny_config, changes, wrong):
    with pytest.raises(ConfigError, match=wrong):
        tiny_config(**changes)
