"""The process that stays at a data owner's node: it answers what the SuperNode receives, with our own code only.

It takes the place of `flower-superexec`, which installs and runs whatever app the server sends, in a new process for
every message. Here the app is fedlora as it is installed, the model is loaded once, and the server's code is dropped.
"""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedlora.config.node import NodeConfig
from fedlora.deploy.endpoint import UnwantedError
from fedlora.deploy.supernode import (
    AwayError,
    HalfMessageError,
    LostTaskError,
    Patience,
    SuperNode,
    forbid_core_dumps,
    require_known_flwr,
)
from fedlora.disk import make_directory, try_lock
from fedlora.errors import ConfigError, without_records
from fedlora.transport.flower_client import Hello, client_app

log = logging.getLogger(__name__)

BUSY_S = 0.1
IDLE_S = 0.5
"""How long to wait before asking for a task again: from BUSY_S after one, up to IDLE_S while none comes."""
AWAY_S = 2.0
"""The same while the SuperNode is away, from BUSY_S too."""
GRACE_S = 5.0
"""What a message in work gets when the process is to stop: less than the 10 s after which Docker kills."""


class Interrupted(BaseException):
    """The grace is over. No Exception, so that nothing on the way takes it for a failure of its own."""


class Stop:
    """SIGTERM and SIGINT: no further message is begun, and one in work is dropped after GRACE_S, or when asked twice.

    Dropping it is what a power cut would do: what was debited stays debited, and is paid anew if asked again.
    """

    def __init__(self) -> None:
        self.asked = False
        self._working = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """The signals are ours meanwhile; main thread only."""
        ours = {signal.SIGTERM: self._ask, signal.SIGINT: self._ask, signal.SIGALRM: self._end}
        before = {number: signal.signal(number, handler) for number, handler in ours.items()}
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def working(self) -> Iterator[None]:
        """The block may be dropped: Interrupted comes out of it then."""
        self._working = True
        try:
            yield
        finally:
            self._working = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            self._end(number, frame)
        self.asked = True
        # Again every second: an exception that meets a finaliser is swallowed there.
        signal.setitimer(signal.ITIMER_REAL, GRACE_S, 1.0)

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self._working:
            raise Interrupted


def run_node(config: NodeConfig, supernode: Callable[[], SuperNode]) -> None:
    """Answers for one data owner until it is told to stop by SIGTERM or SIGINT.

    Args:
        config: the owner's.
        supernode: asked for when the model is loaded; it may wait.

    Raises:
        ConfigError: another executor serves this ledger.
        UnwantedError: the SuperNode will not have us.
        FedLoraError: the records, the model or the budget are not what node.yaml says.
    """
    require_known_flwr()
    forbid_core_dumps()
    stop = Stop()
    with stop.heard(), alone(Path(config.ledger)):
        try:
            with stop.working():
                app, attached = _ready(config), supernode()
        except Interrupted:
            return
        attend(app, attached, stop)
    log.info("stopped")


def attend(app: ClientApp, supernode: SuperNode, stop: Stop) -> None:
    """Asks the SuperNode for messages and answers them by `app`, one at a time, until `stop` is asked for.

    It outlives the SuperNode: one log line when it goes away, one when it is back.

    Raises:
        UnwantedError: the SuperNode will not have us.
    """
    attached: bool | None = None
    wait, patience = BUSY_S, Patience()
    with supernode.connected() as desk:
        while not stop.asked:
            try:
                token = desk.acquire()
            except AwayError as error:
                if attached is not False:
                    log.warning("waiting for the SuperNode at %s: %s", supernode.address, error)
                attached, wait = False, min(2 * wait, AWAY_S)
            else:
                if attached is not True:
                    log.info("attached to the SuperNode at %s", supernode.address)
                    wait = BUSY_S
                attached = True
                if token is not None:
                    _serve(app, supernode, token, patience, stop)
                wait = BUSY_S if token is not None else min(1.02 * wait, IDLE_S)
            if not stop.asked:
                time.sleep(wait)


@contextmanager
def alone(ledger: Path) -> Iterator[None]:
    """No other executor serves this ledger meanwhile; the lock goes with the process, however it ends.

    Raises:
        ConfigError: another one does, or the lock cannot be made.
    """
    path = Path(f"{ledger}.lock")
    try:
        make_directory(path.parent)
        file = path.open("a")
    except OSError as error:
        raise ConfigError(f"ledger: {path} cannot be written ({error.strerror}); make it writable") from None
    with file:
        if not try_lock(file):
            raise ConfigError(
                f"ledger: {path} is held by another process, and one at a time serves a ledger; stop that one first"
            )
        yield


def _ready(config: NodeConfig) -> ClientApp:
    """The node's own app, the base model and the records in memory: what is wrong with them shows now."""
    from fedlora.deploy.node import DeployedNode  # imports torch, which a second executor need not wait for

    began = time.monotonic()
    node = DeployedNode(config)
    node.ready()
    client = config.client
    log.info("%s: model %s loaded in %.1f s", client, config.model.name, time.monotonic() - began)
    hello = Hello(client=client, records=config.declared_records, classes=tuple(config.classes))
    return client_app(lambda context: hello, lambda context, frame, echo: node.answer(frame, echo))


def _serve(app: ClientApp, supernode: SuperNode, token: str, patience: Patience, stop: Stop) -> None:
    """One message is answered, or given up: its sender asks again, and gets what the outbox has."""
    try:
        with supernode.task(token, lambda: stop.asked) as task:
            try:
                with stop.working():
                    message, context = task.pull(patience)
            except HalfMessageError as error:
                log.warning("a message is given back: %s", error)
                gone = Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason="half of the message arrived")
                reply = Message(gone, reply_to=error.message)
                task.push(reply, error.context)
            else:
                task.push(_answered(app, message, context, stop), context)
    except Interrupted:
        log.warning("a message that was still arriving is left: told to stop")
    except (AwayError, LostTaskError) as error:
        log.warning("a task was lost: %s; its reply waits in the outbox if there is one", error)
    except UnwantedError:
        raise
    except Exception as error:
        # The message is the server's making: whatever is wrong with it must not end the node.
        log.error("a task was given up: %s", without_records(error))


def _answered(
    app: Callable[[Message, Context], Message], message: Message, context: Context, stop: Stop
) -> Message:
    """The app's reply, or an error with fixed words."""
    kind, began = message.metadata.message_type, time.monotonic()
    try:
        with stop.working():
            reply = app(message, context)
        log.info("a %.40r message answered in %.1f s", kind, time.monotonic() - began)
        return reply
    except Interrupted:
        log.warning("a %.40r message dropped: told to stop", kind)
        return Message(
            Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason="the node is stopping"), reply_to=message
        )
    except Exception as error:
        log.error("a %.40r message could not be answered: %s", kind, without_records(error))
        return Message(
            Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason="the node's own log says why"),
            reply_to=message,
        )
