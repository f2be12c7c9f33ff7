"""A LoRA that somebody else trained, read from PEFT's files: what it adds to which weight, and what it carries whole.

Only safetensors are read, never a pickle. What PEFT knows and this cannot take, it refuses: nothing is left out.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedlora.config.ranks import matching
from fedlora.errors import ConfigError
from fedlora.training.model import ADAPTER
from fedlora.training.targets import is_within
from fedlora.values import Factors, Site

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "lora.from_adapter:"
PREFIX, A_OF, B_OF = "base_model.model.", ".lora_A.weight", ".lora_B.weight"

HARMLESS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size",
    "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
})  # fmt: skip
"""Fields of PEFT's LoraConfig that change nothing of what its A and B are, or are read here."""

LEAVES_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights under which the adapter stands beside the checkpoint's own weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicAdapter:
    """sha256: of its weights file, as a hub shows it. sites: by layer, factors whose b @ a is added to the weight as it
    is. saved: tensors that it carries whole, by their names in the model. classes: that it tells apart, if it says so.
    """

    name: str
    sha256: str
    sites: Mapping[Site, Factors]
    saved: Mapping[str, Tensor]
    classes: tuple[str, ...] | None

    def at_scale(self, scale: float) -> dict[Site, Factors]:
        """Factors with scale * b @ a added to the weight."""
        return {site: replace(factors, b=factors.b / scale) for site, factors in self.sites.items()}


def adapter_digest(directory: str) -> str:
    """SHA-256 over both files of the adapter: equal bytes begin equal runs.

    Raises:
        ConfigError: one of them cannot be read.
    """
    try:
        contents = [(Path(directory) / name).read_bytes() for name in (CONFIG, WEIGHTS)]
    except OSError as error:
        raise ConfigError(_unreadable(Path(directory), error)) from None
    return hashlib.sha256("".join(hashlib.sha256(part).hexdigest() for part in contents).encode()).hexdigest()


def read_adapter(directory: str) -> PublicAdapter:
    """The adapter in a directory that PEFT's `save_pretrained`, or an export, wrote.

    Raises:
        ConfigError: there is none, or it is more than A and B beside the checkpoint's own layers.
    """
    path = Path(directory)
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        content = (path / WEIGHTS).read_bytes()
        tensors = load_file(path / WEIGHTS)
        classes = _classes(path / "classes.json")
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(_unreadable(path, error)) from None
    require_plain_lora(f"{KEY} {directory}", config)
    sites = {site: _factors(directory, tensors, site, peft_scale(config, site)) for site in _sites(tensors)}
    if not sites:
        raise ConfigError(_refused(directory, "has no lora_A.weight at all", "name a LoRA of PEFT's"))
    rest = {name for name in tensors if not name.endswith((A_OF, B_OF))}
    return PublicAdapter(
        name=directory,
        sha256=hashlib.sha256(content).hexdigest(),
        sites=sites,
        saved={name.removeprefix(PREFIX): tensors[name] for name in sorted(rest)},
        classes=classes,
    )


def require_sites(
    given: PublicAdapter, shapes: Mapping[Site, tuple[int, int]], ranks: Mapping[Site, int]
) -> None:
    """Passes an adapter all of whose layers are adapted here, in the same shape and with no less rank.

    Raises:
        ConfigError: it is not so.
    """
    if strange := sorted(given.sites.keys() - shapes.keys()):
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise ConfigError(
            _refused(
                given.name, f"adapts {strange[0]!r}{more}, which the config does not", "add to target_modules"
            )
        )
    for site, factors in sorted(given.sites.items()):
        shape, r = (factors.b.shape[0], factors.a.shape[1]), len(factors.a)
        if shape != tuple(shapes[site]):
            mend = "name an adapter of this base model"
            raise ConfigError(
                _refused(given.name, f"has {site!r} of shape {shape}, this model {tuple(shapes[site])}", mend)
            )
        if r > ranks[site]:
            mend = f"raise lora.r, or the layer's rank in lora.rank_pattern, to {r}"
            raise ConfigError(
                _refused(given.name, f"has rank {r} at {site!r}, the config {ranks[site]}", mend)
            )


@torch.no_grad()
def take_saved(given: PublicAdapter, model: nn.Module, saved: list[str], classes: tuple[str, ...]) -> None:
    """The modules that the adapter carries whole compute with its tensors.

    Args:
        given: where it carries nothing, nothing changes.
        model: the transformer, PEFT's wrappers in place.
        saved: names of the modules that this run's own export would carry.
        classes: of the run.

    Raises:
        ConfigError: it carries others, or tells other classes apart.
    """
    if not given.saved:
        return
    if given.classes is not None and given.classes != classes:
        mend = "use the same labels, in the same order"
        what = f"tells {list(given.classes)} apart, this run {list(classes)}"
        raise ConfigError(_refused(given.name, what, mend))
    for name, tensor in given.saved.items():
        module = next((module for module in saved if is_within(name, [module])), None)
        if module is None:
            mend = "save it without modules_to_save, or take a base model that has them already"
            what = f"carries {name!r} whole, which this run leaves as the base model has it"
            raise ConfigError(_refused(given.name, what, mend))
        wrapper = model.get_submodule(module)
        assert isinstance(wrapper, ModulesToSaveWrapper)
        own = dict(wrapper.modules_to_save[ADAPTER].named_parameters()).get(name.removeprefix(f"{module}."))
        if own is None or own.shape != tensor.shape:
            here = None if own is None else tuple(own.shape)
            what = f"carries {name!r} of shape {tuple(tensor.shape)}, this run's is {here}"
            raise ConfigError(_refused(given.name, what, "use the same labels, or one without a head"))
        own.copy_(tensor)


def _sites(tensors: Mapping[str, Tensor]) -> list[Site]:
    names = {name.removesuffix(end) for name in tensors for end in (A_OF, B_OF) if name.endswith(end)}
    return sorted(name.removeprefix(PREFIX) for name in names)


def _factors(directory: str, tensors: Mapping[str, Tensor], site: Site, scale: float) -> Factors:
    a, b = (tensors.get(f"{PREFIX}{site}{end}") for end in (A_OF, B_OF))
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        what = f"has no A and B of one rank at {site!r}"
        raise ConfigError(_refused(directory, what, "save it again with PEFT's save_pretrained"))
    if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
        raise ConfigError(_refused(directory, f"has numbers at {site!r} that are not finite", "take another"))
    return Factors(a=a, b=b.double() * scale)


def peft_scale(config: Mapping[str, Any], site: Site) -> float:
    """What PEFT multiplies B A by at a layer."""
    own_r, own_alpha = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    of_r, of_alpha = matching(own_r, site), matching(own_alpha, site)
    r = config["r"] if of_r is None else own_r[of_r]
    alpha = config["lora_alpha"] if of_alpha is None else own_alpha[of_alpha]
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def require_plain_lora(named: str, config: Any) -> None:
    """Passes an adapter that is products beside the checkpoint's own weights, and no more.

    Args:
        named: the adapter as a message begins with it.
        config: what its adapter_config.json holds.

    Raises:
        ConfigError: it is more, or no LoRA.
    """
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA" or not {"r", "lora_alpha"} <= config.keys():
        raise ConfigError(f"{named} has peft_type {kind!r}; name one of LORA")
    if config.get("bias", "none") != "none":
        raise ConfigError(f'{named} has bias: {config["bias"]}; train it again with bias="none"')
    if config.get("use_dora"):
        mend = "merge it into the base model and name that as model.name"
        raise ConfigError(f"{named} is a DoRA, whose magnitudes no B A holds; {mend}")
    if (init := config.get("init_lora_weights")) not in LEAVES_THE_BASE:
        mend = "save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        raise ConfigError(f"{named} began as {init!r}, which changes the base model; {mend}")
    more = sorted(key for key in config.keys() - HARMLESS - {"bias", "use_dora"} if config[key])
    if more:
        raise ConfigError(f"{named} says {more[0]}: {config[more[0]]}; name a plain LoRA")


def _classes(path: Path) -> tuple[str, ...] | None:
    return tuple(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _unreadable(path: Path, error: Exception) -> str:
    pickled = path / "adapter_model.bin"
    mend = (
        f"{pickled.name} is a pickle, which is never read: load and save it with PEFT, safe_serialization=True"
        if pickled.exists()
        else "name a directory that PEFT's save_pretrained wrote"
    )
    return _refused(str(path), f"cannot be read ({error})", mend)


def _refused(directory: str, what: str, mend: str) -> str:
    return f"{KEY} {directory} {what}; {mend}"
