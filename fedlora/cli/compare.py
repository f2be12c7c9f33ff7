"""The command that compares: several methods, the same data, the same budget."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from fedlora.cli.many_runs import WorkersOption, require_none, to_option, told, where_of
from fedlora.cli.output import ConfigArgument, Format, FormatOption, SetOption, show, table
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.compare.tuning import Tuning


_Methods: TypeAlias = Annotated[
    str,
    typer.Option(
        "--methods",
        metavar="A,B,...",
        help="Arms: a method's name, a rule beside one (lora-pro, allora, mifa), a method as published "
        "(fedsvd-paper, ffa-paper, ffa-head), or config, the file as it stands. Another name lists them all.",
    ),
]
_Seeds: TypeAlias = Annotated[
    int, typer.Option("--seeds", min=1, help="Runs of each, from the config's seed upwards.")
]
_Epsilons: TypeAlias = Annotated[
    str, typer.Option("--epsilons", metavar="E,E,...", help="Budgets. [default: the config's]")
]
_Trials: TypeAlias = Annotated[
    int, typer.Option("--trials", min=0, help="Of learning rate and clipping, for each arm; 0: no tuning.")
]
_TrialSeeds: TypeAlias = Annotated[
    int, typer.Option("--trial-seeds", min=1, help="Runs of each setting tried; their mean is its score.")
]
_Proxy: TypeAlias = Annotated[
    Path | None,
    typer.Option("--proxy", metavar="YAML", help="A config whose data, public or synthetic, trials run on."),
]
_TuneOnData: TypeAlias = Annotated[
    bool, typer.Option("--tune-on-data", help="Trials run on the config's own data; its budget pays.")
]
_Own: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--arm", metavar='"NAME: KEY=VALUE ..."', help="One more arm; repeatable."),
]
_Control: TypeAlias = Annotated[
    bool, typer.Option("--control", help="The first arm once more: it must not differ from itself.")
]
_Against: TypeAlias = Annotated[
    str | None, typer.Option("--against", metavar="ARM", help="Whom to pair with. [default: the first]")
]
_References: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--references/--no-references",
        help="Beside: the run without privacy, and one client with all data.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """The app knows this command."""
    app.command("compare", short_help="Compare methods at equal data, budget and work.")(compare)


def compare(
    config: ConfigArgument,
    methods: _Methods,
    seeds: _Seeds = 5,
    epsilons: _Epsilons = "",
    trials: _Trials = 0,
    trial_seeds: _TrialSeeds = 1,
    proxy: _Proxy = None,
    tune_on_data: _TuneOnData = False,
    own: _Own = None,
    control: _Control = False,
    against: _Against = None,
    references: _References = True,
    overrides: SetOption = None,
    directory: Annotated[Path | None, to_option("compare")] = None,
    workers: WorkersOption = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Run methods x epsilons x seeds on one data split; table, paired differences, plot. Interrupted, it goes on."""
    from fedlora.compare.cells import Source
    from fedlora.compare.compare import Request
    from fedlora.compare.compare import compare as work

    source = Source(path=config, overrides=tuple(overrides or ()))
    where = where_of(source, directory, workers, "compare")
    request = Request(
        source=source,
        methods=_words(methods),
        own=own or (),
        seeds=seeds,
        epsilons=_numbers(epsilons),
        tuning=_tuning(trials, trial_seeds, proxy, tune_on_data=tune_on_data),
        control=control,
        against=against,
        references=references,
        where=where,
    )
    found, failures = told(partial(work, request), where)
    show(found, _text(found, where.directory), form)
    require_none(failures, len(found["cells"]), "cells", where)


def _tuning(trials: int, seeds: int, proxy: Path | None, *, tune_on_data: bool) -> "Tuning | None":
    from fedlora.compare.tuning import Tuning

    if proxy is not None and tune_on_data:
        raise ConfigError("--proxy, --tune-on-data: one of the two; a proxy costs no privacy")
    if trials and proxy is None and not tune_on_data:
        raise ConfigError(
            f"--trials {trials}: on which data? none is named; name a config with public or synthetic data: "
            "--proxy PROXY.yaml, or write --tune-on-data and pay for it"
        )
    if not trials and (proxy is not None or tune_on_data):
        given = "--tune-on-data" if proxy is None else f"--proxy {proxy}"
        raise ConfigError(f"{given}: no trials; write how many for each arm, for example --trials 6")
    return Tuning(trials=trials, proxy=proxy, seeds=seeds) if trials else None


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[float]:
    found = []
    for word in _words(text):
        try:
            found.append(float(word))
        except ValueError:
            raise ConfigError(
                f"--epsilons: {word!r} is no number; write for example --epsilons 1,3,8"
            ) from None
    return found


def _text(found: Mapping[str, Any], directory: Path) -> str:
    from fedlora.compare.table import HEADS, heading, notes, rows_of

    parts: list[str] = []
    for result in found["results"]:
        parts += [heading(result, found), _table(HEADS, rows_of(result, found)), ""]
    files = ", ".join(f"comparison.{kind}" for kind in ("json", "md", "svg"))
    return "\n".join([*parts, *(f"  {note}" for note in notes(found)), f"  {directory}: {files}, cells/"])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(line.rstrip() for line in table(heads, rows).splitlines())
