"""Whole runs on a quantised base: they repeat, are runs of their own, and what saves time changes rounding only."""

import json

import pytest
from torch.testing import assert_close

from fedlora.config.load import config_digest
from fedlora.errors import ConfigError
from fedlora.federation.store import Store
from fedlora.runtime.check.measured import preview
from fedlora.runtime.simulate import simulate


def quiet(event: object) -> None: ...


def run(tiny_config, path, **changes):
    """Summary of a run of two rounds, and its last adapters."""
    config = tiny_config(**{"federation__rounds": 2, "lora__layers_to_transform": [1], **changes})
    simulate(config, path, quiet)
    found = json.loads((path / "summary.json").read_text())
    adapters = Store(path).load()[0].adapters
    numbers = {f"{site}.b": pair.b for site, pair in adapters.sites.items()} | dict(adapters.head)
    return found, {name: value.clone() for name, value in numbers.items()}


def test_a_run_repeats_to_the_bit_and_is_another_than_on_the_whole_base(tiny_config, tmp_path):
    first, moved = run(tiny_config, tmp_path / "a", model__quantization="nf4")
    again, _ = run(tiny_config, tmp_path / "b", model__quantization="nf4")
    whole, _ = run(tiny_config, tmp_path / "c")
    assert first["private"] and 0 < first["epsilon_max"] <= 8.0 and any(b.any() for b in moved.values())
    assert first["epsilon_by_client"] == whole["epsilon_by_client"]
    assert first["state_sha256"] == again["state_sha256"] != whole["state_sha256"]


def test_what_saves_time_or_memory_changes_no_more_than_rounding(tiny_config, tmp_path):
    _, one = run(tiny_config, tmp_path / "one", model__quantization="nf4")
    for change in (
        {"model__gradient_checkpointing": True},
        {"runtime__cache_prefix": True},
        {"runtime__clients_together": 2},
        {"model__kernels": "torch"},
    ):
        _, other = run(tiny_config, tmp_path / next(iter(change)), model__quantization="nf4", **change)
        assert_close(other, one, rtol=1e-4, atol=1e-4)  # float32 sums in another order, and releases' grid


def test_a_run_directory_of_the_whole_base_is_not_gone_on_with(tiny_config, tmp_path):
    simulate(tiny_config(federation__rounds=1), tmp_path / "run", quiet)
    quantised = tiny_config(federation__rounds=1, model__quantization="nf4")
    assert config_digest(quantised) != config_digest(tiny_config(federation__rounds=1))
    with pytest.raises(ConfigError):
        simulate(quantised, tmp_path / "run", quiet)


def test_check_counts_the_memory_of_rounded_weights(tiny_config):
    whole, eight, four = (
        preview(tiny_config(model__quantization=bits), quiet).memory_bytes for bits in ("none", "int8", "nf4")
    )
    # two layers of 32 x 32 four times and 32 x 64 twice, and a pooler: 28 or 27.5 bits less each, and small tables
    numbers = 2 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 32
    assert whole - eight == pytest.approx(numbers * 3, rel=0.2)
    assert four < eight + 13 * 2048
