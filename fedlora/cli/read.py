"""Commands that look: status, budget, evaluate, report, schema."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.config.schema import RunConfig
    from fedlora.runtime.events import Listener


def add_to(app: typer.Typer) -> None:
    """The app knows these commands."""
    app.command("status", short_help="Tell how far a run is.")(status)
    app.command("budget", short_help="Tell what ledgers have spent and have left.")(budget)
    app.command("evaluate", short_help="Score an adapter on test data.")(evaluate)
    app.command("report", short_help="Write the run as one HTML file.")(report)
    app.command("schema", short_help="Print the JSON Schema of the config, for editors.")(schema)


def status(run_dir: RunDirArgument, form: FormatOption = Format.TEXT) -> None:
    """Tell how far a run is: rounds, score, refusals, epsilon, throughput. Works while it goes on."""
    from fedlora.export.words import duration, epsilon, number, score

    with only_ours():
        found = run_status(run_dir)
    state = (
        "finished" if found["finished"] else f"not finished; if nothing works on it: fedlora resume {run_dir}"
    )
    metric, pace = str(found["metric"]), number(found["client_rounds_per_second"])
    rows = [
        ("state", state),
        ("rounds", f"{found['rounds_completed']} of {found['rounds']}"),
        ("clients", str(found["clients"])),
        (
            f"test {metric}",
            f"{score(metric, found['score_before'])} before, {score(metric, found['score'])} now",
        ),
        ("epsilon", epsilon(found["epsilon_max"]) if found["private"] else "NOT PRIVATE"),
        ("refusals", f"{found['refusals']} refused, {found['rejections']} rejected"),
        ("pace", f"{pace} client rounds a second, {duration(found['seconds'])} so far"),
    ]
    show(found, f"{run_dir}\n{pairs(rows)}", form)


def run_status(run_dir: Path) -> dict[str, Any]:
    """The run's summary so far, and how far that is."""
    from fedlora.cli.so_far import summary_so_far
    from fedlora.runtime.rundir import finished_summary, run_config, run_rounds

    lines = run_rounds(run_dir)
    return {
        "finished": finished_summary(run_dir) is not None,
        "rounds": run_config(run_dir).federation.rounds,
        **summary_so_far(run_dir),
        "refusals": sum(len(line["refused"]) for line in lines),
        "rejections": sum(len(line["rejected"]) for line in lines),
    }


def budget(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A run directory, or one ledger file.")],
    form: FormatOption = Format.TEXT,
) -> None:
    """Tell what a ledger, or every ledger of a run, has spent and has left."""
    from fedlora.export.words import epsilon, number
    from fedlora.runtime.summary import run_budget

    if not path.exists():
        raise ConfigError(f"{path}: no such file or directory; name a run directory or a ledger")
    rows = run_budget(path)
    lines = [
        (
            row["client"],
            f"{row['participations']} of {row.get('max_participations', '-')}",
            epsilon(row.get("epsilon")),
            number(row.get("target_epsilon")),
            number(row.get("left")),
            number(row.get("delta")),
        )
        for row in rows
    ]
    heads = ("client", "rounds answered", "epsilon spent", "target", "left", "delta")
    show(
        rows,
        table(heads, lines) if rows else f"{path}: nothing spent: no ledgers (NOT PRIVATE, or not begun)",
        form,
    )


def evaluate(
    path: Annotated[
        Path, typer.Argument(metavar="RUN_DIR_OR_ADAPTER", help="A run, or an exported adapter.")
    ],
    config: ConfigArgument,
    overrides: SetOption = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Score an adapter on the test data that a config names."""
    from fedlora.config.load import load_config

    loaded = load_config(config, overrides or [])
    from fedlora.cli.progress import watching
    from fedlora.export.words import number, score

    with only_ours(), watching() as listener:
        found = _score(path, loaded, listener)
    metric = str(found["metric"])
    count = f"{found['examples']:,}"
    rows = [(metric, score(metric, found["score"])), ("loss", number(found["loss"])), ("examples", count)]
    show(found, f"{path}\n{pairs(rows)}", form)


def _score(path: Path, config: "RunConfig", listener: "Listener") -> dict[str, Any]:
    """{metric, score, loss, examples} of a run's or a PEFT directory's model on the config's test data."""
    from fedlora.export.peft_directory import load_adapter
    from fedlora.runtime.prepare import prepare
    from fedlora.runtime.rundir import adapters_of
    from fedlora.training.tasks import evaluate as score_of

    # Scoring spends nothing, so no noise needs to be calibrated.
    prepared = prepare(config.model_copy(update={"privacy": "none"}), listener)
    if (path / "config.yaml").exists():
        made_by, adapters, classes = adapters_of(path)
        _require_same(path, made_by, config)
        if classes != prepared.clients.classes:
            theirs, ours = list(classes), list(prepared.clients.classes)
            raise ConfigError(f"{path} tells {theirs} apart, the data {ours}; use the same labels")
        prepared.model.load(adapters)
    else:
        load_adapter(path, prepared.model, prepared.clients.classes)
    found = score_of(prepared.model, prepared.clients.test)
    return {
        "metric": found.metric,
        "score": found.value,
        "loss": found.loss,
        "examples": len(prepared.clients.test),
    }


def _require_same(path: Path, made_by: "RunConfig", config: "RunConfig") -> None:
    """The config describes the model that the run trained. A frozen random head follows from the seed."""
    frozen = getattr(made_by.task, "head", None) == "frozen"
    for key in ("model", "task", "lora", "seed") if frozen else ("model", "task", "lora"):
        theirs, ours = getattr(made_by, key), getattr(config, key)
        if theirs != ours:
            raise ConfigError(
                f"{path} was trained with {key} {theirs!r}, the config has {ours!r}; make them equal"
            )


def report(
    run_dir: RunDirArgument,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE", help="Instead of RUN_DIR/report.html.")
    ] = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Write one self-contained HTML file: curves, epsilon by client, participation, privacy statement."""
    from fedlora.cli.write import write_report

    target = run_dir / "report.html" if to is None else to
    write_report(run_dir, target)
    show({"report": str(target)}, str(target), form)


def schema(form: FormatOption = Format.JSON) -> None:
    """Print the JSON Schema of the config, for editors. It has no other form than JSON."""
    from fedlora.config.load import json_schema

    print(json.dumps(json_schema(), indent=2))
