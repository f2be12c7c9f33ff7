"""What a finished run hands over: the adapter and the report, in its own directory."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedlora.config.schema import RunConfig
from fedlora.export.diagnose import write_diagnostics
from fedlora.export.peft_directory import write_adapter
from fedlora.export.report import write_report
from fedlora.export.samples import asks_for_samples, write_samples
from fedlora.runs.beginning import require_beginning
from fedlora.runs.partition_picture import load_picture
from fedlora.runs.rundir import (
    DIAGNOSTICS,
    SAMPLES,
    load_classes,
    run_config,
    run_diagnostics,
    run_rounds,
    run_samples,
)
from fedlora.runs.summary import summary_so_far
from fedlora.runs.trained import trained_adapters
from fedlora.values import ServerState


def deliver(run_dir: Path, say: Callable[[str], None]) -> Mapping[str, Any]:
    """`run_dir`, of a finished run, holds adapter/, diagnostics.json, report.html and, where asked for, samples.jsonl.

    What was there before is whole, and kept. A run that has its report is not measured any more. Returns the summary.
    say: hears of what takes a while.
    """
    config, summary = run_config(run_dir), summary_so_far(run_dir)
    if not (run_dir / "adapter").exists():
        say("writing the adapter, and loading it again to be sure")
        adapters, classes = trained_adapters(run_dir)
        write_adapter(run_dir / "adapter", config=config, adapters=adapters, classes=classes, summary=summary)
    if asks_for_samples(config) and not (run_dir / SAMPLES).exists():
        say("letting the model go on from test prompts")
        write_samples(run_dir / SAMPLES, config, trained_adapters(run_dir)[0])
    if not (run_dir / "report.html").exists():
        if run_diagnostics(run_dir) is None:
            say("measuring what the adapter is")
            write_diagnostics(run_dir / DIAGNOSTICS, config, *trained_adapters(run_dir))
        report_of(run_dir, run_dir / "report.html", summary)
    return summary


def report_of(run_dir: Path, target: Path, summary: Mapping[str, Any]) -> None:
    """The report in `target` tells all that lies in `run_dir`. summary: of the run, so far."""
    write_report(
        target,
        summary,
        run_rounds(run_dir),
        run_config(run_dir),
        diagnostics=run_diagnostics(run_dir),
        picture=load_picture(run_dir),
        samples=run_samples(run_dir),
    )


def delivering(run_dir: Path, config: RunConfig, say: Callable[[str], None]) -> Callable[[ServerState], None]:
    """What leaves adapters/round-000010 and so on in `run_dir`, every `export_every` rounds, once a round is stored.

    Each is whole or not there, and one that is there stays; its card tells the epsilon spent by then. Given the newest
    state again, as when a run goes on, it writes what an interruption kept from being written.

    Args:
        run_dir: of the run, simulated or served.
        config: of the run.
        say: hears of what takes a while.
    """

    def deliver_round(state: ServerState) -> None:
        every, directory = config.export_every, run_dir / "adapters" / f"round-{state.round:06d}"
        if every is None or state.round == 0 or state.round % every or directory.exists():
            return
        say(f"writing the adapter of round {state.round}")
        require_beginning(config, run_dir)
        # A round that was not scored has no score; the summary would tell an earlier one's.
        summary = {**summary_so_far(run_dir), "score": run_rounds(run_dir)[-1].get("score")}
        write_adapter(
            directory, config=config, adapters=state.adapters, classes=load_classes(run_dir), summary=summary
        )

    return deliver_round
