"""A run's model as files that PEFT and transformers load; loaded again and compared before they count."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedlora.algebra.factors import folded, padded
from fedlora.config import schema
from fedlora.config.schema import RunConfig
from fedlora.disk import fsync
from fedlora.errors import ConfigError, FedLoraError
from fedlora.export.card import model_card
from fedlora.training.checkpoints import DTYPES, auto_class, load_base, quiet
from fedlora.training.from_adapter import peft_scale, require_plain_lora
from fedlora.training.load import load_model
from fedlora.training.model import ADAPTER, AdaptedModel, transformer_of
from fedlora.values import Adapters

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 0.05}
"""Largest difference of logits, relative to the largest. bfloat16 has 8 bits; PEFT loads the head in it."""

MERGED_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-5, torch.bfloat16: 0.1}
"""Merging rounds W + scale B A to the dtype of W, so a merged model differs from its adapter a little."""


def write_adapter(
    directory: Path,
    *,
    config: RunConfig,
    adapters: Adapters,
    classes: tuple[str, ...],
    summary: Mapping[str, Any],
    merge: bool = False,
    one_rank: bool = False,
) -> Path:
    """`directory` holds the trained model, and loading it from there gives the run's own logits.

    Of a run on a quantised base: those of its adapter on the base model as it was.

    Written aside and renamed at the end: it is whole, or it is not there.

    Args:
        directory: must not exist, or be empty.
        config: of the run.
        adapters: the state to export.
        classes: names of the labels; empty for a causal LM.
        summary: of the run, for the model card.
        merge: a whole model with scale * B A added into its weights, in place of a PEFT directory.
        one_rank: every layer has the largest rank of any, filled up with zeros, for who reads no `rank_pattern`.

    Raises:
        ConfigError: there is something in `directory`, or it cannot be written.
        FedLoraError: what was written gives other logits, or holds another A, B or head; it is deleted again.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} is there already and is left alone; name a directory that is not")
    # Nobody who loads it need have the run's quantisation, and a merged weight must not be rounded.
    base_cfg = config.model.model_copy(update={"quantization": "none"})
    plain = as_peft(adapters, one_rank=one_rank)
    ranks = {len(factors.a) for factors in plain.sites.values()}
    same = one_rank or _has_rest(adapters)
    lora_cfg = peft_lora(
        config.lora, (max(ranks), None) if same else (config.lora.r, config.lora.rank_pattern)
    )
    if not config.task.causal:  # a classifier, whose head or pooler may have come with it
        lora_cfg = lora_cfg.model_copy(update={"from_adapter": config.lora.from_adapter})
    given = config.model_copy(update={"model": base_cfg, "lora": lora_cfg})
    model = load_model(given.model, given.task, given.lora, classes, given.seed, any_rank=True)
    model.load(replace(plain, scale=model.scale))  # the same, but for the last bit of a quotient
    aside = directory.with_name(f".{directory.name}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _write(aside, model, given, classes, merge)
        (aside / "README.md").write_text(model_card(config, summary, merged=merge), encoding="utf-8")
        for path in aside.iterdir():
            fsync(path)
        aside.replace(directory)
        fsync(directory.parent)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written ({error}); name another directory") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return directory


def as_peft(adapters: Adapters, *, one_rank: bool = False) -> Adapters:
    """The same model as PEFT can hold it: an A and a whole B a site, all of one rank, which a rest makes larger; or,
    where there is no rest and one_rank is not asked for, each of its own.
    """
    sites = {site: folded(factors, adapters.scale) for site, factors in adapters.sites.items()}
    if not one_rank and not _has_rest(adapters):
        return replace(adapters, sites=sites)
    r = max(len(factors.a) for factors in sites.values())
    return replace(adapters, sites={site: padded(factors, r) for site, factors in sites.items()})


def _has_rest(adapters: Adapters) -> bool:
    return any(factors.rest is not None for factors in adapters.sites.values())


Ranks = tuple[int, dict[str, int] | None]
"""A rank, and by pattern those that differ."""


def peft_lora(lora_cfg: schema.Lora, ranks: Ranks | None = None) -> schema.Lora:
    """The adapter as PEFT has it, with a whole B: what an export holds, whatever of it was trained.

    ranks: its own, at the same scale; None: the run's.
    """
    r, pattern = (lora_cfg.r, lora_cfg.rank_pattern) if ranks is None else ranks
    alpha = lora_cfg.lora_alpha / lora_cfg.r * r
    update = {
        "trains": "b",
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": pattern or None,
        "from_adapter": None,
    }
    return lora_cfg.model_copy(update=update)


def ranks_in(directory: Path) -> Ranks | None:
    """The ranks of the adapter in a PEFT directory; None where none can be read, as `load_adapter` will say."""
    try:
        words = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        return int(words["r"]), dict(words.get("rank_pattern") or {}) or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_adapter(directory: Path, model: AdaptedModel, classes: tuple[str, ...]) -> None:
    """The model computes with the adapter and head that a PEFT directory holds.

    Args:
        directory: as `write_adapter` left it, or any LoRA that PEFT saved for the same layers.
        model: changed in place; of a config whose `lora` is a `peft_lora`.
        classes: those of the data, compared with the ones the adapter was trained for.

    Raises:
        ConfigError: no adapter there, or one for other layers, ranks or classes, or one that is more than products
            beside the base model's own weights.
    """
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        state = load_file(directory / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"{directory} is neither a run nor a PEFT adapter ({error}); name one of the two"
        ) from None
    require_plain_lora(str(directory), config)
    for site in model.sites:
        if not math.isclose(theirs := peft_scale(config, site), model.scale):
            scale = f"lora_alpha {config['lora_alpha']} / r {config['r']}, a factor {theirs:g} at {site!r}"
            raise ConfigError(
                f"{directory} has {scale}, the config {model.scale:g}; make `lora` of the config equal"
            )
    _require_classes(directory, classes)
    try:
        result = set_peft_model_state_dict(model.peft_model, state)
    except RuntimeError as error:
        raise ConfigError(
            f"{directory} has tensors of other shapes than the config's model: {error}"
        ) from None
    absent = [name for name in result.missing_keys if f".{ADAPTER}." in name]
    if absent or result.unexpected_keys:
        raise ConfigError(
            f"{directory} lacks {absent[:3]} and has {result.unexpected_keys[:3]} beyond the config's model; "
            f"make `model`, `task` and `lora` of the config those it was trained with"
        )


def _require_classes(directory: Path, classes: tuple[str, ...]) -> None:
    path = directory / "classes.json"
    theirs = tuple(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else classes
    if theirs != classes:
        raise ConfigError(
            f"{directory} tells {list(theirs)} apart, the data {list(classes)}; use the same labels"
        )


def _write(
    aside: Path, model: AdaptedModel, config: RunConfig, classes: tuple[str, ...], merge: bool
) -> None:
    """All files but the card, compared."""
    inputs = model.intake.made_up(transformer_of(model.peft_model))
    wanted = _logits(model.peft_model, inputs)
    limits = MERGED_TOLERANCE if merge else TOLERANCE
    if merge:
        with quiet():
            merged = model.peft_model.merge_and_unload()
            merged.save_pretrained(str(aside), safe_serialization=True)
        model.intake.save(aside)
        again = _merged_again(aside, config)
    else:
        # The name that others know the base by, not where it lies on this machine.
        model.peft_model.peft_config[ADAPTER].base_model_name_or_path = config.model.name
        # "auto" would ask the hub whether the vocabulary was resized; it never is.
        model.peft_model.save_pretrained(str(aside), safe_serialization=True, save_embedding_layers=False)
        again = _adapter_again(aside, config, classes)
    if classes:
        (aside / "classes.json").write_text(json.dumps(classes) + "\n", encoding="utf-8")
    _require_equal(wanted, _logits(again, inputs), limits[DTYPES[config.model.dtype]])
    if isinstance(again, PeftModel):
        _require_same_tensors(model.peft_model, again)


def _adapter_again(directory: Path, config: RunConfig, classes: tuple[str, ...]) -> PeftModel:
    with torch.random.fork_rng(devices=[]):  # layers that the checkpoint lacks are drawn, then overwritten
        base, _ = load_base(config.model, config.task, classes)
        with quiet():
            return PeftModel.from_pretrained(base, str(directory))


def _merged_again(directory: Path, config: RunConfig) -> nn.Module:
    load: Callable[..., nn.Module] = auto_class(config.task).from_pretrained
    with quiet():
        return load(str(directory), dtype=DTYPES[config.model.dtype], local_files_only=True)


@torch.no_grad()
def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits of a fixed batch, float64."""
    return model.eval()(**inputs).logits.double()


def _require_equal(wanted: Tensor, got: Tensor, tolerance: float) -> None:
    difference = float((wanted - got).abs().max())
    bound = tolerance * max(1.0, float(wanted.abs().max()))
    if not difference <= bound:
        raise FedLoraError(
            f"loaded again, the export gives logits that differ by {difference:.3g} (allowed {bound:.3g}); "
            f"it was deleted, the run is untouched: report this with its config.yaml"
        )


def _require_same_tensors(live: PeftModel, again: PeftModel) -> None:
    """Every A and B, and the head, is that of `live`, to the bit once rounded to the type it was loaded in.

    In bfloat16 the rounding of logits hides all of a small B.
    """
    wanted, got = (get_peft_model_state_dict(model, save_embedding_layers=False) for model in (live, again))
    same = {
        name for name, value in got.items() if name in wanted and torch.equal(wanted[name].to(value), value)
    }
    if wrong := sorted((wanted.keys() | got.keys()) - same):
        raise FedLoraError(
            f"loaded again, the export holds other values in {len(wrong)} of its tensors, such as {wrong[0]!r}; "
            f"it was deleted, the run is untouched: report this with its config.yaml"
        )
