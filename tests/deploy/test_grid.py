"""What a node may put into Flower's objects instead of a reply: none of it raises in the server, none makes it grow."""

import hashlib
import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, ObjectTree, PullObjectResponse
from flwr.proto.message_pb2 import Message as Proto
from flwr.proto.message_pb2 import Metadata as ProtoMetadata
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.run import Run

from fedlora.deploy import grid as grid_module
from fedlora.deploy.grid import PromptGrid

pytestmark = pytest.mark.fault("F26", "F28")


def part(kind: str, children: Sequence[bytes], body: bytes) -> bytes:
    """An object as Flower stores it, by the digest of these bytes."""
    head = HEAD_VALUE_DIVIDER.join([kind, ",".join(map(name, children)), str(len(body))])
    return head.encode() + HEAD_BODY_DIVIDER + body


def name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def message(*children: bytes) -> bytes:
    words = ProtoMetadata(
        run_id=7, src_node_id=5, dst_node_id=1, reply_to_message_id="asked", ttl=100, message_type="train",
        created_at=time.time(),
    )  # fmt: skip
    return part("Message", children, Proto(metadata=words).SerializeToString())


class Stored:
    """A SuperLink's store with one reply in it; `gone` are parts that are still being uploaded."""

    def __init__(self, root: bytes, parts: Sequence[bytes], gone: Sequence[bytes] = ()) -> None:
        for content in (root, *parts):
            validate_object_content(content)  # all that Flower looks at
        self.root, self.parts = root, [root, *parts]
        self.gone = {name(content) for content in gone}
        self.pulled = 0

    def PullMessages(self, request: object) -> SimpleNamespace:  # noqa: N802
        inner = [ObjectTree(object_id=name(content)) for content in self.parts[1:]]
        words = ProtoMetadata(reply_to_message_id="asked", message_id=name(self.root))
        tree = ObjectTree(object_id=name(self.root), children=inner)
        return SimpleNamespace(messages_list=[Proto(metadata=words)], message_object_trees=[tree])

    def PullObject(self, request) -> PullObjectResponse:  # noqa: N802
        if request.object_id in self.gone:
            return PullObjectResponse(object_found=True, object_available=False)
        (content,) = [content for content in self.parts if name(content) == request.object_id]
        self.pulled += len(content)
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request: object) -> ConfirmMessageReceivedResponse:  # noqa: N802
        return ConfirmMessageReceivedResponse()


class Offline(PromptGrid):
    """Ours, with a store of a test's own in the place of the HTTP client."""

    def over(self, stored: Stored) -> "Offline":
        self.stored, self.node = stored, Node(node_id=1)
        self._run = Run.create_empty(7)
        return self

    @property
    def _runtime_client(self):
        return self.stored


def grid_over(stored: Stored) -> PromptGrid:
    """A grid whose SuperLink is this store."""
    return Offline("127.0.0.1:1", True, None, token="t").over(stored)


def sound() -> tuple[bytes, list[bytes]]:
    """A reply of one array."""
    content = RecordDict({"r": ArrayRecord({"a": Array(dtype="uint8", shape=(3,), stype="s", data=b"abc")})})
    array = content["r"]["a"]
    chunks = [chunk.deflate() for chunk in array.children.values()]
    parts = [content.deflate(), content["r"].deflate(), array.deflate(), *chunks]
    return message(content.deflate()), parts


NO_MESSAGES = {
    "neither content nor error": (message(), []),
    **{
        what: (message(inner), [inner])
        for what, inner in {
            "an array that is no JSON": part("Array", [], b"not json"),
            "a config of garbage": part("ConfigRecord", [], b"\xff\xff"),
            "a chunk for content": part("ArrayChunk", [], b"x"),
            "an array for content": part(
                "Array", [], b'{"dtype":"u","shape":[1],"stype":"s","arraychunk_ids":[]}'
            ),
            "a child that was never sent": part("RecordDict", [b"nobody has it"], b"{}"),
        }.items()
    },
}


@pytest.mark.parametrize("what", list(NO_MESSAGES))
def test_whatever_a_node_stores_as_its_reply_comes_as_an_error(what):
    (found,) = grid_over(Stored(*NO_MESSAGES[what])).pull_messages(["asked"])
    assert found.has_error() and found.metadata.reply_to_message_id == "asked"


def test_records_in_each_other_a_thousand_deep_come_as_an_error():
    chain = [part("ArrayChunk", [], b"x")]
    for _ in range(1500):
        chain.append(part("RecordDict", [chain[-1]], b"{}"))
    (found,) = grid_over(Stored(message(chain[-1]), chain)).pull_messages(["asked"])
    assert found.has_error()


def test_a_whole_reply_comes_as_it_is_and_one_that_is_under_way_later():
    root, parts = sound()
    stored = Stored(root, parts, gone=parts[-1:])
    grid = grid_over(stored)
    assert grid.pull_messages(["asked"]) == []
    stored.gone.clear()
    (found,) = grid.pull_messages(["asked"])
    assert isinstance(found, Message) and found.content["r"]["a"].data == b"abc"


def test_a_reply_larger_than_any_request_is_not_fetched(monkeypatch):
    monkeypatch.setattr(grid_module, "ROOM", 1000)
    chunks = [part("ArrayChunk", [], bytes([number]) * 400) for number in range(50)]
    stored = Stored(message(*chunks), chunks)
    (found,) = grid_over(stored).pull_messages(["asked"])
    assert found.has_error() and stored.pulled < 4000


def test_a_reply_of_too_many_parts_is_not_fetched(monkeypatch):
    monkeypatch.setattr(grid_module, "MOST_OBJECTS", 10)
    chunks = [part("ArrayChunk", [], bytes([number])) for number in range(20)]
    stored = Stored(message(*chunks), chunks)
    (found,) = grid_over(stored).pull_messages(["asked"])
    assert found.has_error() and stored.pulled == 0
