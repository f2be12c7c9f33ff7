"""Which layers a run adapts, told from a model's files alone; `training.targets` tells it of the model itself."""

from fedlora.config.ranks import matching, rank_of
from fedlora.config.schema import RunConfig
from fedlora.errors import ModelError
from fedlora.training.look import Look, is_pooler


def sites(config: RunConfig, seen: Look) -> list[tuple[int, int, int]]:
    """(out, in, rank) of each adapted layer.

    Raises:
        ModelError: a target names no linear layer, `layers_to_transform` no layer of the stack, or a rank exceeds one.
    """
    layers = seen.layers()
    if getattr(config.task, "pooler", None) == "identity":
        layers = [name for name in layers if not is_pooler(name)]
    chosen = _matched(config, seen, layers)
    numbers = {name: _number(name) for name in chosen}
    kept = config.lora.layers_to_transform
    if missing := sorted(set(kept or ()) - set(numbers.values())):
        has = sorted(number for number in set(numbers.values()) if number is not None)
        raise ModelError(
            f"lora.layers_to_transform: {seen.architecture} has no layer {missing} with {config.lora.target_modules}; "
            f"it has {has}"
        )
    return [_site(config, seen, name) for name in chosen if kept is None or numbers[name] in kept]


def _matched(config: RunConfig, seen: Look, layers: list[str]) -> list[str]:
    """The paths that the targets name, each once."""
    targets = config.lora.target_modules
    if isinstance(targets, str):
        return layers
    found: dict[str, None] = {}
    for target in targets:
        matched = [name for name in layers if _is_named(name, target)]
        if not matched:
            last = ", ".join(sorted({repr(name.rpartition(".")[2]) for name in layers}))
            raise ModelError(
                f"lora.target_modules: {target!r} matches no linear layer of {seen.architecture}; it has {last}, or "
                "write all-linear"
            )
        found |= dict.fromkeys(matched)
    return list(found)


def _is_named(name: str, target: str) -> bool:
    """A target is the end of a path; or all of a longer one, where a file is of the encoder or decoder alone."""
    return name == target or name.endswith(f".{target}") or target.endswith(f".{name}")


def _number(name: str) -> int | None:
    """Of the layer in the stack."""
    return next((int(word) for word in name.split(".") if word.isdigit()), None)


def _site(config: RunConfig, seen: Look, name: str) -> tuple[int, int, int]:
    out, into = seen.out_and_in(name)
    r = rank_of(config.lora, name)
    if r > min(out, into):
        key = "lora.r" if matching(config.lora.rank_pattern or {}, name) is None else "lora.rank_pattern:"
        raise ModelError(
            f"{key} {r} exceeds {name!r} of shape {(out, into)}; lower it to {min(out, into)} or less"
        )
    return out, into, r
