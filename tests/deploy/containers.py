"""The compose file as it is meant to be started: in containers."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.deploy.deployment import Deployment
from tests.deploy.engine import base_images, engine, pip_as_here
from tests.deploy.processes import free_port

PUBLISHED = {"proxy": "FEDLORA_LISTEN", "monitor": "FEDLORA_MONITOR", "metrics": "FEDLORA_METRICS"}


class Containers(Deployment):
    """Images are built of the copy; certs/ has to be there before anything is started."""

    def __init__(self, folder: Path, environment: dict[str, str], stand_ins: list[str]) -> None:
        super().__init__(folder)
        self.ports = {name: f"127.0.0.1:{free_port()}" for name in PUBLISHED}
        names = {variable: self.ports[name] for name, variable in PUBLISHED.items()}
        self.environment = {**environment, **names, "COMPOSE_PROJECT_NAME": f"fedlora-test-{os.getpid()}"}
        self.kind = "containers"
        if stand_ins:
            self.kind += f", with stand-ins of this machine's files for {', '.join(stand_ins)}"

    def start(self, *services: str) -> None:
        self.compose("up", "--detach", *services)

    def kill(self, service: str) -> None:
        # Of all but the container's init, which ends with them; docker kill would be taken for the owner's wish.
        self.attempt("exec", "-T", service, "sh", "-c", "kill -9 -1")

    def starts(self, service: str) -> int:
        return int(self._inspected(service, "{{.RestartCount}}"))

    def is_healthy(self, service: str) -> bool:
        return self._inspected(service, "{{.State.Health.Status}}") == "healthy"

    def read(self, service: str, path: str) -> str:
        return self.attempt("exec", "-T", service, "cat", path).stdout

    def copy(self, service: str, path: str, target: Path) -> None:
        self.compose("cp", f"{service}:{path}", str(target))

    def said(self, service: str) -> str:
        return self.attempt("logs", "--no-log-prefix", service).stdout

    def address(self, service: str, port: int) -> str:
        return self.ports["metrics" if port == 9464 else service]

    def python(self, service: str, code: str, *words: str) -> str:
        """What the code prints, run as the service's own user in its container."""
        return self.compose("exec", "-T", service, "python", "-c", code, *words).strip()

    def addresses(self, service: str) -> list[str]:
        """Of the service on its networks."""
        return self._inspected(service, "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}").split()

    def memory(self, service: str) -> int:
        """Bytes that its processes have resident and that lie in its /tmp."""
        top = self._docker("top", self._id(service), "-eo", "pid,rss")
        # Not du: what nginx buffers are files without a name.
        in_tmp = self.attempt("exec", "-T", service, "df", "-kP", "/tmp").stdout.splitlines()[-1].split()[2]
        return (sum(int(line.split()[1]) for line in top.splitlines()[1:]) + int(in_tmp)) << 10

    def compose(self, *words: str, timeout: float = 900) -> str:
        """What the command prints; the test fails if it does."""
        done = self.attempt(*words, timeout=timeout)
        assert done.returncode == 0, f"docker compose {' '.join(words)}\n{done.stderr[-3000:]}"
        return done.stdout

    def attempt(self, *words: str, timeout: float = 900) -> "subprocess.CompletedProcess[str]":
        command = ["docker", "compose", "--profile", "cpu", *words]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=timeout
        )

    def _id(self, service: str) -> str:
        return self.compose("ps", "--all", "--quiet", service).strip()

    def _inspected(self, service: str, form: str) -> str:
        return self._docker("inspect", "--format", form, self._id(service)).strip()

    def _docker(self, *words: str) -> str:
        command = ["docker", *words]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=True
        ).stdout


@contextmanager
def in_containers(folder: Path, scratch: Path) -> Iterator[Containers]:
    """Images are built of the project in `folder`; nothing is started yet, and nothing is left at the end.

    Raises:
        NoEngineError: there is no engine, or no images to begin with.
    """
    with engine() as environment, pip_as_here() as pip:
        stand_ins = base_images(environment, scratch)
        found = Containers(folder, {**environment, **pip}, stand_ins)
        found.compose("build", timeout=1800)
        try:
            yield found
        finally:
            found.attempt("down", "--volumes", "--timeout", "1")
