"""The part of the report that shows who holds what: a bar a simulated client, a colour a label."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fedlora.export.page import figure, folded, table
from fedlora.export.shapes import COLOURS, WIDTH, margins, rule_down, short, svg, text, ticks

_SHOWN_LABELS = COLOURS
"""Told apart by colour; of more, the rarest are one."""


def partition_picture(picture: Mapping[str, Any] | None) -> str:
    """The chart, its key and the figures; nothing for a run that has no picture, as a server's."""
    if picture is None or not picture["clients"]:
        return ""
    labels, counts = _few(picture["labels"], picture["counts"])
    clients, total = picture["clients"], picture["of"]
    title = f"Records of {len(clients)} simulated clients" + (f" by {len(labels)} labels" if labels else "")
    note = (
        f"{len(clients):,} of {total:,}, evenly spaced by size, the largest first."
        if len(clients) < total
        else "The largest first."
    )
    said = (
        f"Partition: {picture['kind']}. These clients are simulated, so their labels can be shown; a data owner's node "
        f"tells nobody. The counts are exact, and no epsilon covers them. {note}"
    )
    keys = "".join(f"<span>{_key(place)}{escape(label)}</span>" for place, label in enumerate(labels))
    heads = ("Client", "Records", *labels)
    rows = [
        (client, f"{sum(own):,}", *(f"{count:,}" for count in own if labels))
        for client, own in zip(clients, counts, strict=True)
    ]
    chart = figure(lambda width: stacked_chart(clients, counts, title=title, width=width))
    key = f'<p class="keys">{keys}</p>\n' if labels else ""
    return f"<h2>Who holds what</h2>\n<p>{escape(said)}</p>\n{chart}\n{key}{folded('As a table', table(heads, rows))}"


def stacked_chart(
    names: Sequence[str], counts: Sequence[Sequence[int]], *, title: str, width: float = WIDTH
) -> str:
    """One horizontal bar a name, its parts one after the other; counts: (names, parts), whole numbers."""
    (left, right, letters), top, floor = margins(width), 12, 44
    pitch = 24 if len(names) <= 30 else 15
    height = top + pitch * len(names) + floor
    columns = ticks(0.0, max(max(sum(own) for own in counts), 1))

    def across(value: float) -> float:
        return left + (width - left - right) * value / columns[-1]

    parts = [
        rule_down(across(tick), top, height - floor, f"{tick:,.0f}") for tick in columns if tick % 1 == 0
    ]
    parts.append(text((left + width - right) / 2, height - 6, "records", anchor="middle", kind="faint"))
    for index, (name, own) in enumerate(zip(names, counts, strict=True)):
        y, begun = top + pitch * index, 0
        parts.append(text(left - 10, y + pitch / 2 + 4, short(name, letters), anchor="end"))
        for place, count in enumerate(own):
            if count:
                parts.append(_part(place, across(begun), y + 2, across(begun + count), pitch - 5))
            begun += count
        parts.append(text(across(begun) + 8, y + pitch / 2 + 4, f"{begun:,}", anchor="start", kind="faint"))
    return svg("partition", title, height, parts, width=width)


def _part(place: int, x1: float, y: float, x2: float, high: float) -> str:
    return f'<rect class="part-{place % COLOURS}" x="{x1:.2f}" y="{y:.1f}" width="{x2 - x1:.2f}" height="{high}"/>'


def _key(place: int) -> str:
    return f'<svg class="key" viewBox="0 0 16 16" aria-hidden="true">{_part(place, 2, 2, 14, 12)}</svg>'


def _few(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> tuple[list[str], list[list[int]]]:
    """At most so many labels as there are colours: the most frequent, and the others as one behind them."""
    if len(labels) <= _SHOWN_LABELS:
        return list(labels), [list(own) for own in counts]
    frequent = sorted(range(len(labels)), key=lambda label: (-sum(own[label] for own in counts), label))
    kept = sorted(frequent[: _SHOWN_LABELS - 1])
    rest = len(labels) - len(kept)
    named = [*(labels[label] for label in kept), f"{rest} others"]
    few = [[own[label] for label in kept] for own in counts]
    return named, [[*held, sum(own) - sum(held)] for held, own in zip(few, counts, strict=True)]
