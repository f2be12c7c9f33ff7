"""What a world does to a run, told without training: who would be heard, and how long that would take."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fedlora.errors import IncompleteError
from fedlora.federation.plan import Roll
from fedlora.runtime.prepare import Prepared
from fedlora.runtime.world.window import Moment, Window, window
from fedlora.runtime.world.world import World

MOST_ROUNDS = 200
"""A forecast plays so many; the rest of a longer run is taken to be like them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Of a whole run, as if nobody refused.

    asked: replies that a world without absence would bring. answered, late, lost: replies that come, those of them
    that come in a later round, and work that is paid for and never counts. virtual_s: seconds on the clock.
    stuck: the round that would never end, if there is one.
    """

    asked: float
    answered: float
    late: float
    lost: float
    virtual_s: float
    stuck: int | None = None


def forecast(prepared: Prepared, world: World) -> Forecast:
    """What the cohorts that the run will draw meet in its world: exact, but for refusals and rounds not played."""
    run, seed, federation = prepared.origin.run, prepared.config.seed, prepared.config.federation
    roll, every = Roll.of(prepared.clients.members, federation), prepared.method.subspace.refactor_every
    moment, over = Moment(), []
    asked, stuck = 0, None
    for number in range(1, min(federation.rounds, MOST_ROUNDS) + 1):
        cohort = roll.plan(number, run=run, seed=seed).cohort
        basis = (number - 1) // every if every else 0
        try:
            over.append(
                window(
                    moment,
                    cohort,
                    number,
                    basis=basis,
                    world=world,
                    federation=federation,
                    ask=_nobody_refuses,
                )
            )
        except IncompleteError:
            stuck = number
            break
        asked += len(cohort)
        moment = over[-1].after
    return _scaled(over, asked, federation.rounds / max(1, len(over)), stuck)


def note(found: Forecast) -> str:
    """One sentence of the forecast, as `fedlora check --measure` prints it."""
    if found.stuck is not None:
        return (
            f"the world never lets round {found.stuck} end: too few of its cohort are there for thousands of "
            f"deadlines; change world.availability, or lower federation.min_clients"
        )
    return (
        f"in this world {_share(found.answered, found.asked)} of those asked answer, {_share(found.late, found.asked)} "
        f"in a later round, {_share(found.lost, found.asked)} go away at work or answer too late to count, "
        f"which they pay for; "
        f"the run takes {found.virtual_s / 3600:.1f} virtual hours"
    )


def _nobody_refuses(clients: Sequence[str]) -> Collection[str]:
    return ()


def _scaled(over: Sequence[Window], asked: int, times: float, stuck: int | None) -> Forecast:
    late = sum(len(played.late) for played in over)
    return Forecast(
        asked=times * asked,
        answered=times * (late + sum(len(played.fresh) for played in over)),
        late=times * late,
        lost=times * sum(len(played.lost) + len(played.dropped) for played in over),
        virtual_s=times * (over[-1].after.began_s if over else 0.0),
        stuck=stuck,
    )


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "none"
