"""The nouns of fedlora: frozen values, no behaviour beyond validation.

Shapes are (rows, columns). An adapted layer computes W x + scale * B (A x) with A (r, d_in) and B (d_out, r).
B means nothing without its A, so everything shaped like B carries the number of its basis.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from torch import Tensor

from fedlora.errors import BasisError, ShapeError

Site: TypeAlias = str
"""Dotted path of an adapted module, as in the base model. Always visited in sorted order."""

FRAME = -1
"""The basis number of the canonical frame: coordinates in the orthonormal rows `ServerState.frame`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """One adapted site."""

    a: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ShapeError(
                f"a {tuple(self.a.shape)} and b {tuple(self.b.shape)} share no rank; need (r, n) and (m, r)"
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
    """A change of B, (d_out, r) a site, in one basis; and of the head, which has none."""

    basis: int
    sites: Mapping[Site, Tensor]
    head: Mapping[str, Tensor] = field(default_factory=dict)

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
    """What a server may ask of a client. Never a privacy parameter."""

    steps: int
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """One client's work in one round. Idempotent: asked twice, it is released once."""

    run: str
    round: int
    adapters: Adapters
    work: LocalWork


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """The Poisson-subsampled Gaussian mechanism of one DP-SGD step, for one example added or removed.

    max_grad_norm: L2 bound C on one example's gradient, jointly over everything trained.
    noise_multiplier: std of the noise on the clipped sum, in units of max_grad_norm.
    sample_rate: probability with which each record enters a step's draw.
    """

    max_grad_norm: float
    noise_multiplier: float
    sample_rate: float

    def __post_init__(self) -> None:
        if not (self.max_grad_norm > 0 and math.isfinite(self.max_grad_norm)):
            raise ValueError(f"max_grad_norm {self.max_grad_norm} must be positive and finite")
        if not (self.noise_multiplier > 0 and math.isfinite(self.noise_multiplier)):
            raise ValueError(f"noise_multiplier {self.noise_multiplier} must be positive and finite")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate {self.sample_rate} must lie in (0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class DpEvent:
    """What one participation spent: `steps` releases of a Poisson-subsampled Gaussian. No epsilon: it is computed."""

    noise_multiplier: float
    sample_rate: float
    steps: int


class RefusalReason(StrEnum):
    """Why a client stayed away; a code, since free text could carry a record."""

    BUDGET = "budget"
    NO_DATA = "no_data"
    BAD_REQUEST = "bad_request"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientUpdate:
    """All that leaves a client: no loss, no count. `spent` is None only where privacy is off."""

    client: str
    run: str
    round: int
    delta: Delta
    spent: DpEvent | None


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
class ServerState:
    """All that a resume needs, beside the remembered updates that the store keeps by client.

    round: rounds completed.
    frame: orthonormal rows (r, d_in) a site; spans the row space that A never leaves.
    gauges: from each basis that a late update may still carry into the frame, newest last.
    memory: sum over clients of weight * remembered update, in the frame (FedStale).
    remembered: the round of each client's last update that counted.
    """

    round: int
    adapters: Adapters
    frame: Mapping[Site, Tensor]
    gauges: tuple[Gauges, ...]
    memory: Delta
    remembered: Mapping[str, int] = field(default_factory=dict)


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
class RoundReport:
    """What became of a plan: who answered, who refused and why, whose reply was rejected and why; all sorted."""

    round: int
    asked: tuple[str, ...]
    answered: tuple[str, ...]
    refused: Mapping[str, str]
    rejected: Mapping[str, str]
    spent: Mapping[str, DpEvent]
