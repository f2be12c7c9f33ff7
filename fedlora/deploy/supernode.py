"""A SuperNode's runtime API, as `flower-superexec` and `flwr-clientapp` speak it: the one room for flwr's internals.

All of it was read in flwr 1.41.0 and may be otherwise in any other, so another is refused. What of Flower's own
client is not used, and why: its retries end the process on a 401, its heartbeat on a lost task, its version check on
a mismatch; a process that stays has to outlive the first two and to say the third in one line.
"""

import logging
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

import httpx
from flwr.app import Context, Message
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PushTaskOutputRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClientInterceptor, ProtobufRequestContext
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.runtime_version_compatibility import (
    RuntimeVersionMetadata,
    get_runtime_version_incompatibility_exit_message,
)
from flwr.supercore.utils import disable_process_dumping
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message

from fedlora.errors import ConfigError, FedLoraError

log = logging.getLogger(__name__)

FLWR = "1.41.0"
"""The only flwr whose runtime API this room knows."""

CALL_S = 10.0
"""One call's time; Flower's own is 30 s, within which a stop could not be prompt."""

RETRY_S = 20.0
"""How long a task's calls are tried again: a SuperNode that is away for longer has forgotten the task."""


class AwayError(FedLoraError):
    """Nothing answers at the SuperNode's address; it may later."""


class LostTaskError(FedLoraError):
    """The SuperNode does not know the task any more: it was restarted, or had given the task up."""


class UnwantedError(ConfigError):
    """The SuperNode will not have us: another secret, certificate or flwr. No waiting mends that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperNode:
    """The runtime API of one SuperNode in `--isolation process`.

    Args:
        address: HOST:PORT.
        tls: what vouches for its certificate; None speaks plain HTTP, for a network that only the two share.
        secret: of its --superexec-auth-secret-file; None where it has none.
    """

    address: str
    tls: ssl.SSLContext | None = None
    secret: bytes | None = None

    @contextmanager
    def connected(self) -> Iterator["Desk"]:
        """Where its tasks are handed out, over one connection."""
        interceptors: list[ProtobufClientInterceptor] = [_SameVersion()]
        if self.secret is not None:
            only = {"/flwr.proto.Runtime/AcquireTask"}
            interceptors.append(
                SuperExecAuthHttpInterceptor(master_secret=self.secret, protected_methods=only)
            )
        with self._client(interceptors) as client:
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
        with self._client([_SameVersion(), RuntimeTokenHttpInterceptor(token)]) as beating:
            heartbeat = HeartbeatSender(_heartbeat(beating))
            heartbeat.start()
            try:
                with (
                    self._client([_SameVersion(), RuntimeTokenHttpInterceptor(token)], patient) as client,
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
            f"{'http' if self.tls is None else 'https'}://{self.address}",
            interceptors=interceptors,
            verify=False if self.tls is None else self.tls,
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

    def pull(self) -> tuple[Message, Context]:
        """The message, and its run. The app that the server sent along is dropped unread: its code never runs here."""
        message, context, _, _ = pull_task_input(self._client)
        return message, context

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


class _SameVersion:
    """Tells our version of flwr, and hears of one that the SuperNode does not accept."""

    def __init__(self) -> None:
        self._words = dict(RuntimeVersionMetadata.from_local_component("SuperExec").as_metadata())

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers.update(self._words)
        response = call_next(context)
        if response.is_error and (words := get_runtime_version_incompatibility_exit_message(response.text)):
            raise UnwantedError(f"{' '.join(words.split())}; install flwr {FLWR} on both ends")
        return response


@contextmanager
def _told() -> Iterator[None]:
    """What HTTP says of a SuperNode, in our words."""
    try:
        yield
    except httpx.TransportError as error:
        if (certificate := _certificate_fault(error)) is not None:
            raise UnwantedError(
                f"the SuperNode's certificate is not trusted: {certificate}; give the CA that signed it "
                f"as --root-certificates"
            ) from error
        raise AwayError(str(error) or type(error).__name__) from error
    except httpx.HTTPStatusError as error:
        if error.response.status_code >= 500:
            raise AwayError(f"HTTP {error.response.status_code}") from error
        raise LostTaskError(f"HTTP {error.response.status_code}") from error


def _certificate_fault(error: BaseException | None) -> str | None:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message
        error = error.__cause__ or error.__context__
    return None


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
