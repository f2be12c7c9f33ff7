"""The privacy room's own source with one piece of text replaced, run under its own module names."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fedlora.privacy

# In order of import: a later module sees the mutant of an earlier one.
STEP = (
    "noise",
    "sampling",
    "clipping",
    "engine",
    "stacked",
    "direct_engine",
    "opacus_engine",
    "gaussian",
    "step",
)
ACCOUNTS = ("accountants", "calibration")


@dataclass(frozen=True)
class Mutation:
    """One line broken on purpose, and the check that must fail for it."""

    name: str
    module: str
    old: str
    new: str
    caught_by: str


def mutated(
    modules: tuple[str, ...], module: str = "", old: str = "", new: str = ""
) -> dict[str, ModuleType]:
    """Fresh copies of `modules`, `old` replaced by `new` in one of them; the real ones are left alone."""
    names = [f"fedlora.privacy.{name}" for name in modules]
    kept = {name: sys.modules.get(name) for name in names}
    attributes = dict(vars(fedlora.privacy))
    loaded: dict[str, ModuleType] = {}
    assert module in ("", *modules), module
    try:
        for short, name in zip(modules, names, strict=True):
            path = Path(fedlora.privacy.__file__).with_name(f"{short}.py")
            text = path.read_text()
            if short == module:
                assert text.count(old) == 1, f"{path} holds {text.count(old)} of {old!r}; mend the mutation"
                text = text.replace(old, new)
            spec = importlib.util.spec_from_loader(name, loader=None)
            assert spec is not None
            loaded[short] = sys.modules[name] = importlib.util.module_from_spec(spec)
            exec(compile(text, str(path), "exec"), vars(loaded[short]))
    finally:
        for name, original in kept.items():
            sys.modules.pop(name, None)
            if original is not None:
                sys.modules[name] = original
        vars(fedlora.privacy).update(attributes)
    return loaded


def room(module: str = "", old: str = "", new: str = "") -> SimpleNamespace:
    """What `checks` ask of the room: every public name of its modules of the private step."""
    loaded = mutated(STEP, module, old, new)
    return SimpleNamespace(
        **{
            name: value
            for one in loaded.values()
            for name, value in vars(one).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == one.__name__
        }
    )
