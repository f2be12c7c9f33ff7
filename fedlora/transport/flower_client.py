"""The node's end of Flower's messages: a hello, and one flat array of our own bytes each way.

Nothing here imports torch: a node answers a hello in a fresh process, which should be a light one.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedlora.errors import WireError, without_records
from fedlora.transport import FRAME_VERSION, QUOTED
from fedlora.values import Witness

log = logging.getLogger(__name__)

HELLO = "query.hello"
TRAIN = "train"
FRAME = "fedlora.frame"
MOST_RECORDS = 10**9
MOST_CLASSES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """How a node presents itself: owner's name, declared number of records, classes in their order."""

    client: str
    records: int
    classes: tuple[str, ...]


def client_app(
    greet: Callable[[Context], Hello], answer: Callable[[Context, bytes, Witness | None], bytes]
) -> ClientApp:
    """A ClientApp that says hello by `greet` and turns a request's frame, and its echo, into a reply's by `answer`.

    An exception in either becomes an error without words, since its text could carry a record; the node's own
    log has it.
    """

    def _answer(context: Context, content: RecordDict) -> bytes:
        return answer(context, frame_of(content), echo_of(content))

    app = ClientApp()
    app.query("hello")(partial(_reply, lambda context, content: hello_content(greet(context))))
    app.train()(partial(_reply, lambda context, content: frame_content(_answer(context, content))))
    return app


def frame_content(frame: bytes, echo: Witness | None = None) -> RecordDict:
    """A frame as one array of raw bytes: Flower's cost is per array, and unlike a config it is chunked.

    echo: how far the server remembers the ledger of the node that it asks.
    """
    array = Array(dtype="uint8", shape=(len(frame),), stype=FRAME, data=frame)
    content = RecordDict({"fedlora": ArrayRecord({"frame": array})})
    if echo is not None:
        content["fedlora.echo"] = ConfigRecord({"seq": echo.seq, "head": echo.head})
    return content


def frame_of(content: RecordDict) -> bytes:
    """The frame in a message; WireError when there is none."""
    record = content.get("fedlora")
    array = record.get("frame") if isinstance(record, ArrayRecord) else None
    if array is None or array.stype != FRAME:
        raise WireError(f"records {sorted(content)} but no fedlora frame; run the same fedlora on both ends")
    return array.data


def echo_of(content: RecordDict) -> Witness | None:
    """How far the server remembers this node's ledger; None if it never saw it. WireError when malformed."""
    record = content.get("fedlora.echo")
    if record is None:
        return None
    words = dict(record) if isinstance(record, ConfigRecord) else {}
    seq, head = words.get("seq"), words.get("head")
    if not (isinstance(seq, int) and seq >= 1 and isinstance(head, str)):
        raise WireError(f"an echo of {seq!r} and {head!r}; run the same fedlora on both ends")
    return Witness(seq=seq, head=head)


def hello_content(hello: Hello) -> RecordDict:
    """A hello as one config record, with what both ends have to have in common."""
    words = {"client": hello.client, "records": hello.records, "classes": list(hello.classes)}
    return RecordDict(
        {"fedlora": ConfigRecord({**words, "version": version("fedlora"), "wire": FRAME_VERSION})}
    )


def hello_of(content: RecordDict) -> Hello:
    """The hello in a message; WireError when it is malformed, or of another version of the frames."""
    record = content.get("fedlora")
    words = dict(record) if isinstance(record, ConfigRecord) else {}
    client, records, classes = words.get("client"), words.get("records"), words.get("classes")
    if not (
        (isinstance(client, str) and client)
        and (type(records) is int and 1 <= records <= MOST_RECORDS)
        and isinstance(classes, list)
    ):
        raise WireError(
            f"a hello of {_quoted(client)} with {_quoted(records)} records; run the same fedlora on both ends"
        )
    names = tuple(str(name) for name in classes)
    if len(names) > MOST_CLASSES or sum(map(len, names)) > MOST_CLASSES * QUOTED:
        raise WireError(f"a hello of {_quoted(client)} with {len(names)} classes, {MOST_CLASSES} is the most")
    if words.get("wire") != FRAME_VERSION:
        raise WireError(
            f"a hello of {_quoted(client)} from fedlora {_quoted(words.get('version'))} with frames of version "
            f"{_quoted(words.get('wire'))}, "
            f"but here is fedlora {version('fedlora')} with version {FRAME_VERSION}; install the same on both ends"
        )
    return Hello(client=client, records=records, classes=names)


def _quoted(word: object) -> str:
    """A stranger's word, as much of it as goes into one of our lines."""
    return repr(word if isinstance(word, int) else str(word)[:QUOTED])[: QUOTED + 2]


def _reply(
    respond: Callable[[Context, RecordDict], RecordDict], message: Message, context: Context
) -> Message:
    try:
        return Message(respond(context, message.content), reply_to=message)
    except Exception as error:
        kind, words = message.metadata.message_type, without_records(error)
        log.error("a %s message could not be answered: %s", kind, words)
        return Message(
            Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason="the node's own log says why"),
            reply_to=message,
        )
