"""Small charts as SVG text: lines, bars against a limit, a matrix of states. Nothing from elsewhere.

Colours are CSS classes of the page around, so light and dark follow the reader. Shapes repeat the colours.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 760
"""Of every chart, in the units of its own view box."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Values of one name, one a column: low end, middle and high end of an interval; None where there is none."""

    name: str
    values: Sequence[tuple[float, float, float] | None]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers covering [low, high], about `count` of them, in steps of 1, 2 or 5 at a power of ten."""
    span = high - low
    if not span > 0:
        span = abs(high) or 1.0
        low, high = low - span / 2, high + span / 2
    raw = span / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if raw <= factor * power * (1 + 1e-9))
    first = math.floor(low / step + 1e-9)
    return [round(step * index, 12) for index in range(first, math.ceil(high / step - 1e-9) + 1)]


def line_chart(
    points: Sequence[tuple[int, float]],
    *,
    before: float | None,
    title: str,
    show: Callable[[float], str],
    name: str = "score",
    floor: float | None = None,
) -> str:
    """A curve over rounds, with the value before the first one as a dashed line.

    Args:
        points: (round, value), rounds ascending; at least one.
        before: the value that nothing had yet changed.
        title: what the chart shows, for those who hear it.
        show: how a value is written.
        name: its own on the page.
        floor: where the axis begins; None: about where the values do.
    """
    left, right, top, bottom, height = 64, 24, 20, 44, 300
    marks = [(0, before), *points] if before is not None and points[0][0] > 0 else list(points)
    last = max(marks[-1][0], 1)
    low, high = min(value for _, value in marks), max(value for _, value in marks)
    rows = ticks(low, high) if floor is None else ticks(floor, high if high > floor else floor + 1)

    def across(index: float) -> float:
        return left + (WIDTH - left - right) * index / last

    def up(value: float) -> float:
        return height - bottom - (height - top - bottom) * (value - rows[0]) / (rows[-1] - rows[0])

    parts = [_row(left, WIDTH - right, up(row), _plain(show(row))) for row in rows]
    columns = [tick for tick in ticks(0, last, min(last + 1, 9)) if tick <= last and tick == int(tick)]
    parts += [_text(across(tick), height - bottom + 20, str(int(tick)), anchor="middle") for tick in columns]
    parts.append(_text((left + WIDTH - right) / 2, height - 6, "round", anchor="middle", kind="faint"))
    if before is not None:
        parts.append(_dashed(left, up(before), WIDTH - right, up(before)))
        parts.append(
            _text(
                WIDTH - right, up(before) - 7, f"before training {show(before)}", anchor="end", kind="faint"
            )
        )
    line = " ".join(f"{across(index):.1f},{up(value):.1f}" for index, value in marks)
    parts.append(f'<polyline class="curve" points="{line}"/>')
    dots = marks if len(marks) <= 60 else marks[-1:]
    parts += [f'<circle class="dot" cx="{across(i):.1f}" cy="{up(v):.1f}" r="3.5"/>' for i, v in dots]
    falls = len(marks) > 1 and marks[-2][1] > marks[-1][1]
    at = _beside_the_last(up(marks[-1][1]), top, height - bottom, falls=falls)
    parts.append(_text(across(marks[-1][0]), at, show(marks[-1][1]), anchor="end", kind="strong"))
    return _svg(name, title, height, parts)


def bar_chart(
    values: Sequence[tuple[str, float]], *, limit: float | None, title: str, show: Callable[[float], str]
) -> str:
    """One horizontal bar a name, and the limit that none may pass as a dashed line."""
    left, right, top, pitch = 150, 84, 28, 24
    height = top + pitch * len(values) + 30
    columns = ticks(0.0, max([value for _, value in values] + ([limit] if limit else []) + [1e-9]))

    def across(value: float) -> float:
        return left + (WIDTH - left - right) * value / columns[-1]

    parts = [_column(across(tick), top, height - 30, f"{tick:g}") for tick in columns]
    for index, (name, value) in enumerate(values):
        y = top + pitch * index
        over = " over" if limit is not None and value > limit * (1 + 1e-9) else ""
        width = across(value) - left
        parts.append(_text(left - 10, y + 16, _short(name), anchor="end"))
        middle = y + 5 + (pitch - 9) / 2
        parts.append(_box(f"bar{over}", left + width / 2, middle, width, pitch - 9))
    if limit is not None:
        parts.append(_dashed(across(limit), top - 6, across(limit), height - 30))
        parts.append(_text(across(limit), top - 12, f"target {show(limit)}", anchor="middle", kind="faint"))
    parts += [
        _text(WIDTH - right + 14, top + pitch * index + 16, show(value), anchor="start", kind="strong")
        for index, (_, value) in enumerate(values)
    ]
    return _svg("epsilon", title, height, parts)


def matrix_chart(
    names: Sequence[str], rounds: Sequence[int], states: Mapping[tuple[str, int], str], *, title: str
) -> str:
    """Who did what in which round. A state is answered, refused, rejected or silent; no entry: not asked."""

    def cell(name: str, index: int, x: float, y: float, radius: float) -> str:
        return mark(states.get((name, index), "not-asked"), x, y, 0.68 * radius)

    return _grid("participation", names, rounds, cell, title=title)


def size_chart(
    names: Sequence[str], rounds: Sequence[int], sizes: Mapping[tuple[str, int], float], *, title: str
) -> str:
    """How much there was of whom in which round, as the area of a disc; a ring: none. No entry: nobody knows.

    Args:
        names: one row each. rounds: one column each.
        sizes: none negative; the largest fills its place.
        title: what the chart shows, for those who hear it.
    """
    largest = max([*sizes.values(), 0.0]) or 1.0

    def cell(name: str, index: int, x: float, y: float, radius: float) -> str:
        size = sizes.get((name, index))
        if size is None:
            return mark("not-asked", x, y, radius)
        if size == 0:
            return _disc("none", x, y, 0.34 * radius)
        return _disc("answered", x, y, max(radius * math.sqrt(size / largest), 1.5))

    return _grid("sizes", names, rounds, cell, title=title)


Panel = tuple[str, str, Sequence[float]]
"""A label, a note and values, the largest first."""


def panels_chart(panels: Sequence[Panel], *, title: str) -> str:
    """Small bar charts side by side, all of one scale."""
    across, pitch, wide, tall, head = 4, WIDTH / 4, WIDTH / 4 - 26, 74, 40
    largest = max([value for _, _, values in panels for value in values], default=0.0) or 1.0
    parts: list[str] = []
    for number, (label, note, values) in enumerate(panels):
        left, top = pitch * (number % across) + 4, (head + tall + 18) * (number // across)
        floor, bar = top + head + tall, wide / max(len(values), 1)
        parts.append(_text(left, top + 16, _short(label, 24), anchor="start", kind="strong"))
        parts.append(_text(left, top + 32, note, anchor="start", kind="faint"))
        parts.append(f'<line class="grid" x1="{left:.1f}" y1="{floor}" x2="{left + wide:.1f}" y2="{floor}"/>')
        for place, value in enumerate(values):
            high = tall * value / largest
            middle = left + bar * (place + 0.5)
            parts.append(_box("bar", middle, floor - high / 2, min(0.8 * bar, 22.0), high))
    return _svg("panels", title, (head + tall + 18) * math.ceil(len(panels) / across), parts)


def _grid(
    name: str,
    names: Sequence[str],
    rounds: Sequence[int],
    cell: Callable[[str, int, float, float, float], str],
    *,
    title: str,
) -> str:
    """Rows of clients, columns of rounds; `cell` draws client, round, x, y into a place of that radius."""
    left, right, top, pitch = 150, 16, 12, 24
    wide = min(36.0, (WIDTH - left - right) / len(rounds))
    height = top + pitch * len(names) + 44
    parts = [
        _text(left - 10, top + pitch * row + pitch / 2 + 4, _short(name), anchor="end")
        for row, name in enumerate(names)
    ]
    for row, client in enumerate(names):
        for column, index in enumerate(rounds):
            x, y = left + wide * (column + 0.5), top + pitch * (row + 0.5)
            parts.append(cell(client, index, x, y, min(wide, pitch) / 2))
    every = math.ceil(len(rounds) / max(1, int((WIDTH - left) / 36)))
    parts += [
        _text(left + wide * (column + 0.5), height - 24, str(index), anchor="middle")
        for column, index in enumerate(rounds)
        if column % every == 0 or len(rounds) <= every
    ]
    parts.append(_text(left + wide * len(rounds) / 2, height - 4, "round", anchor="middle", kind="faint"))
    return _svg(name, title, height, parts)


def interval_chart(
    columns: Sequence[str],
    series: Sequence[Series],
    *,
    title: str,
    across: str,
    show: Callable[[float], str],
) -> str:
    """Middles as marks with a bar over their interval, side by side in each column and joined between columns.

    Args:
        columns: what stands under each, evenly apart.
        series: of as many values as there are columns.
        title: what the chart shows, for those who hear it.
        across: what the columns are.
        show: how a value is written.
    """
    left, right, top, bottom, base = 64, 190, 20, 48, 340
    height = max(base, top + bottom + 20 * len(series))
    known = [value for one in series for point in one.values if point is not None for value in point]
    rows = ticks(min(known), max(known)) if known else [0.0, 1.0]
    wide = (WIDTH - left - right) / len(columns)
    apart = min(14.0, 0.7 * wide / max(len(series), 1))

    def up(value: float) -> float:
        return height - bottom - (height - top - bottom) * (value - rows[0]) / (rows[-1] - rows[0])

    parts = [_row(left, WIDTH - right, up(row), _plain(show(row))) for row in rows]
    middles = [left + wide * (column + 0.5) for column in range(len(columns))]
    parts += [
        _text(x, height - bottom + 20, name, anchor="middle")
        for x, name in zip(middles, columns, strict=True)
    ]
    parts.append(_text((left + WIDTH - right) / 2, height - 6, across, anchor="middle", kind="faint"))
    for index, one in enumerate(series):
        shift = apart * (index - (len(series) - 1) / 2)
        points = [
            (x + shift, *(up(value) for value in point))
            for x, point in zip(middles, one.values, strict=True)
            if point is not None
        ]
        parts.append(_intervals(index, points))
        y = top + 10 + 20 * index
        parts.append(f'<g class="series-{index % COLOURS}">{_shape(index, WIDTH - right + 20, y)}</g>')
        parts.append(_text(WIDTH - right + 32, y + 4, _short(one.name), anchor="start"))
    return _svg("intervals", title, height, parts)


def standalone(chart: str) -> str:
    """The chart as a file of its own, with its colours in it."""
    opening, _, rest = chart.partition("\n")
    opening = opening.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{opening}\n<style>{_STYLE}</style>\n{rest}\n"


COLOURS = 8
"""Different ones; the ninth series has the first again, under another shape."""
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#5f6872")
"""Okabe and Ito's, for all kinds of sight, without black and yellow."""
_STYLE = (
    "svg { background: #ffffff; font-family: system-ui, sans-serif; } text { fill: #1c2024; font-size: 12.5px; } "
    "text.faint { fill: #5f6872; } .grid { stroke: #dfe2e5; } .joined { fill: none; stroke-opacity: 0.45; } "
    + " ".join(f".series-{i} {{ fill: {colour}; stroke: {colour}; }}" for i, colour in enumerate(_PALETTE))
)


def _intervals(index: int, points: Sequence[tuple[float, ...]]) -> str:
    """One series: a thin line through its marks (x, y), each over the bar from its low to its high end."""
    line = " ".join(f"{x:.1f},{middle:.1f}" for x, _, middle, _ in points)
    bars = "".join(
        f'<line x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}" stroke-width="2"/>'
        for x, low, _, high in points
    )
    shapes = "".join(_shape(index, x, middle) for x, _, middle, _ in points)
    return f'<g class="series-{index % COLOURS}"><polyline class="joined" points="{line}"/>{bars}{shapes}</g>'


def _shape(index: int, x: float, y: float) -> str:
    """A disc, a square, a lozenge or a triangle."""
    corners = (
        None,
        ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)),
        ((0, -5), (5, 4), (-5, 4)),
    )[(index + index // COLOURS) % 4]
    if corners is None:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    return f'<polygon points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)}"/>'


def mark(state: str, x: float, y: float, radius: float) -> str:
    """One state as a shape of its own: disc, square with a bar, cross, ring, point."""
    match state:
        case "answered":
            return _disc("answered", x, y, radius)
        case "refused":
            side = 1.8 * radius
            hole = _box("hole", x, y, side / 2, max(radius * 0.3, 1.0))
            return _box("refused", x, y, side, side) + hole
        case "rejected":
            low, high, left, right = y - 0.8 * radius, y + 0.8 * radius, x - 0.8 * radius, x + 0.8 * radius
            strokes = (
                f"M{left:.1f} {low:.1f}L{right:.1f} {high:.1f}M{left:.1f} {high:.1f}L{right:.1f} {low:.1f}"
            )
            return f'<path class="rejected" d="{strokes}"/>'
        case "silent":
            return _disc("silent", x, y, radius * 0.85)
        case _:
            return _disc("not-asked", x, y, 1.5)


def _disc(kind: str, x: float, y: float, radius: float) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'


def _box(kind: str, x: float, y: float, width: float, height: float) -> str:
    """A rectangle around its centre (x, y)."""
    left, top = x - width / 2, y - height / 2
    return f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def _svg(name: str, title: str, height: float, parts: Sequence[str]) -> str:
    opening = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-labelledby="{name}-title">'
    return "\n".join([opening, f'<title id="{name}-title">{escape(title)}</title>', *parts, "</svg>"])


def _row(left: float, right: float, y: float, label: str) -> str:
    grid = f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
    return grid + _text(left - 10, y + 4, label, anchor="end")


def _column(x: float, top: float, bottom: float, label: str) -> str:
    grid = f'<line class="grid" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>'
    return grid + _text(x, bottom + 18, label, anchor="middle")


def _dashed(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="limit" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _beside_the_last(y: float, top: float, floor: float, *, falls: bool) -> float:
    """Where the label of the last point stands: above it, below where the curve comes from above; inside the chart."""
    above, below = y - 10, y + 22
    if falls:
        return below if below < floor else above
    return above if above - 12 > top else below


def _text(x: float, y: float, label: str, *, anchor: str, kind: str = "") -> str:
    shade = f' class="{kind}"' if kind else ""
    return f'<text{shade} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(label)}</text>'


def _plain(label: str) -> str:
    """The label of a round number: `80 %`, not `80.0 %`."""
    return label.replace(".0 %", " %")


def _short(name: str, most: int = 18) -> str:
    half = most // 2 - 1
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"
