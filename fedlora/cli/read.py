"""Commands that look: status, replay, evaluate, report, schema; and budget, which is a file of its own."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli import budget, follow
from fedlora.cli.output import (
    ConfigArgument,
    Format,
    FormatOption,
    RunDirArgument,
    SetOption,
    only_ours,
    pairs,
    show,
    table,
)
from fedlora.cli.run_dir import run_dir_named, scorable
from fedlora.errors import IncompleteError


def add_to(app: typer.Typer) -> None:
    """The app knows these commands."""
    app.command("status", short_help="Tell how far a run is.")(status)
    follow.add_to(app)
    budget.add_to(app)
    app.command("replay", short_help="Play a server's run again from its journal.")(replay)
    app.command("evaluate", short_help="Score an adapter on test data.")(evaluate)
    app.command("report", short_help="Write the run as one HTML file.")(report)
    app.command("schema", short_help="Print the JSON Schema of the config, for editors.")(schema)


def status(
    run_dir: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN_DIR]",
            help="What simulate or a server left behind, or the config of it.",
            callback=run_dir_named,
        ),
    ] = None,
    server: follow.ServerOption = None,
    follow_rounds: follow.FollowOption = False,
    roots: follow.RootsOption = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Tell how far a run is: rounds, score, refusals, epsilon, throughput. Works while it goes on."""
    follow.require_one_source(run_dir, server, follow=follow_rounds, roots=roots)
    if server is not None:
        follow.status_of_server(server, roots, form, follow=follow_rounds)
        return
    assert run_dir is not None
    from fedlora.monitor.view import found_in
    from fedlora.runs.rundir import going_on, is_at_work

    with only_ours():
        at_work = is_at_work(run_dir)  # asked first: whoever ends meanwhile is found to be finished
        found = found_in(run_dir)
    running = at_work and not found["finished"]
    unfinished = "running" if running else f"not running; {going_on(run_dir)}"
    show({**found, "running": running}, follow.status_text(str(run_dir), found, unfinished), form)


def replay(run_dir: RunDirArgument, form: FormatOption = Format.TEXT) -> None:
    """Play a server's run again from its journal: every update that it heard gives its model, bit for bit."""
    from fedlora.deploy import replay as journal
    from fedlora.federation.store import Store, state_digest

    with only_ours():
        played = list(journal.replay(run_dir))
        stored = state_digest(Store(run_dir).load()[0])
    number, found = played[-1]
    if found != stored:
        raise IncompleteError(
            f"{run_dir}: by the journal round {number} ends in {found}, by the checkpoint in {stored}; something was "
            "changed: restore the directory"
        )
    rows = [{"round": number, "state_sha256": digest} for number, digest in played]
    text = table(("round", "state_sha256"), [(str(number), digest) for number, digest in played])
    show(rows, f"{text}\nThe checkpoint is the same, bit for bit.", form)


def evaluate(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_DIR_OR_ADAPTER", help="A run, or an exported adapter.", callback=scorable
        ),
    ],
    config: ConfigArgument,
    overrides: SetOption = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Score an adapter on the test data that a config names."""
    from fedlora.config.load import load_config
    from fedlora.config.located import located

    loaded = load_config(config, overrides or [])
    from fedlora.cli.progress import watching
    from fedlora.export.peft_directory import load_adapter, peft_lora, ranks_in
    from fedlora.export.words import number, score
    from fedlora.runtime import scoring

    with located(config, overrides or []), only_ours(), watching() as listener:
        is_run = (path / "config.yaml").exists()
        if not is_run:
            loaded = loaded.model_copy(update={"lora": peft_lora(loaded.lora, ranks_in(path))})
        prepared = scoring.prepared_for_scoring(loaded, listener)
        if is_run:
            scoring.load_run(path, prepared)
        else:
            load_adapter(path, prepared.model, prepared.clients.classes)
        found = scoring.score(prepared)
    metric = str(found["metric"])
    count = f"{found['examples']:,}"
    rows = [(metric, score(metric, found["score"])), ("loss", number(found["loss"])), ("examples", count)]
    show(found, f"{path}\n{pairs(rows)}", form)


def report(
    run_dir: RunDirArgument,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE", help="Instead of RUN_DIR/report.html.")
    ] = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Write one self-contained HTML file: curves, epsilon by client, signal and noise, what the adapter is."""
    from fedlora.export.deliver import report_of
    from fedlora.runs.summary import summary_so_far

    target = run_dir / "report.html" if to is None else to
    report_of(run_dir, target, summary_so_far(run_dir))
    show({"report": str(target)}, str(target), form)


def schema(form: FormatOption = Format.JSON) -> None:
    """Print the JSON Schema of the config, for editors. It has no other form than JSON."""
    from fedlora.config.load import json_schema

    print(json.dumps(json_schema(), indent=2))
