"""No message of a server costs a node what it did not ask for, and no frame of either end takes more than it is."""

import pickle
import sys
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedlora.deploy.node import DeployedNode
from fedlora.errors import WireError
from fedlora.transport.flower_client import TRAIN, frame_content, frame_of
from fedlora.transport.wire import decode_reply, decode_request, encode_request
from fedlora.values import ClientUpdate, Refusal, RefusalReason, TrainRequest
from tests.deploy.nodes import debits, first_request, reason
from tests.faults import rogues
from tests.faults.grid import RUN
from tests.faults.kills import PARTICIPATIONS
from tests.faults.rogues import array, records
from tests.faults.server import app_of, fixture_of_loaded, node_of

loaded = fixture_of_loaded

MOST_BYTES, MOST_S = 64 << 20, 1.0

Decode = Callable[[bytes], object]


@pytest.fixture(scope="module")
def request_one(loaded) -> TrainRequest:
    """Of an honest server."""
    return first_request(loaded.config)


@pytest.fixture
def node(loaded, tmp_path) -> DeployedNode:
    """It was never asked."""
    return node_of(loaded.config, tmp_path / "node", "site-0", loaded)


def in_a_new_process(node: DeployedNode) -> DeployedNode:
    """The same node, which remembers nothing but its disk."""
    again = DeployedNode(node.config)
    again.__dict__["_model"], again.__dict__["_terms"] = node._model, node._terms
    return again


def answered(node: DeployedNode, content: RecordDict) -> Message:
    """What the node's app says to a message."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, 1, 1
    context = Context(run_id=RUN, node_id=1, node_config={}, state=RecordDict(), run_config={})
    return app_of(node)(Message(content, 1, TRAIN), context)


def costs(node: DeployedNode, content: RecordDict, words: str = "fedlora") -> str:
    """What is broken by a message that is no request: it is refused without words, and nothing is read or paid."""
    reader = DeployedNode(node.config)  # it would have to load its records, and that can be seen
    reply = answered(reader, content)
    found = []
    if reply.has_error():
        found += [] if words not in reply.error.reason else [f"it told {reply.error.reason}"]
    elif not isinstance(decode_reply(frame_of(reply.content)), Refusal):
        found.append("it was answered")
    if "_records" in reader.__dict__ or "_examples" in reader.__dict__:
        found.append("records were read")
    return "; ".join([*found, *(["it was paid"] if Path(node.config.ledger).exists() else [])])


def require_honest_work(node: DeployedNode, request: TrainRequest) -> None:
    """Whatever came before, the next honest request is answered, and it is the first that was paid."""
    reply = answered(node, frame_content(encode_request(request)))
    assert isinstance(decode_reply(frame_of(reply.content)), ClientUpdate) and debits(node.config) == 1


@pytest.mark.fault("F24")
def test_instructions_sent_again_in_any_order_get_the_same_bytes_and_cost_nothing(node, request_one):
    frames = [encode_request(replace(request_one, round=n)) for n in range(1, PARTICIPATIONS + 1)]
    replies = [node.answer(frame) for frame in frames]
    paid = Path(node.config.ledger).read_bytes()
    assert len(set(replies)) == debits(node.config) == PARTICIPATIONS
    for asked in (node, in_a_new_process(node)):
        # All is spent, and these bytes are still the ones.
        for frame, reply in reversed(list(zip(frames, replies, strict=True))):
            assert asked.answer(frame) == reply
        more = encode_request(replace(request_one, round=PARTICIPATIONS + 1))
        assert reason(asked.answer(more)) == RefusalReason.BUDGET
    assert Path(node.config.ledger).read_bytes() == paid


@pytest.mark.fault("F24", "F25")
def test_after_another_request_for_its_round_the_first_still_gets_its_bytes(node, request_one):
    first = encode_request(request_one)
    head = {name: tensor + 1 for name, tensor in request_one.adapters.head.items()}
    other = encode_request(replace(request_one, adapters=replace(request_one.adapters, head=head)))
    reply = node.answer(first)
    paid = Path(node.config.ledger).read_bytes()
    for asked in (node, in_a_new_process(node)):
        assert reason(asked.answer(other)) == RefusalReason.BAD_REQUEST
        assert "_records" not in asked.__dict__
        assert asked.answer(first) == reply
    assert Path(node.config.ledger).read_bytes() == paid


@pytest.mark.fault("F26")
def test_a_damaged_request_costs_nothing(node, request_one):
    frame = encode_request(request_one)
    for what, change in rogues.DAMAGED.items():
        assert costs(node, frame_content(change(frame))) == "", what
    require_honest_work(node, request_one)


REQUESTS: dict[str, rogues.Change] = {
    "a tensor twice": rogues.UNREADABLE["a tensor twice"],
    "complex numbers": rogues.UNREADABLE["complex numbers"],
    "text": rogues.UNREADABLE["text"],
    "objects": rogues.UNREADABLE["objects"],
    "a shape of more": rogues.UNREADABLE["a shape of more"],
    "a field that there is not": rogues.UNREADABLE["a field that there is not"],
    "a reply": rogues.with_header(lambda header: header.update(kind="update")),
    "a rate of 1e400": rogues.with_header(lambda header: header.update(learning_rate=float("inf"))),
    "a noise of the server's": rogues.with_header(lambda header: header.update(noise_multiplier=0.0)),
    "a run of half a letter": rogues.with_header(lambda header: header.update(run="\ud800")),
    "a run of a megabyte": rogues.with_header(lambda header: header.update(run="r" * (1 << 20))),
}


@pytest.mark.fault("F27")
def test_a_request_that_no_server_writes_costs_nothing(node, request_one):
    frame = encode_request(request_one)
    for what, change in REQUESTS.items():
        assert costs(node, frame_content(change(frame))) == "", what
    require_honest_work(node, request_one)


NO_REQUEST: dict[str, Callable[[bytes], RecordDict]] = {
    "no record": lambda frame: RecordDict(),
    "a frame in another record": lambda frame: RecordDict({"other": records(frame=array(frame))["fedlora"]}),
    "a frame of another name": lambda frame: records(other=array(frame)),
    "another serialisation": lambda frame: records(frame=array(frame, "numpy.ndarray")),
    "a frame as config": lambda frame: RecordDict({"fedlora": ConfigRecord({"frame": frame})}),
    "an echo of no number": lambda frame: _echoing(frame, seq="1", head="h"),
    "an echo of no line": lambda frame: _echoing(frame, seq=0, head="h"),
    "an echo of no digest": lambda frame: _echoing(frame, seq=1, head=b"h"),
}


def _echoing(frame: bytes, **words: int | str | bytes) -> RecordDict:
    content = frame_content(frame)
    content["fedlora.echo"] = ConfigRecord(words)
    return content


@pytest.mark.fault("F26")
def test_a_message_that_is_no_request_is_an_error_without_words_and_costs_nothing(node, request_one):
    frame = encode_request(request_one)
    for what, content in NO_REQUEST.items():
        assert costs(node, content(frame), words="echo") == "", what
    require_honest_work(node, request_one)


@pytest.mark.fault("F29")
def test_nothing_that_a_server_sends_is_run(node, request_one, tmp_path):
    mark, seen = tmp_path / "mark", []
    listening = [True]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if listening[0] and event == "pickle.find_class" and arguments[1] == "mkdir":
            seen.append(arguments)

    sys.addaudithook(hook)  # for ever, so it is told when to stop
    frame = encode_request(request_one)
    for kind, data in rogues.executables(mark).items():
        for what, content in rogues.as_messages(kind, data).items():
            assert costs(node, content(frame)) == "", what
    assert not seen and not mark.exists()
    pickle.loads(rogues.executables(mark)["pickle"])
    listening[0] = False
    assert seen and mark.exists()  # it would have shown
    require_honest_work(node, request_one)


def peak_of(call: Callable[[], object]) -> int:
    """Most bytes that Python and numpy held at once for `call`, beyond what was there before."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(decode: Decode, frame: bytes) -> None:
    with pytest.raises(WireError):
        decode(frame)


@pytest.mark.fault("F28")
@pytest.mark.parametrize("decode", [decode_reply, decode_request])
@pytest.mark.parametrize("what", list(rogues.GREEDY))
def test_a_small_frame_that_asks_for_much_gets_little_memory_and_little_time(what, decode):
    frame = rogues.GREEDY[what]()
    assert len(frame) < 5 << 20 and peak_of(lambda: refused(decode, frame)) < MOST_BYTES
    began = time.process_time()
    refused(decode, frame)
    assert time.process_time() - began < MOST_S


@pytest.mark.fault("F28")
@pytest.mark.parametrize("what", list(rogues.MANY))
def test_a_header_of_many_small_things_gets_little_memory_too(what):
    frame = rogues.MANY[what]()

    def read() -> None:
        with suppress(WireError):
            decode_reply(frame)

    assert peak_of(read) < MOST_BYTES


@pytest.mark.fault("F28")
@pytest.mark.parametrize(("what", "copies"), [("junk", 0), ("another digest", 1), ("no such tensor", 4)])
def test_a_large_frame_is_copied_no_more_often_than_reading_it_takes(what, copies):
    size = 32 << 20
    frame = rogues.large(what, size)

    def read() -> None:
        with suppress(WireError):
            decode_reply(frame)

    # Cut out, made native, and written once more to see that it is the one way to write it.
    assert peak_of(read) < (copies + 0.1) * size
