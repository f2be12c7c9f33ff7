"""What a data owner sets on the own node, and no server may ever set."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fedlora.config.columns import RecordColumns, column_conflicts
from fedlora.config.combinations import (
    lora_conflicts,
    model_conflicts,
    optimizer_conflicts,
    rank_conflicts,
    step_conflicts,
)
from fedlora.config.data import Docstrings
from fedlora.config.schema import Lora, Model, Optimizer
from fedlora.config.section import Section
from fedlora.config.task import Task

CLIENT_NAME = r"(?!\.+\Z)[A-Za-z0-9._~-]{1,96}\Z"
"""What a server takes as a node's name (re.match): it may become a file's name there."""


class NodeFiles(RecordColumns):
    """The owner's records in one file; never sent anywhere."""

    source: Literal["files"]
    train: str
    """Path of a tsv, csv, jsonl or parquet file on this node, also gzipped."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens kept of each record; of a pair of completions, of each of both. null for images, and only there."""


class NodeDocstrings(Docstrings):
    """One part of the built-in docstrings: a demonstration with nothing to protect."""

    part: str
    """Which part of the partition this node plays: client-0, client-1, ..."""
    seed: Annotated[int, Field(ge=0)]
    """Of the partition; the same on every node, or parts overlap."""


class Budget(Section):
    """What this node will ever spend on these records, over all runs and all servers."""

    target_epsilon: Annotated[float, Field(gt=0)]
    """Of one record, zero-out adjacency, over everything that this node ever sends about these records."""
    target_delta: Annotated[float, Field(gt=0, lt=1)]
    """Must be below 1 / declared_records."""
    max_participations: Annotated[int, Field(ge=1)]
    """Rounds of work; the ledger refuses the next one."""
    accountant: Literal["pld", "prv", "rdp"] = "pld"
    """What calibrates the noise and counts what was spent."""


class Work(Section):
    """How this node trains when asked. The noise is calibrated for exactly this."""

    batch_size: Annotated[int, Field(ge=1)]
    """Expected size of a Poisson draw, divisor of every step; the rate is it / declared_records."""
    local_steps: Annotated[int, Field(ge=1)]
    """Steps of one participation; a server that asks for more is refused."""
    optimizer: Optimizer
    """lr is the most that a server may ask for."""
    own_b: bool = False
    """Take part in runs that leave each node its own B (`fedsa`), and in no others; `lora.trains` is then `ab`. B is
    kept in a folder of the ledger's name and `.personal`; noised and paid for, so that it may be shown."""


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Accepted(Section):
    """What a request must say of where it comes from. `fedlora check node.yaml` prints both digests."""

    code: Annotated[list[Sha256], Field(min_length=1)] | None = None
    """Digests of fedlora itself, this node's own and the server's; null: any."""
    base_model: Annotated[list[Sha256], Field(min_length=1)] | None = None
    """Digests of the weights file; together with how they are quantised, the adapter of `lora.from_adapter`, keys of
    `task` other than their defaults, and what is frozen as `seed` draws it, where there is any of it. null: whatever
    this file comes to, which the server's must equal anyway."""


class NodeConfig(Section):
    """One data owner's node, whole."""

    client: str
    """The name under which the server knows this node: letters, digits and . _ ~ -, not only dots."""
    data: Annotated[NodeFiles | NodeDocstrings, Field(discriminator="source")]
    declared_records: Annotated[int, Field(ge=1)]
    """The number of records as told to the server. Public: sampling rates and noise follow from it."""
    classes: Annotated[list[str], Field(default_factory=list)]
    """Every class of the task, in the order that all nodes and the server share; empty for causal-lm and dpo."""
    model: Model
    task: Task
    lora: Lora
    rank: Annotated[int, Field(ge=1)] | None = None
    """This node trains, clips, noises and sends only so many columns of every B, the first ones; the run's
    `federation.ranks` must say the same of it. null: all `lora.r`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of a frozen head, and of a pooler that the checkpoint lacks: where there is one, the run's own seed, or requests
    are refused. Draws and noise never come from it."""
    work: Work
    ledger: str
    """Path of the append-only record of everything spent. Losing it means losing the guarantee: back it up.

    Replies already given lie beside it, in a folder of its name and `.outbox`; they bear it witness.
    """
    mark: str | None = None
    """Path, on another disk or volume, of a file that remembers how far the ledger has come: a ledger that was lost
    or put back from a backup together with its replies is then refused."""
    budget: Budget
    min_noise_multiplier: Annotated[float, Field(gt=0)]
    """Noise never goes below this, however much the budget would allow."""
    max_grad_norm: Annotated[float, Field(gt=0)]
    """L2 bound on one record's gradient, jointly over everything trained."""
    evaluation_noise: Annotated[float, Field(gt=0)] | None = None
    """Tell the server in each round how many own records the model gets right, with noise of this standard deviation,
    in records; the budget pays. null: nothing is told."""
    accept: Accepted = Accepted()
    reply_quantum_s: Annotated[float, Field(ge=0)] = 1.0
    """Replies leave at multiples of this many seconds after the request: how long a step takes tells how many records
    were drawn. 0: at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where this node trains; auto: on a card if there is one."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Cores that training uses."""

    @field_validator("client")
    @classmethod
    def _is_a_plain_name(cls, name: str) -> str:
        if not re.match(CLIENT_NAME, name):
            raise ValueError(f"client: {name!r} is no name; use 1 to 96 letters, digits and . _ ~ -")
        return name

    @model_validator(mode="after")
    def _fits_together(self) -> "NodeConfig":
        classifies, kind = not self.task.causal, self.task.kind
        if classifies and len(self.classes) < 2:
            raise ValueError(f"classes: {len(self.classes)} named, but task.kind is {kind}; list them all")
        if classifies and getattr(self.data, "label", "") is None:
            raise ValueError(f"data.label: missing, but task.kind is {kind}; name the label's column")
        of_work = optimizer_conflicts(self.work.optimizer, self.lora, "work.optimizer")
        own = {} if self.rank is None else {self.client: self.rank}
        of_rank = rank_conflicts(own, self.lora, self.work.optimizer, "rank") if own else ()
        of_b = _own_b_conflicts(self.work, self.lora)
        times = self.budget.max_participations
        of_steps = step_conflicts(
            self.work.local_steps, times, "work.local_steps", "budget.max_participations"
        )
        of_data = column_conflicts(self.data, self.task)
        of_parts = [
            *model_conflicts(self.model),
            *lora_conflicts(self.lora),
            *of_work,
            *of_rank,
            *of_b,
            *of_steps,
        ]
        if wrong := [*of_data, *of_parts]:
            raise ValueError("\n".join(wrong))
        return self


def _own_b_conflicts(work: Work, lora: Lora) -> Iterator[str]:
    if work.own_b and lora.trains != "ab":
        yield f"work.own_b: true, but lora.trains is {lora.trains}; write ab, or own_b: false"
    if work.own_b and lora.from_adapter is not None:
        yield f"lora.from_adapter: {lora.from_adapter}, but a node's own B begins at zero; write null"
