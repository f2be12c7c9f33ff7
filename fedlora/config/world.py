"""The section `world`: when simulated clients are there and how long they take, by a virtual clock."""

from typing import Annotated, Literal

from pydantic import Field

from fedlora.config.section import Section

Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Spread = Annotated[float, Field(ge=0)]


class Always(Section):
    """Every client, at any time."""

    kind: Literal["always"]


class DayNight(Section):
    """Once in a period each client is there for a share of it."""

    kind: Literal["day-night"]
    share: Share
    """Of the period, in one piece. 1 is `always`."""
    period_s: Seconds = 86400.0
    """Of one day and night."""
    groups: Annotated[int, Field(ge=1)] | None = None
    """Time zones, evenly apart, each client in one by the seed; null: each client has a phase of its own."""


class Uneven(Section):
    """Each client is there with a probability of its own, drawn anew in each slot of time."""

    kind: Literal["uneven"]
    probability: (
        dict[str, Annotated[float, Field(ge=0, le=1)]]
        | Annotated[list[Seconds], Field(min_length=2, max_length=2)]
    )
    """One for each client by name; or [a, b]: drawn from Beta(a, b), whose mean is a / (a + b)."""
    slot_s: Seconds = 3600.0
    """How long one draw holds."""


class DropOuts(Section):
    """Groups of clients go away and come back together, each by a two-state Markov chain in continuous time."""

    kind: Literal["drop-outs"]
    groups: Annotated[int, Field(ge=1)]
    """Each client is in one of so many, by the seed."""
    mean_up_s: Seconds
    """How long a client stays, on average."""
    mean_down_s: Seconds
    """Long-run share of the time there: mean_up_s / (mean_up_s + mean_down_s)."""


class Trace(Section):
    """A file of when each client was there."""

    kind: Literal["trace"]
    path: str
    """csv with the columns, or jsonl with the keys, client, from_s, until_s; relative to the working directory."""
    repeat_s: Seconds | None = None
    """The trace begins anew after so many seconds; null: after its end nobody is there."""


Availability = Annotated[Always | DayNight | Uneven | DropOuts | Trace, Field(discriminator="kind")]


class Instant(Section):
    """A round of work takes no time."""

    kind: Literal["instant"]


class Lognormal(Section):
    """Seconds of work: median_s, times a lognormal factor a client, times one a client and round."""

    kind: Literal["lognormal"]
    median_s: Seconds
    """Of a client's work in a round."""
    sigma: Spread = 0.0
    """Of the logarithm, between clients."""
    round_sigma: Spread = 0.0
    """Of the logarithm, between the rounds of one client."""


class SpeedFile(Section):
    """Seconds of each client's work from a file, times a lognormal factor a round."""

    kind: Literal["file"]
    path: str
    """csv or jsonl with `client` and the column; relative to the working directory."""
    column: str = "seconds"
    """Of a client's work in a round."""
    round_sigma: Spread = 0.0
    """Of the logarithm, between the rounds of one client."""


Speed = Annotated[Instant | Lognormal | SpeedFile, Field(discriminator="kind")]


class Stragglers(Section):
    """Some rounds of some clients take much longer."""

    share: Share
    """Of all rounds of all clients, drawn independently."""
    factor: Annotated[float, Field(gt=1)]
    """How many times as long."""


class World(Section):
    """Participation under a virtual clock. Who is away is not reached and spends nothing; who goes away at work has
    paid and is not heard; a reply after the round's end counts in a later round. Nothing waits for real."""

    availability: Availability = Always(kind="always")
    speed: Speed = Instant(kind="instant")
    stragglers: Stragglers | None = None
