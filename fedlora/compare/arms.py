"""What can be compared: each arm a name and what it changes in the config. A new method is one line in METHODS."""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.config.schema import Classification, IndependentCohort, RunConfig
from fedlora.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A variant of a config. overrides: as for `--set`, after the user's own.

    tuned: whether its learning rate and clipping are searched for; not where they are the point of the arm.
    """

    name: str
    reason: str
    overrides: tuple[str, ...] = ()
    tuned: bool = True


METHODS = (
    Arm(
        name="fedsvd",
        reason="B averaged, A turned within the row space of its first draw",
        overrides=("method={name: fedsvd}", "lora.trains=b"),
    ),
    Arm(
        name="ffa",
        reason="B averaged, A stays: the control that a gain of FedSVD is measured against",
        overrides=("method={name: ffa}", "lora.trains=b"),
    ),
    Arm(
        name="fedsb",
        reason="an r x r core between two frozen frames: the fewest noised numbers",
        overrides=("method={name: fedsb}", "lora.trains=core"),
    ),
    Arm(
        name="fedavg",
        reason="B averaged under the A that PEFT draws: LoRA without further choices",
        overrides=("method={name: fedavg}", "lora.init=kaiming", "lora.trains=b"),
    ),
)
"""Each method as itself: no stale memory, none of the other methods' choices; all else is the config's."""

PUBLISHED = (
    Arm(
        name="fedsvd-paper",
        reason="FedSVD as published (arXiv 2505.12805); draws and steps are the config's, so all arms do equal work",
        overrides=(
            "method={name: fedsvd, refactor_every: 1}",
            "lora.trains=b",
            "lora.init=kaiming",
            "lora.r=8",
            "lora.lora_alpha=8",
            "task.head=frozen",
            "privacy.max_grad_norm=2.0",
            "federation.optimizer={name: sgd, lr: 0.5}",
        ),
        tuned=False,
    ),
    Arm(
        name="ffa-paper",
        reason="FFA-LoRA as FedSVD's paper runs it: PEFT's A, the head frozen; its rate and clipping are tuned",
        overrides=(
            "method={name: ffa}",
            "lora.trains=b",
            "lora.init=kaiming",
            "lora.r=8",
            "lora.lora_alpha=8",
            "task.head=frozen",
        ),
    ),
)

AS_IT_STANDS = Arm(name="config", reason="the file as it stands", tuned=False)

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
    known = {arm.name: _fitted(arm, config) for arm in (*METHODS, *PUBLISHED, AS_IT_STANDS)}
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
        reason = "the file without clipping and noise"
        found.insert(0, Arm(name="not-private", reason=reason, overrides=("privacy=none",)))
    return found


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
    cohort = config.federation.cohort
    if not isinstance(cohort, IndependentCohort):
        return cohort
    if isinstance(cohort.probability, dict):
        return sum(cohort.probability.values())
    clients = getattr(config.data.partition, "clients", None)
    if clients is None:
        raise ConfigError(
            "federation.cohort: a probability over a partition by column has no known size, which the arm `central` "
            "needs; write a number of clients, or leave the references out: --no-references"
        )
    return cohort.probability * clients


def _fitted(arm: Arm, config: RunConfig) -> Arm:
    """The arm without what a config of this kind does not have: a clipping norm, a head."""
    lacks = [
        *(["privacy."] if config.privacy == "none" else []),
        *(["task.head"] if not isinstance(config.task, Classification) else []),
    ]
    kept = tuple(o for o in arm.overrides if not o.startswith(tuple(lacks)))
    return Arm(name=arm.name, reason=arm.reason, overrides=kept, tuned=arm.tuned)


def as_value(value: object) -> str:
    """A value as `--set` takes it; JSON is YAML."""
    return json.dumps(value)
