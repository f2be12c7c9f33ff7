"""A run goes on with the base model and the records that it began with, or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora.cli.forget import erasers
from fedlora.errors import ConfigError
from fedlora.federation.events import RoundDone
from fedlora.runs.forgetting import forget
from fedlora.runs.rundir import INPUTS
from fedlora.runs.trained import trained_adapters
from fedlora.runtime.simulate import resume, simulate
from fedlora.training.checkpoints import weights_digest
from tests.e2e.interrupt import Interrupt


def quiet(event: object) -> None: ...


@pytest.fixture
def copies(tmp_path, tiny_encoder, topic_files) -> dict[str, Path]:
    """What a run reads, to be changed at will; `weights_digest` remembers nothing of it."""
    model = tmp_path / "model"
    shutil.copytree(tiny_encoder, model)
    train, test = (Path(shutil.copy(file, tmp_path)) for file in topic_files)
    weights_digest.cache_clear()
    return {"model": model, "train": train, "test": test}


@pytest.fixture
def cut(tmp_path, tiny_config, copies):
    """A run without privacy that was stopped in its second round."""
    named = {"model__name": copies["model"], "data__train": copies["train"], "data__test": copies["test"]}
    config = tiny_config(**{key: str(path) for key, path in named.items()}, privacy="none")
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "cut", Interrupt(RoundDone, 1))
    return tmp_path / "cut"


def perturbed(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    save_file({name: tensor + torch.ones_like(tensor) for name, tensor in weights.items()}, path / "aside")
    (path / "aside").replace(path / "model.safetensors")


def relabelled(path: Path) -> None:
    """As many records of the same classes, a class of which lends its name to the next."""
    names, *lines = path.read_text().splitlines()
    to = {"weather": "kitchen", "kitchen": "music", "music": "weather"}
    moved = (f"{to[topic]}\t{rest}" for topic, _, rest in (line.partition("\t") for line in lines))
    path.write_text("\n".join([names, *moved]) + "\n")


def files(run_dir: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ("test", r"data\.test: .*test\.tsv gives other records, as the model reads them, now than when"),
        ("train", r"data\.train: .*train\.tsv gives other records"),
        ("model", r"model\.name: .*model holds other weights now than when .*; put back .* another output"),
    ],
)
def test_what_was_replaced_is_named_and_nothing_is_asked(cut, copies, tmp_path, changed, told):
    whole, before = shutil.copytree(cut, tmp_path / "whole"), files(cut)
    resume(whole, quiet)
    if changed == "model":
        old = (copies["model"] / "model.safetensors").read_bytes()
        perturbed(copies["model"])
        weights_digest.cache_clear()  # another process would go on
    else:
        old = copies[changed].read_bytes()
        relabelled(copies[changed])
    with pytest.raises(ConfigError, match=told):
        resume(cut, quiet)
    assert files(cut) == before
    place = copies["model"] / "model.safetensors" if changed == "model" else copies[changed]
    place.write_bytes(old)
    weights_digest.cache_clear()
    ends = [json.loads((resume(run, quiet) / "summary.json").read_text()) for run in (cut, whole)]
    assert all(
        json.loads((run / INPUTS).read_text()).keys() == {"base_model", "test"} for run in (cut, whole)
    )
    assert ends[0]["state_sha256"] == ends[1]["state_sha256"] and ends[0]["score"] == ends[1]["score"]


def test_a_run_that_an_older_fedlora_began_goes_on_and_is_held_to_what_it_reads_then(cut, copies, tmp_path):
    told = json.loads((cut / INPUTS).read_text())
    assert told.keys() == {"base_model", "test", "train"}
    (cut / INPUTS).unlink()
    with pytest.raises(KeyboardInterrupt):
        resume(cut, Interrupt(RoundDone, 0))
    assert json.loads((cut / INPUTS).read_text()) == told
    relabelled(copies["test"])
    with pytest.raises(ConfigError, match=r"data\.test"):
        resume(cut, quiet)


def test_what_a_finished_run_trained_belongs_to_its_base_model_alone(cut, copies):
    resume(cut, quiet)
    trained_adapters(cut)
    perturbed(copies["model"])
    weights_digest.cache_clear()
    with pytest.raises(
        ConfigError, match=r"model\.name: .* other weights now than when .*, to which its adapter belongs"
    ):
        trained_adapters(cut)


def test_classes_that_were_lost_are_named_and_come_back_as_the_run_goes_on(cut):
    (cut / "classes.json").unlink()
    with pytest.raises(ConfigError, match=r"classes\.json is missing; restore it"):
        trained_adapters(cut)
    resume(cut, quiet)
    assert trained_adapters(cut)[1] == ("kitchen", "music", "weather")


def test_classes_of_a_start_that_was_killed_are_not_the_next_runs(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "classes.json").write_text('["another", "runs"]\n')
    simulate(tiny_config(federation__rounds=1, privacy="none"), tmp_path / "run", quiet)
    assert trained_adapters(tmp_path / "run")[1] == ("kitchen", "music", "weather")


def test_who_is_forgotten_may_take_the_records_away(cut, copies):
    forget(cut, "client-1", erasers(cut))
    assert "train" not in json.loads((cut / INPUTS).read_text())
    relabelled(copies["train"])
    resume(cut, quiet)
