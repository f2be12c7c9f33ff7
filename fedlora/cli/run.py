"""Commands that work: check, simulate, resume."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli.check_node import check_fit
from fedlora.cli.output import (
    ConfigArgument,
    Format,
    FormatOption,
    RunDirArgument,
    SetOption,
    first_rows,
    only_ours,
    pairs,
    show,
    summary_text,
    telling,
)
from fedlora.cli.run_dir import config_named, interruption, usable
from fedlora.errors import IncompleteError

if TYPE_CHECKING:
    from fedlora.config.schema import RunConfig
    from fedlora.federation.events import Listener
    from fedlora.runtime.check.answer import Preview
    from fedlora.values import ServerState


def add_to(app: typer.Typer) -> None:
    """The app knows these commands."""
    app.command("check", short_help="Preview a run, or a data owner's node, without training.")(check)
    app.command("simulate", short_help="Run the federation; get an adapter and a report.")(simulate)
    app.command("resume", short_help="Go on with an interrupted run.")(resume)


def check(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="A run's YAML file, or a data owner's node.yaml.", callback=config_named
        ),
    ],
    node: Annotated[
        Path | None,
        typer.Argument(
            metavar="[NODE]",
            help="After a run's file: tell only whether this node.yaml would take part in it.",
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Of a run: load its model and run a few test records; all is then exact."
        ),
    ] = False,
    overrides: SetOption = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Tell what a run or a node would do, without training: noise, epsilon, sizes, digests, memory and time."""
    from fedlora.config.kinds import is_node
    from fedlora.config.load import dump_config, load_config
    from fedlora.config.located import located

    if node is not None:
        check_fit(config, node, overrides or [], form)
        return
    if is_node(config, overrides or []):
        _check_node(config, overrides or [], form)
        return
    loaded = load_config(config, overrides or [])
    with located(config, overrides or []), only_ours(), usable(Path(loaded.output)):
        found = _previewed(loaded, measure=measure)
    value = {"config": loaded.model_dump(mode="json"), **asdict(found)}
    show(value, f"{dump_config(loaded)}\n{preview_text(found)}", form)


def _previewed(config: "RunConfig", *, measure: bool) -> "Preview":
    if not measure:
        from fedlora.runtime.check.outline import outline

        return outline(config)
    from fedlora.cli.progress import watching
    from fedlora.runtime.check.measured import preview

    with watching() as listener:
        return preview(config, listener)


def _check_node(path: Path, overrides: Sequence[str], form: Format) -> None:
    from fedlora.config.load import load_node

    loaded = load_node(path, overrides)
    from fedlora.cli.check_node import node_text
    from fedlora.deploy.preview_node import preview_node

    with only_ours():
        found = preview_node(path, overrides)
    show({"config": loaded.model_dump(mode="json"), **asdict(found)}, f"{path}\n{node_text(found)}", form)


def simulate(
    config: ConfigArgument,
    overrides: SetOption = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", metavar="DIR", help="Instead of the config's `output`.")
    ] = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Run the whole federation with simulated clients; ends with a table, the adapter and the report."""
    from fedlora.config.load import load_config
    from fedlora.config.located import located

    loaded = load_config(config, overrides or [])
    target = Path(loaded.output) if run_dir is None else run_dir
    from fedlora.runtime import simulate as runtime

    with located(config, overrides or []), usable(target):
        _to_the_end(
            target,
            lambda listener: runtime.simulate(
                loaded, target, listener, stored=_delivering(target, loaded, listener)
            ),
            form,
        )


def resume(run_dir: RunDirArgument, form: FormatOption = Format.TEXT) -> None:
    """Go on after any interruption; a finished run is left alone."""
    from fedlora.config.located import located
    from fedlora.runs.rundir import run_config
    from fedlora.runtime import simulate as runtime

    config = run_config(run_dir)
    with located(run_dir / "config.yaml"), usable(run_dir):
        _to_the_end(
            run_dir,
            lambda listener: runtime.resume(run_dir, listener, stored=_delivering(run_dir, config, listener)),
            form,
        )


def _delivering(run_dir: Path, config: "RunConfig", listener: "Listener") -> "Callable[[ServerState], None]":
    from fedlora.export.deliver import delivering
    from fedlora.federation.events import Stage

    return delivering(run_dir, config, lambda words: listener(Stage(name=words)))


def _to_the_end(run_dir: Path, work: "Callable[[Listener], Path]", form: Format) -> None:
    """Does the work, writes the adapter and the report where they are missing, prints the table."""
    from fedlora.cli.progress import watching
    from fedlora.export.deliver import deliver
    from fedlora.federation.events import Stage
    from fedlora.interrupts import sigterm_as_ctrl_c
    from fedlora.runs.rundir import finished_summary, require_simulation

    require_simulation(run_dir)
    was_finished = finished_summary(run_dir) is not None
    try:
        with sigterm_as_ctrl_c(), only_ours(), watching() as listener:
            work(listener)
            summary = deliver(run_dir, lambda words: listener(Stage(name=words)))
    except KeyboardInterrupt:
        raise IncompleteError(interruption(run_dir)) from None
    heading = f"{run_dir} is finished already; nothing was done" if was_finished else f"{run_dir} is finished"
    show(summary, f"{heading}\n{summary_text(summary, run_dir)}", form)


def _about(seconds: float) -> str:
    """An estimate leaves out what every run costs besides: the start, and writing."""
    from fedlora.export.words import duration

    return "under a minute" if seconds < 45 else f"about {duration(seconds)}"


MOST_CLASSES = 8
"""That are named."""


def preview_text(found: "Preview") -> str:
    """The preview as people read it."""
    from fedlora.data.table import shown
    from fedlora.export.words import bytes_text, epsilon, number

    rows = [
        (c.client, f"{c.records:,}", number(c.sample_rate), number(c.noise_multiplier), epsilon(c.epsilon))
        for c in telling(found.clients, lambda c: (c.records, c.client))  # few records, a high rate
    ]
    facts = [
        ("trained", f"{found.trained_parameters:,} numbers"),
        (
            "each round a client",
            f"sends {bytes_text(found.bytes_up)}, receives {bytes_text(found.bytes_down)}",
        ),
        ("steps", f"{found.steps_per_participation} in each round that a client answers"),
        ("memory", f"about {bytes_text(found.memory_bytes)}"),
        ("time", f"{_about(found.training_seconds)} for the rounds, at this machine's present load"),
    ]
    if not found.trained_parameters:
        facts = [fact for fact in facts if fact[0] == "steps"]
    if found.classes:
        facts = [("classes", f"{len(found.classes):,}: {shown(found.classes, MOST_CLASSES)}"), *facts]
    noise = "noise multiplier" if found.measured else "noise, about"
    heads = ("client", "records", "sample rate", noise, "epsilon at most")
    return "\n".join(
        [first_rows(heads, rows), "", pairs(facts), *[f"  note: {note}" for note in found.notes]]
    )
