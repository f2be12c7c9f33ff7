"""Who holds what in a simulation, as its report draws it: RUN_DIR/partition.json, written when the run begins.

Of simulated clients only: a data owner's counts by label are its own, and no server has them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.data.holdings import Holdings
from fedlora.disk import write_durably
from fedlora.errors import ConfigError

PARTITION = "partition.json"
SHOWN = 60
"""Clients in the picture at most; of more, so many evenly spaced by size."""


def save_picture(run_dir: Path, kind: str, holdings: Holdings, classes: Sequence[str]) -> None:
    """The picture is durable. kind: of the partition; classes: names of the labels."""
    write_durably(run_dir / PARTITION, json.dumps(picture(kind, holdings, classes)) + "\n")


def picture(kind: str, holdings: Holdings, classes: Sequence[str]) -> dict[str, Any]:
    """`clients` with the `counts` of each by label, the largest first, out of `of` clients.

    One count a client, its records, and no `labels`, where records have none.
    """
    sizes = holdings.bounds[1:] - holdings.bounds[:-1]
    ordered = sorted(range(len(sizes)), key=lambda place: (-sizes[place], place))
    if len(ordered) > SHOWN:
        ordered = [ordered[round(n * (len(ordered) - 1) / (SHOWN - 1))] for n in range(SHOWN)]
    clients = [holdings.clients[place] for place in ordered]
    counts = holdings.label_counts(clients, len(classes)) if classes else None
    plain = [[int(sizes[place])] for place in ordered] if counts is None else counts.tolist()
    labels = [] if counts is None else list(classes)
    return {"kind": kind, "of": len(sizes), "labels": labels, "clients": clients, "counts": plain}


def load_picture(run_dir: Path) -> dict[str, Any] | None:
    """What was saved there; None for a server's run, and for a simulation that somebody withdrew from.

    Raises:
        ConfigError: it is damaged.
    """
    path = run_dir / PARTITION
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if len(found["clients"]) == len(found["counts"]) and isinstance(found["labels"], list):
            return found
    except (ValueError, TypeError, KeyError):
        pass
    raise ConfigError(f"{path} is damaged; remove it, and the report leaves the picture out") from None
