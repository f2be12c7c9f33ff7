"""Adapters on the way: each is of its round, whole, tells the epsilon spent by then, and is written once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedlora.algebra.factors import whole
from fedlora.config.load import config_digest
from fedlora.export.deliver import delivering
from fedlora.federation.store import Store
from fedlora.runs.summary import summary_so_far
from fedlora.runtime.simulate import resume, simulate

SMALL = {"federation__rounds": 4, "federation__local_steps": 1, "privacy__max_participations": 4}


def quiet(_: object) -> None:
    pass


def whatever_lies_in(run_dir: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run_dir)): path.read_bytes()
        for path in sorted((run_dir / "adapters").rglob("*"))
        if path.is_file()
    }


class Kill(BaseException):
    """Something that no code of ours catches."""


def test_an_adapter_every_second_round_is_that_rounds_own(tiny_config, tmp_path):
    config, run_dir, epsilons = tiny_config(**SMALL, export_every=2), tmp_path / "run", {}
    write = delivering(run_dir, config, quiet)

    def stored(state):
        write(state)
        epsilons[state.round] = summary_so_far(run_dir)["epsilon_max"]
        if state.round % 2 == 0 and state.round:
            path = run_dir / "adapters" / f"round-{state.round:06d}"
            tensors = load_file(path / "adapter_model.safetensors")
            for site, factors in state.adapters.sites.items():
                assert torch.equal(tensors[f"base_model.model.{site}.lora_A.weight"], factors.a)
                assert torch.equal(tensors[f"base_model.model.{site}.lora_B.weight"], whole(factors).b)

    simulate(config, run_dir, quiet, stored=stored)
    assert sorted(path.name for path in (run_dir / "adapters").iterdir()) == ["round-000002", "round-000004"]
    cards = {n: (run_dir / "adapters" / f"round-00000{n}" / "README.md").read_text() for n in (2, 4)}
    assert epsilons[2] < epsilons[4]
    assert "2 of 4" in cards[2] and "4 of 4" in cards[4]
    assert all(f"epsilon {epsilons[n]:.2f}"[:-1] in cards[n] for n in cards)


def test_a_run_that_died_over_an_adapter_writes_it_when_it_goes_on_and_no_other_again(
    tiny_config, tmp_path, monkeypatch
):
    config, whole_run = tiny_config(**SMALL, export_every=1), tmp_path / "whole"
    simulate(config, whole_run, quiet, stored=delivering(whole_run, config, quiet))
    run_dir = tmp_path / "broken"
    write, rename = delivering(run_dir, config, quiet), Path.replace

    def dies_over_round_2(self, target):
        if Path(target).name == "round-000002":
            raise Kill  # all is written aside, nothing is renamed
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", dies_over_round_2)
    with pytest.raises(Kill):
        simulate(config, run_dir, quiet, stored=write)
    monkeypatch.undo()
    assert [path.name for path in (run_dir / "adapters").glob("round-*")] == ["round-000001"]
    assert Store(run_dir).load()[0].round == 2
    first = (run_dir / "adapters" / "round-000001").stat().st_mtime_ns
    resume(run_dir, quiet, stored=write)
    assert (run_dir / "adapters" / "round-000001").stat().st_mtime_ns == first
    theirs, ours = whatever_lies_in(whole_run), whatever_lies_in(run_dir)
    weights = {name for name in theirs if name.endswith(".safetensors")}
    assert theirs.keys() == ours.keys() and len(weights) == 4
    assert all(theirs[name] == ours[name] for name in weights)


def test_it_changes_nothing_of_what_a_run_computes(tiny_config):
    assert config_digest(tiny_config(export_every=2)) == config_digest(tiny_config())
    assert json.loads(tiny_config().model_dump_json())["export_every"] is None
