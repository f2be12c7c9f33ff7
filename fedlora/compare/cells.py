"""The runs of a comparison, from a config, arms, epsilons and seeds; pure but for reading the YAML."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora.compare.arms import Arm, as_value
from fedlora.compare.candidates import cohort_size
from fedlora.config.load import load_config, require_same
from fedlora.config.schema import PrivateRuns, RunConfig
from fedlora.errors import ConfigError
from fedlora.runs.rundir import run_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A YAML file and the user's own overrides: what every cell begins with."""

    path: Path
    overrides: tuple[str, ...] = ()

    def config(self, more: Sequence[str] = (), arm: str | None = None) -> RunConfig:
        """The run with further overrides.

        Raises:
            ConfigError: it is none; says the arm that it is part of.
        """
        try:
            return load_config(self.path, [*self.overrides, *more])
        except ConfigError as error:
            raise ConfigError(str(error) if arm is None else f"arm {arm}: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A learning rate and a clipping norm. max_grad_norm: None without privacy."""

    lr: float
    max_grad_norm: float | None

    @classmethod
    def of(cls, config: RunConfig) -> "Setting":
        """The config's own."""
        norm = None if config.privacy == "none" else config.privacy.max_grad_norm
        return cls(lr=config.federation.optimizer.lr, max_grad_norm=norm)

    def overrides(self) -> tuple[str, ...]:
        """As for `--set`."""
        lr = f"federation.optimizer.lr={as_value(self.lr)}"
        return (
            (lr,)
            if self.max_grad_norm is None
            else (lr, f"privacy.max_grad_norm={as_value(self.max_grad_norm)}")
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a comparison. epsilon: None without privacy; such a cell stands beside every epsilon."""

    arm: str
    epsilon: float | None
    seed: int
    config: RunConfig
    run_dir: Path

    @property
    def work(self) -> float:
        """Records that clients go through in the whole run, expected: what its time grows with."""
        federation = self.config.federation
        return federation.rounds * federation.local_steps * federation.batch_size * cohort_size(self.config)


def cells_of(
    source: Source,
    arm: Arm,
    *,
    epsilons: Sequence[float],
    seeds: Sequence[int],
    setting: Callable[[float | None], Setting | None],
    private_runs: int | None,
    directory: Path,
) -> list[Cell]:
    """The runs of one arm: every epsilon with every seed; every seed alone where the arm is not private.

    Args:
        source: what all arms share.
        arm: what this one changes.
        epsilons: target budgets.
        seeds: of the runs.
        setting: that tuning chose for a budget; None: the arm's own.
        private_runs: how many runs on the same records each of these stands for, itself among them; None: itself alone.
        directory: in which they lie, `ARM-epsE-seedS` each.

    Raises:
        ConfigError: the arm does not fit the config.
    """
    private = source.config(arm.overrides, arm.name).privacy != "none"
    found = []
    for epsilon in epsilons if private else [None]:
        chosen = setting(epsilon)
        changes = (*arm.overrides, *(chosen.overrides() if chosen is not None else ()))
        for seed in seeds:
            budget = () if epsilon is None else _budget(epsilon, private_runs)
            run_dir = directory / f"{arm.name}-eps{'none' if epsilon is None else f'{epsilon:g}'}-seed{seed}"
            config = source.config((*changes, *budget, *_place(seed, run_dir)), arm.name)
            found.append(Cell(arm=arm.name, epsilon=epsilon, seed=seed, config=config, run_dir=run_dir))
    return found


def _budget(epsilon: float, private_runs: int | None) -> tuple[str, ...]:
    target = f"privacy.target_epsilon={as_value(epsilon)}"
    if private_runs is None:
        return (target,)
    return (target, f"privacy.tuned_on={as_value({'private_runs': private_runs})}")


def _place(seed: int, run_dir: Path) -> tuple[str, ...]:
    """In one process on one core, in its own directory: cells run side by side."""
    return (
        f"seed={seed}",
        "runtime.kind=local",
        "runtime.address=null",
        "runtime.threads=1",
        f"output={as_value(str(run_dir))}",
    )


def longest_first(cells: Sequence[Cell]) -> list[Cell]:
    """In the order in which cores that share them are all done soonest."""
    return sorted(cells, key=lambda cell: -cell.work)


def require_unchanged(cells: Sequence[Cell]) -> None:
    """Passes only where each cell that has begun is the run it is to be.

    Raises:
        ConfigError: a directory holds another run, or one that declared another cost of its tuning.
    """
    for cell in cells:
        if not (cell.run_dir / "config.yaml").exists():
            continue
        held = run_config(cell.run_dir)
        require_same(held, cell.config, cell.run_dir)
        if _declared(held) != _declared(cell.config):
            # No part of the digest, but the summary that is there would tell too small a cost.
            raise ConfigError(
                f"{cell.run_dir} declares privacy.tuned_on {_declared(held)}, now it is {_declared(cell.config)}; "
                "choose another --to"
            )


def _declared(config: RunConfig) -> str:
    if config.privacy == "none":
        return "none"
    tuned_on = config.privacy.tuned_on
    return f"{tuned_on.private_runs} private runs" if isinstance(tuned_on, PrivateRuns) else tuned_on
