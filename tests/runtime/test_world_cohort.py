"""A cohort in a world is the cohort inside it, less who is away, later who is slow."""

import pytest

from fedlora.federation.cohort import Cohort
from fedlora.federation.work import work
from fedlora.runtime.local import LocalCohort
from fedlora.runtime.prepare import prepare
from fedlora.runtime.world.availability import Always
from fedlora.runtime.world.cohort import VirtualCohort
from fedlora.runtime.world.world import World
from fedlora.transport.wire import encode_reply
from fedlora.values import TrainRequest


class Backwards:
    """The same clients, the last to be asked the first to answer, as on a pool of workers."""

    def __init__(self, inner: Cohort) -> None:
        self.inner = inner

    def ask(self, clients, request):
        return reversed(list(self.inner.ask(clients, request)))

    def close(self) -> None:
        self.inner.close()


@pytest.fixture
def prepared(tiny_config):
    return prepare(tiny_config(federation__local_steps=1, privacy__accountant="rdp"), lambda event: None)


def local(prepared, run_dir) -> LocalCohort:
    (run_dir / "ledgers").mkdir(parents=True, exist_ok=True)
    return LocalCohort(prepared.save_for_hosts(run_dir), lambda event: None)


def virtual(prepared, inner: Cohort, run_dir, seconds=None, **terms) -> VirtualCohort:
    taken = seconds or {}
    place = World(availability=Always(), seconds=lambda client, round_: taken.get(client, 0.0), digest="")
    federation = prepared.config.federation.model_copy(update=terms)
    return VirtualCohort(inner, world=place, federation=federation, run_dir=run_dir, completed=0)


def request(prepared, round_: int) -> TrainRequest:
    origin = prepared.origin
    return TrainRequest(
        run=origin.run,
        base_model=origin.base_model,
        code=origin.code,
        round=round_,
        adapters=prepared.first_state().adapters,
        work=work(round_, prepared.config.federation),
    )


CLIENTS = ["client-0", "client-1", "client-2"]


def test_where_everybody_is_there_and_quick_the_world_changes_no_byte(prepared, tmp_path):
    alone = local(prepared, tmp_path / "alone").ask(CLIENTS, request(prepared, 1))
    expected = [encode_reply(reply) for reply in alone]
    inner = local(prepared, tmp_path / "world")
    heard = virtual(prepared, inner, tmp_path / "world").ask(CLIENTS, request(prepared, 1))
    assert [encode_reply(reply) for reply in heard] == expected


def test_replies_come_in_the_order_of_the_cohort_however_its_workers_answer(prepared, tmp_path):
    slow = {"client-0": 50.0, "client-1": 5.0, "client-2": 20.0}
    for number, turned in enumerate((lambda cohort: cohort, Backwards)):
        inner = turned(local(prepared, tmp_path / str(number)))
        cohort = virtual(prepared, inner, tmp_path / str(number), slow, deadline_s=30.0)
        rounds = [[(r.client, r.round) for r in cohort.ask(CLIENTS, request(prepared, n))] for n in (1, 2)]
        assert rounds == [
            [("client-1", 1), ("client-2", 1)],
            [("client-1", 2), ("client-2", 2), ("client-0", 1)],
        ]


def test_who_stops_listening_early_loses_no_late_reply(prepared, tmp_path):
    """A round with `enough` leaves after the reply that makes it so."""
    inner = local(prepared, tmp_path / "run")
    cohort = virtual(prepared, inner, tmp_path / "run", {"client-0": 50.0, "client-1": 5.0}, enough=1)
    for round_, expected in ((1, ("client-2", 1)), (2, ("client-2", 2)), (3, ("client-2", 3))):
        reply = next(iter(cohort.ask(CLIENTS, request(prepared, round_))))
        assert (reply.client, reply.round) == expected
    heard = [cohort.ask(["client-1"], request(prepared, n)) for n in (4, 5)]
    assert [(r.client, r.round) for replies in heard for r in replies] == [("client-1", 1), ("client-1", 5)]


def test_a_round_asked_again_hears_the_same_to_the_byte(prepared, tmp_path):
    inner = local(prepared, tmp_path / "run")
    seconds = {"client-0": 50.0, "client-1": 5.0, "client-2": 20.0}
    first = virtual(prepared, inner, tmp_path / "run", seconds, deadline_s=30.0)
    list(first.ask(CLIENTS, request(prepared, 1)))
    second = [encode_reply(reply) for reply in first.ask(CLIENTS, request(prepared, 2))]
    third = [encode_reply(reply) for reply in first.ask(CLIENTS, request(prepared, 3))]
    again = virtual(prepared, inner, tmp_path / "run", seconds, deadline_s=30.0)
    assert [encode_reply(reply) for reply in again.ask(CLIENTS, request(prepared, 2))] == second
    assert [encode_reply(reply) for reply in again.ask(CLIENTS, request(prepared, 3))] == third
