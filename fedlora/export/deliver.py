"""What a finished run hands over: the adapter and the report, in its own directory."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.config.schema import RunConfig
from fedlora.export.diagnose import write_diagnostics
from fedlora.export.peft_directory import write_adapter
from fedlora.export.report import write_report
from fedlora.runs.rundir import DIAGNOSTICS, run_diagnostics
from fedlora.values import Adapters


def deliver(
    run_dir: Path,
    *,
    config: RunConfig,
    summary: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    trained: Callable[[], tuple[Adapters, tuple[str, ...]]],
    say: Callable[[str], None],
) -> None:
    """`run_dir` holds adapter/, diagnostics.json and report.html; what was there before is whole, and kept.

    A run that has its report is not measured any more.

    Args:
        run_dir: of the finished run.
        config: of the run.
        summary: as in summary.json.
        rounds: as in rounds.jsonl.
        trained: reads the final adapters and the class names; called only where one of the three is missing.
        say: hears of what takes a while.
    """
    if not (run_dir / "adapter").exists():
        say("writing the adapter, and loading it again to be sure")
        adapters, classes = trained()
        write_adapter(run_dir / "adapter", config=config, adapters=adapters, classes=classes, summary=summary)
    if not (run_dir / "report.html").exists():
        if run_diagnostics(run_dir) is None:
            say("measuring what the adapter is")
            write_diagnostics(run_dir / DIAGNOSTICS, config, *trained())
        write_report(run_dir / "report.html", summary, rounds, config, run_diagnostics(run_dir))
