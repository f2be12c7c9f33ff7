"""A data owner's node trains on images as on texts; an image that it cannot read is told of and costs nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.config.load import load_node
from fedlora.data.own import own_records
from fedlora.deploy.node import DeployedNode
from fedlora.errors import ConfigError, DataError
from fedlora.training.checkpoints import base_digest, weights_digest
from fedlora.transport.wire import decode_reply, encode_request
from fedlora.values import ClientUpdate, RefusalReason
from tests.deploy.nodes import debits, first_request
from tests.pictures import save_model, save_pictures

NODE = """
client: site-0
data: {{source: files, train: {folder}/train.csv, image: picture, label: shape}}
declared_records: 30
classes: {classes}
model: {{name: {folder}/vit}}
task: {{kind: image-classification}}
lora: {{r: 2, lora_alpha: 2, target_modules: [q_proj, v_proj]}}
work: {{batch_size: 8, local_steps: 2, optimizer: {{name: sgd, lr: 1.0}}}}
ledger: {folder}/state/ledger.jsonl
budget: {{target_epsilon: 8.0, target_delta: 1.0e-5, max_participations: 2}}
max_grad_norm: 1.0
min_noise_multiplier: 0.3
reply_quantum_s: 0
"""


def node(folder, classes="[disc, stripes, bars, ring]", count=30):
    save_model(folder / "vit", num_labels=4)
    save_pictures(folder, {"train": count})
    (folder / "node.yaml").write_text(NODE.format(folder=folder, classes=classes))
    return load_node(folder / "node.yaml")


def test_a_node_answers_with_an_update_and_pays_once(tmp_path):
    config = node(tmp_path)
    frame = encode_request(first_request(config))
    reply = decode_reply(DeployedNode(config).answer(frame))
    assert isinstance(reply, ClientUpdate)
    assert all(bool(b.any(dim=0).all()) for b in reply.delta.sites.values())  # noise in every column
    assert debits(config) == 1


def test_a_bad_image_costs_nothing(tmp_path, caplog):
    config = node(tmp_path)
    (tmp_path / "train" / "7.png").write_bytes(b"no image")
    reply = decode_reply(DeployedNode(config).answer(encode_request(first_request(config))))
    assert not isinstance(reply, ClientUpdate)
    assert debits(config) == 0
    assert "no image that can be read" in caplog.text


def test_labels_are_numbered_as_all_nodes_number_them(tmp_path):
    records = own_records(node(tmp_path, count=6))
    assert records.labels.tolist() == [2, 0, 1, 2, 0, 1]  # bars, disc, stripes
    with pytest.raises(DataError, match="1 labels are not among classes"):
        own_records(node(tmp_path / "other", "[disc, bars]", count=6))


def test_classes_and_the_label_are_asked_for(tmp_path):
    node(tmp_path, count=3)
    for wrong, message in (("classes: []", "classes: 0 named"), ("label: null", "data.label: missing")):
        text = (tmp_path / "node.yaml").read_text()
        key = wrong.partition(":")[0]
        old = "classes: [disc, stripes, bars, ring]" if key == "classes" else "label: shape"
        (tmp_path / "bad.yaml").write_text(text.replace(old, wrong))
        with pytest.raises(ConfigError, match=message):
            load_node(tmp_path / "bad.yaml")


def test_another_image_processor_is_another_base_model(tmp_path):
    """Server and node would turn the same image into other numbers: neither would learn what it thinks."""
    config = node(tmp_path, count=3)
    recipe = config.model.name + "/preprocessor_config.json"
    words = json.loads(Path(recipe).read_text())
    agreed = base_digest(config.model, config.lora, config.task)
    assert agreed != base_digest(config.model, config.lora) == weights_digest(config.model.name)
    Path(recipe).write_text(json.dumps({**words, "image_mean": [0.4, 0.5, 0.5]}))
    assert base_digest(config.model, config.lora, config.task) not in (
        agreed,
        weights_digest(config.model.name),
    )
    request = replace(first_request(config), base_model=agreed)
    assert (
        decode_reply(DeployedNode(config).answer(encode_request(request))).reason is RefusalReason.BAD_REQUEST
    )
    assert debits(config) == 0
