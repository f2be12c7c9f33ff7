"""What the report says of ages, lengths and clipping is what rounds.jsonl holds; it is drawn for desk and phone."""

import re
from itertools import pairwise

import pytest

from fedlora.export.charts import Beside, line_chart
from fedlora.export.grids import AGES, age_chart, matrix_chart, shade
from fedlora.export.page import figure
from fedlora.export.report import report_html
from fedlora.export.report_clipping import clipping
from fedlora.export.report_lengths import lengths_by_round
from fedlora.export.report_staleness import ages, staleness_by_client
from fedlora.export.shapes import NARROW, WIDTH

HOSTILE = "<script>alert('x')</script>"


def cells(html):
    return re.findall(r"<td>([^<]*)</td>", html)


def test_an_age_counts_the_rounds_since_a_client_was_last_heard(rounds):
    known = ages(rounds)
    assert {key: age for key, age in known.items() if key[0] != "client-0"} == {
        ("client-1", 1): 0, ("client-1", 2): 1, ("client-1", 3): 2,
        (HOSTILE, 1): 0, (HOSTILE, 2): 1, (HOSTILE, 3): 2,
    }  # fmt: skip
    assert [known["client-0", index] for index in (1, 2, 3)] == [0, 0, 0]


def test_a_late_update_makes_its_client_young_again_and_a_client_never_heard_has_no_age():
    """Round 3 counts a late update of client b, who was not asked again."""
    asked = [("a", "b", "c"), ("a", "c"), ("a",)]
    heard = [("a",), (), ("a", "b")]
    lines = [
        {"round": n + 1, "asked": asked[n], "answered": heard[n], "refused": {}, "rejected": {}}
        for n in range(3)
    ]
    known = ages(lines)
    assert known == {("a", 1): 0, ("a", 2): 1, ("a", 3): 0, ("b", 3): 0}
    html = staleness_by_client({"epsilon_by_client": None}, lines)
    assert cells(html) == ["a", "3", "0", "1", "b", "3", "0", "0", "c", "never", "-", "-"]


def test_a_run_in_which_all_were_always_heard_says_so_in_a_sentence(summary, rounds):
    whole = {**rounds[1], "answered": rounds[1]["asked"]}
    html = staleness_by_client(summary, [rounds[0], whole])
    assert "heard in every round" in html and "<svg" not in html
    assert staleness_by_client(summary, rounds[:1]) == ""


def test_a_square_grows_and_darkens_with_its_age_and_never_is_a_ring():
    names = [f"c{age}" for age in (*AGES, 40)] + ["mute"]
    known = {(name, 1): age for name, age in zip(names, (*AGES, 40), strict=False)}
    svg = age_chart(names, [1], known, title="t")
    squares = [
        (int(of), float(side))
        for of, side in re.findall(r'<rect class="age-(\d)"[^>]* width="([0-9.]+)"', svg)
    ]
    assert squares == sorted(squares) and len(set(squares)) == len(AGES) and squares[-1] == squares[-2]
    assert svg.count('class="none"') == 1
    assert [shade(age) for age in (0, 1, 2, 3, 4, 5, 8, 9, 99)] == [0, 1, 2, 3, 3, 4, 4, 5, 5]


def test_a_phone_sees_the_latest_rounds_that_it_has_room_for_and_is_told_so():
    at = list(range(1, 61))
    narrow = matrix_chart(["a"], at, {("a", index): "answered" for index in at}, title="t", width=NARROW)
    shown = narrow.count('class="answered"')
    assert 20 <= shown < 60 and f"round, the latest {shown}" in narrow
    assert matrix_chart(["a"], at, {}, title="t").count('class="not-asked"') == 60


def test_lengths_are_the_median_between_the_shortest_and_the_longest_of_a_round(rounds):
    lengths = {1: {"client-0": 1.0, "client-1": 2.0, HOSTILE: 9.0}, 2: {"client-0": 4.0}}
    told = [{**line, "update_norm": lengths.get(line["round"], {})} for line in rounds]
    html = lengths_by_round(told)
    assert cells(html) == [
        "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;", "1", "9", "9", "9",
        "client-0", "2", "1", "2.5", "4",
        "client-1", "1", "2", "2", "2",
    ]  # fmt: skip
    assert HOSTILE not in html and "noise alone" not in html and "4 in the last one" in html
    noisy = lengths_by_round([{**line, "noise_norm": line["update_norm"]} for line in told])
    assert "noise alone, expected" in noisy
    assert lengths_by_round(rounds) == ""


def test_what_stands_beside_a_curve_is_inside_its_chart():
    beside = Beside(label="limit", points=[(1, 9.0), (2, 9.0)], spread=[(1.0, 3.0), (-5.0, 3.0)])
    svg = line_chart([(1, 2.0), (2, 2.5)], before=None, title="t", show=str, beside=beside)
    tops = re.findall(r'class="band"[^>]* y="([-0-9.]+)"[^>]* height="([0-9.]+)"', svg)
    heights = [float(y) for y in re.findall(r'y1="([0-9.]+)"', svg)]
    assert len(tops) == 2
    assert all(min(heights) <= float(y) and float(y) + float(high) <= max(heights) + 0.11 for y, high in tops)
    dashed = svg.split('class="limit" points="')[1].split('"')[0]
    assert all(min(heights) <= float(point.split(",")[1]) <= max(heights) for point in dashed.split())


@pytest.mark.parametrize("width", [WIDTH, NARROW])
@pytest.mark.parametrize(
    ("points", "before"),
    [
        ([(5, 0.225), (20, 0.225)], 0.225),
        ([(5, 0.24), (10, 0.2), (20, 0.175)], 0.225),
        ([(5, 0.23), (20, 0.2252)], 0.225),
        ([(1, 0.3)], 0.225),
        ([(1, 0.1)], 0.225),
        ([(0, 0.3)], 0.225),
    ],
)
def test_no_label_stands_on_a_curve_or_on_another_label(points, before, width):
    svg = line_chart(points, before=before, title="t", show=lambda v: f"{100 * v:.1f} %", width=width)
    curve = [
        tuple(map(float, at.split(",")))
        for at in svg.split('class="curve" points="')[1].split('"')[0].split()
    ]
    boxes = []
    label = r'<text class="([a-z]+)" x="([-0-9.]+)" y="([-0-9.]+)" text-anchor="([a-z]+)">([^<]*)</text>'
    for kind, x, y, anchor, words in re.findall(label, svg):
        if kind == "strong" or "before" in words:
            left = float(x) - (6 * len(words) if anchor == "end" else 0)
            boxes.append((left, float(y) - 9, left + 6 * len(words), float(y)))
    (a, b) = boxes
    assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    for left, top, right, bottom in boxes:
        for (x0, y0), (x1, y1) in pairwise(curve):
            for step in range(201):
                x, y = x0 + (x1 - x0) * step / 200, y0 + (y1 - y0) * step / 200
                assert not (left < x < right and top < y < bottom)


def test_the_clip_share_is_a_curve_once_it_was_scored_twice(rounds, tiny_config):
    shares = [{**line, "public_clip_share": 0.25 * line["round"]} for line in rounds]
    html = clipping(shares, tiny_config())
    assert "clips 75% of the public test records" in html and html.count("<polyline") == 2
    assert "<svg" not in clipping(shares[-1:], tiny_config())
    assert clipping(shares, tiny_config(privacy="none")) == "" == clipping(rounds, tiny_config())


def test_every_chart_is_drawn_once_for_a_desk_and_once_for_a_phone(summary, rounds, tiny_config):
    html = report_html(summary, rounds, tiny_config())
    boxes = re.findall(r'<svg( class="narrow")? viewBox="0 0 (\d+)', html)
    assert len(boxes) == html.count("<figure>") * 2 == 10
    assert boxes == [("", str(WIDTH)), (' class="narrow"', str(NARROW))] * 5
    names = re.findall(r' id="([^"]*)"', html)
    assert len(names) == len(set(names)) == 10
    assert figure(lambda width: f"{width:g}") == f"<figure>\n{WIDTH}\n{NARROW}\n</figure>"


def test_the_page_names_no_address_from_which_a_browser_could_fetch(summary, rounds, tiny_config):
    html = report_html(summary, rounds, tiny_config())
    assert re.findall(r"https?:|//[a-z]|url\(|@import|\bsrc=|\bhref=", html) == []
