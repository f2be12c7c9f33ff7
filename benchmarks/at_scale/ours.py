"""Our side: `fedlora simulate` as a user calls it from Python, with a listener that looks at the clock.

python -m at_scale.ours MATERIAL SCRATCH
"""

import json
import sys
import time
from pathlib import Path

from fedlora.config.load import load_config
from fedlora.federation.events import Event, RoundDone, RunStarted
from fedlora.runtime.simulate import simulate


def main(material: Path, scratch: Path) -> None:
    """SCRATCH/times.json: monotonic seconds before the first round and after each, when it was on disk."""
    stamps: list[float] = []
    answered: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, RunStarted | RoundDone):
            stamps.append(time.monotonic())
        if isinstance(event, RoundDone):
            answered.append(len(event.round["answered"]))

    simulate(load_config(material / "config.yaml"), scratch / "run", listen)
    spans = [_spans(path) for path in sorted((scratch / "spans").iterdir())]
    (scratch / "times.json").write_text(json.dumps({"stamps": stamps, "answered": answered, "spans": spans}))


def _spans(path: Path) -> list[tuple[float, float]]:
    """When one process began and ended each job."""
    rows = [line.split() for line in path.read_text().splitlines()]
    return [(float(row[0]), float(row[1])) for row in rows if len(row) == 2]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
