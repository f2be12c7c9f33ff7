"""What is simulated: sizes of federation, adapter and local work, and who does it."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

OURS, FLOWER, STEP = "fedlora", "flower", "flower, no ledger"
GHOST, TRIMMED = "flower, ghost", "flower, ghost, trimmed"
"""fedlora: `simulate` on Ray. flower: stock Flower and Ray, model kept by the actor, the same `train()`.
no ledger: the same, but the private step alone. ghost: as in a tutorial, the model loaded in every call, records padded
to `max_length`, Opacus' ghost clipping. trimmed: the same, but padded to the batch's longest record."""

ARMS = (OURS, FLOWER, STEP, GHOST, TRIMMED)

ACTORS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One federation.

    model: tiny is a random BERT of one layer, as wide as `megabytes` of B at rank 32 takes; minilm is real.
    megabytes: of an update.
    clients, asked: registered, and taking part in a round.
    rounds: the first, in which actors still load, is not counted.
    records: of a client. null: a client answers with zeros instead of training. beta: of the stale memory.
    together: our `runtime.clients_together`.
    """

    name: str
    model: Literal["tiny", "minilm"] = "tiny"
    megabytes: float = 0.3
    clients: int
    asked: int
    rounds: int
    records: int = 4
    batch_size: int = 1
    local_steps: int = 1
    null: bool = False
    beta: float = 0.0
    together: int | Literal["auto"] = 1
    arms: tuple[str, ...] = (OURS, FLOWER)
    repeats: int = 1
    limit_s: float = 900.0

    @property
    def private(self) -> bool:
        """Noise on the tiny model's numbers would be all of its work, and the same for both sides."""
        return self.model == "minilm"

    def words(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def case_of(words: dict[str, Any]) -> Case:
    """What `Case.words` gave."""
    return Case(**{**words, "arms": tuple(words["arms"])})


def _tiny(megabytes: float, clients: int, rounds: int, repeats: int) -> Case:
    name = f"tiny, {megabytes:g} MB, {clients:,}"
    return Case(
        name=name, megabytes=megabytes, clients=clients, asked=clients, rounds=rounds, repeats=repeats
    )


def _registered(clients: int) -> Case:
    name = f"tiny, 0.3 MB, 200 of {clients:,}"
    return Case(name=name, clients=clients, asked=200, rounds=5, records=1)


def _stale(clients: int) -> Case:
    name = f"FedStale, 0.3 MB, 200 of {clients:,}"
    return Case(name=name, clients=clients, asked=200, rounds=20, records=1, beta=0.2, arms=(OURS,))


QUICK = (_tiny(0.3, 100, 6, 1),)

FULL = (
    *(
        _tiny(megabytes, clients, rounds, repeats)
        for megabytes in (0.3, 3.0)
        for clients, rounds, repeats in ((10, 12, 3), (100, 8, 3), (1000, 4, 2))
    ),
    Case(
        name="MiniLM, 32 to 64 tokens, batch 2, 1 step",
        model="minilm", megabytes=0.15, clients=64, asked=64, rounds=5, records=64, batch_size=2, repeats=3,
        together="auto", arms=ARMS,
    ),
    Case(
        name="MiniLM, 32 to 64 tokens, batch 8, 5 steps",
        model="minilm", megabytes=0.15, clients=16, asked=16, rounds=4, records=64, batch_size=8, local_steps=5,
        together="auto", arms=ARMS,
    ),
    Case(name="null, 1,000", megabytes=0.01, clients=1000, asked=1000, rounds=6, null=True, arms=(OURS,), repeats=3),
    Case(name="null, 0.3 MB, 1,000", clients=1000, asked=1000, rounds=6, null=True, arms=(OURS,)),
    _registered(10_000),
    _registered(100_000),
    _stale(1_000),
    _stale(100_000),
)  # fmt: skip
"""Noise and clip are on for MiniLM only: see `Case.private`."""
