"""The shapes that charts are drawn of, as SVG text; whoever writes a number or a name writes it here.

Colours are CSS classes of the page around, so light and dark follow the reader. Shapes repeat the colours.
"""

import math
from collections.abc import Sequence
from html import escape

WIDTH = 760
"""Of a chart, in the units of its own view box: pixels of a desk's screen."""
NARROW = 360
"""Of the same chart drawn for a phone, where the other one's letters would be 5 pixels high."""
COLOURS = 8
"""Different ones; the ninth series has the first again, under another shape."""
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#5f6872")
"""Okabe and Ito's, for all kinds of sight, without black and yellow."""
SERIES_STYLE = ".joined { fill: none; stroke-opacity: 0.45; } " + " ".join(
    f".series-{place} {{ fill: {colour}; stroke: {colour}; }}" for place, colour in enumerate(PALETTE)
)
"""Of marks that belong together, and of the line through them."""


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


def mark(state: str, x: float, y: float, radius: float) -> str:
    """One state as a shape of its own: disc, square with a bar, cross, ring, point."""
    match state:
        case "answered":
            return disc("answered", x, y, radius)
        case "refused":
            side = 1.8 * radius
            hole = box("hole", x, y, side / 2, max(radius * 0.3, 1.0))
            return box("refused", x, y, side, side) + hole
        case "rejected":
            low, high, left, right = y - 0.8 * radius, y + 0.8 * radius, x - 0.8 * radius, x + 0.8 * radius
            strokes = (
                f"M{left:.1f} {low:.1f}L{right:.1f} {high:.1f}M{left:.1f} {high:.1f}L{right:.1f} {low:.1f}"
            )
            return f'<path class="rejected" d="{strokes}"/>'
        case "silent":
            return disc("silent", x, y, radius * 0.85)
        case _:
            return disc("not-asked", x, y, 1.5)


def disc(kind: str, x: float, y: float, radius: float) -> str:
    """A disc of this class."""
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'


def box(kind: str, x: float, y: float, width: float, height: float) -> str:
    """A rectangle around its centre (x, y)."""
    left, top = x - width / 2, y - height / 2
    return f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def svg(name: str, title: str, height: float, parts: Sequence[str], *, width: float = WIDTH) -> str:
    """The whole chart, with what it shows for those who hear it. name: its own on the page at this width."""
    own = f"{name}-narrow-title" if width == NARROW else f"{name}-title"
    kind = ' class="narrow"' if width == NARROW else ""
    opening = f'<svg{kind} viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{own}">'
    return "\n".join([opening, f'<title id="{own}">{escape(title)}</title>', *parts, "</svg>"])


def margins(width: float) -> tuple[float, float, int]:
    """Left of the rows for their names, right of them for a value, and letters that a name has there."""
    return (150, 84, 18) if width > NARROW else (84, 62, 10)


def rule_across(left: float, right: float, y: float, label: str) -> str:
    """A horizontal line of the grid with its label at the left."""
    grid = f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
    return grid + text(left - 10, y + 4, label, anchor="end")


def rule_down(x: float, top: float, bottom: float, label: str) -> str:
    """A vertical line of the grid with its label below."""
    grid = f'<line class="grid" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>'
    return grid + text(x, bottom + 18, label, anchor="middle")


def dashed(x1: float, y1: float, x2: float, y2: float) -> str:
    """A dashed line: a limit."""
    return f'<line class="limit" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def text(x: float, y: float, label: str, *, anchor: str, kind: str = "") -> str:
    """A label; anchor is start, middle or end."""
    shade = f' class="{kind}"' if kind else ""
    return f'<text{shade} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(label)}</text>'


def plain(label: str) -> str:
    """The label of a round number: `80 %`, not `80.0 %`."""
    return label.replace(".0 %", " %")


def short(name: str, most: int = 18) -> str:
    """The name, its middle left out where it is long."""
    half = most // 2 - 1
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"
