"""What becomes of a round in virtual time: whom it reaches, when it ends, and whose reply it hears. Pure.

A round asks those of its cohort who are there and free, and lasts

- until all of them have answered, or one deadline after it began;
- with `federation.enough`, only until the reply that makes enough: of replies at one moment the first by name count;
- where fewer than `federation.min_clients` updates came, one deadline more, and again: each time those of the cohort
  who have come back are asked, too. A clock that stood still would find the same clients away for ever.

A refusal takes no time. Who goes away at work is never heard of this round, and free again from then on; so is a
client whose reply would come too late for the gauges to carry it, which no round may wait for or count.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from fedlora.config.schema import Federation
from fedlora.errors import IncompleteError
from fedlora.runtime.world.world import World

MOST_DEADLINES = 10_000
"""After so many deadlines without enough answers nothing will change any more: 69 days at the default."""

Asked = Callable[[Sequence[str]], Collection[str]]
"""Asks these clients; returns who of them refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """A client's work of a round. number: its place in the cohort. basis: what the work is done in.

    One client has one errand at a time.

    arrives: False if nothing comes of it, and at `until_s` the client goes away or is done.

    refused: nothing was worked, and the answer came at once.
    """

    client: str
    round: int
    number: int
    basis: int
    asked_s: float
    until_s: float
    arrives: bool
    refused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """When a round begins, and who is still busy with earlier ones."""

    began_s: float = 0.0
    pending: tuple[Errand, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A round that is over.

    fresh: replies of this round to it, in the order of the cohort. late: replies to earlier rounds that arrived in
    it, as they came. away, busy: of its cohort, who was never there, who was at work still. lost: those of its errands
    that nothing comes of. dropped: errands of earlier rounds whose replies came to be too old to count in this one.
    after: where the next round begins.
    """

    fresh: tuple[Errand, ...]
    late: tuple[Errand, ...]
    away: tuple[str, ...]
    busy: tuple[str, ...]
    lost: tuple[Errand, ...]
    dropped: tuple[Errand, ...]
    after: Moment


def window(
    moment: Moment,
    clients: Sequence[str],
    round_: int,
    *,
    basis: int,
    world: World,
    federation: Federation,
    ask: Asked,
) -> Window:
    """The round that began at `moment`.

    Args:
        moment: where it begins.
        clients: its cohort, nobody twice.
        round_: its number.
        basis: what its requests are sent in.
        world: who is there, and how long whom a round takes.
        federation: `deadline_s`, `enough`, `min_clients` and `keep_gauges` are read.
        ask: called any number of times, never twice for a client.

    Raises:
        IncompleteError: nobody came back for MOST_DEADLINES deadlines.
    """
    moment, dropped = _within_reach(moment, basis - federation.keep_gauges)
    numbers = {client: number for number, client in enumerate(clients)}
    least = min(federation.min_clients, len(clients))
    errands: dict[str, Errand] = {}
    start_s = moment.began_s
    for _ in range(MOST_DEADLINES):
        busy = {errand.client for errand in moment.pending if not _is_lost(errand, start_s)}
        idle = [c for c in clients if c not in busy and (c not in errands or _is_lost(errands[c], start_s))]
        there = [client for client in idle if world.availability.is_there(client, start_s)]
        unasked = [client for client in there if client not in errands]
        refused = ask(unasked) if unasked else ()
        for client in there:
            asked = Errand(
                client=client, round=round_, number=numbers[client], basis=basis,
                asked_s=start_s, until_s=start_s, arrives=True, refused=client in refused,
            )  # fmt: skip
            errands[client] = _sent(asked, world)
        taken, ends_s = _end(start_s, [*moment.pending, *errands.values()], round_, federation)
        answers = [errand for errand in taken if not errand.refused]
        heard = {errand.client for errand in taken}
        at_work = [e for e in (*moment.pending, *errands.values()) if not _is_lost(e, start_s)]
        waits = {errand.client for errand in at_work} - heard
        hopeless = len(idle) == len(there) and not waits  # nobody is away or at work
        if len(answers) >= least or hopeless:
            ours = tuple(errands.values())
            return _window(moment, clients, ours, taken, ends_s, round_, dropped=dropped)
        start_s += federation.deadline_s
    raise IncompleteError(
        f"round {round_}: fewer than {least} of {len(clients)} clients answered in {MOST_DEADLINES} deadlines of "
        f"{federation.deadline_s:g} virtual seconds; they will not come back: in another output, change "
        f"world.availability, or lower federation.min_clients"
    )


def _is_lost(errand: Errand, at_s: float) -> bool:
    return not errand.arrives and errand.until_s <= at_s


def _within_reach(moment: Moment, oldest: int) -> tuple[Moment, tuple[Errand, ...]]:
    """The moment with nothing to come of errands in a basis before the oldest that gauges reach; and those errands.

    Bases only grow, so what is out of reach once will not count in any later round either.
    """
    dropped = tuple(errand for errand in moment.pending if errand.arrives and errand.basis < oldest)
    pending = tuple(
        replace(errand, arrives=False) if errand in dropped else errand for errand in moment.pending
    )
    return replace(moment, pending=pending), dropped


def _sent(errand: Errand, world: World) -> Errand:
    """The errand with what becomes of it, unless it was refused."""
    if errand.refused:
        return errand
    done_s = errand.asked_s + world.seconds(errand.client, errand.round)
    gone_s = world.availability.leaves(errand.client, errand.asked_s, done_s)
    return replace(errand, until_s=done_s if gone_s is None else gone_s, arrives=gone_s is None)


def _end(
    start_s: float, errands: Sequence[Errand], round_: int, federation: Federation
) -> tuple[list[Errand], float]:
    """The replies that a round which is at `start_s` hears till it ends or is prolonged, as they come; and when."""
    limit_s = start_s + federation.deadline_s
    order = sorted(errands, key=lambda errand: (errand.until_s, errand.client))
    in_time = [errand for errand in order if errand.arrives and errand.until_s <= limit_s]
    updates = [errand for errand in in_time if not errand.refused]
    if federation.enough is not None and len(updates) >= federation.enough:
        last = updates[federation.enough - 1]
        taken = updates[: federation.enough] + [errand for errand in in_time if errand.refused]
        return taken, max(start_s, last.until_s)
    ours = [errand for errand in errands if errand.round == round_]
    if all(errand.arrives and errand.until_s <= limit_s for errand in ours):
        limit_s = max([start_s, *(errand.until_s for errand in ours)])
    return [errand for errand in in_time if errand.until_s <= limit_s], limit_s


def _window(
    moment: Moment,
    clients: Sequence[str],
    errands: Sequence[Errand],
    taken: Sequence[Errand],
    ends_s: float,
    round_: int,
    *,
    dropped: tuple[Errand, ...],
) -> Window:
    heard = {errand.client for errand in taken}
    asked = {errand.client for errand in errands}
    busy = {errand.client for errand in moment.pending}
    return Window(
        fresh=tuple(sorted((e for e in taken if e.round == round_), key=lambda errand: errand.number)),
        late=tuple(errand for errand in taken if errand.round < round_),
        away=tuple(client for client in clients if client not in asked | busy),
        busy=tuple(client for client in clients if client in busy - asked),
        lost=tuple(errand for errand in errands if not errand.arrives),
        dropped=dropped,
        after=Moment(
            began_s=ends_s,
            pending=tuple(
                errand
                for errand in (*moment.pending, *errands)
                if errand.client not in heard and (errand.arrives or errand.until_s > ends_s)
            ),
        ),
    )
