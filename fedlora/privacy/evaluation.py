"""What a client may tell of its own records: a noised mean of values in [0, 1], paid for like everything else."""

from torch import Tensor

from fedlora.privacy.gaussian import released
from fedlora.privacy.noise import NoiseSource
from fedlora.values import DpEvent


def private_mean(
    values: Tensor,
    records: int,
    noise_multiplier: float,
    *,
    noise: NoiseSource,
    purpose: tuple[str | int, ...],
) -> float:
    """The sum of `values` and its noise, divided by the declared number of records. May lie outside [0, 1].

    Args:
        values: (n,), one a record, brought into [0, 1]; what is not a number counts as 0.
        records: a declared constant, not n.
        noise_multiplier: std of the noise on the sum, in records.
        noise: its stream is (purpose, "sum").
        purpose: no two releases may share it.
    """
    total = values.double().nan_to_num(nan=0.0).clamp(0.0, 1.0).sum().reshape(1)
    told = released(
        {"sum": total}, bound=1.0, noise_multiplier=noise_multiplier, noise=noise, purpose=purpose
    )
    return float(told["sum"]) / records


def spent_on_mean(noise_multiplier: float) -> DpEvent:
    """What one `private_mean` costs: a Gaussian over all records, without sampling."""
    return DpEvent(noise_multiplier=noise_multiplier, sample_rate=1.0, steps=1)
