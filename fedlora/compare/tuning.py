"""Learning rate and clipping norm: as many trials for every method, from one grid, on data that is not the run's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import TypeAlias

from fedlora.compare.arms import Arm, as_value
from fedlora.compare.cells import Cell, Setting, Source
from fedlora.config.data import Data, Docstrings, Files, HuggingFace
from fedlora.config.load import load_config
from fedlora.config.schema import PrivateRuns, RunConfig
from fedlora.errors import ConfigError

APART = 1_000_000
"""Trials have the config's seed and so many: a seed of their own, however many are measured later."""
FACTOR = 2.0
"""Between neighbours of the grid. Finer steps would vanish in the noise of one seed."""
REACH = 3
"""Neighbours on each side: rates from an eighth to eight times the config's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What trials are made of. proxy: None tunes on the run's own data. trials: settings tried for each arm.

    seeds: runs of each setting, judged by their mean: under much noise the best of one seed is luck.
    """

    trials: int
    proxy: Path | None
    seeds: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Of one arm at one budget: what was tried with which score, and the best of it."""

    tried: tuple[tuple[Setting, float], ...]
    best: Setting


Choices: TypeAlias = Mapping[str, Mapping[float | None, Choice]]
"""By arm and budget; None: of an arm without privacy."""


def setting_of(choices: Choices, arm: str, epsilon: float | None) -> Setting | None:
    """What was chosen for the arm at this budget, or at the one budget of its trials; None: it was not tuned."""
    own = choices.get(arm)
    if not own:
        return None
    return (own[epsilon] if epsilon in own else next(iter(own.values()))).best


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


def trial_epsilons(epsilons: Sequence[float], tuning: Tuning) -> list[float]:
    """The budgets of trials: each on a proxy, since the best rate falls with the noise; else the smallest alone.

    A cell says that it cost as much as K runs like itself; no trial on the run's own data may have spent more than a
    cell, and there may be no more of them.
    """
    ordered = sorted(epsilons)
    return ordered[:1] if tuning.proxy is None else ordered


def private_runs(tuning: Tuning | None, config: RunConfig) -> int | None:
    """Runs on the same records that a cell stands for, itself and those that the config declares among them; None:
    none but what the config declares.
    """
    if tuning is None or tuning.proxy is not None or config.privacy == "none":
        return None
    declared = config.privacy.tuned_on
    return tuning.trials * tuning.seeds + (declared.private_runs if isinstance(declared, PrivateRuns) else 1)


def trials_of(source: Source, arm: Arm, tuning: Tuning, epsilon: float | None, directory: Path) -> list[Cell]:
    """The cells of each point of the grid, a seed after the other, in its order. epsilon: of private arms.

    Raises:
        ConfigError: the arm does not fit the proxy, or the proxy is the run's own data.
    """
    base = source.config()
    words = arm.name if epsilon is None else f"{arm.name}-eps{epsilon:g}"
    proxy = () if tuning.proxy is None else (_data_of(tuning.proxy, base),)
    changes = (*proxy, *arm.overrides)
    centre = source.config(changes, arm.name)
    budget = None if centre.privacy == "none" else epsilon
    target = () if budget is None else (f"privacy.target_epsilon={as_value(budget)}",)
    found = []
    for number, setting in enumerate(grid(Setting.of(centre), tuning.trials), 1):
        for again in range(tuning.seeds):
            run_dir = directory / (f"{words}-trial{number}" + (f"-again{again}" if again else ""))
            place = (
                f"seed={base.seed + APART + again}",
                "runtime.kind=local",
                "runtime.address=null",
                "runtime.threads=1",
            )
            output = f"output={as_value(str(run_dir))}"
            config = source.config((*changes, *target, *setting.overrides(), *place, output), arm.name)
            found.append(Cell(arm=arm.name, epsilon=budget, seed=config.seed, config=config, run_dir=run_dir))
    return found


def choose(trials: Sequence[Cell], scores: Mapping[Path, float], *, high_is_good: bool) -> Choice:
    """The setting with the best mean over its seeds; of equals the first. A mean that is no number is the worst.

    Args:
        trials: in the order of the grid.
        scores: by run directory, one of each.
        high_is_good: of the metric.
    """
    by_setting: dict[Setting, list[float]] = {}
    for trial in trials:
        by_setting.setdefault(Setting.of(trial.config), []).append(scores[trial.run_dir])
    tried = tuple((setting, fmean(found)) for setting, found in by_setting.items())

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
        read.append(_file(data.test))
    if isinstance(data, Files | HuggingFace) and data.public is not None:
        read.append(_file(data.public))
    return read


def _private(data: Data) -> tuple[object, ...]:
    """What tells training records apart."""
    match data:
        case Files():
            return _file(data.train)
        case HuggingFace():
            return ("huggingface", data.path, data.name)
        case Docstrings():
            return ("docstrings",)


def _file(path: str) -> tuple[object, ...]:
    return ("files", Path(path).expanduser().resolve())
