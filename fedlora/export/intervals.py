"""The chart of a comparison: means and their intervals side by side, on a page or as a file of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.export.shapes import (
    COLOURS,
    NARROW,
    SERIES_STYLE,
    WIDTH,
    plain,
    rule_across,
    short,
    svg,
    text,
    ticks,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Values of one name, one a column: low end, middle and high end of an interval; None where there is none."""

    name: str
    values: Sequence[tuple[float, float, float] | None]


def point(row: Mapping[str, Any], metric: str) -> tuple[float, float, float] | None:
    """The interval of a table's row as it is drawn: that of an accuracy ends where accuracies do."""
    if row["mean"] is None:
        return None
    low, high = row["interval"] or (row["mean"], row["mean"])
    return (max(low, 0.0), row["mean"], min(high, 1.0)) if metric == "accuracy" else (low, row["mean"], high)


def interval_chart(
    columns: Sequence[str],
    series: Sequence[Series],
    *,
    title: str,
    across: str,
    show: Callable[[float], str],
    width: float = WIDTH,
) -> str:
    """Middles as marks with a bar over their interval, side by side in each column and joined between columns.

    The names stand beside it, on a phone below.

    Args:
        columns: what stands under each, evenly apart.
        series: of as many values as there are columns.
        title: what the chart shows, for those who hear it.
        across: what the columns are.
        show: how a value is written.
        width: WIDTH or NARROW.
    """
    below = width <= NARROW
    left, right, top, bottom = (52, 8, 20, 48) if below else (64, 190, 20, 48)
    height = 300 if below else max(340, top + bottom + 20 * len(series))
    names = (left, height + 16) if below else (width - right + 20, top + 10)
    known = [value for one in series for point in one.values if point is not None for value in point]
    rows = ticks(min(known), max(known)) if known else [0.0, 1.0]
    wide = (width - left - right) / len(columns)
    apart = min(14.0, 0.7 * wide / max(len(series), 1))

    def up(value: float) -> float:
        return height - bottom - (height - top - bottom) * (value - rows[0]) / (rows[-1] - rows[0])

    parts = [rule_across(left, width - right, up(row), plain(show(row))) for row in rows]
    middles = [left + wide * (column + 0.5) for column in range(len(columns))]
    parts += [
        text(x, height - bottom + 20, name, anchor="middle") for x, name in zip(middles, columns, strict=True)
    ]
    parts.append(text((left + width - right) / 2, height - 6, across, anchor="middle", kind="faint"))
    for index, one in enumerate(series):
        shift = apart * (index - (len(series) - 1) / 2)
        points = [
            (x + shift, *(up(value) for value in point))
            for x, point in zip(middles, one.values, strict=True)
            if point is not None
        ]
        parts.append(_intervals(index, points))
        x, y = names[0], names[1] + 20 * index
        parts.append(f'<g class="series-{index % COLOURS}">{_shape(index, x, y)}</g>')
        parts.append(text(x + 12, y + 4, short(one.name, 36 if below else 22), anchor="start"))
    return svg("intervals", title, height + (20 * len(series) + 16 if below else 0), parts, width=width)


def standalone(chart: str) -> str:
    """The chart as a file of its own, with its colours in it."""
    opening, _, rest = chart.partition("\n")
    opening = opening.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{opening}\n<style>{_STYLE}</style>\n{rest}\n"


_STYLE = (
    "svg { background: #ffffff; font-family: system-ui, sans-serif; } text { fill: #1c2024; font-size: 12.5px; } "
    "text.faint { fill: #5f6872; } .grid { stroke: #dfe2e5; } " + SERIES_STYLE
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
