"""What a run's adapter is, in numbers: measured once, when the run is delivered, and kept beside it."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.algebra.diagnostics import (
    INTRUDER_BELOW,
    INTRUDERS_AMONG,
    decomposed,
    effective_rank,
    energy_shares,
    explained_share,
    intruder_dimensions,
    share_by_chance,
    singular_values,
)
from fedlora.algebra.factors import folded
from fedlora.config.schema import RunConfig
from fedlora.disk import write_durably
from fedlora.training.checkpoints import load_base
from fedlora.training.public import frozen_weight
from fedlora.values import Adapters, Factors, Site

MOST_WORK = 1.5e10
"""Of d_out d_in min(d_out, d_in), summed over the weights that are decomposed: about 20 s on one core."""
DIGITS = 6


def write_diagnostics(path: Path, config: RunConfig, adapters: Adapters, classes: tuple[str, ...]) -> None:
    """`path` holds `diagnostics` as JSON, whole."""
    write_durably(path, json.dumps(diagnostics(config, adapters, classes), indent=1) + "\n")


def diagnostics(config: RunConfig, adapters: Adapters, classes: tuple[str, ...]) -> dict[str, Any]:
    """Of each site its spectrum and, where that is cheap, how it stands to the frozen weight before any rounding.

    Args:
        config: of the run; `model` and `task` say where the frozen weights are.
        adapters: what the run ended with.
        classes: names of the labels; empty for a causal LM.

    Returns:
        `directions`: of the weight that explained shares are of, as many as the adapter's rank. `intruders_among` and
        `intruder_below`: k and epsilon of `intruder_dimensions`. `sites`: by name, see `_site` and `_beside`.
    """
    sites = {site: folded(factors, adapters.scale) for site, factors in sorted(adapters.sites.items())}
    weights = _weights(config, classes, _affordable(sites))
    found = {site: _site(factors, adapters.scale, weights.get(site)) for site, factors in sites.items()}
    return {
        "directions": max((factors.a.shape[0] for factors in sites.values()), default=0),
        "intruders_among": INTRUDERS_AMONG,
        "intruder_below": INTRUDER_BELOW,
        "sites": found,
    }


def _affordable(sites: Mapping[Site, Factors]) -> list[Site]:
    """Sites whose weights may be decomposed: all, or evenly many of those that are not too large."""
    work = {site: _work(*_shape(factors)) for site, factors in sites.items()}
    few = [site for site in sorted(work) if work[site] <= MOST_WORK]
    every = math.ceil(sum(work[site] for site in few) / MOST_WORK) if few else 1
    return few[::every]


def _work(d_out: int, d_in: int) -> float:
    return float(d_out) * d_in * min(d_out, d_in)


def _shape(factors: Factors) -> tuple[int, int]:
    return factors.b.shape[0], factors.a.shape[1]


def _weights(config: RunConfig, classes: tuple[str, ...], sites: list[Site]) -> dict[Site, Tensor]:
    if not sites:
        return {}
    # Nobody who loads the adapter need have the run's quantisation.
    base_cfg = config.model.model_copy(update={"quantization": "none"})
    with torch.random.fork_rng(devices=[]):  # layers that the checkpoint lacks are drawn; none is looked at
        model, _ = load_base(base_cfg, config.task, classes)
    return {site: frozen_weight(model.get_submodule(site)) for site in sites}


TINY = 1e-300
"""In the place of a zero, so that every number can be written as JSON."""


def _site(factors: Factors, scale: float, weight: Tensor | None) -> dict[str, Any]:
    """shape, singular_values and energy_shares (r,), effective_rank; beside: None where it was not measured."""
    values = singular_values(factors, scale)
    return {
        "shape": list(_shape(factors)),
        "singular_values": _short(values),
        "energy_shares": _short(energy_shares(values)),
        "effective_rank": round(effective_rank(values), DIGITS),
        "beside": None if weight is None else _beside(factors, scale, weight, values),
    }


def _beside(factors: Factors, scale: float, weight: Tensor, values: Tensor) -> dict[str, Any]:
    """relative_norm: of the update, in norms of the weight. explained and by_chance: shares. intruders: a number."""
    base, k = decomposed(weight), factors.a.shape[0]
    return {
        "relative_norm": float(values.norm() / base.values.norm().clamp_min(TINY)),
        "explained": asdict(explained_share(base, factors, k)),
        "by_chance": asdict(share_by_chance(_shape(factors), k)),
        "intruders": intruder_dimensions(weight, factors, scale, base=base),
    }


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
