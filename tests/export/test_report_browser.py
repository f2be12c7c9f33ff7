"""A real browser shows the report whole: on a desk, on a phone, in the dark, on paper; it fetches nothing else."""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fedlora.export.report import report_html
from fedlora.export.shapes import NARROW, WIDTH
from tests.export.chromium import Tab, browser, found

PROGRAM = found()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium or Chrome here: the report was shown by no browser"
)

DESK, PHONE = 1280, 390
DRAWN = (
    "[...document.querySelectorAll('figure svg')].filter(chart => chart.getBoundingClientRect().width > 0)"
)
LETTERS = f"""Math.min(...{DRAWN}.flatMap(chart => [...chart.querySelectorAll('text')].map(
    word => parseFloat(getComputedStyle(word).fontSize) * chart.getScreenCTM().a)))"""
OUTSIDE = """[...document.querySelectorAll('main *')].filter(
    part => part.getBoundingClientRect().right > innerWidth + 1 && !part.closest('.scroll, pre')
).map(part => part.tagName)"""
FOLDED = """[...document.querySelectorAll('details > :not(summary)')].filter(
    part => !part.checkVisibility() || part.getBoundingClientRect().height === 0).length"""
LONG = "ward-" + "x" * 90


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    assert PROGRAM is not None
    with browser(PROGRAM) as page:
        yield page


@pytest.fixture
def report(tmp_path, summary, rounds, tiny_config) -> Path:
    """With every section, a name that a page would stumble over, and one as long as no screen is wide."""
    names = [*rounds[1]["asked"], LONG]
    told = [
        {
            **line,
            "asked": [*line["asked"], LONG] if line["asked"] else [],
            "update_norm": dict.fromkeys(line["answered"], 2.0),
            "noise_norm": dict.fromkeys(line["answered"], 1.0),
            "public_clip_share": 0.5,
            "accuracy_told": dict.fromkeys(line["answered"], 0.5),
        }
        for line in rounds
    ]
    site = {"shape": [32, 8], "singular_values": [4.0, 1.0], "effective_rank": 1.65, "beside": None}
    measured = {"directions": 2, "intruders_among": 10, "intruder_below": 0.5, "sites": {"h.0.query": site}}
    picture = {
        "kind": "iid",
        "clients": names,
        "of": 4,
        "labels": ["a", "b"],
        "counts": [[30 + n, 40] for n in range(4)],
    }
    samples = [{"prompt": "Question: how many?\nAnswer: ", "before": "word " * 80, "after": "y" * 200}]
    html = report_html(
        {**summary, "epsilon_by_client": {**summary["epsilon_by_client"], LONG: 1.0}},
        told,
        tiny_config(output="runs/" + "z" * 200),
        diagnostics=measured,
        picture=picture,
        samples=samples,
    )
    page = tmp_path / "report.html"
    page.write_text(html)
    return page


def test_the_page_asks_the_network_for_nothing_and_complains_of_nothing(tab, report):
    seen = len(tab.events)
    tab.look(DESK)
    tab.open(report)
    assert tab.value(f"{DRAWN}.length") == 12, "every section draws its chart"
    events = tab.events[seen:]
    asked = [e["params"]["request"]["url"] for e in events if e.get("method") == "Network.requestWillBeSent"]
    assert [urlsplit(url).scheme for url in asked] == ["file"], asked
    complaints = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    assert [event for event in events if event.get("method") in complaints] == []


def test_a_page_with_a_script_that_fails_and_a_picture_from_elsewhere_would_be_caught(tab, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<script>missing()</script><img src='http://127.0.0.1:9/a.png'>")
    seen = len(tab.events)
    tab.open(page)
    methods = [event.get("method") for event in tab.events[seen:]]
    assert "Runtime.exceptionThrown" in methods and methods.count("Network.requestWillBeSent") == 2


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, PHONE, 601, 768, DESK])
def test_nothing_is_wider_than_the_screen(tab, report, width, dark):
    tab.look(width, phone=width < 600, dark=dark)
    tab.open(report)
    assert tab.value("document.documentElement.scrollWidth") == width
    assert tab.value(OUTSIDE) == []


def test_a_phone_shows_the_charts_that_were_drawn_for_it_in_letters_that_can_be_read(tab, report):
    widths = {}
    for screen in (PHONE, DESK):
        tab.look(screen, phone=screen == PHONE)
        tab.open(report)
        widths[screen] = set(tab.value(f"{DRAWN}.map(chart => chart.viewBox.baseVal.width)"))
        assert tab.value(LETTERS) >= 10, "pixels of the smallest letter"
    assert widths == {PHONE: {NARROW}, DESK: {WIDTH}}


def test_dark_is_dark_and_its_words_stand_out(tab, report):
    for dark in (False, True):
        tab.look(DESK, dark=dark)
        tab.open(report)
        paper, ink = (
            luminance(tab.value(f"getComputedStyle(document.body).{of}"))
            for of in ("backgroundColor", "color")
        )
        assert (paper < ink) == dark
        assert contrast(paper, ink) >= 7, "AAA of the Web Content Accessibility Guidelines"
        for faint in (".lead", "th", "svg text.faint", ".flag.warn"):
            kind = "fill" if "svg" in faint else "color"
            of = tab.value(f"getComputedStyle(document.querySelector('{faint}')).{kind}")
            assert contrast(paper, luminance(of)) >= 4.5, (faint, dark)


def test_paper_has_pages_and_everything_that_a_click_would_open(tab, report):
    tab.look(DESK, dark=True)
    tab.open(report)
    assert tab.value(FOLDED) == tab.value("document.querySelectorAll('details').length") > 5
    pdf = tab.printed()
    assert pdf.startswith(b"%PDF-") and len(re.findall(rb"/Type\s*/Page\b", pdf)) > 1
    tab.command(
        "Emulation.setEmulatedMedia",
        media="print",
        features=[{"name": "prefers-color-scheme", "value": "dark"}],
    )
    try:
        assert tab.value(FOLDED) == 0
        paper, ink = (
            tab.value(f"getComputedStyle(document.body).{of}") for of in ("backgroundColor", "color")
        )
        assert paper == "rgb(255, 255, 255)" and luminance(ink) < 0.05, "dark words on white paper"
    finally:
        tab.command("Emulation.setEmulatedMedia", media="")


def luminance(colour: str) -> float:
    """Relative, of an opaque `rgb(r, g, b)`, as the Web Content Accessibility Guidelines have it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
