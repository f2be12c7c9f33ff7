"""TensorBoard: event files in RUN_DIR/tensorboard. `tensorboard --logdir RUN_DIR` shows them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.tracking.tracker import Opened, Tracked


def open_tensorboard(run_dir: Path, config: dict[str, Any], have: Tracked) -> Opened:
    """See `tracker.Open`. What an interrupted process wrote beyond the last round that is marked is purged."""
    from torch.utils.tensorboard import SummaryWriter

    directory = run_dir / "tensorboard"
    writer = SummaryWriter(str(directory), purge_step=have.told + 1 if directory.exists() else None)
    if have.told < 0:
        writer.add_text("config", _as_code(config))
    return _TensorBoard(writer), have


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._last = 0

    def round(self, number: int, found: Mapping[str, float]) -> None:
        for name, value in found.items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()
        self._last = number

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._writer.add_text("summary", _as_code(summary), self._last)

    def close(self, *, finished: bool) -> None:
        self._writer.close()


def _as_code(words: Mapping[str, Any]) -> str:
    """Markdown, which is how TensorBoard shows text."""
    return "\n".join(f"    {line}" for line in json.dumps(words, indent=2, default=str).splitlines())
