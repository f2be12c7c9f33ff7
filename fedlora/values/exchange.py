"""What a server asks of a client, and all that a client may answer."""

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from fedlora.values.adapters import Adapters, Delta, Side
from fedlora.values.privacy import DpEvent, Witness


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalWork:
    """What a server may ask of a client. Never a privacy parameter.

    proximal: FedProx's pull that the run counts on; a node that has another one stays away.
    precondition: what the run counts on that a step makes of B's gradient; likewise.
    side: which factors are trained; a node whose model has A frozen stays away from all but "b".
    own_b: each node goes on from the B that its own work left, not from the one it is sent; a node that keeps none
        stays away.
    """

    steps: int
    learning_rate: float
    proximal: float = 0.0
    precondition: str = "none"
    side: Side = "b"
    own_b: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Whose requests these are: the run's name, and the digests that `TrainRequest` carries."""

    run: str
    base_model: str
    code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """One client's work in one round. Idempotent: asked twice, it is released once.

    base_model: SHA-256 of the frozen weights that the adapters belong to, and of what else a loss comes from. code: of
        the server's fedlora.
    """

    run: str
    base_model: str
    code: str
    round: int
    adapters: Adapters
    work: LocalWork


class RefusalReason(StrEnum):
    """Why a client stayed away; a code, since free text could carry a record.

    MALFORMED and UNSOUND are a server's alone: for bytes that are no reply to what was asked, and for an update that
    cannot be what it says of itself. It also says FAILED and LEDGER for a client.
    """

    BUDGET = "budget"
    NO_DATA = "no_data"
    BAD_REQUEST = "bad_request"
    LEDGER = "ledger"
    FAILED = "failed"
    MALFORMED = "malformed"
    UNSOUND = "unsound"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientUpdate:
    """All that leaves a client.

    spent: every release in it, one event each kind; empty only where privacy is off.
    ledger: the line of its debit; None only where privacy is off.
    accuracy: the mean over the client's own records of the model it began the round with, with noise that `spent`
        pays for; None where the client gives none.
    """

    client: str
    run: str
    round: int
    delta: Delta
    spent: tuple[DpEvent, ...]
    ledger: Witness | None = None
    accuracy: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Absence with a cause."""

    client: str
    run: str
    round: int
    reason: RefusalReason


Reply: TypeAlias = ClientUpdate | Refusal
