"""Which clients go together, and who goes first."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.data.holdings import Holdings
from fedlora.data.records import Examples
from fedlora.runtime.cells import next_of
from fedlora.runtime.jobs import MOST_CLIENTS, SHARE, Job, Queue, cut, expected_tokens, singles

costs = st.lists(st.integers(1, 1000).map(float), min_size=1, max_size=300)


@given(costs, st.integers(1, 16), st.integers(1, MOST_CLIENTS))
def test_jobs_are_runs_of_neighbours_that_cover_everybody_once(costs, workers, most):
    jobs = cut(costs, workers=workers, most=most)
    assert [place for job in jobs for place in range(job.start, job.stop)] == list(range(len(costs)))
    assert sum(job.cost for job in jobs) == sum(costs)
    assert max(job.stop - job.start for job in jobs) <= most


@given(costs, st.integers(1, 16))
def test_no_job_of_several_clients_exceeds_a_workers_share_of_what_is_left(costs, workers):
    for job in cut(costs, workers=workers, most=len(costs)):
        assert job.stop - job.start == 1 or job.cost <= sum(costs[job.start :]) / (SHARE * workers)


@given(costs, st.integers(2, 9), st.integers(1, 16), st.integers(1, 16))
def test_groups_of_a_given_size_depend_on_nothing_but_the_cohort(costs, exactly, few, many):
    jobs = cut(costs, workers=few, most=1, exactly=exactly)
    assert jobs == cut(costs, workers=many, most=MOST_CLIENTS, exactly=exactly)
    assert {job.stop - job.start for job in jobs[:-1]} <= {exactly}
    assert [job.start for job in jobs] == list(range(0, len(costs), exactly))


def test_a_thousand_equal_clients_are_few_jobs_and_end_one_by_one():
    jobs = cut([1.0] * 1000, workers=2, most=MOST_CLIENTS)
    assert len(jobs) < 60
    assert jobs[0].stop - jobs[0].start == MOST_CLIENTS
    assert [job.stop - job.start for job in jobs[-8:]] == [1] * 8


def test_the_longest_job_of_the_window_comes_first_and_a_lost_one_before_it():
    first, long, short, far = (
        Job(start=place, stop=place + 1, cost=cost) for place, cost in enumerate((2.0, 9.0, 1.0, 99.0))
    )
    queue = Queue([first, long, short, far])
    assert queue.take(before=0) is None
    assert queue.take(before=3) == long
    queue.put_back(short)
    assert queue.take(before=3) == short
    assert queue.take(before=3) == first
    assert len(queue) == 2  # the other copy of the short one, and the far one
    assert (queue.take(before=3), queue.take(before=3), queue.take(before=4)) == (short, None, far)


def test_a_lost_job_is_asked_client_by_client_and_each_remembers_the_death():
    assert singles(Job(start=3, stop=5, cost=4.0, deaths=1)) == [
        Job(start=3, stop=4, cost=2.0, deaths=1),
        Job(start=4, stop=5, cost=2.0, deaths=1),
    ]


def test_expected_tokens_are_the_mean_length_times_the_batch_that_can_be_drawn():
    examples = Examples(
        input_ids=np.zeros(12, dtype=np.int32), offsets=np.array([0, 2, 6, 12]), labels=np.zeros(3, np.int64)
    )
    holdings = Holdings(clients=("a", "b", "c"), examples=examples, bounds=np.array([0, 2, 3, 3]))
    assert expected_tokens(holdings, ["b", "a", "c"], 8).tolist() == [6.0, 6.0, 0.0]
    assert expected_tokens(holdings, ["a"], 1).tolist() == [3.0]


def test_a_client_without_holdings_is_no_neighbours_cost():
    examples = Examples(input_ids=np.zeros(1, dtype=np.int32), offsets=np.array([0, 1]))
    holdings = Holdings(clients=("b",), examples=examples, bounds=np.array([0, 1]))
    for stranger in ("a", "c"):
        with pytest.raises(KeyError, match=stranger):
            expected_tokens(holdings, [stranger], 8)


def test_a_process_goes_on_with_what_it_knows_then_with_what_nobody_beside_is_at():
    assert next_of(["a", "b", "a"], None, []) == 0
    assert next_of(["a", "b", "a"], "b", ["a"]) == 1
    assert next_of(["a", "b", "a"], "c", ["a"]) == 1
    assert next_of(["a", "a"], "c", ["a"]) == 0


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 3))
def test_every_run_begins_once_and_no_process_changes_kind_while_its_own_waits(kinds, slots):
    waiting, running, begun = list(enumerate(kinds)), [], []
    freed = None
    while waiting or running:
        while waiting and len(running) < slots:
            place = next_of([kind for _, kind in waiting], freed, [kind for _, kind in running])
            assert waiting[place][1] == freed or freed not in [kind for _, kind in waiting]
            running.append(waiting.pop(place))
            begun.append(running[-1][0])
        freed = running.pop(0)[1]
    assert sorted(begun) == list(range(len(kinds)))
