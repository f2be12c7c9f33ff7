"""Whole runs in which each client goes on from its own B (FedSA-LoRA)."""

import json

from fedlora.federation.store import Store
from fedlora.runtime.simulate import simulate

FEDSA = {"lora__trains": "ab", "method": {"name": "fedsa"}}


def ran(config, run_dir):
    simulate(config, run_dir, lambda event: None)
    return Store(run_dir).load()[0], json.loads((run_dir / "summary.json").read_text())


def test_it(tiny_config, tmp_path):
    state, summary = ran(tiny_config(**FEDSA), tmp_path / "a")
    print(summary)
