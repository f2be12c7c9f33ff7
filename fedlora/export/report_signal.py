"""The part of the report that tells the signal in the clients' updates from the noise that they added."""

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlora.algebra.diagnostics import signal_to_noise
from fedlora.export.charts import line_chart
from fedlora.export.grids import size_chart
from fedlora.export.page import figure, folded, table

_SHOWN_CLIENTS = 40
"""Rows of the chart and the table; the lengths of all clients are in rounds.jsonl."""
_SHOWN_ROUNDS = 120
"""Columns of the chart, the latest ones."""


@dataclass(slots=True)
class Energies:
    """Of some updates, their squared lengths and the expected ones of the noise in them, summed."""

    updates: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)

    def add(self, length: float, noise_length: float) -> None:
        """One more update."""
        self.updates.append(length**2)
        self.noise.append(noise_length**2)

    @property
    def ratio(self) -> float:
        """Signal to noise of all of them together, which scatters less than the mean of each one's own."""
        return signal_to_noise(sum(self.updates), sum(self.noise))


def signal_by_client(rounds: Sequence[Mapping[str, Any]]) -> str:
    """The ratio by round, and by client and round; nothing where no update's noise is known."""
    by_round: dict[int, Energies] = defaultdict(Energies)
    by_client: dict[str, Energies] = defaultdict(Energies)
    each: dict[tuple[str, int], float] = {}
    for line in rounds:
        for client, noise in line.get("noise_norm", {}).items():
            index, length = int(line["round"]), line["update_norm"][client]
            by_round[index].add(length, noise)
            by_client[client].add(length, noise)
            each[client, index] = signal_to_noise(length**2, noise**2)
    if not each:
        return ""
    text = (
        "The energy of the signal in an update, in energies of the noise that its client added: its squared length "
        "less that of the noise, which is known, divided by the latter. 1 is as much signal as noise, 0 nothing that "
        "could be told from noise. All of it follows from what was released, so it costs no privacy."
    )
    points = [(index, by_round[index].ratio) for index in sorted(by_round)]
    title = "Signal to noise of all updates of a round"
    curve = figure(
        lambda width: line_chart(
            points,
            before=None,
            title=title,
            show=_ratio,
            name="signal",
            unit="ratio",
            floor=0.0,
            width=width,
        )
    )
    return f"<h2>Signal to noise of the updates</h2>\n<p>{text}</p>\n{curve}\n{_clients(by_client, each)}"


def _clients(by_client: Mapping[str, Energies], each: Mapping[tuple[str, int], float]) -> str:
    names = sorted(
        heapq.nsmallest(_SHOWN_CLIENTS, by_client, key=lambda name: (-len(by_client[name].noise), name))
    )
    shown = sorted({index for _, index in each})[-_SHOWN_ROUNDS:]
    sizes = {(name, index): size for (name, index), size in each.items() if name in names and index in shown}
    largest = max(sizes.values(), default=0.0)
    title = (
        f"Signal to noise of {len(names)} clients in {len(shown)} rounds; the largest is {_ratio(largest)}"
    )
    more = len(by_client) - len(names)
    note = f" The {len(names)} heard most, and {more:,} more in rounds.jsonl." if more else ""
    chart = figure(lambda width: size_chart(names, shown, sizes, title=title, width=width))
    caption = (
        f"Client by client: the area of a disc is the ratio, the largest {_ratio(largest)}; a ring is 0, a point no "
        f"update.{note}"
    )
    rows = [(name, str(len(by_client[name].noise)), _ratio(by_client[name].ratio)) for name in names]
    as_table = folded("As a table", table(("Client", "Updates", "Signal to noise of all of them"), rows))
    return f"<p>{caption}</p>\n{chart}\n{as_table}"


def _ratio(value: float) -> str:
    """Two digits: the estimate scatters by more."""
    return f"{value:.2g}"
