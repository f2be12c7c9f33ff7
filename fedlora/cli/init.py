"""The command that a beginner types first: it writes a commented config, for one's own records if they are named."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.data.look import SplitFile


def add_to(app: typer.Typer) -> None:
    """The app knows this command."""
    app.command("init", short_help="Write a commented run.yaml that runs offline.")(init)


def init(
    directory: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Where to write; made if missing.")
    ] = Path(),
    node: Annotated[bool, typer.Option("--node", help="node.yaml, for a data owner.")] = False,
    own: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="FILE", help="Your records: csv, tsv, jsonl or parquet; split in two in DIR."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="DIR|ID",
            help="With --data: your model. A causal one learns the text, or completions of prompts.",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", metavar="COLUMN", help="With --data; twice for pairs of texts. [default: the longest]"
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option("--label", metavar="COLUMN", help="With --data. [default: what looks like it]"),
    ] = None,
) -> None:
    """Write a commented run.yaml that runs offline as it is, or one for your own file and model."""
    from fedlora.config.template import NODE_YAML, run_yaml

    if own is None and (model or text or label):
        raise ConfigError("--model, --text, --label: of which records? none are named; write --data FILE")
    if own is not None and node:
        raise ConfigError("--node, --data: node.yaml names a data owner's file itself; leave --data out")
    if len(set(text or ())) != len(text or ()) or len(text or ()) > 2:
        raise ConfigError(f"--text: {', '.join(text or ())}; name one column, or the two of a pair")
    target = directory / ("node.yaml" if node else "run.yaml")
    if target.exists():
        raise _exists(target)
    if own is not None:
        written, notes = _own_files(target, own, model=model, text=text or (), label=label)
    else:
        written, notes = {target: NODE_YAML if node else run_yaml(directory.resolve().name)}, []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, words in written.items():
            # Records may be private: a copy is its owner's alone.
            opener = _for_the_owner if path.suffix == ".csv" else None
            with open(path, "x", encoding="utf-8", newline="", opener=opener) as file:
                file.write(words)
    except FileExistsError as error:
        raise _exists(Path(error.filename)) from None
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror}); name another directory") from None
    print(
        f"{target} written; look at it, then: fedlora check {target}{'' if node else f', fedlora simulate {target}'}"
    )
    for note in notes:
        print(note)


def _for_the_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _exists(path: Path) -> ConfigError:
    return ConfigError(f"{path} exists already and is left alone; name another directory")


def _own_files(
    target: Path, own: Path, *, model: str | None, text: Sequence[str], label: str | None
) -> tuple[dict[Path, str], list[str]]:
    """run.yaml and the two parts of the file, by path; run.yaml last, since it makes them a whole. And what to say."""
    from fedlora.config.own_template import Own, own_yaml
    from fedlora.data.look import csv_text, look_through
    from fedlora.training.look import look

    name = model or "sentence-transformers/all-MiniLM-L6-v2"
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ConfigError(f"--model {name!r}: no such directory; mend the path, or name a model of the hub")
    seen = look(Path(name)) if Path(name).is_dir() else None
    found = look_through(str(own), text=text, label=label, causal=seen is not None and seen.causal)
    config = Own(
        file=str(own),
        columns=found.columns,
        owners=found.owners,
        records=len(found.train),
        directory=target.parent,
        model=name,
        targets=("query", "value") if seen is None else seen.attention(),
        identity=seen.pooled if seen is not None else name.startswith("sentence-transformers/"),
    )
    written = {
        config.train: csv_text(found.header, found.train),
        config.test: csv_text(found.header, found.test),
        target: own_yaml(config),
    }
    unprotected = (
        f"{config.test}, a tenth of your records, is scored in the open; replace it if they are private"
    )
    return written, [_taken(found), f"NOT PROTECTED: {unprotected}", *_to_be_fetched(name)]


def _to_be_fetched(model: str) -> list[str]:
    """What to know of a model that is not here."""
    from fedlora.training.places import local

    if local(model) is not None:
        return []
    return [
        f"{model} is not on this machine: the run will ask the hub for it; without one, name its directory: --model"
    ]


def _taken(found: "SplitFile") -> str:
    """Which columns are learnt from, and which are not."""
    used = {key: [names] if isinstance(names, str) else list(names) for key, names in found.columns.items()}
    words = ", ".join(f"{key} {' and '.join(map(repr, names))}" for key, names in used.items())
    others = [repr(name) for name in found.header if not any(name in names for names in used.values())]
    return f"learnt from: {words}" + (f"; not from {', '.join(others)}" if others else "")
