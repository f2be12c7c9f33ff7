"""The chart of a comparison: means and their intervals side by side, on a page or as a file of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedlora.export.shapes import COLOURS, PALETTE, WIDTH, plain, rule_across, short, svg, text, ticks


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Values of one name, one a column: low end, middle and high end of an interval; None where there is none."""

    name: str
    values: Sequence[tuple[float, float, float] | None]


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

    parts = [rule_across(left, WIDTH - right, up(row), plain(show(row))) for row in rows]
    middles = [left + wide * (column + 0.5) for column in range(len(columns))]
    parts += [
        text(x, height - bottom + 20, name, anchor="middle") for x, name in zip(middles, columns, strict=True)
    ]
    parts.append(text((left + WIDTH - right) / 2, height - 6, across, anchor="middle", kind="faint"))
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
        parts.append(text(WIDTH - right + 32, y + 4, short(one.name), anchor="start"))
    return svg("intervals", title, height, parts)


def standalone(chart: str) -> str:
    """The chart as a file of its own, with its colours in it."""
    opening, _, rest = chart.partition("\n")
    opening = opening.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{opening}\n<style>{_STYLE}</style>\n{rest}\n"


_STYLE = (
    "svg { background: #ffffff; font-family: system-ui, sans-serif; } text { fill: #1c2024; font-size: 12.5px; } "
    "text.faint { fill: #5f6872; } .grid { stroke: #dfe2e5; } .joined { fill: none; stroke-opacity: 0.45; } "
    + " ".join(f".series-{i} {{ fill: {colour}; stroke: {colour}; }}" for i, colour in enumerate(PALETTE))
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
