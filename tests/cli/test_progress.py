"""What a person sees of a run: a moving line on a terminal, plain lines elsewhere, colours only where wanted."""

import io
import re
from pathlib import Path

import pytest

from fedlora.cli.progress import watching
from fedlora.federation.events import Note, RoundDone, RunStarted, Stage

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[[0-9;]*[34][0-9](;[0-9]+)*m|\x1b\[[0-9;]*9[0-7]m")


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def seen(stream: io.StringIO) -> str:
    line = {
        "round": 1,
        "asked": ["a", "b"],
        "answered": ["a"],
        "metric": "accuracy",
        "score": 0.431,
        "epsilon_max": 3.2,
    }
    with watching(stream) as listener:
        listener(Stage(name="reading files"))
        listener(Note(words="of [two] clients"))
        listener(RunStarted(clients=2, rounds=4, private=True, run_dir=Path("run")))
        listener(RoundDone(round=line, eta_s=130.4))
    return stream.getvalue()


def test_elsewhere_a_round_is_a_plain_line_with_times_in_human_units():
    assert seen(io.StringIO()).splitlines() == [
        "reading files",
        "note: of [two] clients",
        "2 clients, 4 rounds",
        "round 1/4  1 of 2 answered  accuracy 43.1 %  epsilon 3.2  2 min 10 s left",
    ]


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert seen(Terminal()) == seen(io.StringIO())


@pytest.mark.parametrize("plain", [False, True])
def test_a_terminal_gets_a_moving_line_and_no_colour_where_none_is_wanted(monkeypatch, plain):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    if plain:
        monkeypatch.setenv("NO_COLOR", "1")
    told = seen(Terminal())
    assert "note: of [two] clients\n" in told
    assert ESCAPE.search(told) and "2 min 10 s left" in ESCAPE.sub("", told)
    assert bool(COLOUR.search(told)) is not plain


def test_of_a_narrow_terminal_the_bar_goes_first(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "72")
    told = ESCAPE.sub("", seen(Terminal()))
    assert re.search(r"round 1/4 1 of 2 answered  accuracy 43.1 %  epsilon 3.2  2 min 10 s left", told)
