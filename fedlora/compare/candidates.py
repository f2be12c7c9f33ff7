"""The arms that one config can be compared in: the table's, fitted to it, the user's own, and what stands beside."""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import replace

from fedlora.compare.arms import AS_IT_STANDS, METHODS, PUBLISHED, VARIANTS, Arm, as_value
from fedlora.config.asking import expected_cohort
from fedlora.config.schema import IndependentCohort, RunConfig
from fedlora.errors import ConfigError

_TUNED = ("federation.optimizer", "privacy.max_grad_norm", "privacy=")
"""Who sets one of these says what is to be compared, and is not tuned."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_.]*(-[a-z0-9_.]+)*")


def arms_of(config: RunConfig, own: Sequence[str]) -> dict[str, Arm]:
    """Every arm that this config can be compared in, by name.

    Args:
        config: as the user wrote it.
        own: the user's, `name: key=value key=value`.

    Raises:
        ConfigError: one of the user's cannot be read, or has the name of another.
    """
    known = {arm.name: _fitted(arm, config) for arm in (*METHODS, *VARIANTS, *PUBLISHED, AS_IT_STANDS)}
    known |= {arm.name: arm for arm in references(config)}
    for text in own:
        arm = parse_arm(text)
        if arm.name in known:
            raise ConfigError(f"--arm {text!r}: there is an arm {arm.name!r} already; choose another name")
        known[arm.name] = arm
    return known


def parse_arm(text: str) -> Arm:
    """The arm that `name: key=value key=value` describes; a value may hold blanks.

    Raises:
        ConfigError: it is not of that form.
    """
    name, colon, rest = (part.strip() for part in text.partition(":"))
    overrides = tuple(re.split(r"\s+(?=[\w.]+=)", rest)) if rest else ()
    if not colon or not _NAME.fullmatch(name) or not overrides or not all("=" in o for o in overrides):
        raise ConfigError(
            f'--arm {text!r}: not an arm; write for example --arm "small: lora.r=2 lora.lora_alpha=2", the name in '
            "small letters, digits and dashes"
        )
    tuned = not any(override.startswith(_TUNED) for override in overrides)
    return Arm(name=name, reason="the user's own", overrides=overrides, tuned=tuned)


def chosen(known: dict[str, Arm], names: Sequence[str]) -> list[Arm]:
    """The arms of these names, in their order.

    Raises:
        ConfigError: a name is unknown or there twice; says the nearest.
    """
    for place, name in enumerate(names):
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
            allowed = ", ".join(known)
            mend = f"write {near[0]} (there are {allowed})" if near else f"there are {allowed}"
            raise ConfigError(f"--methods: {name!r} is not known; {mend}")
        if name in names[:place]:
            raise ConfigError(f"--methods: {name} is there twice; --control compares a method with itself")
    return [known[name] for name in names]


UNCLIPPED = 8.0
"""A run without clipping has rate * bound over this for its rate: its gradients are long where others are cut short."""


def references(config: RunConfig) -> list[Arm]:
    """What stands beside in every table: the price of privacy, and the price of records that stay apart."""
    found = [
        Arm(
            name="central",
            reason="one client with all records: as many a step, the same epsilon",
            overrides=_central(config),
        )
    ]
    if config.privacy != "none":
        arm = Arm(
            name="not-private", reason="the file without clipping and noise", overrides=("privacy=none",)
        )
        found.insert(0, _with_a_tame_rate(arm, config))
    return found


def _with_a_tame_rate(arm: Arm, config: RunConfig) -> Arm:
    """The arm, its search for a rate begun lower under SGD: at the rates that go with small clips, unclipped steps run
    away.
    """
    if config.privacy == "none" or config.federation.optimizer.name != "sgd":
        return arm
    rate = config.federation.optimizer.lr * config.privacy.max_grad_norm / UNCLIPPED
    lower = f"federation.optimizer.lr={as_value(rate)}"
    reason = f"{arm.reason}, at a rate that suits unclipped steps"
    return replace(arm, reason=reason, overrides=(*arm.overrides, lower))


def control_of(arm: Arm, config: RunConfig) -> Arm:
    """The same arm under another name of the run, so that draws and noise are new while the split stays.

    Both are keyed by the run's name, which is the digest of its config. How many bases back a late reply may reach is
    part of that and changes nothing where none is twenty rounds late: one more makes the twin.
    """
    return Arm(
        name=f"{arm.name}-again",
        reason=f"{arm.name} once more, with other draws and noise: must not differ",
        overrides=(*arm.overrides, f"federation.keep_gauges={config.federation.keep_gauges + 1}"),
        tuned=arm.tuned,
    )


def _central(config: RunConfig) -> tuple[str, ...]:
    federation = config.federation
    overrides = (
        'data.partition={"kind": "iid", "clients": 1}',
        "federation.cohort=1",
        "federation.min_clients=1",
        "federation.enough=null",
        "world=null",
        f"federation.batch_size={max(1, round(federation.batch_size * cohort_size(config)))}",
    )
    if config.privacy == "none":
        return overrides
    return (*overrides, f"privacy.max_participations={federation.rounds}")


def cohort_size(config: RunConfig) -> float:
    """Clients asked in a round, on average.

    Raises:
        ConfigError: they depend on a column that only the data tells.
    """
    cohort, clients = config.federation.cohort, config.data.partition.clients
    if clients is None and isinstance(cohort, IndependentCohort) and not isinstance(cohort.probability, dict):
        raise ConfigError(
            "federation.cohort: a probability over a partition by column has no known size, which the arm `central` "
            "needs; write a number of clients, or leave the references out: --no-references"
        )
    return expected_cohort(config.federation, clients or 0)


def _fitted(arm: Arm, config: RunConfig) -> Arm:
    """The arm without what a config of this kind does not have, a clipping norm or a head; its words as numbers."""
    lacks = [
        *(["privacy."] if config.privacy == "none" else []),
        *(["task.head"] if config.task.causal else []),
    ]
    quarter, often = str(max(1, config.federation.rounds // 4)), str(_participations(config))
    kept = tuple(
        override.replace("QUARTER", quarter).replace("OFTEN", often)
        for override in arm.overrides
        if not override.startswith(tuple(lacks))
    )
    return Arm(name=arm.name, reason=arm.reason, overrides=kept, tuned=arm.tuned)


def _participations(config: RunConfig) -> int:
    if config.privacy == "none":
        return 0
    federation, own = config.federation, config.privacy.max_participations
    clients = config.data.partition.clients
    if not federation.reshuffle or not isinstance(federation.cohort, int):
        return own
    if clients is None:  # only the data tells how many they are
        return federation.rounds
    share = federation.cohort / clients
    spread = math.sqrt(federation.rounds * share * (1 - share))
    return min(federation.rounds, math.ceil(federation.rounds * share + 2 * spread))
