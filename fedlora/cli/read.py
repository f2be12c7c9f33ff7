"""Commands that look: status, budget, evaluate, report, schema."""

import json
from collections.abc import Mapping, Sequence
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
    from collections.abc import Callable

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
    from fedlora.export.statement import reservation
    from fedlora.export.words import duration, epsilon, number, score
    from fedlora.runtime.rundir import going_on

    with only_ours():
        found = run_status(run_dir)
    state = "finished" if found["finished"] else f"not finished; if nothing works on it, {going_on(run_dir)}"
    taken_back = reservation(found) if found["private"] else None
    promise = _known(epsilon, found["epsilon_max"]) if found["private"] else "NOT PRIVATE"
    promise += "" if taken_back is None else f" ({taken_back})"
    metric, pace = str(found["metric"]), number(found["client_rounds_per_second"])
    rows = [
        ("state", state),
        ("rounds", f"{found['rounds_completed']} of {found['rounds']}"),
        ("clients", str(found["clients"])),
        (
            f"test {metric}",
            f"{score(metric, found['score_before'])} before, {score(metric, found['score'])} now",
        ),
        ("epsilon", promise),
        ("refusals", f"{found['refusals']} refused, {found['rejections']} rejected"),
        ("pace", f"{pace} client rounds a second, {duration(found['seconds'])} so far"),
    ]
    show(found, f"{run_dir}\n{pairs(rows)}", form)


def run_status(run_dir: Path) -> dict[str, Any]:
    """The run's summary so far, and how far that is."""
    from fedlora.runtime.rundir import finished_summary, run_config, run_rounds
    from fedlora.runtime.summary import summary_so_far

    lines = run_rounds(run_dir)
    finished, summary = finished_summary(run_dir) is not None, summary_so_far(run_dir)
    if summary["private"] and not finished and (lost := unaccounted(run_dir)):
        known = {client: None if client in lost else e for client, e in summary["epsilon_by_client"].items()}
        summary = {**summary, "epsilon_max": None, "epsilon_by_client": known}
    return {
        "finished": finished,
        "rounds": run_config(run_dir).federation.rounds,
        **summary,
        "refusals": sum(len(line["refused"]) for line in lines),
        "rejections": sum(len(line["rejected"]) for line in lines),
    }


def unaccounted(run_dir: Path) -> dict[str, int]:
    """Client -> rounds that it answered, where ledgers or reports hold fewer, so that nobody knows what it spent."""
    from collections import Counter

    from fedlora.runtime.rundir import run_rounds
    from fedlora.runtime.summary import spent_events

    answered = Counter(client for line in run_rounds(run_dir) for client in line["answered"])
    spent = spent_events(run_dir)
    return {client: count for client, count in sorted(answered.items()) if len(spent.get(client, ())) < count}


def _known(words: "Callable[[float], str]", value: float | None) -> str:
    return "unknown" if value is None else words(value)


def budget(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A run directory, a node.yaml, or one ledger file.")
    ],
    delta: Annotated[
        float | None,
        typer.Option("--delta", help="Of epsilon, for a lone ledger. [default: 1e-5]", show_default=False),
    ] = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Tell what ledgers have spent and have left, once their chains are verified."""
    from fedlora.runtime.budgets import budgets

    rows = budgets(path, delta)
    if rows:
        lost, source = unaccounted(path) if path.is_dir() else {}, _noise_source(path)
        rows = [_honest(row, lost.get(row["client"], 0), source) for row in rows]
    show(rows, budget_text(path, rows), form)


def _honest(row: Mapping[str, Any], lost: int, noise_source: str | None) -> dict[str, Any]:
    """The row, which knows nothing of what was spent if its client answered `lost` rounds without a whole ledger."""
    unknown = {"participations": lost, "epsilon": None, "left": None, "verified": False} if lost else {}
    return {**row, **unknown, "noise_source": noise_source}


def _noise_source(path: Path) -> str | None:
    """The kind of noise behind what `budget` tells; None where there is no ledger to tell it."""
    from fedlora.config.load import load_node
    from fedlora.privacy.ledger import read_ledger
    from fedlora.runtime.summary import noise_source

    if path.is_dir():
        return noise_source(path)
    ledger = Path(load_node(path).ledger) if path.suffix in (".yaml", ".yml") else path
    return read_ledger(ledger).header.noise if ledger.exists() else None


def budget_text(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as people read them, and what vouches for them."""
    from fedlora.export.statement import SIMULATION, reservation
    from fedlora.export.words import epsilon, number

    if not rows:
        return f"{path}: NOT PRIVATE: there are no ledgers"
    lines = [
        (
            row["client"],
            f"{row['participations']} of {row['max_participations'] or '-'}",
            _known(epsilon, row["epsilon"]),
            number(row["target_epsilon"]),
            "unknown" if row["epsilon"] is None else number(row["left"]),
            number(row["delta"]),
        )
        for row in rows
    ]
    heads = ("client", "rounds answered", "epsilon spent", "target", "left", "delta")
    entries = sum(row["participations"] for row in rows if row["verified"])
    lost = [row for row in rows if row["epsilon"] is None]
    reported = sum(row["participations"] for row in rows if not row["verified"] and row not in lost)
    notes = [f"chain verified: {entries} entries"] if any(row["verified"] for row in rows) else []
    notes += (
        [f"{reported} as the nodes report them: each node's own ledger is the authority"] if reported else []
    )
    if lost:
        count = sum(row["participations"] for row in lost)
        notes.append(f"unknown: {count} answers of {len(lost)} clients without a whole ledger; restore it")
    notes = notes or ["no ledger yet"]
    source = rows[0].get("noise_source")
    if source is not None and reservation({"noise_source": source}) == SIMULATION:
        notes.append(SIMULATION)
    return "\n".join([table(heads, lines), *[f"  {note}" for note in notes]])


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
    from fedlora.config.located import located

    loaded = load_config(config, overrides or [])
    from fedlora.cli.progress import watching
    from fedlora.export.words import number, score

    with located(config, overrides or []), only_ours(), watching() as listener:
        found = _score(path, loaded, listener)
    metric = str(found["metric"])
    count = f"{found['examples']:,}"
    rows = [(metric, score(metric, found["score"])), ("loss", number(found["loss"])), ("examples", count)]
    show(found, f"{path}\n{pairs(rows)}", form)


def _score(path: Path, config: "RunConfig", listener: "Listener") -> dict[str, Any]:
    """{metric, score, loss, examples} of a run's or a PEFT directory's model on the config's test data."""
    from fedlora.export.peft_directory import load_adapter
    from fedlora.runtime.prepare import prepare
    from fedlora.runtime.rundir import adapters_of, run_config
    from fedlora.training.tasks import evaluate as score_of

    # Scoring spends nothing, so no noise needs to be calibrated.
    prepared = prepare(config.model_copy(update={"privacy": "none"}), listener)
    if (path / "config.yaml").exists():
        _require_same(path, run_config(path), config)
        adapters, classes = adapters_of(path)
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
    from fedlora.config.located import flat

    frozen = getattr(made_by.task, "head", None) == "frozen"
    sections = {"model", "task", "lora", "seed"} if frozen else {"model", "task", "lora"}
    theirs, ours = (dict(flat(c.model_dump(mode="json", include=sections))) for c in (made_by, config))
    for key in sorted({*theirs, *ours}):
        there, here = theirs.get(key), ours.get(key)
        if there != here and not isinstance(here, Mapping):
            name = ".".join(key)
            raise ConfigError(f"{name}: {here!r}, but {path} was trained with {there!r}; make them equal")


def report(
    run_dir: RunDirArgument,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE", help="Instead of RUN_DIR/report.html.")
    ] = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Write one self-contained HTML file: curves, epsilon by client, participation, privacy statement."""
    from fedlora.export.report import write_report
    from fedlora.runtime.rundir import run_config, run_rounds
    from fedlora.runtime.summary import summary_so_far

    target = run_dir / "report.html" if to is None else to
    write_report(target, summary_so_far(run_dir), run_rounds(run_dir), run_config(run_dir))
    show({"report": str(target)}, str(target), form)


def schema(form: FormatOption = Format.JSON) -> None:
    """Print the JSON Schema of the config, for editors. It has no other form than JSON."""
    from fedlora.config.load import json_schema

    print(json.dumps(json_schema(), indent=2))
