"""`fedlora budget PATH` and `fedlora budget verify PATH`: what ledgers have spent, and the proof that they hold."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import click
import typer
from typer.core import TyperGroup

from fedlora.cli.output import Format, FormatOption, first_rows, pairs, show, telling
from fedlora.cli.run_dir import kept_in
from fedlora.errors import PrivacyError

PathArgument: TypeAlias = Annotated[
    Path,
    typer.Argument(
        metavar="PATH", help="A run directory, a node.yaml, or one ledger file.", callback=kept_in
    ),
]
DeltaOption: TypeAlias = Annotated[
    float | None,
    typer.Option("--delta", help="Of epsilon, for a lone ledger. [default: 1e-5]", show_default=False),
]


class _ShowsByDefault(TyperGroup):
    """`budget PATH` is `budget show PATH`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in {*self.commands, *ctx.help_option_names}:
            args = ["show", *args]
        return super().parse_args(ctx, args)


def add_to(app: typer.Typer) -> None:
    """The app knows this command."""
    budget = typer.Typer(
        cls=_ShowsByDefault, subcommand_metavar="[show | verify] PATH", rich_markup_mode=None
    )
    budget.command("show", short_help="What is spent and left; `budget PATH` is the same.")(show_budget)
    budget.command("verify", short_help="Prove ledgers to an auditor.")(verify)
    app.add_typer(
        budget,
        name="budget",
        short_help="Tell what ledgers have spent and have left; verify them.",
        help="Tell what ledgers have spent and have left; `verify` proves them to an auditor.",
    )


def show_budget(path: PathArgument, delta: DeltaOption = None, form: FormatOption = Format.TEXT) -> None:
    """Tell what ledgers have spent and have left, once their chains are verified."""
    from fedlora.runs.budgets import budgets

    rows = budgets(path, delta)
    show(rows, budget_text(path, rows), form)


def verify(path: PathArgument, delta: DeltaOption = None, form: FormatOption = Format.TEXT) -> None:
    """Check every line of a ledger and compute epsilon from it alone, by two accountants that have to agree."""
    from fedlora.runs.verify import verified

    rows = verified(path, delta)
    show(rows, verified_text(path, rows), form)
    if objections := [row["objection"] for row in rows if row["objection"] is not None]:
        raise PrivacyError("\n".join(objections))


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
            known(epsilon, row["epsilon"]),
            number(row["target_epsilon"]),
            "unknown" if row["epsilon"] is None else number(row["left"]),
            number(row["delta"]),
        )
        for row in telling(rows, _dearest_first)
    ]
    heads = ("client", "participations", "epsilon spent", "target", "left", "delta")
    entries = sum(row["participations"] for row in rows if row["verified"])
    lost = [row for row in rows if row["epsilon"] is None]
    reported = sum(
        row["participations"] for row in rows if not row["verified"] and row["epsilon"] is not None
    )
    notes = [f"chain verified: {entries} participations"] if any(row["verified"] for row in rows) else []
    notes += (
        [f"{reported} as the nodes report them: each node's own ledger is the authority"] if reported else []
    )
    if lost:
        count = sum(row["participations"] for row in lost)
        notes.append(f"unknown: {count} answers of {len(lost)} clients without a whole ledger; restore it")
    notes = notes or ["no ledger yet"]
    source = rows[0]["noise_source"]
    if source is not None and reservation({"noise_source": source}) == SIMULATION:
        notes.append(SIMULATION)
    return "\n".join([first_rows(heads, lines), *[f"  {note}" for note in notes]])


def _dearest_first(row: Mapping[str, Any]) -> tuple[float, int, str]:
    """What nobody knows may be the most; of equals, who took part more often."""
    spent = math.inf if row["epsilon"] is None else row["epsilon"]
    return -spent, -row.get("participations", row.get("debits", 0)), row["client"]


def known(words: Callable[[float], str], value: float | None) -> str:
    """The value in words, or that nobody knows it."""
    return "unknown" if value is None else words(value)


def verified_text(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """One ledger in full; of several a line each."""
    if not rows:
        return f"{path}: NOT PRIVATE: there are no ledgers"
    if len(rows) == 1:
        return f"{rows[0]['ledger']}\n{pairs(_facts(rows[0]))}"
    from fedlora.export.statement import noise_label
    from fedlora.export.words import epsilon, number

    heads = ("client", "debits", "lost", "epsilon by pld", "by prv", "by rdp", "replace-one", "noise")
    names = ("epsilon_pld", "epsilon_prv", "epsilon_rdp", "epsilon_replace_one")
    lines = [
        (
            row["client"],
            str(row["debits"]),
            str(row["lost_attempts"]),
            *[epsilon(row[name]) for name in names],
            row["noise_source"],
        )
        for row in telling(rows, _dearest_first)
    ]
    entries, agree = sum(row["entries"] for row in rows), all(row["accountants_agree"] for row in rows)
    notes = [
        f"chains hold: {entries} entries in {len(rows)} ledgers, each of which follows the one before",
        f"delta {number(rows[0]['delta'])}, reported by {rows[0]['accountant']}; {_agreement(agree)}",
        *sorted({f"noise: {noise_label(row['noise_source'])}" for row in rows}),
    ]
    return "\n".join([first_rows(heads, lines), *[f"  {note}" for note in notes]])


def _facts(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    from fedlora.export.statement import noise_label, unit_text
    from fedlora.export.words import epsilon, number
    from fedlora.privacy.noise import SEEDED

    lost, replies = row["lost_attempts"], row.get("replies")
    attempts = f", {lost} of them attempts that left no reply" if lost else ""
    kept = "" if replies is None else f"; {replies['kept']} kept, their bytes are those recorded"
    if replies and replies["acknowledged"]:
        kept += f"; the server has {replies['acknowledged']} more"
    if row["noise_source"] == SEEDED:
        kept = ": seeded noise repeats them, so none is kept"
    unsent = f", {replies['unsent']} of them not sent yet" if replies and replies["unsent"] else ""
    by_each = ", ".join(f"{epsilon(row[f'epsilon_{name}'])} by {name}" for name in ("pld", "prv", "rdp"))
    return [
        ("chain", f"holds: {row['entries']} entries, each of which follows the one before"),
        ("head", f"{row['head']}; lines cut off the end show only to who knows a later one: compare it"),
        ("client", row["client"]),
        ("data set", row["dataset"]),
        ("unit", unit_text(row["unit"])),
        ("adjacency", row["adjacency"]),
        ("noise", noise_label(row["noise_source"])),
        ("debits", f"{row['debits']} for {row['rounds']} rounds{attempts}"),
        ("replies", f"{row['releases']} recorded{kept}{unsent}"),
        *[(mechanism["kind"], _mechanism(mechanism)) for mechanism in row["mechanisms"]],
        ("epsilon", f"{epsilon(row['epsilon'])} at delta {number(row['delta'])} by {row['accountant']}"),
        ("accountants", f"{by_each}: {_agreement(row['accountants_agree'])}"),
        ("replace-one", f"epsilon {epsilon(row['epsilon_replace_one'])}"),
    ]


def _mechanism(mechanism: Mapping[str, Any]) -> str:
    from fedlora.export.words import number

    steps, noise = f"{mechanism['steps']:,}", number(mechanism["noise_multiplier"])
    if mechanism["kind"] == "evaluation":
        return f"{steps} counts over all records, noise of {noise} records"
    cut = mechanism["max_draw"]
    drawn = "" if cut is None else f", {number(mechanism['expected_batch'])} expected and {cut} at most"
    return (
        f"{steps} steps, noise of {noise} x norm {number(mechanism['max_grad_norm'])}, "
        f"records drawn at rate {number(mechanism['sample_rate'])}{drawn}"
    )


def _agreement(agree: bool) -> str:
    return "pld and prv agree" if agree else "pld and prv DO NOT AGREE"
