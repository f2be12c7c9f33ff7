"""A data owner's node releases once for a debit; nothing a server sends makes it raise or overspend."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from fedlora.config.load import load_node
from fedlora.config.node import NodeConfig
from fedlora.errors import ConfigError, DataError
from fedlora.federation.absorb import start
from fedlora.federation.store import Store
from fedlora.methods import build
from fedlora.privacy.accountants import epsilon
from fedlora.privacy.ledger import read_ledger
from fedlora.runtime.flower_client import Hello
from fedlora.runtime.journal import Reported, reported_events
from fedlora.runtime.node import DeployedNode, own_mechanism, own_records
from fedlora.runtime.server import _fits
from fedlora.runtime.wire import decode_reply, encode_request
from fedlora.training.model import load_model
from fedlora.values import (
    FRAME,
    Adapters,
    ClientUpdate,
    Delta,
    DpEvent,
    LocalWork,
    Member,
    Refusal,
    RefusalReason,
    Reply,
    TrainRequest,
)

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
    for path in Path(f"{config.ledger}.outbox").glob("*.reply"):
        path.unlink()
    assert reason(DeployedNode(config).answer(frame)) == RefusalReason.FAILED
    assert debits(config) == 1


def test_a_ledger_that_was_deleted_or_put_back_is_noticed_and_not_begun_anew(config, request_one, caplog):
    frames = [encode_request(replace(request_one, round=n)) for n in (1, 2)]
    ledger = Path(config.ledger)
    node = DeployedNode(config)
    node.answer(frames[0])
    older = ledger.read_bytes()
    node.answer(frames[1])
    newest = ledger.read_bytes()

    ledger.unlink()
    for asked in (node, DeployedNode(config)):  # the old process knew better, the new one could not
        assert [reason(asked.answer(frame)) for frame in frames] == [RefusalReason.FAILED] * 2
    assert not ledger.exists()
    assert "2 replies" in caplog.text and "backup" in caplog.text

    ledger.write_bytes(older)
    third = encode_request(replace(request_one, run="another"))
    for asked in (node, DeployedNode(config)):
        assert reason(asked.answer(third)) == RefusalReason.FAILED
    assert ledger.read_bytes() == older

    ledger.write_bytes(newest)
    assert isinstance(decode_reply(DeployedNode(config).answer(frames[1])), ClientUpdate)


def test_two_ledgers_in_one_folder_share_no_replies(config, request_one):
    other = config.model_copy(
        update={"client": "site-1", "ledger": str(Path(config.ledger).parent / "b.jsonl")}
    )
    frame = encode_request(request_one)
    replies = [decode_reply(DeployedNode(each).answer(frame)) for each in (config, other)]
    assert [(type(reply), reply.client) for reply in replies] == [
        (ClientUpdate, "site-0"),
        (ClientUpdate, "site-1"),
    ]


def test_whatever_decoding_raises_is_a_bad_request(config, monkeypatch):
    def breaks(frame: bytes) -> TrainRequest:
        raise MemoryError("a record")

    monkeypatch.setattr("fedlora.runtime.node.decode_request", breaks)
    assert reason(DeployedNode(config).answer(b"")) == RefusalReason.BAD_REQUEST


NO_NAMES = ["", ".", "..", "...", "a/b", "../../../victim", "a\\b", "a b", "a\n", "ü", "a\0", "x" * 97]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_could_be_a_path_is_refused_on_both_ends(config, name):
    with pytest.raises(ValidationError, match="client"):
        NodeConfig.model_validate({**config.model_dump(), "client": name})
    assert not _fits(Hello(client=name, records=10, classes=("a", "b")), ("a", "b"), {})


@pytest.mark.parametrize("name", ["site-0", "clinic.example.org", "a_~", "..a", "x" * 96])
def test_a_plain_name_is_taken_on_both_ends(config, name):
    assert NodeConfig.model_validate({**config.model_dump(), "client": name}).client == name
    assert _fits(Hello(client=name, records=10, classes=("a", "b")), ("a", "b"), {})


def test_what_the_server_remembers_stays_in_its_own_folder_whatever_the_client_is_called(tmp_path):
    store = Store(tmp_path / "run")
    names = ["../../victim", "..", ".", "", "%", "%2E", "a/b", "a%2Fb", "kliniek ü", "ü" * 250, "ü" * 251]
    for number, name in enumerate(names):
        store._save_memory(name, 1, Delta(basis=FRAME, sites={"x": torch.full((1,), float(number))}))
    for number, name in enumerate(names):
        assert store._load_memory(name, 1).sites["x"].item() == number
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert {path.parent.parent for path in tmp_path.rglob("*.safetensors")} == {store.memory}


def asked_in(number: int) -> TrainRequest:
    adapters = Adapters(basis=0, scale=1.0, sites={})
    return TrainRequest(run="r", round=number, adapters=adapters, work=LocalWork(steps=2, learning_rate=1.0))


SOUND = DpEvent(noise_multiplier=0.7, sample_rate=0.1, steps=2)


class Claims:
    """A cohort of one node that says what it likes about what it spent."""

    def __init__(self, spent: DpEvent) -> None:
        self.spent = spent

    def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterator[Reply]:
        delta = Delta(basis=0, sites={})
        yield ClientUpdate(client="site-0", run="r", round=request.round, delta=delta, spent=self.spent)

    def close(self) -> None: ...


@pytest.mark.parametrize(
    "claim",
    [
        *({"noise_multiplier": noise} for noise in (1e300, 1e-200, 1.1e4, 0.9e-2, float("nan"))),
        *({"steps": steps} for steps in (0, 3, 10**18)),
        *({"sample_rate": rate} for rate in (0.0, 1.1, float("nan"))),
    ],
)
def test_what_no_participation_can_spend_is_a_failed_reply(tmp_path, claim):
    cohort = Reported(Claims(replace(SOUND, **claim)), tmp_path / "spent.jsonl", most_steps=2)
    (reply,) = cohort.ask(["site-0"], asked_in(1))
    assert isinstance(reply, Refusal) and reply.reason == RefusalReason.FAILED
    assert not (tmp_path / "spent.jsonl").exists()


def test_a_torn_line_of_the_journal_does_not_spoil_the_next(tmp_path):
    journal = tmp_path / "spent.jsonl"
    members = [Member(client="site-0", examples=10)]
    cohort = Reported(Claims(SOUND), journal, most_steps=2)
    for number in (1, 2, 3):
        list(cohort.ask(["site-0"], asked_in(number)))
        with journal.open("a") as file:
            file.write('{"client": "site-0", "rou')
        assert reported_events(journal, members) == {"site-0": (SOUND,) * number}


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
