"""A grid in this process: nodes are callables behind node ids, and a tape has all that they were asked and said.

As at Flower's SuperLink, a message has an id, a reply is handed over at most once, and whoever asks anew after a death
has no message left from before. What goes wrong on the way is told by node and round: `wire.fates[2, 3] = is_lost`.
"""

import json
import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedlora.errors import WireError
from fedlora.transport.flower_client import TRAIN, echo_of, frame_content, frame_of
from fedlora.transport.wire import decode_request
from fedlora.values import Witness

RUN = 7

App = Callable[[Message, Context], Message]
"""What a node does with a message: a ClientApp of Flower is one."""

Fate = Callable[[Message, Message], Sequence[Message]]
"""(asked, reply) -> what arrives in the reply's place, one at each pull."""


def is_lost(asked: Message, reply: Message) -> list[Message]:
    """Nothing ever arrives."""
    return []


def arrives_twice(asked: Message, reply: Message) -> list[Message]:
    """Whoever pulls again gets it again."""
    return [reply, reply]


def instead(content: RecordDict | bytes) -> Fate:
    """These records arrive, or a message with this frame, whatever the node said."""
    records = frame_content(content) if isinstance(content, bytes) else content
    return lambda asked, reply: [Message(records, reply_to=asked)]


def fails(code: int) -> Fate:
    """Flower's error with this code arrives, as it does for a node that it takes for gone."""
    return lambda asked, reply: [Message(Error(code=code, reason="as a test will have it"), reply_to=asked)]


def round_of(message: Message) -> int:
    """The round that a message asks for; 0 for a hello and for what is no request."""
    if message.metadata.message_type != TRAIN:
        return 0
    with suppress(WireError):
        return decode_request(frame_of(message.content)).round
    return 0


@dataclass(frozen=True, kw_only=True)
class Taped:
    """A message of a round at a node: `asked`, or `said` in reply. frame: no bytes where it has none."""

    what: str
    node: int
    round: int
    frame: bytes
    echo: Witness | None


class Tape:
    """What nodes were asked and said, in one file that every process appends to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, what: str, node: int, round_: int, message: Message) -> None:
        """The message is on the tape."""
        frame, echo = b"", None
        with suppress(WireError):
            if message.has_content():
                frame, echo = frame_of(message.content), echo_of(message.content)
        words = {"what": what, "node": node, "round": round_, "frame": frame.hex()}
        words["echo"] = None if echo is None else [echo.seq, echo.head]
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps(words).encode() + b"\n")

    def read(self, what: str) -> list[Taped]:
        """All that was `asked`, or `said`, so far."""
        text = self.path.read_bytes() if self.path.exists() else b""
        found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith(b"\n")]
        return [
            Taped(
                what=what,
                node=words["node"],
                round=words["round"],
                frame=bytes.fromhex(words["frame"]),
                echo=Witness(seq=words["echo"][0], head=words["echo"][1]) if words["echo"] else None,
            )
            for words in found
            if words["what"] == what
        ]


@dataclass(slots=True, kw_only=True)
class _Letter:
    """A message on its way. child: of the process that answers it. replies: what is still to be handed over."""

    node: int
    round: int
    asked: Message
    child: int | None = None
    replies: list[Message] | None = None


def _release_locks() -> None:
    """Locks of whoever asked are its own: a fork would hold them when the other is dead."""
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if link.readlink().name == ".lock":
                os.close(int(link.name))


def _always(node: int) -> bool:
    return True


@dataclass(kw_only=True)
class Wire(Grid):
    """A Grid over `nodes`.

    nodes: by node id. names: of those who joined by a registered key.
    folder: where the tape lies, and the mail of processes.
    awake: whether a node can be reached now; what it is asked while it cannot waits until it can.
    apart: each message is answered by a process of its own, which outlives whoever asked; else in this one.
    fates: by node and round (0: a hello), what arrives in the place of a reply.
    holds: by node and round, what must be true before the reply arrives.
    """

    nodes: Mapping[int, App]
    folder: Path
    awake: Callable[[int], bool] = _always
    apart: bool = False
    names: Mapping[int, str] = field(default_factory=dict)
    fates: dict[tuple[int, int], Fate] = field(default_factory=dict)
    holds: dict[tuple[int, int], Callable[[], bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, 1, 1
        self.tape = Tape(self.folder / "tape.jsonl")
        self._letters: dict[str, _Letter] = {}

    def get_node_ids(self) -> list[int]:
        """Those awake."""
        return [node for node in self.nodes if self.awake(node)]

    def get_nodes(self) -> list[NodeInfo]:
        """Those awake, by name where they have one."""
        return [NodeInfo(node_id=node, name=self.names.get(node, "")) for node in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Their ids; '' for a node that there is not."""
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """What arrived in reply to them since the last pull."""
        return [reply for identifier in message_ids if (reply := self._pull(identifier)) is not None]

    def _push(self, message: Message) -> str:
        node = message.metadata.dst_node_id
        if node not in self.nodes:
            return ""
        identifier = message.metadata.__dict__["_message_id"] = uuid4().hex
        letter = _Letter(node=node, round=round_of(message), asked=message)
        self._letters[identifier] = letter
        self._carry(letter)
        return identifier

    def _carry(self, letter: _Letter) -> None:
        """The node gets it, if it is awake and did not yet."""
        if letter.child is not None or letter.replies is not None or not self.awake(letter.node):
            return
        if not self.apart:
            letter.replies = self._fated(letter, self._answered(letter))
            return
        letter.child = os.fork()
        if letter.child == 0:
            with suppress(BaseException):
                _release_locks()
                reply = pickle.dumps(self._answered(letter))
                mail = self._mail(letter)
                mail.with_suffix(".part").write_bytes(reply)
                mail.with_suffix(".part").rename(mail)
            os._exit(0)

    def _answered(self, letter: _Letter) -> Message:
        self.tape.note("asked", letter.node, letter.round, letter.asked)
        state = RecordDict()
        context = Context(run_id=RUN, node_id=letter.node, node_config={}, state=state, run_config={})
        reply = self.nodes[letter.node](letter.asked, context)
        self.tape.note("said", letter.node, letter.round, reply)
        return reply

    def _fated(self, letter: _Letter, reply: Message) -> list[Message]:
        fate = self.fates.get((letter.node, letter.round))
        return [reply] if fate is None else list(fate(letter.asked, reply))

    def _mail(self, letter: _Letter) -> Path:
        return self.folder / f"{letter.asked.metadata.message_id}.mail"

    def _pull(self, identifier: str) -> Message | None:
        letter = self._letters.get(identifier)
        if letter is None:
            return None
        self._carry(letter)
        if letter.child is not None and letter.replies is None and self._mail(letter).exists():
            os.waitpid(letter.child, 0)
            # Written by our own fork a moment ago.
            reply = pickle.loads(self._mail(letter).read_bytes())
            letter.replies = self._fated(letter, reply)
        held = not self.holds.get((letter.node, letter.round), lambda: True)()
        return letter.replies.pop(0) if letter.replies and not held else None

    # What our server never asks of a grid.

    def set_run(self, run: Run) -> None:
        """See Grid."""
        raise NotImplementedError

    @property
    def run(self) -> Run:
        """See Grid."""
        return Run.create_empty(RUN)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """See Grid."""
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """See Grid."""
        raise NotImplementedError
