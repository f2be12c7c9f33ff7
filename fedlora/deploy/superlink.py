"""A SuperLink, as `flwr run` and `flower-superexec` speak to it: where runs are submitted and handed out.

Like supernode, all of it was read in flwr 1.41.0. What is Flower's own stays on the wire; neither the bundle
that a run carries nor anything else that comes from the control port is ever run here.
"""

import hashlib
import tomllib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import tomli_w
from flwr.cli.build import build_fab_from_files
from flwr.cli.utils import collect_files
from flwr.common.constant import Status
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.run_pb2 import Run
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from fedlora.deploy.endpoint import CALL_S, Endpoint, SameVersion, certificate_fault
from fedlora.deploy.server_task import ENDED
from fedlora.errors import ConfigError, FedLoraError

SHOWN = 1000
"""How many runs are looked through for ours, newest first; Flower shows 20 unless told."""


class SuperLinkAwayError(FedLoraError):
    """Nothing answers at the SuperLink's address; it may later."""


class RefusedError(FedLoraError):
    """The SuperLink understood and said no."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the SuperLink answers HTTP {status}; its own log says why")
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A run as the SuperLink lists it. fab: sha256 of its bundle. details: what its process said at the end."""

    run_id: int
    series_id: int
    fab: str
    pending: bool
    finished: bool
    details: str

    @property
    def exit_status(self) -> int | None:
        """With which our own server process ended the run; None if it had no time to say."""
        word = self.details.removeprefix(ENDED).partition(":")[0]
        return int(word) if self.details.startswith(ENDED) and word.isdigit() else None

    @property
    def words(self) -> str:
        """What was the matter, as far as anybody said."""
        if self.exit_status is not None:
            return self.details.partition(": ")[2]
        return self.details or ("stopped" if self.finished else "its process died")


class SuperLink(Endpoint):
    """The control and runtime APIs of a SuperLink in `--isolation process`."""

    @contextmanager
    def connected(self) -> Iterator["Control"]:
        """Where runs are submitted, and their tasks handed out."""
        known: list[ProtobufClientInterceptor] = [SameVersion()]
        with (
            ControlHttpClient(self.url, interceptors=known, verify=self.verify, timeout=CALL_S) as control,
            RuntimeHttpClient(
                self.url, interceptors=self.asking(), verify=self.verify, timeout=CALL_S
            ) as runtime,
        ):
            yield Control(self.address, control, runtime)


class Control:
    """The calls. Each raises SuperLinkAwayError, RefusedError, or ConfigError for what no waiting mends."""

    def __init__(self, address: str, control: ControlHttpClient, runtime: RuntimeHttpClient) -> None:
        self._address = address
        self._control = control
        self._runtime = runtime

    def register(self, name: str, key: bytes) -> bool:
        """A SuperNode with this public key (PEM) may join; whether that is new."""
        try:
            with self._told():
                self._control.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
        except RefusedError as error:
            if (
                error.status == httpx.codes.PRECONDITION_FAILED
            ):  # the key was read by us, so it is one, and known
                return False
            raise
        return True

    def unregister_others(self, keys: Collection[bytes]) -> list[str]:
        """No SuperNode with any other key (PEM) than these may join any more. Returns the names of those who could."""
        with self._told():
            known = self._control.ListNodes(ListNodesRequest()).nodes_info
        others = [node for node in known if node.public_key not in keys and not node.unregistered_at]
        for node in others:
            with self._told():
                self._control.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
        return [node.name for node in others]

    def barred(self, keys: Collection[bytes]) -> list[str]:
        """The names of SuperNodes whose key (PEM) is among these but was unregistered: Flower takes no key twice."""
        with self._told():
            known = self._control.ListNodes(ListNodesRequest()).nodes_info
        return [node.name for node in known if node.public_key in keys and node.unregistered_at]

    def runs(self) -> list[Submitted]:
        """Newest first."""
        with self._told():
            found = self._control.ListRuns(ListRunsRequest(limit=SHOWN)).run_dict.values()
        return [_submitted(run) for run in sorted(found, key=lambda run: run.pending_at, reverse=True)]

    def run(self, run_id: int) -> Submitted | None:
        """The run; None if the SuperLink knows of none such."""
        try:
            with self._told():
                found = self._control.ListRuns(ListRunsRequest(run_id=run_id)).run_dict
        except RefusedError as error:
            if error.status == httpx.codes.NOT_FOUND:
                return None
            raise
        return _submitted(found[run_id])

    def submit(self, fab: bytes, series_id: int | None) -> tuple[int, int]:
        """A run waits for somebody to take it. Returns its id, and that of its series.

        Args:
            fab: see `bundle`.
            series_id: of earlier runs, whose state at the SuperNodes this one shares; None begins a series.
        """
        proto = fab_to_proto(Fab(hashlib.sha256(fab).hexdigest(), fab, {}))
        with self._told():
            answer = self._control.StartRun(StartRunRequest(fab=proto, series_id=series_id))
        if not answer.run_id:
            raise ConfigError(
                f"the SuperLink at {self._address} takes no bundle of {len(fab)} bytes; see its log"
            )
        return answer.run_id, answer.series_id

    def stop(self, run_id: int) -> None:
        """The run is finished, if it was not already."""
        try:
            with self._told():
                self._control.StopRun(StopRunRequest(run_id=run_id))
        except RefusedError as error:
            if error.status not in (httpx.codes.PRECONDITION_FAILED, httpx.codes.NOT_FOUND):
                raise

    def acquire(self) -> tuple[int, str] | None:
        """The oldest run that waits for a server process, and its token; None if there is none."""
        with self._told():
            answer = self._runtime.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
        return (answer.task.run_id, answer.token) if answer.token else None

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What HTTP says of a SuperLink, in our words."""
        try:
            yield
        except httpx.TransportError as error:
            if (certificate := certificate_fault(error)) is not None:
                raise ConfigError(f"the SuperLink's certificate is not trusted: {certificate}") from error
            hint = "; if it speaks TLS, give --root-certificates"
            hint = hint if isinstance(error, httpx.RemoteProtocolError) else ""
            raise SuperLinkAwayError(f"{str(error) or type(error).__name__}{hint}") from error
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if status >= 500:
                raise SuperLinkAwayError(f"HTTP {status}") from error
            if status == httpx.codes.UNAUTHORIZED:
                raise ConfigError(
                    f"the SuperLink at {self._address} refuses the secret; give as --secret-file the file of its "
                    f"--superexec-auth-secret-file, and compare the clocks if both run on different machines"
                ) from None
            if status in (httpx.codes.NOT_FOUND, httpx.codes.METHOD_NOT_ALLOWED) and not _is_flowers(error):
                raise ConfigError(
                    f"{self._address} is no SuperLink, or only its fleet path; give the control address as --superlink"
                ) from None
            raise RefusedError(status) from error


def bundle(app: Path, name: str) -> bytes:
    """The bundle (FAB) that `flwr run` would make of the directory, but marked: no other run has the same digest.

    Args:
        app: holds a pyproject.toml with a table tool.flwr.app.
        name: the mark, by which a run is known as ours in a SuperLink's list.

    Raises:
        ConfigError: nothing can be made of the directory.
    """
    try:
        files: dict[str, bytes | Path] = dict(collect_files(app.expanduser().resolve()))
        project = tomllib.loads((app / "pyproject.toml").read_text(encoding="utf-8"))
        project["tool"]["flwr"]["app"].setdefault("config", {})["fedlora-run"] = name
        files["pyproject.toml"] = tomli_w.dumps(project).encode()
        return build_fab_from_files(files)[0]
    except KeyError as error:
        raise ConfigError(
            f"--app {app}: pyproject.toml has no table tool.flwr.app ({error} is missing); name fedlora's own directory"
        ) from None
    except FileNotFoundError:
        raise ConfigError(
            f"--app {app}: no pyproject.toml is there, so nothing can be submitted and no node's key was registered; "
            "give the command in fedlora's checkout, or name that as --app"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--app {app}: {error}; give the command in fedlora's checkout, or name that as --app"
        ) from None


def _submitted(run: Run) -> Submitted:
    return Submitted(
        run_id=run.run_id,
        series_id=run.series_id,
        fab=run.fab_hash,
        pending=run.status.status == Status.PENDING,
        finished=run.status.status == Status.FINISHED,
        details=run.status.details,
    )


def _is_flowers(error: httpx.HTTPStatusError) -> bool:
    """Whether Flower itself wrote this error: it has a code, where a web server's has words only."""
    try:
        return "code" in error.response.json()
    except ValueError:
        return False
