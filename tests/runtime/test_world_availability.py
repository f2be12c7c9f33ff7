"""Who is there when: the law of each generator, and that nothing but seed, client and time decides."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config import world as config
from fedlora.errors import ConfigError
from fedlora.runtime.world.availability import availability
from fedlora.runtime.world.draws import beta, exponential, lognormal, uniform
from fedlora.runtime.world.world import build

CLIENTS = [f"client-{number:02d}" for number in range(40)]
HOUR = 3600.0
DAY = 24 * HOUR

SECTIONS = {
    "always": config.Always(kind="always"),
    "day-night": config.DayNight(kind="day-night", share=0.4),
    "zones": config.DayNight(kind="day-night", share=0.3, period_s=1000.0, groups=3),
    "uneven": config.Uneven(kind="uneven", probability=[2.0, 2.0], slot_s=600.0),
    "drop-outs": config.DropOuts(kind="drop-outs", groups=4, mean_up_s=3000.0, mean_down_s=1000.0),
}


def of(section: config.Availability, seed: int = 1, clients=CLIENTS):
    return availability(section, clients, seed)


def share_there(there, client: str, seconds: float, step: float) -> float:
    steps = int(seconds / step)
    return sum(there.is_there(client, (n + 0.5) * step) for n in range(steps)) / steps


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    lines = [f"{client},{10 * n},{10 * n + 100}" for n, client in enumerate(CLIENTS)]
    lines += [f"{CLIENTS[0]},100,150", f"{CLIENTS[0]},400,500"]
    path.write_text("\n".join(["client,from_s,until_s", *lines]) + "\n")
    return config.Trace(kind="trace", path=str(path), repeat_s=500.0)


@pytest.mark.parametrize("name", SECTIONS)
@given(data=st.data())
def test_a_client_is_there_until_it_leaves_and_is_away_then(name, data):
    there = of(SECTIONS[name])
    client, at = data.draw(st.sampled_from(CLIENTS)), data.draw(st.floats(0, 40 * DAY))
    if not there.is_there(client, at):
        return
    gone = there.leaves(client, at, at + 2 * DAY)
    until = at + 2 * DAY if gone is None else gone
    assert until > at
    # Times near 40 days are exact to 2**-31 s; a millisecond is far from that on both sides.
    for part in (0.001, 0.3, 0.7, 0.999):
        assert there.is_there(client, max(at, until - 0.001 - part * (until - at - 0.001)))
    if gone is not None:
        assert not there.is_there(client, gone + 0.001)


@pytest.mark.parametrize("name", SECTIONS)
def test_nothing_but_seed_client_and_time_decides(name):
    asked = [(client, 977.0 * n) for n in range(60) for client in CLIENTS[:10]]
    first = of(SECTIONS[name])
    forwards = [first.is_there(*question) for question in asked]
    second = of(SECTIONS[name], clients=CLIENTS[:10][::-1])
    backwards = [second.is_there(*question) for question in reversed(asked)]
    assert forwards == backwards[::-1]
    if name != "always":
        other = of(SECTIONS[name], seed=2)
        assert forwards != [other.is_there(*question) for question in asked]


def test_by_day_and_night_each_client_is_there_for_its_share_in_one_piece():
    there = of(config.DayNight(kind="day-night", share=0.4, period_s=DAY))
    for client in CLIENTS:
        row = [there.is_there(client, 60.0 * n) for n in range(1440)]
        assert abs(sum(row) - 0.4 * 1440) <= 1
        assert sum(a != b for a, b in zip(row, [*row[1:], row[0]], strict=True)) == 2
        assert row == [there.is_there(client, 3 * DAY + 60.0 * n) for n in range(1440)]


def test_phases_of_clients_spread_over_the_period_and_those_of_zones_are_as_many_as_zones():
    alone = of(config.DayNight(kind="day-night", share=0.5))
    assert {int(4 * alone.phase(client)) for client in CLIENTS} == {0, 1, 2, 3}
    zones = of(config.DayNight(kind="day-night", share=0.5, groups=3))
    assert {zones.phase(client) for client in CLIENTS} == {0.0, 1 / 3, 2 / 3}


def test_a_named_probability_is_the_long_run_share():
    named = dict.fromkeys(CLIENTS, 0.5) | {CLIENTS[0]: 0.0, CLIENTS[1]: 1.0, CLIENTS[2]: 0.2}
    there = of(config.Uneven(kind="uneven", probability=named, slot_s=60.0))
    shares = {client: share_there(there, client, 60.0 * 4000, 60.0) for client in CLIENTS[:4]}
    assert (shares[CLIENTS[0]], shares[CLIENTS[1]]) == (0.0, 1.0)
    for client, p in ((CLIENTS[2], 0.2), (CLIENTS[3], 0.5)):
        assert abs(shares[client] - p) < 4 * math.sqrt(p * (1 - p) / 4000)


def test_drawn_probabilities_have_the_mean_and_spread_of_their_beta():
    many = [f"c{n}" for n in range(3000)]
    drawn = of(config.Uneven(kind="uneven", probability=[2.0, 6.0]), clients=many).probability.values()
    mean = sum(drawn) / 3000
    spread = sum((p - mean) ** 2 for p in drawn) / 3000
    variance = 2 * 6 / (8**2 * 9)
    assert abs(mean - 0.25) < 4 * math.sqrt(variance / 3000)
    assert abs(spread - variance) < 0.15 * variance


def test_clients_of_a_group_drop_out_together_and_groups_apart_from_each_other():
    there = of(SECTIONS["drop-outs"])
    rows = {client: tuple(there.is_there(client, 100.0 * n) for n in range(5000)) for client in CLIENTS}
    assert len(set(rows.values())) == 4
    a, b, *_ = sorted(set(rows.values()))
    both = sum(x and y for x, y in zip(a, b, strict=True)) / 5000
    # 500,000 s hold 125 cycles: the share of one group has a standard error of about 0.04.
    assert abs(both - (sum(a) / 5000) * (sum(b) / 5000)) < 0.12


def test_drop_outs_last_as_long_as_the_config_says_and_leave_the_long_run_share():
    there = of(config.DropOuts(kind="drop-outs", groups=1, mean_up_s=300.0, mean_down_s=100.0))
    row = [there.is_there("a", 5.0 * n) for n in range(200_000)]
    falls = sum(a and not b for a, b in pairwise(row))
    # 2,500 cycles of 400 s, with about that for a standard deviation; looking every 5 s misses 5 % of the falls.
    assert abs(sum(row) / len(row) - 0.75) < 0.03
    assert abs(5.0 * len(row) / falls - 400.0) < 4 * 400 / math.sqrt(2500)


def test_at_the_beginning_groups_are_there_in_their_long_run_share():
    many = config.DropOuts(kind="drop-outs", groups=2000, mean_up_s=300.0, mean_down_s=100.0)
    up = of(many)
    clients = [f"c{n}" for n in range(2000)]
    for at in (0.0, 50.0, 400.0):
        assert abs(sum(up.is_there(client, at) for client in clients) / 2000 - 0.75) < 0.06


def test_a_trace_is_read_as_it_stands_and_begins_anew(trace):
    there = of(trace)
    row = {at: there.is_there(CLIENTS[0], at) for at in (0.0, 99.0, 100.0, 149.0, 150.0, 399.0, 400.0, 499.0)}
    assert list(row.values()) == [True, True, True, True, False, False, True, True]
    assert [there.is_there(CLIENTS[0], 500.0 * 7 + at) for at in row] == list(row.values())
    assert there.leaves(CLIENTS[0], 450.0, 10_000.0) == 650.0  # over the seam, through what touches
    assert there.leaves(CLIENTS[0], 450.0, 650.0) is None
    assert there.leaves(CLIENTS[1], 20.0, 10_000.0) == 110.0


def test_a_jsonl_trace_says_the_same(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"client": "a", "from_s": 5, "until_s": 8}\n{"client": "b", "from_s": 0, "until_s": 1}\n'
    )
    there = of(config.Trace(kind="trace", path=str(path)), clients=["a"])
    assert [there.is_there("a", at) for at in (4.9, 5.0, 7.9, 8.0, 1e9)] == [False, True, True, False, False]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("client,from_s,until_s\na,0,5\n", r"lacks 1 of 2 clients \('b', ...\)"),
        ("client,from_s,until_s\na,5,5\nb,0,1\n", "2: from_s 5, until_s 5; until_s must be after"),
        ("client,from_s,until_s\na,x,5\nb,0,1\n", "2: no number of seconds under 'from_s'"),
        ("name,from_s,until_s\na,0,5\n", "lacks 2 of 2"),
        ("client,from_s,until_s\na,-1,5\nb,0,1\n", "from_s -1.0; write seconds from 0 on"),
    ],
)
def test_a_trace_that_says_less_than_it_should_is_refused(tmp_path, text, says):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        of(config.Trace(kind="trace", path=str(path)), clients=["a", "b"])


def test_a_probability_by_name_must_name_every_client():
    with pytest.raises(ConfigError, match=r"lacks 1 of 2 clients \('b'"):
        of(config.Uneven(kind="uneven", probability={"a": 0.5}), clients=["a", "b"])


def test_draws_have_their_distributions():
    n = 4000
    flat = [uniform(1, "u", k) for k in range(n)]
    assert abs(sum(flat) / n - 0.5) < 4 * math.sqrt(1 / 12 / n) and min(flat) > 0 and max(flat) < 1
    waits = [exponential(7.0, 1, "e", k) for k in range(n)]
    assert abs(sum(waits) / n - 7.0) < 4 * 7.0 / math.sqrt(n)
    logs = [math.log(lognormal(0.5, 1, "l", k)) for k in range(n)]
    assert abs(sum(logs) / n) < 4 * 0.5 / math.sqrt(n)
    assert abs(math.sqrt(sum(x * x for x in logs) / n) - 0.5) < 4 * 0.5 / math.sqrt(2 * n)
    assert abs(sum(beta(3, 1, 1, "b", k) for k in range(n)) / n - 0.75) < 4 * math.sqrt(3 / 80 / n)


def test_clients_are_fast_or_slow_for_good_and_each_round_a_little_otherwise():
    speed = config.Lognormal(kind="lognormal", median_s=60.0, sigma=0.8, round_sigma=0.1)
    seconds = build(config.World(speed=speed), CLIENTS, 3).seconds
    logs = {client: [math.log(seconds(client, n) / 60.0) for n in range(1, 40)] for client in CLIENTS}
    within = [math.sqrt(sum((x - sum(v) / 39) ** 2 for x in v) / 38) for v in logs.values()]
    assert abs(sum(within) / 40 - 0.1) < 0.01
    means = [sum(v) / 39 for v in logs.values()]
    assert 0.5 < math.sqrt(sum(x * x for x in means) / 40) < 1.1


def test_stragglers_take_so_many_times_as_long_in_their_share_of_rounds():
    speed = config.Lognormal(kind="lognormal", median_s=10.0)
    slow = config.World(speed=speed, stragglers=config.Stragglers(share=0.2, factor=5.0))
    seconds = build(slow, CLIENTS, 3).seconds
    taken = [seconds(client, n) for client in CLIENTS for n in range(1, 51)]
    assert set(taken) == {10.0, 50.0}
    assert abs(taken.count(50.0) / 2000 - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 2000)


def test_seconds_come_from_a_column_and_a_client_without_is_refused(tmp_path):
    path = tmp_path / "speed.csv"
    path.write_text("client,phone_s\na,30\nb,0.5\n")
    speed = config.SpeedFile(kind="file", path=str(path), column="phone_s")
    world = build(config.World(speed=speed), ["a", "b"], 1)
    assert (world.seconds("a", 1), world.seconds("b", 9)) == (30.0, 0.5)
    with pytest.raises(ConfigError, match="lacks 1 of 3"):
        build(config.World(speed=speed), ["a", "b", "c"], 1)
    path.write_text("client,phone_s\na,30\nb,0.6\n")
    assert build(config.World(speed=speed), ["a", "b"], 1).digest != world.digest
