"""How many cores there are for a run."""

import os


def usable_cores() -> int:
    """Cores that this process may run on: in a job of a batch system fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
