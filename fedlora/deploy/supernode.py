"""A SuperNode's runtime API, as `flower-superexec` and `flwr-clientapp` speak it.

All of it is flwr's inside: it was read in flwr 1.41.0 and may be otherwise in any other, so another is refused. What of
Flower's own client is not used, and why: its retries end the process on a 401, its heartbeat on a lost task, its
version check on a mismatch; a process that stays has to outlive the first two and to say the third in one line.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

import httpx
from flwr.app import Context, Message
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, message_from_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    pull_and_inflate_object_from_tree,
)
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.utils import disable_process_dumping
from flwr.supernode.runtime.run_clientapp import push_message

from fedlora.deploy.endpoint import CALL_S, FLWR, Endpoint, SameVersion, UnwantedError, certificate_fault
from fedlora.errors import ConfigError, FedLoraError

log = logging.getLogger(__name__)

RETRY_S = 20.0
"""How long a task's calls are tried again: a SuperNode that is away for longer has forgotten the task."""


FIRST_S, MOST_S = 20.0, 160.0
"""How long the next piece of a message is waited for: at first, and at most."""


@dataclass(slots=True)
class Patience:
    """How long the next piece of a message is waited for; each half message doubles it, since the link may be slow.

    A SuperNode hands a message out while it is still receiving it, and, if its run was stopped meanwhile, keeps half of
    it for ever; Flower's own client waits two hours for that.
    """

    seconds: float = FIRST_S

    def grow(self) -> None:
        """A half message came."""
        self.seconds = min(2 * self.seconds, MOST_S)


class AwayError(FedLoraError):
    """Nothing answers at the SuperNode's address; it may later."""


class LostTaskError(FedLoraError):
    """The SuperNode does not know the task any more: it was restarted, or had given the task up."""


class HalfMessageError(FedLoraError):
    """What was handed out is half a message; `message` is it, without content, so that it can be answered."""

    def __init__(self, message: Message, context: Context) -> None:
        super().__init__("no more than half of a message came")
        self.message, self.context = message, context


class SuperNode(Endpoint):
    """The runtime API of one SuperNode in `--isolation process`."""

    @contextmanager
    def connected(self) -> Iterator["Desk"]:
        """Where its tasks are handed out, over one connection."""
        with self._client(self.asking()) as client:
            yield Desk(self.address, client)

    @contextmanager
    def task(self, token: str, stopping: Callable[[], bool]) -> Iterator["Task"]:
        """A task that was handed out; the SuperNode is told every 20 s or so that somebody works on it.

        Args:
            token: the task's.
            stopping: whether a call that finds nobody is not to be tried again.

        Raises:
            LostTaskError, AwayError, UnwantedError: from the block, whenever a call of the task finds so.
        """
        patient = RetryInvoker(
            lambda: exponential(base_delay=0.2, max_delay=2),
            httpx.TransportError,
            max_tries=None,
            max_time=RETRY_S,
            should_giveup=lambda error: stopping(),
        )
        with self._client([SameVersion(), RuntimeTokenHttpInterceptor(token)]) as beating:
            heartbeat = HeartbeatSender(_heartbeat(beating))
            heartbeat.start()
            try:
                with (
                    self._client([SameVersion(), RuntimeTokenHttpInterceptor(token)], patient) as client,
                    _told(),
                ):
                    yield Task(client)
            finally:
                if heartbeat.is_running:
                    heartbeat.stop()

    def _client(
        self, interceptors: list[ProtobufClientInterceptor], retries: RetryInvoker | None = None
    ) -> RuntimeHttpClient:
        return RuntimeHttpClient(
            self.url,
            interceptors=interceptors,
            verify=self.verify,
            timeout=CALL_S,
            retry_invoker=retries,
        )


class Desk:
    """Where a SuperNode hands out tasks."""

    def __init__(self, address: str, client: RuntimeHttpClient) -> None:
        self._address = address
        self._client = client

    def acquire(self) -> str | None:
        """The token of the oldest task that waits; None if none does.

        Raises:
            AwayError: nothing answers.
            UnwantedError: what answers will not have us, or is no SuperNode.
        """
        try:
            with _told():
                answer = self._client.AcquireTask(
                    AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
                )
        except LostTaskError as error:
            raise UnwantedError(_unwanted(self._address, error.__cause__)) from None
        return answer.token or None


class Task:
    """One message, to be answered once."""

    def __init__(self, client: RuntimeHttpClient) -> None:
        self._client = client

    def pull(self, patience: Patience) -> tuple[Message, Context]:
        """The message, and its run. The app that the server sent along is dropped unread: its code never runs here.

        Raises:
            HalfMessageError: no further piece of the message comes.
        """
        given = self._client.PullTaskInput(PullTaskInputRequest())
        context, run = context_from_proto(given.context), given.run.run_id
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = given.task_id, run, context.node_id
        waiting = self._client.PullMessages(PullAppMessagesRequest())
        if not waiting.messages_list:
            raise LostTaskError("it has no message")
        tree, node = waiting.message_object_trees[0], Node(node_id=context.node_id)
        try:
            message = pull_and_inflate_object_from_tree(
                tree,
                _while_it_comes(
                    make_pull_object_fn_protobuf(self._client.PullObject, node, run), patience.seconds
                ),
                make_confirm_message_received_fn_protobuf(self._client.ConfirmMessageReceived, node, run),
                return_type=Message,
                max_time=None,
            )
        except ObjectPullError as error:
            patience.grow()
            half = message_from_proto(waiting.messages_list[0])
            raise HalfMessageError(_named(half, tree.object_id), context) from error
        return _named(message, tree.object_id), context

    def push(self, reply: Message, context: Context) -> None:
        """The reply is the SuperNode's, and the task is finished, in this order.

        A task that is finished without a reply would block the SuperNode for ever; one that is left to expire
        becomes an error at the server after a minute.
        """
        failed = reply.has_error()
        push_message(self._client, reply, context)
        # No context and no words: the node's state is on its own disk, and its errors in its own log.
        status = SubStatus.FAILED if failed else SubStatus.COMPLETED
        self._client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=""))


def _while_it_comes(pull: Callable[[str], bytes], patience_s: float) -> Callable[[str], bytes]:
    """Pulls pieces of one message, by several threads, until none has come for so long."""
    latest = time.monotonic()

    def pulled(piece: str) -> bytes:
        nonlocal latest
        try:
            content = pull(piece)
        except ObjectUnavailableError:
            if time.monotonic() - latest > patience_s:
                raise ObjectPullError(piece, f"none came for {patience_s:g} s") from None
            raise
        latest = time.monotonic()
        return content

    return pulled


def _named(message: Message, identifier: str) -> Message:
    """The message with its id, which does not travel in it."""
    message.metadata.__dict__["_message_id"] = identifier
    return message


def require_known_flwr() -> None:
    """Refuses any flwr but the one whose runtime API this room knows."""
    if (found := version("flwr")) != FLWR:
        raise ConfigError(
            f"flwr {found} is installed, but a node speaks the runtime API of {FLWR}; install that"
        )


def forbid_core_dumps() -> None:
    """Neither a crash nor another process of this user gets at the memory, which holds records and gradients."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The limit does not hold where cores are piped to a program (core(5)); prctl's PR_SET_DUMPABLE does.
    disable_process_dumping(strict=False)


@contextmanager
def _told() -> Iterator[None]:
    """What HTTP says of a SuperNode, in our words."""
    try:
        yield
    except httpx.TransportError as error:
        if (certificate := certificate_fault(error)) is not None:
            raise UnwantedError(f"the SuperNode's certificate is not trusted: {certificate}") from error
        raise AwayError(str(error) or type(error).__name__) from error
    except httpx.HTTPStatusError as error:
        if error.response.status_code >= 500:
            raise AwayError(f"HTTP {error.response.status_code}") from error
        raise LostTaskError(f"HTTP {error.response.status_code}") from error


def _unwanted(address: str, error: BaseException | None) -> str:
    status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None
    if status == httpx.codes.UNAUTHORIZED:
        return (
            f"the SuperNode at {address} refuses the secret; give as --secret-file the file of its "
            f"--superexec-auth-secret-file, and compare the clocks if both run on different machines"
        )
    return f"{address} answers HTTP {status} and is no SuperNode of flwr {FLWR}; give its runtime API as --supernode"


def _heartbeat(client: RuntimeHttpClient) -> Callable[[], bool]:
    def beat() -> bool:
        """Whether it was heard, or need not be any more: the block that works on the task finds that out itself."""
        try:
            with _told():
                client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except AwayError:
            return False
        except FedLoraError as error:
            log.warning("a heartbeat was refused: %s", error)
        return True

    return beat
