"""A run that a SuperLink handed out, as `flwr-serverapp` works on it: the grid, the heartbeat and the end."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from flwr.common.constant import SubStatus
from flwr.common.serde import run_from_proto
from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
from flwr.serverapp import Grid
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.task_identity import TaskIdentity

from fedlora.deploy.endpoint import certificate_fault
from fedlora.deploy.grid import PromptGrid
from fedlora.errors import FedLoraError, IncompleteError, without_records

log = logging.getLogger(__name__)

ENDED = "fedlora status "
"""What a run's details begin with when our own process ended it: then its exit status, a colon, and words."""


@contextmanager
def server_task(address: str, certificates: bytes | None, token: str) -> Iterator[Grid]:
    """The grid of a run that was handed out. The run is finished with the block, and its end says how.

    The SuperLink is told every 20 s or so that somebody works on it; if it has given the run up, KeyboardInterrupt
    comes out of the block. The bundle that comes with the run is dropped unread.

    Args:
        address: HOST:PORT.
        certificates: of who vouches for the SuperLink, PEM; None speaks plain HTTP.
        token: the task's.

    Raises:
        IncompleteError: from the block, when a call finds no SuperLink that can answer.
    """
    grid = PromptGrid(address, certificates is None, certificates, token=token)
    client = grid._runtime_client
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()

    def finish(status: str, details: str) -> None:
        grid._retry_invoker.max_tries = 1
        try:
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=details))
        except httpx.HTTPError as error:
            log.warning("the SuperLink was not told of the end: %s", error)

    try:
        given = client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        grid.set_run(run_from_proto(given.run))
        with _told(address):
            yield grid
        finish(SubStatus.COMPLETED, "")
    except Exception as error:
        status = error.exit_status if isinstance(error, FedLoraError) else 1
        finish(SubStatus.FAILED, f"{ENDED}{status}: {without_records(error)}")
        raise
    finally:
        if heartbeat.is_running:
            heartbeat.stop()
        grid.close()


@contextmanager
def _told(address: str) -> Iterator[None]:
    """What HTTP says of a SuperLink, in our words."""
    try:
        yield
    except httpx.HTTPError as error:
        said = certificate_fault(error) or str(error) or type(error).__name__
        if isinstance(error, httpx.HTTPStatusError):
            said = f"HTTP {error.response.status_code}"
        raise IncompleteError(
            f"the SuperLink at {address} failed: {said}; the run goes on when it is submitted again"
        ) from error
