"""What `fedlora doctor` finds at a config's runtime.address: a Ray cluster that this machine can use, or why not."""

from collections.abc import Iterator
from typing import Any

from fedlora.doctor.line import Line, fail, ok
from fedlora.doctor.machine import Probe

_ASK = """
import json, logging, platform, ray
ray.init(address={address!r}, logging_level=logging.CRITICAL, log_to_driver=False, configure_logging=False)
nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
cores = [int(node.get("CPU", 0)) for node in nodes]
print(json.dumps({{"ray": ray.__version__, "python": platform.python_version(), "cores": cores}}))
"""
"""Ray itself refuses a cluster of another version of Ray or of Python, and names both."""


def cluster_lines(address: str) -> Iterator[Line]:
    """One line: who answers at the address, with how many cores for work on each machine."""
    said: dict[str, Any] | str = Probe(_ASK.format(address=address)).answer()
    if isinstance(said, str):
        why = said.replace("not imported", "no answer")
        mend = (
            "start one there: ray start --head; every machine needs this machine's versions of Ray and Python"
        )
        yield fail("ray cluster", f"{address}: {why}", mend)
        return
    cores = ", ".join(map(str, said["cores"]))
    found = (
        f"{address}: Ray {said['ray']} and Python {said['python']} as here; cores of its machines: {cores}"
    )
    if any(said["cores"]):
        yield ok("ray cluster", found)
    else:
        yield fail("ray cluster", found, "add a machine that may work: ray start --address HOST:PORT")
