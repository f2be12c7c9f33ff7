"""A Docker engine for a test: the one that runs, or one of our own that leaves nothing behind, and images for it."""

import ast
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

from tests.deploy.stand_ins import stand_in_nginx, stand_in_python

PYTHON = "python:3.11-slim"
NGINX = "nginxinc/nginx-unprivileged:1.28.0-alpine"


class NoEngineError(Exception):
    """Why there is none."""


@contextmanager
def engine() -> Iterator[dict[str, str]]:
    """The environment in which `docker` works. An engine that was started here is stopped, and its folder removed.

    Raises:
        NoEngineError: none runs, and none can be started.
    """
    if shutil.which("docker") is None or _fails(["docker", "compose", "version"], dict(os.environ)):
        raise NoEngineError("docker compose is not on this machine")
    if not _fails(["docker", "info"], dict(os.environ)):
        yield dict(os.environ)
        return
    if shutil.which("dockerd") is None or os.geteuid() != 0:
        raise NoEngineError("no Docker engine runs, and only root with dockerd can start one")
    folder = Path(tempfile.mkdtemp(prefix="eng"))  # a socket's path has about 100 characters
    try:
        with _started(folder) as environment:
            yield environment
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _started(folder: Path) -> Iterator[dict[str, str]]:
    """No iptables and no forwarding: nothing leaves the machine, and nothing of the machine's is changed."""
    environment = {**os.environ, "DOCKER_HOST": f"unix://{folder}/docker.sock", "BUILD_NETWORK": "host"}
    places = [f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--pidfile={folder}/dockerd.pid"]
    closed = ["--iptables=false", "--ip6tables=false", "--ip-forward=false"]
    with (folder / "dockerd.log").open("wb") as log:
        process = subprocess.Popen(
            ["dockerd", *closed, *places, f"--host={environment['DOCKER_HOST']}"],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + 30
        while _fails(["docker", "info"], environment):
            if process.poll() is not None or time.monotonic() > until:
                last = (folder / "dockerd.log").read_text(errors="replace").splitlines()[-1:]
                raise NoEngineError(f"dockerd does not come up here: {' '.join(last)}")
            time.sleep(0.2)
        yield environment
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def base_images(environment: dict[str, str], folder: Path) -> list[str]:
    """The images of the two FROM lines and of the proxy are there. Returns the names of those that are stand-ins.

    Raises:
        NoEngineError: one can neither be pulled nor stood in for.
    """
    made = []
    for name, stand_in in ((PYTHON, stand_in_python), (NGINX, stand_in_nginx)):
        if not _fails(["docker", "image", "inspect", name], environment):
            continue
        if not _fails(["docker", "pull", "--quiet", name], environment, timeout=600):
            continue
        if (reason := stand_in(environment, folder, name)) is not None:
            raise NoEngineError(f"{name} cannot be pulled, and not be stood in for: {reason}")
        made.append(name)
    return made


@contextmanager
def pip_as_here() -> Iterator[dict[str, str]]:
    """Build arguments with which pip finds in a build what it finds on this machine: folders are served on loopback."""
    told = _pip_settings()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        links = {key: _linked(folder, key, told.get(key, "")) for key in ("find-links", "extra-index-url")}
        if not any(folder.iterdir()):
            yield {}
            return
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        root = f"http://127.0.0.1:{server.server_port}"
        try:
            found = {
                f"PIP_{key.replace('-', '_').upper()}": text.format(root=root) for key, text in links.items()
            }
            certificates = {"PIP_CERT": told["cert"]} if "cert" in told else {}
            yield {**found, **certificates, "BUILD_NETWORK": "host"}
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        return


def _linked(folder: Path, kind: str, told: str) -> str:
    """The places that pip was told, with those on this machine as links under `folder` and as {root}/... here."""
    places = []
    for number, place in enumerate(told.split()):
        path = Path(urlparse(place).path if place.startswith("file:") else place)
        if "://" in place and not place.startswith("file:"):
            places.append(place)
        elif path.is_dir():
            # The parent: an index has links like ../../files/...
            (folder / f"{kind}-{number}").symlink_to(path.parent)
            places.append(f"{{root}}/{kind}-{number}/{path.name}/")
    return " ".join(places)


def _pip_settings() -> dict[str, str]:
    """`find-links`, `extra-index-url` and `cert`, the environment's over the files'."""
    said = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    ).stdout
    lines = sorted(
        (line.partition("=") for line in said.splitlines()), key=lambda line: line[0].startswith(":env:")
    )
    return {key.rpartition(".")[2]: str(ast.literal_eval(value)) for key, _, value in lines if value}


def _fails(command: list[str], environment: dict[str, str], timeout: float = 60) -> bool:
    try:
        return bool(subprocess.run(command, env=environment, capture_output=True, timeout=timeout).returncode)
    except subprocess.TimeoutExpired:
        return True
