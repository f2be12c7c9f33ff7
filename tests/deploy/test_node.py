"""A data owner's node releases once for a debit; nothing a server sends makes it raise or overspend."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlora.config.load import load_node
from fedlora.errors import ConfigError, DataError
from fedlora.federation.absorb import start
from fedlora.methods import build
from fedlora.privacy.accountants import epsilon
from fedlora.privacy.ledger import read_ledger
from fedlora.runtime.node import DeployedNode, own_mechanism, own_records
from fedlora.runtime.wire import decode_reply, encode_request
from fedlora.training.model import load_model
from fedlora.values import ClientUpdate, DpEvent, LocalWork, Refusal, RefusalReason, TrainRequest

NODE = """
client: site-0
data: {{source: files, train: {train}, text: sentence, label: topic, max_length: 16}}
declared_records: 360
classes: [weather, music, kitchen]
model: {{name: {model}}}
task: {{kind: sequence-classification}}
lora: {{r: 2, lora_alpha: 2, target_modules: [query, value]}}
work: {{batch_size: 16, local_steps: 2, optimizer: {{name: sgd, lr: 1.0}}}}
ledger: {folder}/state/ledger.jsonl
budget: {{target_epsilon: 8.0, target_delta: 1.0e-5, max_participations: 2}}
max_grad_norm: 1.0
min_noise_multiplier: 0.3
"""


@pytest.fixture
def config(tmp_path, tiny_encoder, topic_files):
    path = tmp_path / "node.yaml"
    path.write_text(NODE.format(train=topic_files[0], model=tiny_encoder, folder=tmp_path))
    return load_node(path)


@pytest.fixture
def request_one(config, tiny_config) -> TrainRequest:
    run = tiny_config()
    model = load_model(config.model, config.task, config.lora, tuple(config.classes), 0)
    state = start(
        model.shapes(),
        head=model.head(),
        lora_cfg=config.lora,
        method=build(run.method, run.lora),
        seed=3,
        dtype=torch.float32,
    )
    return TrainRequest(run="r", round=1, adapters=state.adapters, work=LocalWork(steps=2, learning_rate=1.0))


def reason(frame: bytes) -> RefusalReason:
    reply = decode_reply(frame)
    assert isinstance(reply, Refusal)
    return reply.reason


def debits(config) -> int:
    path = Path(config.ledger)
    return len(read_ledger(path).entries) if path.exists() else 0


def test_the_same_request_gets_the_same_bytes_also_from_a_new_process_and_is_debited_once(
    config, request_one
):
    frame = encode_request(request_one)
    first = DeployedNode(config).answer(frame)
    assert isinstance(decode_reply(first), ClientUpdate)
    assert DeployedNode(config).answer(frame) == first
    assert debits(config) == 1


def test_two_nodes_never_draw_the_same_noise(config, request_one, tmp_path):
    elsewhere = config.model_copy(update={"ledger": str(tmp_path / "other" / "ledger.jsonl")})
    frame = encode_request(request_one)
    assert DeployedNode(config).answer(frame) != DeployedNode(elsewhere).answer(frame)


def test_another_request_for_an_answered_round_is_refused_and_costs_nothing(config, request_one):
    node = DeployedNode(config)
    node.answer(encode_request(request_one))
    other = replace(request_one, work=LocalWork(steps=1, learning_rate=1.0))
    assert reason(node.answer(encode_request(other))) == RefusalReason.BAD_REQUEST
    assert debits(config) == 1


def test_a_lost_reply_is_not_made_again(config, request_one):
    frame = encode_request(request_one)
    DeployedNode(config).answer(frame)
    for path in (Path(config.ledger).parent / "outbox").glob("*.reply"):
        path.unlink()
    assert reason(DeployedNode(config).answer(frame)) == RefusalReason.FAILED
    assert debits(config) == 1


def test_the_ledger_refuses_what_the_budget_does_not_hold(config, request_one):
    node = DeployedNode(config)
    replies = [decode_reply(node.answer(encode_request(replace(request_one, round=n)))) for n in (1, 2, 3)]
    assert [type(reply) for reply in replies] == [ClientUpdate, ClientUpdate, Refusal]
    assert replies[2].reason == RefusalReason.BUDGET
    events = [entry.event for entry in read_ledger(Path(config.ledger)).entries]
    assert epsilon(events, config.budget.target_delta) <= config.budget.target_epsilon


def misfits(request: TrainRequest):
    adapters = request.adapters
    site, factors = next(iter(adapters.sites.items()))
    wider = replace(factors, a=torch.zeros(3, factors.a.shape[1]), b=torch.zeros(factors.b.shape[0], 3))
    broken = replace(factors, b=torch.full_like(factors.b, torch.nan))
    yield replace(request, round=0)
    yield replace(request, run="")
    yield replace(request, work=LocalWork(steps=3, learning_rate=1.0))
    yield replace(request, work=LocalWork(steps=0, learning_rate=1.0))
    yield replace(request, work=LocalWork(steps=2, learning_rate=1.5))
    yield replace(request, work=LocalWork(steps=2, learning_rate=float("nan")))
    yield replace(request, adapters=replace(adapters, scale=7.0))
    yield replace(request, adapters=replace(adapters, head={}))
    yield replace(request, adapters=replace(adapters, sites={**adapters.sites, site: wider}))
    yield replace(request, adapters=replace(adapters, sites={**adapters.sites, site: broken}))
    yield replace(request, adapters=replace(adapters, sites={site: factors}))


def test_a_request_that_does_not_fit_is_a_bad_request_and_costs_nothing(config, request_one):
    node = DeployedNode(config)
    for misfit in misfits(request_one):
        assert reason(node.answer(encode_request(misfit))) == RefusalReason.BAD_REQUEST
    for garbage in (b"", b"\x00" * 64, encode_request(request_one)[:-1]):
        assert reason(node.answer(garbage)) == RefusalReason.BAD_REQUEST
    assert debits(config) == 0


def test_whatever_breaks_on_the_node_leaves_it_as_a_code_without_words(config, request_one, tmp_path):
    ledger = Path(config.ledger)
    ledger.parent.mkdir()
    ledger.write_text("no ledger, but a secret\n")
    frame = DeployedNode(config).answer(encode_request(request_one))
    assert reason(frame) == RefusalReason.FAILED
    assert b"secret" not in frame
    assert ledger.read_text() == "no ledger, but a secret\n"


def test_noise_comes_from_the_nodes_own_budget_and_never_falls_below_its_floor(config):
    mechanism = own_mechanism(config, 360)
    event = DpEvent(
        noise_multiplier=mechanism.noise_multiplier, sample_rate=mechanism.sample_rate, steps=2 * 2
    )
    assert mechanism.sample_rate == 16 / 360
    assert epsilon([event], config.budget.target_delta) <= config.budget.target_epsilon
    floor = config.model_copy(update={"min_noise_multiplier": 9.0})
    assert own_mechanism(floor, 360).noise_multiplier == 9.0


def test_labels_are_numbered_as_declared_also_where_the_node_lacks_a_class(config, tmp_path):
    train = tmp_path / "own.tsv"
    train.write_text("sentence\ttopic\nrain\tweather\nbread\tkitchen\n")
    data = config.data.model_copy(update={"train": str(train)})
    records = own_records(config.model_copy(update={"data": data}))
    assert records.texts == ["rain", "bread"]
    assert records.labels.tolist() == [0, 2]
    train.write_text("sentence\ttopic\nrain\tweather\ngoal\tsport\n")
    with pytest.raises(DataError, match="sport"):
        own_records(config.model_copy(update={"data": data}))


def test_a_classifier_without_classes_is_refused(tmp_path, tiny_encoder, topic_files):
    path = tmp_path / "node.yaml"
    text = NODE.format(train=topic_files[0], model=tiny_encoder, folder=tmp_path)
    path.write_text(text.replace("classes: [weather, music, kitchen]\n", ""))
    with pytest.raises(ConfigError, match="classes"):
        load_node(path)
