"""The report is one well-formed page that says what is true, and holds no markup but its own."""

import math
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.export.charts import line_chart
from fedlora.export.report import report_html
from fedlora.export.report_participation import participation
from fedlora.export.shapes import ticks
from fedlora.export.words import bytes_text, duration, epsilon, score

HOSTILE = "<script>alert('x')</script>"

VOID = {"meta", "br", "line", "rect", "circle", "path", "polyline"}


class Page(HTMLParser):
    """Collects tags and text, and fails where an element is closed that is not the one open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "onclick", "onload")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_one_well_formed_page_without_scripts_or_links(summary, rounds, tiny_config):
    page = Page(report_html(summary, rounds, tiny_config()))
    assert "script" not in page.tags and "link" not in page.tags and page.links == []
    assert page.tags.count("svg") >= 3 and page.tags.count("title") >= 4
    for said in (
        "75.0 %",
        "25.0 %",
        "3.201",
        "SIMULATION: not a guarantee",
        "one record of one client",
        "target 8",
    ):
        assert said in page.text, said


def test_hostile_names_are_text(summary, rounds, tiny_config):
    html = report_html(
        summary, rounds, tiny_config(data__label="topic", output="<img src=x onerror=alert(1)>")
    )
    assert "<script" not in html and "<img" not in html
    assert HOSTILE in Page(html).text


def test_what_a_client_did_is_told_apart(rounds):
    states = participation(rounds)
    assert states == {
        ("client-0", 1): "answered",
        ("client-1", 1): "answered",
        (HOSTILE, 1): "answered",
        ("client-0", 2): "answered",
        ("client-1", 2): "silent",
        (HOSTILE, 2): "refused",
        ("client-0", 3): "answered",
        ("client-1", 3): "rejected",
    }


def test_a_run_without_privacy_says_so_and_shows_no_epsilon(not_private, rounds, tiny_config):
    page = Page(report_html(not_private, rounds, tiny_config(privacy="none")))
    assert "NOT PRIVATE" in page.text and "Epsilon by client" not in page.text


def test_noise_from_the_operating_system_is_no_simulation(summary, rounds):
    text = Page(report_html({**summary, "noise_source": "os-entropy"}, rounds)).text
    assert "SIMULATION" not in text and "entropy of the operating system" in text


def test_a_noise_source_nobody_knows_is_never_a_guarantee(summary, rounds):
    assert "SIMULATION" in report_html({**summary, "noise_source": "dice"}, rounds)


def test_a_run_of_no_scored_round_still_has_a_report(summary):
    assert "Privacy statement" in Page(report_html({**summary, "score": None, "score_before": None}, [])).text


def test_clients_own_models_are_told_where_there_are_any(summary, rounds):
    personal = {"personal": {"client-0": 0.5, "client-1": 0.75}, "personal_mean": 0.625}
    text = Page(report_html({**summary, **personal}, rounds)).text
    assert "Personal models" in text and "62.5 %" in text and "mean of 2" in text
    for nobody in ({}, {"personal": {}, "personal_mean": None}):
        assert "Personal models" not in report_html({**summary, **nobody}, rounds)


def test_a_thousand_clients_stay_readable(summary, rounds):
    many = {f"client-{n:03d}": 1 + n / 1000 for n in range(1000)}
    html = report_html({**summary, "epsilon_by_client": many, "clients": 1000}, rounds)
    assert "60 largest of 1,000" in Page(html).text and len(html) < 200_000


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(2, 10))
def test_ticks_cover_the_range_in_even_round_steps(low, span, count):
    found = ticks(low, low + span, count)
    assert found[0] <= low + 1e-6 * max(1, abs(low), span) and found[-1] >= low + span - 1e-6 * max(
        1, abs(low), span
    )
    steps = [b - a for a, b in pairwise(found)]
    assert len(found) >= 2 and max(steps) - min(steps) <= 1e-6 * max(1, abs(low), span)
    assert len(found) <= 2 * count + 2


def test_a_curve_rises_on_paper_when_it_rises():
    svg = line_chart([(1, 0.4), (2, 0.6)], before=0.2, title="t", show=str)
    points = svg.split('points="')[1].split('"')[0].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert len(points) == 3 and heights == sorted(heights, reverse=True)


@given(st.floats(0, 1e4))
def test_a_shown_epsilon_is_never_less_than_the_true_one(value):
    assert value - 1e-8 <= float(epsilon(value)) <= value + 0.0011


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (epsilon(7.98), "7.98"),
        (epsilon(7.9801), "7.981"),
        (epsilon(8.0), "8"),
        (epsilon(None), "-"),
        (epsilon(math.inf), "unbounded"),
        (score("accuracy", 0.606), "60.6 %"),
        (score("perplexity", 12.34567), "12.35"),
        (score("accuracy", None), "-"),
        (duration(47.6), "48 s"),
        (duration(200), "3 min 20 s"),
        (duration(7500), "2 h 05 min"),
        (bytes_text(0), "0 B"),
        (bytes_text(999), "999 B"),
        (bytes_text(295_123), "295 kB"),
        (bytes_text(2.5e9), "2.5 GB"),
        (bytes_text(4e12), "4e+03 GB"),
    ],
)
def test_numbers_are_written_as_people_read_them(got, wanted):
    assert got == wanted


def test_the_public_share_of_clipped_records_is_told_with_what_it_suggests(summary, rounds, tiny_config):
    shared = [{**line, "public_clip_share": 1.0} for line in rounds]
    text = Page(report_html(summary, shared, tiny_config())).text
    assert (
        "clips 100% of the public test records" in text and "clipped all of the public test records" in text
    )
    halves = [{**line, "public_clip_share": 0.5} for line in rounds]
    text = Page(report_html(summary, halves, tiny_config())).text
    assert "clips 50% of" in text and "clipped all" not in text
    assert "Clipping" not in Page(report_html(summary, rounds, tiny_config())).text
