"""What one private step is, and what is kept of many."""

import math
from dataclasses import dataclass


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
