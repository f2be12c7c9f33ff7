"""A data owner's node releases once for a debit; nothing a server sends makes it raise or overspend."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from fedlora.config.load import load_node
from fedlora.config.node import NodeConfig
from fedlora.data.own import own_records
from fedlora.deploy.node import DeployedNode
from fedlora.deploy.server import _fits
from fedlora.errors import ConfigError, DataError
from fedlora.federation.store import Store
from fedlora.transport.flower_client import Hello
from fedlora.transport.wire import DIGEST_BYTES, MAGIC, decode_reply, encode_request
from fedlora.values import FRAME, ClientUpdate, Delta, RefusalReason, TrainRequest, Witness
from tests.deploy.node_text import node_text
from tests.deploy.nodes import debits, reason


@pytest.mark.fault("F24")
def test_the_same_request_gets_the_same_bytes_also_from_a_new_process_and_is_debited_once(
    config, request_one
):
    frame = encode_request(request_one)
    first = DeployedNode(config).answer(frame)
    assert isinstance(decode_reply(first), ClientUpdate)
    assert DeployedNode(config).answer(frame) == first
    assert debits(config) == 1


def outbox(config: NodeConfig) -> list[int]:
    """The rounds whose replies are kept."""
    paths = Path(f"{config.ledger}.outbox").glob("*.reply")
    kept = [path for path in paths if path.read_bytes().partition(b"\n")[2]]
    return sorted(int(path.stem.rpartition("-")[2]) for path in kept)


def test_a_reply_is_kept_until_the_server_says_it_has_it(config, request_one):
    budget = config.budget.model_copy(update={"max_participations": 9})
    node = DeployedNode(config.model_copy(update={"budget": budget}))
    frames = {n: encode_request(replace(request_one, round=n)) for n in range(1, 6)}
    told = {1: decode_reply(node.answer(frames[1])).ledger}
    assert outbox(config) == [1]
    told[2] = decode_reply(node.answer(frames[2])).ledger  # no word of the first
    assert outbox(config) == [1, 2]
    another = node.answer(encode_request(replace(request_one, run="another")))
    told[3] = decode_reply(node.answer(frames[3], told[1])).ledger
    assert outbox(config) == [1, 2, 3]  # another run's reply to its round 1
    # A later one that was heard stands for those before it; another run's server knows nothing of this one's.
    node.answer(frames[4], told[3])
    assert outbox(config) == [1, 4]
    assert node.answer(encode_request(replace(request_one, run="another"))) == another


def test_what_was_acknowledged_is_refused_and_not_made_again(config, request_one):
    budget = config.budget.model_copy(update={"max_participations": 9})
    told = config.model_copy(update={"budget": budget})
    frames = [encode_request(replace(request_one, round=n)) for n in (1, 2)]
    heard = decode_reply(DeployedNode(told).answer(frames[0])).ledger
    DeployedNode(told).answer(frames[1], heard)
    for echo in (heard, None):  # whatever the server remembers
        assert reason(DeployedNode(told).answer(frames[0], echo)) == RefusalReason.BAD_REQUEST
    assert debits(told) == 2


@pytest.mark.parametrize("lie", [Witness(seq=1, head="0" * 64), Witness(seq=99, head="0" * 64)])
def test_a_server_that_says_what_the_ledger_does_not_hold_empties_nothing(config, request_one, lie):
    frames = [encode_request(replace(request_one, round=n)) for n in (1, 2)]
    first = DeployedNode(config).answer(frames[0])
    assert reason(DeployedNode(config).answer(frames[1], lie)) == RefusalReason.LEDGER
    assert outbox(config) == [1] and DeployedNode(config).answer(frames[0]) == first


def test_what_is_asked_for_now_is_sent_again_whatever_the_server_says_it_has(config, request_one):
    frame = encode_request(request_one)
    first = DeployedNode(config).answer(frame)
    assert DeployedNode(config).answer(frame, decode_reply(first).ledger) == first
    assert debits(config) == 1


def test_two_nodes_never_draw_the_same_noise(config, request_one, tmp_path):
    elsewhere = config.model_copy(update={"ledger": str(tmp_path / "other" / "ledger.jsonl")})
    frame = encode_request(request_one)
    assert DeployedNode(config).answer(frame) != DeployedNode(elsewhere).answer(frame)


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

    monkeypatch.setattr("fedlora.deploy.node.decode_request", breaks)
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


def test_what_the_server_remembers_stays_in_its_own_file_whatever_the_client_is_called(tmp_path):
    store = Store(tmp_path / "run")
    names = ["../../victim", "..", ".", "", "%", "%2E", "a/b", "a%2Fb", "kliniek ü", "ü" * 250, "ü" * 251]
    for number, name in enumerate(names):
        store.memory.keep(name, 1, Delta(basis=FRAME, sites={"x": torch.full((1,), float(number))}))
    store.memory.commit()
    for number, name in enumerate(names):
        assert store.memory.recall(name, 1).sites["x"].item() == number
    assert [*tmp_path.rglob("*")] == [tmp_path / "run", store.memory.path]


@pytest.mark.parametrize(("took", "left"), [(0.0, 2.0), (0.3, 1.7), (1.999, 0.001), (2.0, 2.0), (7.5, 0.5)])
@pytest.mark.parametrize("kind", ["kept", "refusal", "garbage"])
def test_a_reply_leaves_at_a_multiple_of_the_quantum_whatever_it_is(
    config, request_one, monkeypatch, took, left, kind
):
    if kind == "kept":
        DeployedNode(config).answer(encode_request(request_one))
    clock, slept = [100.0], []
    monkeypatch.setattr("fedlora.deploy.node.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("fedlora.deploy.node.time.sleep", slept.append)
    node = DeployedNode(config.model_copy(update={"reply_quantum_s": 2.0}))
    real = node._reply

    def timed(frame: bytes, echo: Witness | None) -> bytes:
        clock[0] += took
        return real(frame, echo)

    monkeypatch.setattr(node, "_reply", timed)
    asked = request_one if kind == "kept" else replace(request_one, round=0)
    node.answer(b"" if kind == "garbage" else encode_request(asked))
    assert slept == [pytest.approx(left)]


def test_updates_of_a_node_have_one_length_and_its_refusals_another(config, request_one):
    node = DeployedNode(config)
    updates = [node.answer(encode_request(replace(request_one, round=n))) for n in (1, 1 << 40)]
    assert [type(decode_reply(frame)) for frame in updates] == [ClientUpdate] * 2
    assert len({len(frame) for frame in updates}) == 1
    refusals = [node.answer(encode_request(replace(request_one, round=n))) for n in (0, 2, 1 << 50)]
    assert {reason(frame) for frame in refusals} == {RefusalReason.BAD_REQUEST, RefusalReason.BUDGET}
    assert len({len(frame) for frame in refusals}) == 1


def test_what_leaves_is_a_fixed_header_and_the_trained_tensors_and_nothing_else(config, request_one):
    node = DeployedNode(config)
    frame = node.answer(encode_request(request_one))
    start = len(MAGIC) + 4
    (length,) = struct.unpack("<I", frame[len(MAGIC) : start])
    header = json.loads(frame[start : start + length])
    tensors = {name: (dtype, shape) for name, dtype, shape in header.pop("tensors")}
    fields = {"kind", "client", "run", "round", "basis", "spent", "ledger", "accuracy"}
    assert header.keys() == fields and header["accuracy"] is None
    # Exactly what is trained, which is what is clipped and noised: every B, the head, no A, no optimiser.
    trained = {name.removesuffix(".lora_B"): p for name, p in node._model.trained.items()}
    sent = {name.partition(":")[2]: shape for name, (_, shape) in tensors.items()}
    assert sent == {name: list(parameter.shape) for name, parameter in trained.items()}
    numbers = sum(parameter.numel() for parameter in trained.values())
    assert len(frame) == start + length + 4 * numbers + DIGEST_BYTES


def test_whatever_breaks_on_the_node_leaves_it_as_a_code_without_words(config, request_one, tmp_path):
    ledger = Path(config.ledger)
    ledger.parent.mkdir()
    ledger.write_text("no ledger, but a secret\n")
    frame = DeployedNode(config).answer(encode_request(request_one))
    assert reason(frame) == RefusalReason.LEDGER
    assert b"secret" not in frame
    assert ledger.read_text() == "no ledger, but a secret\n"


def test_labels_are_numbered_as_declared_also_where_the_node_lacks_a_class(config, tmp_path):
    train = tmp_path / "own.tsv"
    train.write_text("sentence\ttopic\nrain\tweather\nbread\tkitchen\n")
    data = config.data.model_copy(update={"train": str(train)})
    records = own_records(config.model_copy(update={"data": data}))
    assert records.texts == ["rain", "bread"]
    assert records.labels.tolist() == [0, 2]
    train.write_text("sentence\ttopic\nrain\tweather\ngoal\tsport\n")
    with pytest.raises(DataError, match="1 labels are not among") as refused:
        own_records(config.model_copy(update={"data": data}))
    assert "sport" not in str(refused.value)  # it is a record's


def test_a_classifier_without_classes_is_refused(tmp_path, tiny_encoder, topic_files):
    path = tmp_path / "node.yaml"
    text = node_text(tmp_path, tiny_encoder, topic_files[0], records=360)
    path.write_text(text.replace("classes: [weather, music, kitchen]\n", ""))
    with pytest.raises(ConfigError, match="classes"):
        load_node(path)
