"""The nouns of fedlora: frozen values, no behaviour beyond validation.

Shapes are (rows, columns). An adapted layer computes W x + scale * B (A x) with A (r, d_in) and B (d_out, r).
B means nothing without its A, so everything shaped like B carries the number of its basis. Where a frozen left frame
stands before it, B is a core: W x + scale * L (B (A x)) with L (d_out, k) and B (k, r); nothing else changes. Of a core
of which only the diagonal is trained, B is that, (1, r): W x + scale * L (B * (A x)). Where a method leaves a product
behind that no B A can hold, it is the rest: (W + rest) x + scale * B (A x).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, TypeAlias

from fedlora.errors import BasisError, ShapeError

if TYPE_CHECKING:  # the nouns alone cost no import of torch
    from torch import Tensor

Site: TypeAlias = str
"""Dotted path of an adapted module, as in the base model. Always visited in sorted order."""

Side: TypeAlias = Literal["b", "a", "both"]
"""What of every site a round trains: B (or the core), A, or both; the other is frozen."""

FRAME = -1
"""The basis number of the canonical frame: coordinates in the orthonormal rows `ServerState.frame`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """One adapted site.

    left: the frozen frame before a core, with orthonormal columns; None before a whole B.
    rest: (d_out, d_in), added to the frozen weight as it is, `scale` included; None: nothing is.
    """

    a: Tensor
    b: Tensor
    left: Tensor | None = None
    rest: Tensor | None = None

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ShapeError(
                f"a {tuple(self.a.shape)} and b {tuple(self.b.shape)} share no rank; need (r, n) and (m, r)"
            )
        if self.left is not None:
            k = self.left.shape[1] if self.left.ndim == 2 else None
            if self.b.shape[0] != k and self.b.shape != (1, k):
                raise ShapeError(
                    f"left {tuple(self.left.shape)} and core {tuple(self.b.shape)} share no rank; "
                    "need (m, k) and (k, r)"
                )
        rows = (self.b if self.left is None else self.left).shape[0]
        if self.rest is not None and self.rest.shape != (rows, self.a.shape[1]):
            raise ShapeError(
                f"rest {tuple(self.rest.shape)} is not shaped like the weight, {(rows, self.a.shape[1])}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """What a client starts from: the factors of every site and the head, if one is trained."""

    basis: int
    scale: float
    sites: Mapping[Site, Factors]
    head: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A change of B, (d_out, r) or, of a core, (k, r) a site, in one basis; of the head, which has none; and of A.

    sites: of B; empty where the round trained A alone. a: of A, (r, d_in) a site; empty where it was frozen. A belongs
    to its basis as a whole: no gauge carries its changes into another.
    """

    basis: int
    sites: Mapping[Site, Tensor]
    head: Mapping[str, Tensor] = field(default_factory=dict)
    a: Mapping[Site, Tensor] = field(default_factory=dict)

    def require_basis(self, basis: int) -> None:
        """Refuses to let coordinates of another basis through."""
        if self.basis != basis:
            raise BasisError(
                f"delta is in basis {self.basis}, needed in {basis}; rebase it with its gauges first"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """Change of coordinates, (r, r) a site: `delta @ gauge` is the delta of `basis` in the canonical frame."""

    basis: int
    sites: Mapping[Site, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalWork:
    """What a server may ask of a client. Never a privacy parameter.

    proximal: FedProx's pull that the run counts on; a node that has another one stays away.
    precondition: what the run counts on that a step makes of B's gradient; likewise.
    side: which factors are trained; a node whose model has A frozen stays away from all but "b".
    """

    steps: int
    learning_rate: float
    proximal: float = 0.0
    precondition: str = "none"
    side: Side = "b"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Whose requests these are: the run's name, and the digests that `TrainRequest` carries."""

    run: str
    base_model: str
    code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """One client's work in one round. Idempotent: asked twice, it is released once.

    base_model: SHA-256 of the frozen weights that the adapters belong to. code: of the server's fedlora.
    """

    run: str
    base_model: str
    code: str
    round: int
    adapters: Adapters
    work: LocalWork


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the records of one DP-SGD step are drawn. All three are constants of the configuration.

    rate: probability with which each record enters a draw, independently of all others (Poisson).
    expected_batch: divisor of every step; no less than rate * records.
    max_draw: records of one draw that are processed at most; the rest of an over-full one is dropped.
    """

    rate: float
    expected_batch: float
    max_draw: int

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate {self.rate} must lie in (0, 1]")
        if not (self.expected_batch > 0 and math.isfinite(self.expected_batch)):
            raise ValueError(f"expected_batch {self.expected_batch} must be positive and finite")
        if self.max_draw < self.expected_batch:
            raise ValueError(f"max_draw {self.max_draw} is below expected_batch {self.expected_batch}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """The clip and the Gaussian noise of one DP-SGD step, for one example added or removed.

    max_grad_norm: L2 bound C on one example's gradient, jointly over everything trained.
    noise_multiplier: std of the noise on the clipped sum, in units of what one example can move it by.
    """

    max_grad_norm: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        if not (self.max_grad_norm > 0 and math.isfinite(self.max_grad_norm)):
            raise ValueError(f"max_grad_norm {self.max_grad_norm} must be positive and finite")
        if not (self.noise_multiplier > 0 and math.isfinite(self.noise_multiplier)):
            raise ValueError(f"noise_multiplier {self.noise_multiplier} must be positive and finite")


@dataclass(frozen=True, slots=True, kw_only=True)
class DpEvent:
    """`steps` releases of a Poisson-subsampled Gaussian. No epsilon: it is computed, always anew.

    sample_rate: 1.0 where every record takes part.
    expected_batch, max_draw: as in `Sampling`; both None where no draw is ever cut.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    expected_batch: float | None = None
    max_draw: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Witness:
    """How far a client's ledger had come: its line `seq` has the digest `head`. Who saw it refuses less."""

    seq: int
    head: str


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
    accuracy: the mean over the client's own records of the model it was sent, with noise that `spent` pays for;
        None where the client gives none.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One data owner on the server's roster. `examples` is the declared, public number of records."""

    client: str
    examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrence:
    """How much of what was remembered came back in fresh updates, over the rounds so far, older ones counting less.

    product: sum of <fresh, remembered>. energy: sum of |remembered|^2. Both 0 before a client was heard again.
    """

    product: float = 0.0
    energy: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """The same of one client's updates alone, and the beta that its remembered one has until it is heard again."""

    recurrence: Recurrence = Recurrence()
    beta: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """All that a resume needs, beside the remembered updates that the store keeps by client.

    round: rounds completed.
    frame: orthonormal rows (r, d_in) a site; spans the row space of A. When A leaves it a new one begins, and all that
        was kept in the old one is forgotten: gauges, memory, moments, what adaptive betas know.
    gauges: from each basis that a late update may still carry into the frame, newest last.
    memory: sum over clients of weight * remembered update, in the frame (FedStale); times its own beta, if it has one.
    remembered: the round of each client's last update that counted.
    recurrence: what an adaptive beta is worked out of; never touched where beta is a number.
    own: of each client that has a beta of its own.
    moments: what the server's optimiser remembers, in the frame: sums of steps, then of their squares, if it has them.
    """

    round: int
    adapters: Adapters
    frame: Mapping[Site, Tensor]
    gauges: tuple[Gauges, ...]
    memory: Delta
    remembered: Mapping[str, int] = field(default_factory=dict)
    recurrence: Recurrence = Recurrence()
    own: Mapping[str, Own] = field(default_factory=dict)
    moments: tuple[Delta, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """Who is asked in a round, decided before anything is sent.

    probability: of being asked, for each member. weight: its share alpha of the whole, summing to 1 over all members.
    """

    run: str
    round: int
    cohort: tuple[str, ...]
    probability: Mapping[str, float]
    weight: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """What is kept of an update that counted, once its numbers are in the sum.

    round: of the request that it answers. length: Euclidean, of all its numbers together, float64. numbers: how many
        were trained.
    spent: the event of its training; None only where privacy is off.
    """

    round: int
    length: float
    numbers: int
    spent: DpEvent | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """What became of a plan: who answered, who refused and why, whose reply was rejected and why; all sorted.

    accuracy: by client, what those who tell it told. released: by client, of each update that counted.
    """

    round: int
    asked: tuple[str, ...]
    answered: tuple[str, ...]
    refused: Mapping[str, str]
    rejected: Mapping[str, str]
    accuracy: Mapping[str, float]
    released: Mapping[str, Released] = field(default_factory=dict)
