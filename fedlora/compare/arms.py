"""What can be compared: each arm a name and what it changes in the config. A new method is one line in METHODS, a
rule beside one a line in VARIANTS."""

import json
from dataclasses import dataclass


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
        reason="an r x r core between two frozen frames: few noised numbers",
        overrides=("method={name: fedsb}", "lora.trains=core"),
    ),
    Arm(
        name="svfit",
        reason="the r largest singular values of each weight: the fewest noised numbers",
        overrides=("method={name: svfit}", "lora.init=principal", "lora.trains=singular-values"),
    ),
    Arm(
        name="fedavg",
        reason="B averaged under the A that PEFT draws: LoRA without further choices",
        overrides=("method={name: fedavg}", "lora.init=kaiming", "lora.trains=b"),
    ),
    Arm(
        name="fedask",
        reason="FedSVD with the singular values' roots on either side",
        overrides=("method={name: fedask}", "lora.trains=b"),
    ),
    Arm(
        name="periodic",
        reason="B averaged, unloaded into the weight four times a run, A drawn anew each time",
        overrides=("method={name: periodic, restart_every: QUARTER}", "lora.trains=b"),
    ),
    Arm(
        name="switch",
        reason="B averaged, the weakest direction of A drawn anew four times a run",
        overrides=("method={name: switch, restart_every: QUARTER}", "lora.trains=b"),
    ),
    Arm(
        name="rolora",
        reason="B and A in turn, the frozen one orthonormal",
        overrides=("method={name: rolora, refactor: true}", "lora.trains=ab"),
    ),
    *(
        Arm(name=name, reason=reason, overrides=(f"method={{name: {name}}}", "lora.trains=ab"))
        for name, reason in (
            ("fedit", "A and B averaged apart: the mean of products is missed"),
            ("fedex", "the same, what is missed goes into the weight"),
            ("flora", "products go into the weight, A and B begin anew each round"),
            ("flexlora", "the mean of products, cut to rank r"),
            ("lora-fair", "A and B averaged, B corrected towards the mean of products"),
            ("fedsa", "A averaged, each client's B its own; the score is of the mean B"),
        )
    ),
)
"""Each method as itself: no stale memory, none of the other methods' choices; all else is the config's."""

VARIANTS = (
    Arm(
        name="lora-pro",
        reason="FFA-LoRA under PEFT's A, its steps straightened: what an orthonormal A gives for nothing",
        overrides=(
            "method={name: ffa}",
            "lora.init=kaiming",
            "lora.trains=b",
            "federation.optimizer.precondition=lora-pro",
        ),
    ),
    Arm(
        name="allora",
        reason="B averaged, A stays; rows that have moved little move faster",
        overrides=("method={name: ffa}", "lora.trains=b", "federation.optimizer.precondition=allora"),
    ),
    Arm(
        name="mifa",
        reason="FedSVD, each round the sum of everybody's newest update",
        overrides=("method={name: fedsvd, stale: {rule: mifa, beta: 1.0}}", "lora.trains=b"),
    ),
)
"""Published rules that are a key beside a method; under AdamW clients have none of a step."""

_DRAWN = ("federation.reshuffle=false", "privacy.max_participations=OFTEN")
"""Cohorts drawn afresh in each round. OFTEN: as often as a client is then asked, and two standard deviations more; the
config's own where it draws so itself."""

PUBLISHED = (
    Arm(
        name="fedsvd-paper",
        reason="FedSVD as published (arXiv 2505.12805); draws and steps are the config's, so all arms do equal work",
        overrides=(
            "method={name: fedsvd, refactor_every: 1, route: dense}",
            "lora.trains=b",
            "lora.init=kaiming",
            "lora.r=8",
            "lora.lora_alpha=8",
            "task.head=frozen",
            "privacy.max_grad_norm=2.0",
            "federation.optimizer={name: sgd, lr: 0.5}",
            *_DRAWN,
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
            *_DRAWN,
        ),
    ),
    Arm(
        name="ffa-head",
        reason="the same with its head trained, from zero, which no paper of the two does",
        overrides=(
            "method={name: ffa}",
            "lora.trains=b",
            "lora.init=kaiming",
            "lora.r=8",
            "lora.lora_alpha=8",
            "task.head=trained",
            *_DRAWN,
        ),
    ),
)

AS_IT_STANDS = Arm(name="config", reason="the file as it stands", tuned=False)


def as_value(value: object) -> str:
    """A value as `--set` takes it; JSON is YAML."""
    return json.dumps(value)
