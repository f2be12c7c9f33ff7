"""From YAML and `--set` options to a checked config, or to errors that name file, line, key and mend."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fedlora.config.explain import Problem, problems, shown
from fedlora.config.node import NodeConfig
from fedlora.config.schema import RunConfig
from fedlora.config.section import Section
from fedlora.config.yaml_text import KeyPath, parse, render
from fedlora.errors import ConfigError

_Kind = TypeVar("_Kind", bound=Section)

OVERRIDE = "--set "
"""What the origin of a key begins with that was not written in a file."""

_ELSEWHERE = {"export_every", "output", "runtime"}
"""Keys that say where a run happens and what it leaves there, not what it computes."""

_SINCE: dict[tuple[str, ...], Any] = {
    ("data", "chosen"): None,
    ("data", "completion"): None,
    ("data", "image"): None,
    ("data", "max_train_examples"): None,
    ("data", "messages"): None,
    ("data", "prompt"): None,
    ("data", "public"): None,
    ("data", "rejected"): None,
    ("data", "streaming"): False,
    ("federation", "enough"): None,
    ("federation", "optimizer", "precondition"): "none",
    ("federation", "optimizer", "proximal"): 0.0,
    ("federation", "ranks"): None,
    ("federation", "reshuffle"): False,
    ("federation", "server"): {"name": "sgd", "lr": 1.0},
    ("lora", "from_adapter"): None,
    ("lora", "rank_pattern"): None,
    ("lora", "trains"): "b",
    ("method", "route"): "lq",
    ("method", "soft_threshold"): 0.0,
    ("method", "stale", "rule"): "fedstale",
    ("method", "stale", "scale_by_rate"): False,
    ("model", "quantization"): "none",
    ("task", "loss_on"): None,
    ("task", "packing"): False,
    ("task", "template"): None,
    ("world",): None,
}
"""Keys that came later, and the value that changes nothing: with it, a run of before there was such a key stays what it
was."""


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file describes, with the overrides put in its place.

    Args:
        path: YAML file.
        overrides: `dotted.key=value`, the value being YAML; later ones win.

    Raises:
        ConfigError: all that is wrong, one `FILE:LINE: key: what is wrong; what to write instead` a line.
    """
    return _load(RunConfig, Path(path), overrides)


def load_node(path: Path | str, overrides: Sequence[str] = ()) -> NodeConfig:
    """The node that a data owner's YAML file describes; errors as in `load_config`."""
    return _load(NodeConfig, Path(path), overrides)


def origins_of(path: Path | str, overrides: Sequence[str] = ()) -> dict[KeyPath, str]:
    """Where each key was written: `FILE:LINE`, or the `--set` that overrode it."""
    return _read(Path(path), overrides)[1]


def origin_of(path: KeyPath, origins: Mapping[KeyPath, str]) -> str:
    """Where a key was written, or for a missing one the nearest section around it."""
    return next(origins[path[:depth]] for depth in range(len(path), -1, -1) if path[:depth] in origins)


def dump_config(config: Section) -> str:
    """YAML text that loads back to an equal config, every default spelled out."""
    return render(config.model_dump(mode="json"))


def run_name(config: RunConfig) -> str:
    """What a simulation of this config is called, in requests and ledgers."""
    return config_digest(config)[:16]


def config_digest(config: RunConfig) -> str:
    """Hex SHA-256 of what the run computes: equal for the same run in another place or runtime."""
    values = _computed(config)
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def require_same(held: RunConfig, given: RunConfig, run_dir: Path) -> None:
    """Refuses a config that computes another run than the one that a directory holds, and names the keys.

    Raises:
        ConfigError: they differ.
    """
    theirs, ours = _leaves(_computed(held)), _leaves(_computed(given))
    keys = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    if keys:
        words = ", ".join(
            f"{key} is {shown(theirs.get(key))} there, {shown(ours.get(key))} here" for key in keys[:3]
        )
        more = f", and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise ConfigError(
            f"{run_dir} holds the run of another config ({words}{more}); choose another output, or --run-dir"
        )


def _computed(config: RunConfig) -> dict[str, Any]:
    """All of a config that decides what the run computes."""
    values = config.model_dump(mode="json", exclude=_ELSEWHERE)
    for how in ("kernels", "gradient_checkpointing"):
        del values["model"][how]  # how it is computed, like what runtime says
    values["tracking"] = ["jsonl"]  # who is told decides nothing
    for told in ("samples", "sample_tokens"):
        values["task"].pop(told, None)  # what is shown of the run when it is done
    if isinstance(values["privacy"], dict):
        del values["privacy"]["tuned_on"]  # a declaration; it decides nothing
    if not isinstance(values["method"]["stale"]["beta"], str):
        del values["method"]["stale"]["smoothing"]  # of an adaptive beta only
    if config.method.stale.rule == "mifa" or config.federation.optimizer.decay == "none":
        del values["method"]["stale"]["scale_by_rate"]  # decided already, or nothing to decide
    for (*sections, key), before in _SINCE.items():
        section = values
        for name in sections:
            section = section[name]
        if key in section and section[key] == before:
            del section[key]
    return values


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Dotted keys and their values."""
    if not isinstance(value, dict):
        return {key: value}
    inner = (_leaves(held, f"{key}.{name}".lstrip(".")) for name, held in value.items())
    return {name: held for leaves in inner for name, held in leaves.items()}


def json_schema() -> dict[str, Any]:
    """JSON Schema of `run.yaml`, for editors that complete and check while one types."""
    schema = RunConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "fedlora run.yaml"}


def _load(kind: type[_Kind], path: Path, overrides: Sequence[str]) -> _Kind:
    value, origins = _read(path, overrides)
    for look in (problems, _conflicting):  # values by themselves, then together
        if found := list(look(value, kind)):
            raise ConfigError(_report(_blamed(found, partial(look, model=kind), path, overrides, origins)))
    return kind.model_validate(value)


def _conflicting(value: dict[str, Any], model: type[Section]) -> Iterator[Problem]:
    """What keeps them from being a `model` though each is fine."""
    try:
        model.model_validate(value)
    except ValidationError as error:
        yield from map(_combination, _messages(error))


def _blamed(
    found: Sequence[Problem],
    look: Callable[[dict[str, Any]], Iterable[Problem]],
    path: Path,
    overrides: Sequence[str],
    origins: Mapping[KeyPath, str],
) -> list[tuple[str, Problem]]:
    """Each problem and where it comes from: where its key was written, or the override that is to blame.

    That is one without which this problem is gone and no other comes.
    """
    blamed: dict[Problem, str] = {}
    for place, override in enumerate(overrides):
        try:
            without = _read(path, [*overrides[:place], *overrides[place + 1 :]])[0]
        except ConfigError:  # another override builds on it
            continue
        if (left := set(look(without))) < set(found):
            blamed |= dict.fromkeys(set(found) - left, OVERRIDE + override)
    given = ((origin_of(problem.path, origins), problem) for problem in found)
    return [
        (origin if origin.startswith(OVERRIDE) else blamed.get(problem, origin), problem)
        for origin, problem in given
    ]


def _read(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """The values, overrides in their place, and where each key was written."""
    document = parse(_text(path), str(path))
    value = {} if document.value is None else document.value
    origins = {key: f"{path}:{line}" for key, line in document.lines.items()}
    if not isinstance(value, dict):
        # Without a word of it: it may be a file of records.
        raise ConfigError(f"{path}:1: this is not a config; write `key: value` lines, see `fedlora init`")
    for override in overrides:
        _override(value, origins, override)
    return value, origins


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `fedlora init` writes one to start from") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a YAML file") from None


def _override(value: dict[str, Any], origins: dict[KeyPath, str], override: str) -> None:
    """Puts one `key=value` into `value`, and its own text in place of the file's lines in `origins`."""
    origin = OVERRIDE + override
    name, equals, text = override.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        raise ConfigError(f"{origin}: not `key=value`; write for example --set privacy.target_epsilon=3")
    section = value
    for depth, key in enumerate(keys[:-1], start=1):
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            above = ".".join(keys[:depth])
            raise ConfigError(
                f"{origin}: {above} is {shown(section)}, not a section; set {above} as a whole instead"
            )
        origins.setdefault(keys[:depth], origin)
    section[keys[-1]] = parse(text, origin).value
    for key in [key for key in origins if key[: len(keys)] == keys]:
        del origins[key]
    origins[keys] = origin


def _messages(error: ValidationError) -> list[str]:
    """What the combinations' check said; and, as it is, anything that `problems` should have found before."""
    lines: list[str] = []
    for entry in error.errors():
        if entry["type"] == "value_error":
            lines += str(entry["ctx"]["error"]).splitlines()  # pyright: ignore[reportTypedDictNotRequiredAccess]
        else:
            lines.append(f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}; see `fedlora schema`")
    return lines


def _combination(line: str) -> Problem:
    key, _, rest = line.partition(": ")
    wrong, _, mend = rest.partition("; ")
    return Problem(path=tuple(key.split(".")), wrong=wrong, mend=mend)


def _report(found: Sequence[tuple[str, Problem]]) -> str:
    """One line a problem, in the order of the file, those of `--set` last."""
    lines = sorted(found, key=lambda line: (line[0].startswith(OVERRIDE), _line_number(line[0])))
    return "\n".join(f"{origin}: {'.'.join(map(str, p.path))}: {p.wrong}; {p.mend}" for origin, p in lines)


def _line_number(origin: str) -> int:
    number = origin.rpartition(":")[2]
    return int(number) if number.isdigit() else 0
