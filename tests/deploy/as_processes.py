"""The compose file's services as processes, for machines on which no container engine can run.

Commands, entrypoints, environment, health checks, dependencies and restart policies are read from docker-compose.yml
and the two Dockerfiles. What a container gives is stood in for: its paths by folders, its names and its loopback by
addresses of 127.0.0.0/8, one a service. Users, limits, read-only files and networks are not there at all, so nothing
is shown about them; nor is `keys`, whose work is one of rights only.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.deployment import Deployment
from tests.deploy.processes import BIN

PROFILE = "cpu"
MARK = "FEDLORA_TEST_SERVICE"
"""Names the service in the environment of all that runs in it, also of what has left its session."""
BACKOFF_S, STEADY_S = 0.1, 10.0
"""As Docker waits before it starts a service again: doubled each time, until one had lasted."""
START_S = 120.0
_BROUGHT = {
    f"/app/{name}": name
    for name in (
        "pyproject.toml", "clients/client_app.py", "clients/node.yaml", "server/server_app.py", "server/run.yaml",
    )
}  # fmt: skip
"""Path in the two images -> file of the project, as far as a service reads it."""


class AsProcesses(Deployment):
    """Certificates have to be for `server_names` too. Without nginx, nodes speak to the SuperLink itself."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        words = yaml.safe_load((folder / "docker-compose.yml").read_text())
        self.files = {name: folder / secret["file"] for name, secret in words["secrets"].items()}
        self.services = {name: service for name, service in words["services"].items() if _is_wanted(service)}
        self._numbers = {name: number for number, name in enumerate(self.services, 1)}
        self.has_proxy = None not in (shutil.which("nginx"), shutil.which("wget"))
        if not self.has_proxy:
            del self.services["proxy"]
        self.kind = (
            "processes, with nginx" if self.has_proxy else "processes, without nginx and so without proxy"
        )
        # Another net for each test process, so that two at once are not in each other's way.
        self._net = f"127.77.{os.getpid() % 254 + 1}"
        self._running: dict[str, _Service] = {}

    @property
    def server_names(self) -> list[str]:
        return [self._host(name) for name in ("superlink", "proxy", "monitor")]

    def start(self, *services: str) -> None:
        for name in services or self.services:
            self._start(name)

    def stop(self) -> None:
        for service in self._running.values():
            service.stop()

    def kill(self, service: str) -> None:
        self._running[service].kill()

    def starts(self, service: str) -> int:
        return self._running[service].restarts

    def is_healthy(self, service: str) -> bool:
        _, *command = self.services[service]["healthcheck"]["test"]
        words, environment = [self._here(service, word) for word in command], self._environment(service)
        try:
            return not subprocess.run(words, env=environment, capture_output=True, timeout=60).returncode
        except subprocess.TimeoutExpired:
            return False

    def read(self, service: str, path: str) -> str:
        found = Path(self._here(service, path))
        return found.read_text() if found.exists() else ""

    def copy(self, service: str, path: str, target: Path) -> None:
        found = Path(self._here(service, path))
        (shutil.copytree if found.is_dir() else shutil.copy)(found, target)

    def said(self, service: str) -> str:
        return self._log(service).read_text(errors="replace")

    def address(self, service: str, port: int) -> str:
        return f"{self._host(service)}:{port}"

    def _start(self, name: str) -> None:
        if name in self._running:
            return
        service = self.services[name]
        for other, how in service.get("depends_on", {}).items():
            # Instead of the proxy its SuperLink: a proxy is healthy when that answers through it.
            needed = other if other in self.services or other != "proxy" else "superlink"
            if needed in self.services:
                self._start(needed)
                if how["condition"] == "service_healthy":
                    self._await_health(needed)
        self._unpack(name)
        words = [*service.get("entrypoint", ()), *service.get("command", ())]
        more = ["-g", "user root;"] if name == "proxy" and os.geteuid() == 0 else []
        self._running[name] = _Service(
            [*(self._here(name, word.replace("$$", "$")) for word in words), *more],
            environment=self._environment(name),
            folder=self._root(name) / "app",
            log=self._log(name),
            again=service["restart"] in {"always", "unless-stopped"},
        )

    def _await_health(self, name: str) -> None:
        until = time.monotonic() + START_S
        while not self.is_healthy(name):
            assert time.monotonic() < until, f"{name} is not healthy\n{self.said(name)[-3000:]}"
            time.sleep(0.5)

    def _root(self, name: str) -> Path:
        return self.folder / "root" / name

    def _log(self, name: str) -> Path:
        return self.folder / "root" / f"{name}.log"

    def _unpack(self, name: str) -> None:
        """What the image and the bound files would bring, with this service's places in them."""
        for folder in (self._root(name) / "app", self._root(name) / "tmp", *self._volumes(name).values()):
            folder.mkdir(parents=True, exist_ok=True)
        for target, source in {**_BROUGHT, **self._bound(name)}.items():
            copy = self._root(name) / target.lstrip("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(self._here(name, (self.folder / source).read_text()))

    def _environment(self, name: str) -> dict[str, str]:
        """The image's, but for where this machine's Python and the project are."""
        room = "clients" if self.services[name]["image"].startswith("fedlora-client") else "server"
        dockerfile = self.folder / room / "Dockerfile"
        lines = re.search(r"^ENV ((?:.*\\\n)*.*)$", dockerfile.read_text(), re.MULTILINE)
        assert lines is not None
        image = dict(re.findall(r"(\w+)=(\S+)", lines[1]))
        return {
            **os.environ,
            **{key: self._here(name, value) for key, value in image.items()},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder),
            MARK: f"{self._net} {name}",
        }

    def _here(self, name: str, text: str) -> str:
        """The text with this machine's places instead of the container's."""
        root, own = self._root(name), self._host(name)
        places = {path: str(place) for path, place in {**self._volumes(name), **self._secrets(name)}.items()}
        places |= {path: f"{root}{path}" for path in ("/app", "/tmp", "/etc/nginx")}
        if not self.has_proxy:
            places["proxy:8443"] = f"{self._host('superlink')}:8000"
        hosts, addresses = self._known(name), {"0.0.0.0": own, "127.0.0.1": own}
        # All at once, since a folder here may itself be below /tmp.
        patterns = (
            rf"(?<![\w/.-])(?:{_any(places)})(?![\w.-])",
            rf"(?<![\w.-])(?:{_any(hosts)})(?=:\d)",
            rf"(?<![\w.-])(?:{_any(addresses)})(?=:\d|$)",
            r"(?<=\blisten )(?=\d+[ ;])",  # nginx's, at all addresses of its container
        )
        here = {**places, **hosts, **addresses, "": f"{own}:"}
        return re.sub("|".join(patterns), lambda found: here[found[0]], text, flags=re.MULTILINE)

    def _volumes(self, name: str) -> dict[str, Path]:
        """Path in the container -> folder."""
        volumes = [volume.split(":") for volume in self.services[name].get("volumes", ())]
        return {path: self.folder / "volumes" / source for source, path, *_ in volumes if source[0] != "."}

    def _bound(self, name: str) -> dict[str, str]:
        """Path in the container -> file of the project that is seen there."""
        volumes = [volume.split(":") for volume in self.services[name].get("volumes", ())]
        return {path: source for source, path, *_ in volumes if source[0] == "."}

    def _secrets(self, name: str) -> dict[str, Path]:
        """Path in the container -> provisioned file."""
        told = self.services[name].get("secrets", ())
        named = [{"source": one, "target": one} if isinstance(one, str) else one for one in told]
        return {f"/run/secrets/{one['target']}": self.files[one["source"]] for one in named}

    def _known(self, name: str) -> dict[str, str]:
        """Name -> address of all that share a network with the service: it knows no other."""
        mine = _networks(self.services[name])
        return {
            alias: self._host(other)
            for other, service in self.services.items()
            for network, aliases in _networks(service).items()
            if network in mine
            for alias in (other, *aliases)
        }

    def _host(self, name: str) -> str:
        return f"{self._net}.{self._numbers[name]}"


class _Service:
    """A command that is started again whenever it ends, until it is stopped."""

    def __init__(
        self, command: list[str], *, environment: dict[str, str], folder: Path, log: Path, again: bool
    ) -> None:
        self.command, self.environment, self.folder, self.log = command, environment, folder, log
        self.again = again
        self.restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def kill(self) -> None:
        """kill -9 of its process group, and of all that left it with the service's mark in the environment."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # nginx writes over its environment
        mark = f"{MARK}={self.environment[MARK]}".encode()
        for process in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if process.name.isdecimal() and mark in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)

    def stop(self) -> None:
        self._stopped.set()
        while self._thread.is_alive():
            self.kill()
            self._thread.join(0.2)
        self.kill()

    def _keep(self) -> None:
        wait = BACKOFF_S
        while not self._stopped.is_set():
            began = time.monotonic()
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    self.command, env=self.environment, cwd=self.folder, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
            self._process.wait()
            if not self.again:
                return
            wait = BACKOFF_S if time.monotonic() - began > STEADY_S else 2 * wait
            if not self._stopped.wait(wait):
                self.restarts += 1


@contextmanager
def in_processes(folder: Path) -> Iterator[AsProcesses]:
    """Nothing is started yet, and nothing is left at the end."""
    found = AsProcesses(folder)
    try:
        yield found
    finally:
        found.stop()


def _is_wanted(service: dict[str, Any]) -> bool:
    """Whether the profile has it; `keys`, whose restart is "no", changes rights only."""
    return PROFILE in service.get("profiles", [PROFILE]) and service["restart"] != "no"


def _networks(service: dict[str, Any]) -> dict[str, list[str]]:
    """Network -> the service's aliases on it."""
    told = service["networks"]
    return (
        {network: [] for network in told}
        if isinstance(told, list)
        else {network: (words or {}).get("aliases", []) for network, words in told.items()}
    )


def _any(words: Iterable[str]) -> str:
    """A pattern for one of them, the longest that fits."""
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or "(?!)"
