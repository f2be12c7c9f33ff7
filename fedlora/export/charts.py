"""Small charts as SVG text: lines, bars against a limit, panels. Nothing from elsewhere.

Colours are CSS classes of the page around, so light and dark follow the reader. Each is drawn for a desk or, with
`width=NARROW`, for a phone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fedlora.export.shapes import (
    NARROW,
    WIDTH,
    box,
    dashed,
    margins,
    plain,
    rule_across,
    rule_down,
    short,
    svg,
    text,
    ticks,
)

Point = tuple[int, float]
"""A round and a value."""
Place = tuple[float, float]
"""Where something lies on paper: x and y."""
LETTER = 6.5
"""About how wide one is."""
ROOM = 14.0
"""From the middle of a label to a line that it does not touch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What a curve is looked at beside: a dashed one, and the lowest and highest value at each point of the curve."""

    label: str = ""
    points: Sequence[Point] = ()
    spread: Sequence[tuple[float, float]] = ()

    def values(self) -> list[float]:
        """All that must fit on the axis."""
        return [value for _, value in self.points] + [end for ends in self.spread for end in ends]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axes:
    """Where rounds and values lie on paper."""

    width: float
    rows: Sequence[float]
    last: int
    left: float = 64
    right: float = 24
    top: float = 30
    bottom: float = 44
    height: float = 300

    @property
    def edge(self) -> float:
        return self.width - self.right

    @property
    def floor(self) -> float:
        return self.height - self.bottom

    def across(self, index: float) -> float:
        return self.left + (self.edge - self.left) * index / self.last

    def up(self, value: float) -> float:
        share = (value - self.rows[0]) / (self.rows[-1] - self.rows[0])
        return self.floor - (self.floor - self.top) * share

    def places(self, points: Sequence[Point]) -> list[Place]:
        return [(self.across(index), self.up(value)) for index, value in points]

    def line(self, points: Sequence[Point]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.places(points))

    def drawn(self, show: Callable[[float], str], unit: str) -> list[str]:
        """The grid, its numbers and what they are of."""
        parts = [rule_across(self.left, self.edge, self.up(row), plain(show(row))) for row in self.rows]
        most = min(self.last + 1, 9 if self.width > NARROW else 6)
        columns = [tick for tick in ticks(0, self.last, most) if tick <= self.last and tick == int(tick)]
        parts += [
            text(self.across(tick), self.floor + 20, str(int(tick)), anchor="middle") for tick in columns
        ]
        middle = (self.left + self.edge) / 2
        parts.append(text(middle, self.height - 6, "round", anchor="middle", kind="faint"))
        parts.append(text(4, 14, unit, anchor="start", kind="faint"))
        return parts


def line_chart(
    points: Sequence[Point],
    *,
    before: float | None,
    title: str,
    show: Callable[[float], str],
    name: str = "score",
    unit: str = "",
    floor: float | None = None,
    beside: Beside | None = None,
    width: float = WIDTH,
) -> str:
    """A curve over rounds, with the value before the first one as a dashed line.

    Args:
        points: (round, value), rounds ascending; at least one.
        before: the value that nothing had yet changed.
        title: what the chart shows, for those who hear it.
        show: how a value is written.
        name: its own on the page.
        unit: what the values are, above their axis.
        floor: where the axis begins; None: about where the values do.
        beside: what else is in the chart.
        width: WIDTH or NARROW.
    """
    beside = beside or Beside()
    marks = [(0, before), *points] if before is not None and points[0][0] > 0 else list(points)
    values = [value for _, value in marks] + beside.values()
    low, high = min(values), max(values)
    rows = ticks(low, high) if floor is None else ticks(floor, high if high > floor else floor + 1)
    axes = _Axes(width=width, rows=rows, last=max(marks[-1][0], 1))
    parts = axes.drawn(show, unit)
    last = show(marks[-1][1])
    at = _beside_the_last(axes, marks, last)
    drawn = [axes.places(marks), [(axes.edge - LETTER * len(last), at - 4), (axes.edge, at - 4)]]
    if before is not None:
        level = [(axes.left, axes.up(before)), (axes.edge, axes.up(before))]
        parts.append(dashed(*level[0], *level[1]))
        parts.append(_label(axes, level, f"before training {show(before)}", drawn, at_the_end=True))
    parts += _spread(axes, points, beside.spread)
    if beside.points:
        parts.append(f'<polyline class="limit" points="{axes.line(beside.points)}"/>')
        parts.append(_label(axes, axes.places(beside.points), beside.label, drawn, at_the_end=False))
    parts.append(f'<polyline class="curve" points="{axes.line(marks)}"/>')
    dots = marks if len(marks) <= 60 else marks[-1:]
    parts += [
        f'<circle class="dot" cx="{axes.across(i):.1f}" cy="{axes.up(v):.1f}" r="3.5"/>' for i, v in dots
    ]
    parts.append(text(axes.edge, at, last, anchor="end", kind="strong"))
    return svg(name, title, axes.height, parts, width=width)


def _spread(axes: _Axes, points: Sequence[Point], spread: Sequence[tuple[float, float]]) -> list[str]:
    """A bar from the lowest to the highest value at each point; a band where bars would touch."""
    ends = [(index, low, high) for (index, _), (low, high) in zip(points, spread, strict=False)]
    if len(ends) > 30:
        around = [(i, high) for i, _, high in ends] + [(i, low) for i, low, _ in reversed(ends)]
        return [f'<polygon class="band" points="{axes.line(around)}"/>']
    return [
        box("band", axes.across(i), axes.up((low + high) / 2), 8, max(axes.up(low) - axes.up(high), 1))
        for i, low, high in ends
    ]


def _label(
    axes: _Axes, line: Sequence[Place], words: str, drawn: Sequence[Sequence[Place]], *, at_the_end: bool
) -> str:
    """The words close above or below their line, near its end or its start, where nothing drawn runs through them."""
    wide = LETTER * len(words)
    left, right = max(line[0][0], axes.left) + 6, axes.edge - wide
    starts = [left + (right - left) * step / 12 for step in range(13)]
    places: list[tuple[float, Place]] = []
    for start in reversed(starts) if at_the_end else starts:
        own = _heights(line, start, start + wide)
        for y in (min(own) - 8, max(own) + 17) if own else ():
            if axes.top <= y and y + 4 <= axes.floor:
                near = [
                    abs(h - (y - 4)) for other in (line, *drawn) for h in _heights(other, start, start + wide)
                ]
                places.append((min(*near, ROOM), (start, y)))
    x, y = max(places, key=lambda place: place[0])[1] if places else (left, line[0][1] - 8)
    return text(x, y, words, anchor="start", kind="faint")


def _heights(line: Sequence[Place], left: float, right: float) -> list[float]:
    """Of the line between left and right: at the ends of that, as far as it reaches, and at every corner."""
    found = [y for x, y in line if left <= x <= right]
    for end in (left, right):
        for (x0, y0), (x1, y1) in pairwise(line):
            if x0 < end < x1:
                found.append(y0 + (y1 - y0) * (end - x0) / (x1 - x0))
    return found


def bar_chart(
    values: Sequence[tuple[str, float]],
    *,
    limit: float | None,
    title: str,
    unit: str,
    show: Callable[[float], str],
    width: float = WIDTH,
) -> str:
    """One horizontal bar a name, and the limit that none may pass as a dashed line. unit: what a bar's length is."""
    (left, right, letters), top, pitch, floor = margins(width), 28, 24, 44
    height = top + pitch * len(values) + floor
    columns = ticks(0.0, max([value for _, value in values] + ([limit] if limit else []) + [1e-9]))

    def across(value: float) -> float:
        return left + (width - left - right) * value / columns[-1]

    parts = [rule_down(across(tick), top, height - floor, f"{tick:g}") for tick in columns]
    parts.append(text((left + width - right) / 2, height - 6, unit, anchor="middle", kind="faint"))
    for index, (name, value) in enumerate(values):
        y = top + pitch * index
        over = " over" if limit is not None and value > limit * (1 + 1e-9) else ""
        long = across(value) - left
        parts.append(text(left - 10, y + 16, short(name, letters), anchor="end"))
        parts.append(box(f"bar{over}", left + long / 2, y + 5 + (pitch - 9) / 2, long, pitch - 9))
        parts.append(text(width - right + 14, y + 16, show(value), anchor="start", kind="strong"))
    if limit is not None:
        parts.append(dashed(across(limit), top - 6, across(limit), height - floor))
        parts.append(text(across(limit), top - 12, f"target {show(limit)}", anchor="middle", kind="faint"))
    return svg("epsilon", title, height, parts, width=width)


Panel = tuple[str, str, Sequence[float]]
"""A label, a note and values, the largest first."""


def panels_chart(
    panels: Sequence[Panel], *, title: str, show: Callable[[float], str], width: float = WIDTH
) -> str:
    """Small bar charts side by side, all of one scale; the first bar of each says its value."""
    across, tall, head = 4 if width > NARROW else 2, 74, 56
    pitch = width / across
    wide = pitch - 26
    largest = max([value for _, _, values in panels for value in values], default=0.0) or 1.0
    parts: list[str] = []
    for number, (label, note, values) in enumerate(panels):
        left, top = pitch * (number % across) + 4, (head + tall + 18) * (number // across)
        floor, bar = top + head + tall, wide / max(len(values), 1)
        parts.append(text(left, top + 16, short(label, 24), anchor="start", kind="strong"))
        parts.append(text(left, top + 32, note, anchor="start", kind="faint"))
        parts.append(f'<line class="grid" x1="{left:.1f}" y1="{floor}" x2="{left + wide:.1f}" y2="{floor}"/>')
        for place, value in enumerate(values):
            high = tall * value / largest
            middle = left + bar * (place + 0.5)
            parts.append(box("bar", middle, floor - high / 2, min(0.8 * bar, 22.0), high))
            if place == 0:
                parts.append(text(left, floor - high - 6, show(value), anchor="start", kind="faint"))
    return svg("panels", title, (head + tall + 18) * math.ceil(len(panels) / across), parts, width=width)


def _beside_the_last(axes: _Axes, marks: Sequence[Point], words: str) -> float:
    """Where the label of the last point stands, clear of the curve: above it, below where that comes from above."""
    near = _heights(axes.places(marks), axes.edge - LETTER * len(words), axes.edge) or [axes.up(marks[-1][1])]
    above, below = min(near) - 10, max(near) + 22
    if len(marks) > 1 and marks[-2][1] > marks[-1][1]:
        return below if below < axes.floor else above
    return above if above - 12 > axes.top else below
