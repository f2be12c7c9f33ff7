"""Whom a round reaches, when it ends and whose reply it hears; with times written out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config.schema import Federation, Sgd
from fedlora.errors import IncompleteError
from fedlora.runtime.world import window as window_module
from fedlora.runtime.world.availability import Always, Trace
from fedlora.runtime.world.window import Errand, Moment, window
from fedlora.runtime.world.world import World

LONG = 1e9


def federation(**changes) -> Federation:
    work = {"rounds": 9, "cohort": 3, "local_steps": 1, "batch_size": 1, "optimizer": Sgd(name="sgd", lr=1.0)}
    return Federation(**{**work, "deadline_s": 100.0, **changes})


def world(seconds: dict[str, float], there: dict[str, list[tuple[float, float]]] | None = None) -> World:
    here = Always() if there is None else Trace({c: there.get(c, [(0.0, LONG)]) for c in seconds}, None)
    return World(availability=here, seconds=lambda client, round_: seconds[client], digest="")


class Play:
    """Rounds one after the other, and who was asked in each."""

    def __init__(self, place: World, refuse: tuple[str, ...] = (), **terms) -> None:
        self.place, self.refuse, self.terms = place, refuse, federation(**terms)
        self.moment, self.number, self.asked = Moment(), 0, []

    def round(self, clients: str):
        self.number += 1
        self.asked.append("")
        over = window(
            self.moment,
            [*clients],
            self.number,
            basis=self.number - 1,  # A moves after every round
            world=self.place,
            federation=self.terms,
            ask=self._ask,
        )
        self.moment = over.after
        return over

    def _ask(self, there):
        self.asked[-1] += "".join(there)
        return [client for client in there if client in self.refuse]


def names(errands) -> str:
    return "".join(errand.client for errand in errands)


def test_a_round_ends_with_its_last_answer():
    play = Play(world({"a": 30.0, "b": 10.0, "c": 20.0}))
    assert names(play.round("abc").fresh) == "abc" and play.moment.began_s == 30.0
    assert names(play.round("cb").fresh) == "cb" and play.moment.began_s == 50.0


def test_who_misses_the_deadline_is_heard_in_the_round_its_reply_arrives_in_and_is_busy_till_then():
    play = Play(world({"a": 30.0, "b": 250.0, "c": 80.0}))
    first = play.round("abc")
    assert (names(first.fresh), names(first.late), play.moment.began_s) == ("ac", "", 100.0)
    second = play.round("abc")
    assert (names(second.fresh), second.busy, play.moment.began_s) == ("ac", ("b",), 180.0)
    assert play.asked == ["abc", "ac"]
    third = play.round("abc")  # 180 to 260: b's reply of round 1 comes at 250
    assert (names(third.fresh), names(third.late), third.late[0].round) == ("ac", "b", 1)
    play.round("b")
    assert play.asked[-1] == "b"  # free again


def test_a_reply_at_the_deadline_is_in_time():
    play = Play(world({"a": 100.0, "b": 100.5}))
    over = play.round("ab")
    assert names(over.fresh) == "a" and play.moment.began_s == 100.0


def test_with_enough_the_round_ends_with_the_reply_that_makes_it_so():
    play = Play(world({"a": 30.0, "b": 10.0, "c": 20.0, "d": 90.0}), enough=2)
    assert names(play.round("abcd").fresh) == "bc" and play.moment.began_s == 20.0
    second = play.round("abcd")  # a's comes at 30 and counts; of b at 30 and c at 40 b is the first
    assert (names(second.fresh), names(second.late), second.busy) == ("b", "a", ("a", "d"))
    assert play.moment.began_s == 30.0


def test_of_replies_at_one_moment_the_first_by_name_make_enough_and_the_others_are_not_lost():
    play = Play(world(dict.fromkeys("abcd", 5.0)), enough=2)
    assert names(play.round("dcba").fresh) == "ba"
    second = play.round("abcd")
    assert (names(second.fresh), names(second.late)) == ("", "cd")
    assert play.moment.began_s == 5.0


def test_who_is_away_is_not_asked_and_not_waited_for():
    play = Play(world({"a": 30.0, "b": 10.0}, {"a": [(50.0, LONG)]}))
    over = play.round("ab")
    assert (play.asked, over.away, names(over.fresh)) == (["b"], ("a",), "b")
    assert play.moment.began_s == 10.0


def test_who_goes_away_at_work_is_waited_for_to_the_deadline_and_never_heard_of():
    play = Play(world({"a": 30.0, "b": 10.0}, {"a": [(0.0, 20.0), (150.0, LONG)]}))
    first = play.round("ab")
    assert (play.asked, names(first.lost), names(first.fresh)) == (["ab"], "a", "b")
    assert (play.moment.began_s, play.moment.pending) == (100.0, ())
    assert play.round("ab").away == ("a",)  # at 100
    for _ in range(4):
        play.round("b")
    assert play.moment.began_s == 150.0
    last = play.round("a")  # it is back, and asked anew
    assert names(last.fresh) == "a" and last.fresh[0].round == 7


def test_who_is_at_work_and_will_go_away_is_busy_until_then():
    play = Play(world({"a": 500.0, "b": 100.0}, {"a": [(0.0, 250.0), (250.5, LONG)]}))
    assert [play.round("ab").busy for _ in range(4)] == [(), ("a",), ("a",), ()]
    assert play.asked == ["ab", "b", "b", "ab"]


def test_a_refusal_takes_no_time():
    play = Play(world({"a": 30.0, "b": 90.0}), refuse=("b",))
    over = play.round("ab")
    assert names(over.fresh) == "ab" and play.moment.began_s == 30.0


def test_refusals_are_not_enough():
    play = Play(world({"a": 30.0, "b": 0.0, "c": 40.0, "d": 50.0}), refuse=("b",), enough=2)
    assert names(play.round("abcd").fresh) == "abc" and play.moment.began_s == 40.0


def test_where_nobody_is_there_the_clock_goes_on_until_enough_are():
    play = Play(world({"a": 30.0, "b": 10.0}, {"a": [(950.0, LONG)], "b": [(1250.0, LONG)]}), min_clients=2)
    over = play.round("ab")  # asked at 1,000 and at 1,300
    assert (names(over.fresh), over.away, play.moment.began_s) == ("ab", (), 1310.0)
    assert [errand.asked_s for errand in over.fresh] == [1000.0, 1300.0]


def test_a_round_that_needs_a_reply_waits_for_it_beyond_the_deadline():
    play = Play(world({"a": 130.0, "b": 10.0}), min_clients=1)
    over = play.round("a")
    assert (names(over.fresh), play.moment.began_s) == ("a", 130.0)


def test_a_reply_to_an_earlier_round_is_one_of_those_that_a_round_needs():
    play = Play(world({"a": 130.0, "b": 10.0}, {"b": [(0.0, 50.0)]}))
    assert names(play.round("ab").fresh) == "b"
    over = play.round("b")
    assert (names(over.late), over.away, play.moment.began_s) == ("a", ("b",), 200.0)


def test_a_round_that_lost_everybody_has_them_work_again_and_asks_them_once():
    play = Play(world({"a": 30.0}, {"a": [(0.0, 20.0), (350.0, LONG)]}))
    over = play.round("a")
    assert (names(over.fresh), over.lost, play.moment.began_s, play.asked) == ("a", (), 430.0, ["a"])


def test_a_round_in_which_all_refuse_ends_at_once():
    play = Play(world({"a": 30.0, "b": 10.0}), refuse=("a", "b"))
    assert names(play.round("ab").fresh) == "ab" and play.moment.began_s == 0.0


def test_a_round_that_nobody_is_asked_in_takes_no_time_and_hears_what_has_arrived():
    play = Play(world({"a": 150.0, "b": 10.0, "c": 150.0}), enough=1)
    play.round("abc")
    over = play.round("")
    assert (names(over.fresh), names(over.late), play.moment.began_s) == ("", "", 10.0)


def test_clients_that_never_come_back_stop_the_run_with_the_next_move(monkeypatch):
    monkeypatch.setattr(window_module, "MOST_DEADLINES", 50)
    play = Play(world({"a": 30.0}, {"a": [(0.0, 10.0)]}))
    with pytest.raises(IncompleteError, match=r"round 1: fewer than 1 of 1 .* change world\.availability"):
        Play(world({"a": 30.0}, {"a": [(LONG, 2 * LONG)]})).round("a")
    with pytest.raises(IncompleteError, match=r"lower federation\.min_clients"):
        play.round("a")


TIMES = st.floats(0, 500, allow_subnormal=False)


@given(
    seconds=st.lists(TIMES, min_size=6, max_size=6),
    cuts=st.lists(st.lists(st.floats(1, 2000), min_size=0, max_size=8, unique=True), min_size=6, max_size=6),
    cohorts=st.lists(st.sets(st.sampled_from("abcdef"), min_size=1), min_size=1, max_size=12),
    enough=st.sampled_from([None, 1, 2]),
)
def test_every_reply_is_heard_once_or_lost_or_still_on_its_way(seconds, cuts, cohorts, enough):
    there = {}
    for client, cut in zip("abcdef", cuts, strict=True):
        edges = [0.0, *sorted(cut)]
        there[client] = [*zip(edges[0::2], edges[1::2], strict=False), (5000.0, LONG)]
    play = Play(world(dict(zip("abcdef", seconds, strict=True)), there), enough=enough)
    asked, heard, lost, before = set(), [], set(), 0.0
    for cohort in cohorts:
        over = play.round("".join(sorted(cohort)))
        asked |= {(client, play.number) for client in play.asked[-1]}
        heard += [(errand.client, errand.round) for errand in (*over.fresh, *over.late)]
        lost |= {(errand.client, play.number) for errand in over.lost}
        assert {*over.away, *over.busy, *play.asked[-1]} == cohort
        assert all(errand.until_s <= play.moment.began_s for errand in (*over.fresh, *over.late))
        assert len(over.fresh) + len(over.late) >= 1 and play.moment.began_s >= before
        assert enough is None or len(over.fresh) + len(over.late) <= enough
        before = play.moment.began_s
    coming = {(errand.client, errand.round) for errand in play.moment.pending if errand.arrives}
    assert len(heard) == len(set(heard))
    assert asked == set(heard) | lost | coming
    assert not (set(heard) & lost) and not (set(heard) & coming) and not (lost & coming)


def test_a_reply_that_the_gauges_do_not_carry_is_no_answer_and_its_client_is_free_when_done():
    # c is away from 205 to 450: in round 3, from 200 on, b and one more have to answer.
    there = {"c": [(0.0, 205.0), (450.0, LONG)]}
    seconds, terms = {"a": 250.0, "b": 100.0, "c": 70.0}, {"min_clients": 2}
    for keep_gauges, late, dropped, fresh, ends_s in ((2, "a", "", "b", 300.0), (1, "", "a", "abc", 570.0)):
        play = Play(world(seconds, there), keep_gauges=keep_gauges, **terms)
        assert names(play.round("abc").fresh) == names(play.round("abc").fresh) == "bc"
        third = play.round("abc")
        assert (names(third.late), names(third.dropped)) == (late, dropped)
        assert (names(third.fresh), play.moment.began_s) == (fresh, ends_s)
        # Done at 250, a is asked anew at 300, when the round is prolonged; c, lost at 205, is back for 500.
        assert play.asked[2] == ("bca" if dropped else "bc")


def test_of_two_clients_one_whose_reply_is_too_old_is_waited_for_to_answer_anew():
    play = Play(world({"a": 250.0, "b": 100.0}), keep_gauges=1, min_clients=2)
    play.moment = Moment(pending=(errand("a", until_s=250.0, basis=-2),))
    over = play.round("ab")
    assert (names(over.dropped), names(over.fresh), names(over.late)) == ("a", "ab", "")
    assert play.moment == Moment(began_s=550.0)  # a is done at 250, and asked again at 300


def test_who_went_away_and_is_not_asked_again_is_not_waited_for():
    """Else a round that cannot get its answers would take thousands of deadlines to say so."""
    play = Play(world({"a": 10.0, "b": 10.0}), refuse=("b",), min_clients=2)
    play.moment = Moment(pending=(errand("c", until_s=5.0, arrives=False),))
    assert names(play.round("ab").fresh) == "ab" and play.moment.began_s <= 200.0


def errand(client: str, *, until_s: float, arrives: bool = True, basis: int = 0) -> Errand:
    return Errand(
        client=client, round=0, number=0, basis=basis, asked_s=0.0, until_s=until_s, arrives=arrives
    )
