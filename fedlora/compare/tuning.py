"""Learning rate and clipping norm: as many trials for every method, from one grid, on data that is not the run's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from fedlora.compare.arms import Arm, as_value
from fedlora.compare.cells import Cell, Setting, Source
from fedlora.config.load import load_config
from fedlora.config.schema import Data, Docstrings, Files, HuggingFace, PrivateRuns, RunConfig
from fedlora.errors import ConfigError

APART = 1_000_000
"""Trials have the config's seed and so many: a seed of their own, however many are measured later."""
FACTOR = 2.0
"""Between neighbours of the grid. Finer steps would vanish in the noise of one seed."""
REACH = 3
"""Neighbours on each side: rates from an eighth to eight times the config's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What trials are made of. proxy: None tunes on the run's own data. trials: of each arm."""

    trials: int
    proxy: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Of one arm: what was tried with which score, and the best of it."""

    tried: tuple[tuple[Setting, float], ...]
    best: Setting


def grid(centre: Setting, trials: int) -> list[Setting]:
    """The first `trials` points of the grid around an arm's own setting, itself first, then the nearest.

    Of points as near, those come first that keep the product of rate and norm, the length of the longest step; then
    lower rates. Without privacy there is no norm, and the grid is a line that reaches as far as it has to.

    Raises:
        ConfigError: the grid has fewer points.
    """
    if centre.max_grad_norm is None:
        powers = sorted(range(-trials, trials + 1), key=lambda power: (abs(power), power))[:trials]
        return [Setting(lr=centre.lr * FACTOR**power, max_grad_norm=None) for power in powers]
    steps = range(-REACH, REACH + 1)
    points = sorted(product(steps, steps), key=lambda p: (p[0] ** 2 + p[1] ** 2, abs(p[0] + p[1]), p))
    if trials > len(points):
        raise ConfigError(f"--trials: {trials}, but the grid has {len(points)} points; write fewer")
    norm = centre.max_grad_norm
    return [
        Setting(lr=centre.lr * FACTOR**rate, max_grad_norm=norm * FACTOR**clip)
        for rate, clip in points[:trials]
    ]


def trial_epsilon(epsilons: Sequence[float], tuning: Tuning) -> float:
    """The budget of a trial: the middle one on a proxy, the smallest on the run's own data.

    A cell says that it cost as much as K runs like itself; no trial may have spent more than a cell.
    """
    ordered = sorted(epsilons)
    return ordered[0] if tuning.proxy is None else ordered[(len(ordered) - 1) // 2]


def private_runs(tuning: Tuning | None, config: RunConfig) -> int | None:
    """Runs on the same records that a cell stands for, itself and those that the config declares among them; None:
    none but what the config declares.
    """
    if tuning is None or tuning.proxy is not None or config.privacy == "none":
        return None
    declared = config.privacy.tuned_on
    return tuning.trials + (declared.private_runs if isinstance(declared, PrivateRuns) else 1)


def trials_of(source: Source, arm: Arm, tuning: Tuning, epsilon: float | None, directory: Path) -> list[Cell]:
    """One cell a point of the grid, in its order. epsilon: of private arms.

    Raises:
        ConfigError: the arm does not fit the proxy, or the proxy is the run's own data.
    """
    base = source.config()
    proxy = () if tuning.proxy is None else (_data_of(tuning.proxy, base),)
    changes = (*proxy, *arm.overrides)
    centre = source.config(changes, arm.name)
    budget = None if centre.privacy == "none" else epsilon
    target = () if budget is None else (f"privacy.target_epsilon={as_value(budget)}",)
    found = []
    for number, setting in enumerate(grid(Setting.of(centre), tuning.trials), 1):
        run_dir = directory / f"{arm.name}-trial{number}"
        place = (
            f"seed={base.seed + APART}",
            "runtime.kind=local",
            "runtime.address=null",
            "runtime.threads=1",
        )
        output = f"output={as_value(str(run_dir))}"
        config = source.config((*changes, *target, *setting.overrides(), *place, output), arm.name)
        found.append(Cell(arm=arm.name, epsilon=budget, seed=config.seed, config=config, run_dir=run_dir))
    return found


def choose(trials: Sequence[Cell], scores: Mapping[Path, float], *, high_is_good: bool) -> Choice:
    """The best of the trials of one arm; of equals the first. A score that is no number is the worst.

    Args:
        trials: in the order of the grid.
        scores: by run directory, one of each.
        high_is_good: of the metric.
    """
    tried = tuple((Setting.of(trial.config), scores[trial.run_dir]) for trial in trials)

    def worth(score: float) -> float:
        signed = score if high_is_good else -score
        return -math.inf if math.isnan(signed) else signed

    return Choice(tried=tried, best=max(tried, key=lambda pair: worth(pair[1]))[0])


def _data_of(proxy: Path, base: RunConfig) -> str:
    """The proxy's data section, its partition included, as an override."""
    data = load_config(proxy).data
    if _private(base.data) in _read(data):
        raise ConfigError(
            f"--proxy {proxy}: its data is the run's own; name other data, public or synthetic, or write "
            "--tune-on-data and pay for it"
        )
    return f"data={as_value(data.model_dump(mode='json'))}"


def _read(data: Data) -> list[tuple[object, ...]]:
    """All that a run on this data learns from or is scored on."""
    read = [_private(data)]
    if isinstance(data, Files):
        read.append(("files", Path(data.test).resolve()))
    return read


def _private(data: Data) -> tuple[object, ...]:
    """What tells training records apart."""
    match data:
        case Files():
            return ("files", Path(data.train).resolve())
        case HuggingFace():
            return ("huggingface", data.path, data.name)
        case Docstrings():
            return ("docstrings",)
