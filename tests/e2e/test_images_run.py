"""Whole private runs on images: shapes are told apart, and plain transformers with PEFT says the same."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModelForImageClassification

from fedlora.cli.app import main
from fedlora.config.load import dump_config
from fedlora.errors import ConfigError
from fedlora.runs.rundir import run_rounds
from fedlora.runtime.check.measured import preview
from fedlora.runtime.check.outline import outline
from fedlora.training.look import look
from tests.pictures import save_model, save_pictures


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("shapes")
    for kind in ("vit", "deit"):
        save_model(path / kind, kind, num_labels=3)
    save_pictures(path, {"train": 360, "test": 60})
    return path


@pytest.fixture
def config_of(tiny_config, place, tmp_path):
    def build(kind="vit", **changes):
        return tiny_config(
            **{
                "model__name": str(place / kind), "task": {"kind": "image-classification"},
                "lora__target_modules": ["q_proj", "v_proj"],
                "data": {
                    "source": "files", "train": str(place / "train.csv"), "test": str(place / "test.csv"),
                    "image": "picture", "label": "shape",
                    "partition": {"kind": "dirichlet", "clients": 3, "alpha": 5.0, "min_examples": 60},
                },
                "federation__rounds": 4, "federation__cohort": 3, "federation__local_steps": 4,
                "federation__batch_size": 32, "federation__optimizer__lr": 2.0,
                "privacy__max_participations": 4, "output": str(tmp_path / "run"),
                **changes,
            }
        )  # fmt: skip

    return build


def simulated(config, folder):
    (folder / "task.yaml").write_text(dump_config(config))
    assert main(["simulate", str(folder / "task.yaml")]) == 0
    return json.loads((Path(config.output) / "summary.json").read_text())


def test_shapes_are_told_apart_at_a_private_epsilon(config_of, place, tmp_path, capsys):
    summary = simulated(config_of(), tmp_path)
    rounds = run_rounds(tmp_path / "run")
    assert summary["metric"] == "accuracy" and summary["score_before"] == pytest.approx(1 / 3)
    assert summary["score"] > 0.6, "chance is a third"
    assert rounds[-1]["loss"] < rounds[0]["loss"]
    assert summary["epsilon_max"] <= 8.0
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "AutoImageProcessor" in card

    classes = json.loads((tmp_path / "run" / "adapter" / "classes.json").read_text())
    base = AutoModelForImageClassification.from_pretrained(place / "vit", num_labels=3)
    adapter = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    export = ["export", str(tmp_path / "run"), "--to", str(tmp_path / "merged"), "--merge"]
    assert main(export) == 0
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    names = [merged.config.id2label[number] for number in range(3)]
    assert classes == names == ["bars", "disc", "stripes"]
    processor = AutoImageProcessor.from_pretrained(tmp_path / "merged")
    right = 0
    for number in range(60):
        with Image.open(place / "test" / f"{number}.png") as image, torch.no_grad():
            pixels = processor(image, return_tensors="pt")
            logits = adapter(**pixels).logits
            torch.testing.assert_close(merged(**pixels).logits, logits, rtol=1e-4, atol=1e-4)
            right += int(logits.argmax()) == number % 3
    assert right / 60 == pytest.approx(summary["score"])


def test_clients_that_share_passes_end_near_those_who_do_not(config_of, tmp_path, capsys):
    alone = simulated(config_of(federation__rounds=1), tmp_path)
    shared = config_of(
        federation__rounds=1, runtime__clients_together=3, output=str(tmp_path / "shared")
    )  # fmt: skip
    others = simulated(shared, tmp_path)
    assert "3 clients share a forward pass" in others["execution"]
    tensors = []
    for run in ("run", "shared"):
        with safe_open(tmp_path / run / "adapter" / "adapter_model.safetensors", "pt") as file:
            tensors.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    assert alone["epsilon_max"] == others["epsilon_max"]
    for name, value in tensors[0].items():
        assert float((tensors[1][name] - value).norm()) <= 1e-4 * float(value.norm()) + 1e-6, name


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_what_check_tells_from_shapes_is_what_is_loaded(config_of, place, kind, targets):
    config = config_of(kind, lora__target_modules=targets)
    told, measured = outline(config), preview(config, lambda event: None)
    assert told.trained_parameters == measured.trained_parameters
    assert told.bytes_up == pytest.approx(measured.bytes_up, rel=0.2)
    assert look(place / kind).patches == 16


def test_what_does_not_apply_to_images_is_refused(config_of):
    for changes, message in (
        ({"runtime__cache_prefix": True}, "runtime.cache_prefix: true"),
        ({"data__max_length": 16}, "data.max_length: 16, but an image"),
        ({"data__text": "shape"}, "data.text: text, image together"),
        ({"task": {"kind": "sequence-classification"}}, "data.image: image together"),
        ({"data__label": None}, "data.label: missing, but task.kind is image-classification"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_of(**changes)
