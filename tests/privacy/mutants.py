"""The private step's own source with one piece of text replaced, run under its own module names."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fedlora.kernels
import fedlora.privacy

# In order of import: a later module sees the mutant of an earlier one.
STEP = (
    "torch_ops",
    "noise",
    "sampling",
    "clipping",
    "engine",
    "rows",
    "stacked",
    "direct_engine",
    "opacus_engine",
    "gaussian",
    "step",
)
ACCOUNTS = ("sampled_losses", "accountants", "calibration")


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
    rooms = [fedlora.kernels if name == "torch_ops" else fedlora.privacy for name in modules]
    names = [f"{room.__name__}.{name}" for room, name in zip(rooms, modules, strict=True)]
    kept = {name: sys.modules.get(name) for name in names}
    attributes = [(room, dict(vars(room))) for room in (fedlora.kernels, fedlora.privacy)]
    loaded: dict[str, ModuleType] = {}
    assert module in ("", *modules), module
    try:
        for room, short, name in zip(rooms, modules, names, strict=True):
            assert room.__file__ is not None
            path = Path(room.__file__).with_name(f"{short}.py")
            text = path.read_text()
            if short == module:
                assert text.count(old) == 1, f"{path} holds {text.count(old)} of {old!r}; mend the mutation"
                text = text.replace(old, new)
            spec = importlib.util.spec_from_loader(name, loader=None)
            assert spec is not None
            loaded[short] = sys.modules[name] = importlib.util.module_from_spec(spec)
            exec(compile(text, str(path), "exec"), vars(loaded[short]))
            setattr(room, short, loaded[short])
    finally:
        for name, original in kept.items():
            sys.modules.pop(name, None)
            if original is not None:
                sys.modules[name] = original
        for room, earlier in attributes:
            vars(room).update(earlier)
    return loaded


def room(module: str = "", old: str = "", new: str = "") -> SimpleNamespace:
    """What `checks` ask of the room: every public name of its modules of the private step."""
    loaded = mutated(STEP, module, old, new)
    return SimpleNamespace(
        ops=loaded["torch_ops"],
        **{
            name: value
            for one in loaded.values()
            for name, value in vars(one).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == one.__name__
        },
    )
