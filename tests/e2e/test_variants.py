"""Rules beside a method change what is learnt, not what is spent, in a whole run as in its parts."""

import json

import pytest

from fedlora.federation.store import Store
from fedlora.runtime.simulate import resume, simulate

FALLING = {"name": "sgd", "lr": 1.0, "decay": "linear"}
VARIANTS = {
    "lora-pro": {"federation__optimizer": {**FALLING, "precondition": "lora-pro"}, "lora__lora_alpha": 8},
    "allora": {"federation__optimizer": {**FALLING, "precondition": "allora"}, "lora__lora_alpha": 8},
    "mifa": {"federation__optimizer": FALLING, "method__stale": {"rule": "mifa", "beta": 1.0}},
    "scaled": {"federation__optimizer": FALLING, "method__stale": {"beta": 1.0, "scale_by_rate": True}},
}
PLAIN = {
    "lora-pro": {"federation__optimizer": FALLING, "lora__lora_alpha": 8},
    "allora": {"federation__optimizer": FALLING, "lora__lora_alpha": 8},
    "mifa": {"federation__optimizer": FALLING},
    "scaled": {"federation__optimizer": FALLING, "method__stale": {"beta": 1.0}},
}


class StoppedError(Exception):
    """A run that is interrupted after its second round."""


def stops(event):
    if isinstance(getattr(event, "round", None), dict) and event.round["round"] == 2:
        raise StoppedError


def told(run_dir):
    return json.loads((run_dir / "summary.json").read_text())


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_spends_what_the_method_spends_and_a_stop_changes_no_bit_of_it(tiny_config, tmp_path, name):
    config = tiny_config(**VARIANTS[name])
    simulate(config, tmp_path / "whole", lambda event: None)
    simulate(tiny_config(**PLAIN[name]), tmp_path / "plain", lambda event: None)
    with pytest.raises(StoppedError):
        simulate(config, tmp_path / "stopped", stops)
    assert Store(tmp_path / "stopped").load()[0].round == 2
    resume(tmp_path / "stopped", lambda event: None)
    whole, plain = told(tmp_path / "whole"), told(tmp_path / "plain")
    assert told(tmp_path / "stopped")["state_sha256"] == whole["state_sha256"] != plain["state_sha256"]
    assert whole["epsilon_max"] <= 8.0
    assert whole["epsilon_max"] == pytest.approx(plain["epsilon_max"], rel=1e-9)
