"""What a world does to a run, told without training: who would be heard, and how long that would take."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from fedlora.errors import IncompleteError
from fedlora.federation.plan import plan
from fedlora.runtime.prepare import Prepared
from fedlora.runtime.world.window import Moment, Window, window
from fedlora.runtime.world.world import World, build

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


def world_of(prepared: Prepared) -> World | None:
    """The world that the run's config describes for its clients; raises ConfigError as `build` does."""
    config = prepared.config
    if config.world is None:
        return None
    return build(config.world, [member.client for member in prepared.clients.members], config.seed)


def forecast(prepared: Prepared, world: World) -> Forecast:
    """What the cohorts that the run will draw meet in its world: exact, but for refusals and rounds not played."""
    federation = prepared.config.federation
    state, moment, over = prepared.first_state(), Moment(), []
    asked, stuck, every = 0, None, prepared.method.subspace.refactor_every
    for number in range(min(federation.rounds, MOST_ROUNDS)):
        planned = plan(
            replace(state, round=number),
            prepared.clients.members,
            run=prepared.origin.run,
            federation=federation,
            seed=prepared.config.seed,
        )
        try:
            over.append(
                window(
                    moment,
                    planned.cohort,
                    number + 1,
                    basis=number // every if every else 0,
                    world=world,
                    federation=federation,
                    ask=_nobody_refuses,
                )
            )
        except IncompleteError:
            stuck = number + 1
            break
        asked += len(planned.cohort)
        moment = over[-1].after
    return _scaled(over, asked, federation.rounds / max(1, len(over)), stuck)


def note(found: Forecast) -> str:
    """One sentence of the forecast, as `fedlora check` prints it."""
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
    late = sum(len(window.late) for window in over)
    return Forecast(
        asked=times * asked,
        answered=times * (late + sum(len(window.fresh) for window in over)),
        late=times * late,
        lost=times * sum(len(window.lost) + len(window.dropped) for window in over),
        virtual_s=times * (over[-1].after.began_s if over else 0.0),
        stuck=stuck,
    )


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "none"
