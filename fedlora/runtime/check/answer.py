"""What `fedlora check` answers, measured or not."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientPreview:
    """One client's terms. epsilon: after max_participations, the most it can ever be."""

    client: str
    records: int
    sample_rate: float
    noise_multiplier: float | None
    epsilon: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """The answer of `fedlora check`. Bytes are per client and round; memory and time are estimates.

    classes: of a classifier, in the order of its outputs.
    measured: the model was loaded and run, and noise calibrated for each client; else all is from sizes and shapes.
    """

    clients: tuple[ClientPreview, ...]
    classes: tuple[str, ...]
    trained_parameters: int
    steps_per_participation: int
    bytes_up: int
    bytes_down: int
    memory_bytes: int
    training_seconds: float
    notes: tuple[str, ...]
    measured: bool = True
