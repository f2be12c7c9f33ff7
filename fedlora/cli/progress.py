"""What a person sees while a run goes on: one moving line on a terminal, one plain line a round elsewhere."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column, Table
from rich.text import Text

from fedlora.export.words import duration, epsilon, score
from fedlora.federation.events import ClientDone, Event, Listener, Note, RoundDone, RunDone, RunStarted, Stage


@contextmanager
def watching(stream: TextIO | None = None) -> Iterator[Listener]:
    """A listener for as long as the block runs; by default on stderr. Without colours where NO_COLOR is set.

    Args:
        stream: where to write; a terminal that can move its cursor gets a moving line, anything else plain lines.
    """
    target = sys.stderr if stream is None else stream
    if not target.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        yield PlainLines(target)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),  # on a narrow terminal it makes room for the others
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
    )
    console = Console(file=target)
    with Progress(*columns, TextColumn("{task.fields[news]}"), console=console, transient=True) as bars:
        yield MovingLine(bars)


class PlainLines:
    """One line a stage, a note and a round."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rounds = 0

    def __call__(self, event: Event) -> None:
        """Writes the event's line, if it has one."""
        match event:
            case Stage(name=name):
                self._line(name)
            case Note(words=words):
                self._line(f"note: {words}")
            case RunStarted(clients=clients, rounds=rounds, private=private):
                self._rounds = rounds
                self._line(f"{clients} clients, {rounds} rounds{'' if private else ', NOT PRIVATE'}")
            case RoundDone(round=line, eta_s=eta_s):
                self._line(f"round {line['round']}/{self._rounds}  {round_news(line, eta_s)}")
            case ClientDone() | RunDone():
                pass

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class MovingLine:
    """A bar over the rounds, with the clients of the current one and the news of the last."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._stage = bars.add_task("starting", total=None, news="")
        self._news = ""
        self._answers = 0

    def __call__(self, event: Event) -> None:
        """Redraws what the event changes."""
        match event:
            case Stage(name=name):
                self._bars.update(self._stage, description=name)
            case Note(words=words):  # above the line, where it stays
                note = Table.grid(padding=(0, 1))
                note.add_row("note:", Text(words))
                self._bars.console.print(note)
            case RunStarted(rounds=rounds, private=private):
                self._news = "" if private else "NOT PRIVATE"
                self._bars.update(
                    self._stage, description="round", total=rounds, completed=0, news=self._news
                )
            case ClientDone():
                self._answers += 1
                self._bars.update(self._stage, news=f"{self._answers} replied  {self._news}")
            case RoundDone(round=line, eta_s=eta_s):
                self._answers, self._news = 0, _news(line, eta_s)
                self._bars.update(self._stage, completed=line["round"], news=round_news(line, eta_s))
            case RunDone():
                self._bars.update(self._stage, description="done", news="")


def round_news(line: dict[str, Any], eta_s: float | None) -> str:
    """What a round brought: `7 of 8 answered  accuracy 43.1 %  epsilon 3.2  2 min 10 s left`."""
    return f"{len(line['answered'])} of {len(line['asked'])} answered  {_news(line, eta_s)}".rstrip()


def _news(line: dict[str, Any], eta_s: float | None) -> str:
    """What stays true while the next round goes on: score, epsilon, time left."""
    parts: list[str] = []
    if line.get("score") is not None:
        parts.append(f"{line['metric']} {score(line['metric'], line['score'])}")
    if line.get("epsilon_max") is not None:
        parts.append(f"epsilon {epsilon(line['epsilon_max'])}")
    if eta_s:
        parts.append(f"{duration(max(eta_s, 1))} left")
    return "  ".join(parts)
