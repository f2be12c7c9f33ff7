"""One arm of one case in a tree of processes of its own, watched from outside."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from at_scale.cases import FLOWER, GHOST, OURS, STEP, TRIMMED, Case

BENCHMARKS = Path(__file__).parents[1]
LOOK_EVERY_S = 0.5
"""The kernel keeps each process's peak, so only a process shorter than this is missed."""

NO_ACTORS = ("IDLE", "Agent")
"""Words in the titles of Ray's own processes that look like actors."""

_HOW = {FLOWER: "kept", STEP: "step", GHOST: "ghost", TRIMMED: "trimmed"}


def run(case: Case, arm: str, material: Path, scratch: Path) -> dict[str, Any]:
    """What the arm wrote, and its peak memory by role in MB; `failed` says why there are no times.

    whole_s of a failed one: at least so long it would have taken; unknown where it broke.
    Memory is resident, so a page of Ray's object store that two processes touch counts in both.
    """
    scratch.mkdir(parents=True)
    (scratch / "spans").mkdir()
    (scratch / "case.json").write_text(json.dumps(case.words()))
    module = "at_scale.ours" if arm == OURS else "at_scale.stock"
    with (
        (scratch / "log").open("w") as log,
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as sockets,  # a short path
    ):
        began = time.monotonic()
        command = [sys.executable, "-m", module, str(material), str(scratch)]
        driver = psutil.Popen(
            command, env=_environment(case, arm, material, scratch, sockets), stdout=log,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        memory, late = _watch(driver, began + case.limit_s)
    found: dict[str, Any] = {"case": case.name, "arm": arm, "began": began, **memory}
    if not late and driver.returncode == 0 and (scratch / "times.json").exists():
        return {**found, **json.loads((scratch / "times.json").read_text())}
    last = (scratch / "log").read_text().strip().splitlines()[-12:]
    why = f"not done in {case.limit_s:g} s" if late else f"exit {driver.returncode}"
    return {**found, "failed": why, "whole_s": case.limit_s if late else None, "log": last}


def _environment(case: Case, arm: str, material: Path, scratch: Path, sockets: str) -> dict[str, str]:
    paths = [str(BENCHMARKS), str(BENCHMARKS.parent)]
    if arm == OURS:  # its spans/sitecustomize.py is read by every Python below
        paths.insert(0, str(BENCHMARKS / "at_scale" / "spans"))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "RAY_TMPDIR": sockets,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_HOME": str(scratch / "flwr"),
        "AT_SCALE_SPANS": str(scratch / "spans"),
        "AT_SCALE_NULL": "1" if case.null else "",
        "AT_SCALE_MATERIAL": str(material),
        "AT_SCALE_SCRATCH": str(scratch),
        "AT_SCALE_HOW": _HOW.get(arm, ""),
    }


def _watch(driver: psutil.Popen, until: float) -> tuple[dict[str, float], bool]:
    """Peak memory by role once the driver has ended, or was ended at `until`; nothing of its tree is left."""
    peaks: dict[psutil.Process, tuple[str, float]] = {}
    try:
        while driver.poll() is None and time.monotonic() < until:
            for process in [driver, *_children(driver)]:
                if (seen := _look(process, driver.pid)) is not None:
                    peaks[process] = seen
            time.sleep(LOOK_EVERY_S)
        late = driver.poll() is None
    finally:
        _end([driver, *peaks])
        driver.wait()
    roles = ("driver", "actors", "ray")
    return {f"{role}_mb": sum(mb for held, mb in peaks.values() if held == role) for role in roles}, late


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()  # psutil never ends another process that was given an old number


def _children(driver: psutil.Popen) -> list[psutil.Process]:
    try:
        return driver.children(recursive=True)
    except psutil.Error:
        return []


def _look(process: psutil.Process, driver: int) -> tuple[str, float] | None:
    """(driver, actors or ray; peak MB) of a live process."""
    try:
        title = (process.cmdline() or [""])[0]
        actor = title.startswith("ray::") and not any(word in title for word in NO_ACTORS)
        role = "driver" if process.pid == driver else "actors" if actor else "ray"
        peak = _peak_mb(process)
        return (role, peak) if peak else None
    except (psutil.Error, OSError):
        return None


def _peak_mb(process: psutil.Process) -> float:
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        return process.memory_info().rss / 1e6
    lines = (line.split() for line in status.read_text().splitlines())
    return sum(int(words[1]) for words in lines if words[0] == "VmHWM:") * 1024 / 1e6  # a zombie has none
