"""What `fedlora doctor` finds on the machine itself: Python, packages, cores, accelerator, entropy, core dumps."""

import importlib.util
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

from fedlora.doctor.line import Line, fail, looked, ok, warn
from fedlora.runtime.cores import usable_cores

PROBE_S = 30.0
"""Torch from a cold network disk takes many seconds; longer than this, something is wrong."""
LITTLE_BYTES, NO_BYTES = 1 << 30, 1 << 26
"""Free disk: below the one a downloaded model may not fit, below the other a checkpoint may not."""
_MIB = 1 << 20

_TORCH = """
import json, torch
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads(),
    "devices": [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())],
}))
"""
_RAY = "import json, ray; print(json.dumps({'version': ray.__version__}))"


class Probe:
    """An import in a process of its own, which may crash or hang without taking the doctor with it."""

    def __init__(self, program: str) -> None:
        """Starts it; `answer` waits."""
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, "-P", "-c", program], **quiet)  # noqa: S603  (our own text)
        self._said: dict[str, Any] | str | None = None

    def answer(self) -> dict[str, Any] | str:
        """What it found, or in words why not."""
        if self._said is None:
            self._said = self._wait()
        return self._said

    def _wait(self) -> dict[str, Any] | str:
        try:
            out, err = self._process.communicate(timeout=PROBE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return f"not imported within {PROBE_S:g} s"
        if self._process.returncode:
            return (err.strip().splitlines() or [f"ended with status {self._process.returncode}"])[-1]
        return json.loads(out.splitlines()[-1])


def torch_probe() -> Probe:
    """{version, cuda, threads, devices}."""
    return Probe(_TORCH)


def machine_lines(torch: Probe) -> Iterator[Line]:
    """Everything that does not depend on a config."""
    ray = Probe(_RAY)
    yield from looked("python", _python)
    yield from looked("packages", _packages)
    yield from looked("flower", _flower)
    yield from looked("entropy", _entropy)
    yield from looked("core dumps", _core_dumps)
    yield from looked("loopback", _loopback)
    yield from looked("threads", _blas)
    yield from looked("triton", _triton)
    yield from looked("torch", lambda: _torch(torch.answer()))
    yield from looked("gpu", lambda: _gpu(torch.answer(), _driver()))
    yield from looked("ray", lambda: _ray(ray.answer()))


def disk(name: str, place: Path) -> Iterator[Line]:
    """Whether there is room at `place`, or where it would be made, and whether it can be written."""
    there = existing(place)
    free = shutil.disk_usage(there).free
    found = f"{free / _MIB:,.0f} MiB free at {there}"
    if os.statvfs(there).f_files and not os.statvfs(there).f_favail:
        yield fail(name, f"{found}, but no file can be made: no inodes", "remove files there")
    elif free < NO_BYTES:
        yield fail(name, found, "make room, or name another place in the config")
    elif not os.access(there, os.W_OK | os.X_OK):
        yield fail(
            name, f"{there} cannot be written", f"let the user of this process write there: chown {there}"
        )
    elif free < LITTLE_BYTES:
        yield warn(name, found, "make room: a model and the checkpoints of a run may not fit")
    else:
        yield ok(name, found)


def existing(place: Path) -> Path:
    """`place`, or the nearest directory above it that is there."""
    place = place.expanduser().absolute()
    return next(one for one in (place, *place.parents) if one.is_dir())


def _python() -> Iterator[Line]:
    from packaging.specifiers import SpecifierSet

    here = platform.python_version()
    try:
        wanted = metadata("fedlora")["Requires-Python"]
    except PackageNotFoundError:  # the line of the packages says so
        wanted = ">=3.11"
    if here in SpecifierSet(wanted, prereleases=True):
        yield ok("python", f"{here}, wanted {wanted}")
    else:
        yield fail("python", f"{here}, wanted {wanted}", f"make an environment with a Python {wanted}")


def _packages() -> Iterator[Line]:
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in requires("fedlora") or ()]
    except PackageNotFoundError:
        yield warn("packages", "fedlora runs, but is not installed", "install it: pip install -e .")
        return
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    held = 0
    for one in wanted:
        install = f"pip install '{one.name}{one.specifier}'"
        if (found := _version(one.name)) is None:
            yield fail("packages", f"{one.name} is not installed, wanted {one.specifier}", install)
        elif not one.specifier.contains(found, prereleases=True):
            yield fail("packages", f"{one.name} {found}, wanted {one.specifier}", install)
        else:
            held += 1
    if held == len(wanted):
        yield ok("packages", f"all {held} that fedlora needs, in the versions it was tested with")


def _flower() -> Iterator[Line]:
    from fedlora.deploy.endpoint import FLWR

    if (found := _version("flwr")) == FLWR:
        yield ok("flower", f"{found}, on both ends of a wire the same")
    else:
        yield fail("flower", f"{found}, wanted {FLWR}", f"pip install flwr=={FLWR}, on servers and nodes")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch(said: dict[str, Any] | str) -> Iterator[Line]:
    if isinstance(said, str):
        yield fail("torch", said, "install it again: pip install --force-reinstall torch")
        return
    cores = usable_cores()
    found = f"{said['version']}, {said['threads']} threads on {cores} cores"
    if said["threads"] > cores:
        yield warn(
            "torch", found, f"more threads than cores wait for each other: export OMP_NUM_THREADS={cores}"
        )
    else:
        yield ok("torch", found)


def _gpu(said: dict[str, Any] | str, driver: str | None) -> Iterator[Line]:
    told: Mapping[str, Any] = {} if isinstance(said, str) else said
    if told.get("devices"):
        yield ok("gpu", f"{', '.join(told['devices'])}, CUDA {told['cuda']}")
    elif driver is None:
        yield ok("gpu", "none; training runs on the cores")
    elif told.get("cuda") is None:
        yield warn(
            "gpu",
            f"NVIDIA driver {driver}, but this torch is built without CUDA",
            "install a CUDA build of the same torch: https://pytorch.org/get-started/locally",
        )
    else:
        yield warn(
            "gpu",
            f"NVIDIA driver {driver}, but torch for CUDA {told['cuda']} finds no device",
            "a container needs the NVIDIA runtime and a device; elsewhere the driver may be older than CUDA",
        )


def _driver() -> str | None:
    """The NVIDIA driver of this machine, seen without asking it: that could hang."""
    told = Path("/proc/driver/nvidia/version")
    if told.exists():
        words = told.read_text().split()
        return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), "unknown")
    return "unknown" if Path("/dev/nvidiactl").exists() else None


def _triton() -> Iterator[Line]:
    if importlib.util.find_spec("triton") is None:
        yield ok("triton", "none; nothing of fedlora needs it")
    else:
        yield ok("triton", f"{_version('triton') or 'there'}; computes on GPUs only")


def _ray(said: dict[str, Any] | str) -> Iterator[Line]:
    if isinstance(said, str):
        yield fail("ray", said, "install it again, or set runtime.kind to local")
    else:
        yield ok("ray", f"{said['version']} can be imported")


def _entropy() -> Iterator[Line]:
    """Noise, draws and keys come from here; a machine that has just started may have none yet."""
    try:
        drawn = os.getrandom(32, os.GRND_NONBLOCK) if hasattr(os, "getrandom") else os.urandom(32)
    except BlockingIOError:
        yield fail("entropy", "the kernel has none yet", "wait a minute; a virtual machine needs virtio-rng")
        return
    if drawn == os.urandom(32):
        yield fail("entropy", "two draws are equal", "trust nothing that this machine makes at random")
    else:
        yield ok("entropy", "the kernel's generator answers")


def _core_dumps() -> Iterator[Line]:
    limit, _ = resource.getrlimit(resource.RLIMIT_CORE)
    pattern = Path("/proc/sys/kernel/core_pattern")
    piped = pattern.read_text().strip() if pattern.exists() else ""
    if limit:
        yield warn("core dumps", "allowed: a crash writes memory, records and all, to disk", "ulimit -c 0")
    elif piped.startswith("|"):
        yield warn(
            "core dumps",
            f"forbidden, but the kernel hands them to {piped[1:].split()[0]} all the same",
            "`fedlora node` forbids its own; for simulations on real records: sysctl kernel.core_pattern=core",
        )
    else:
        yield ok("core dumps", "forbidden")


def _loopback() -> Iterator[Line]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()[:2], timeout=1).close()
    yield ok("loopback", "ports of this machine can be opened and reached")


def _blas() -> Iterator[Line]:
    said, cores = os.environ.get("OMP_NUM_THREADS"), usable_cores()
    if said is not None and said.isascii() and said.isdecimal() and 0 < int(said) <= cores:
        yield ok("threads", f"OMP_NUM_THREADS={said}, {cores} cores")
    elif said is not None:
        yield warn(
            "threads", f"OMP_NUM_THREADS={said!r}, {cores} cores", f"export OMP_NUM_THREADS=1 (to {cores})"
        )
    elif cores > 1:
        yield warn(
            "threads",
            f"OMP_NUM_THREADS is not set: each worker's libraries start {cores} threads",
            "export OMP_NUM_THREADS=1; runtime.threads (of a node: threads) says how many training uses",
        )
    else:
        yield ok("threads", "one core, one thread")
