"""Seconds a round against participating clients, as one SVG that needs nothing around it."""

import math
from collections.abc import Sequence
from html import escape
from itertools import groupby

from at_scale.cases import FLOWER, OURS, Case
from at_scale.figures import Rows, pooled

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 70, 190, 30, 56
LINE = 16
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#444}line{stroke:#ddd}polyline{fill:none;stroke-width:2}circle{fill:#fff}"
    ".ours{stroke:#0b6e4f}.peer{stroke:#b3541e}polyline.big{stroke-dasharray:6 4}"
)


def plot(rows: Rows, cases: Sequence[Case]) -> str:
    """Both axes by powers of ten; solid 0.3 MB, dashed 3 MB."""
    curves = _curves(rows, cases)
    points = [point for _, _, held in curves for point in held] or [(1, 1.0), (10, 1.0)]
    across = _Scale([x for x, _ in points], LEFT, WIDTH - RIGHT)
    up = _Scale([y for _, y in points], HEIGHT - BOTTOM, TOP)
    parts = [f"<style>{STYLE}</style>"]
    for power in across.powers:
        x = across(10.0**power)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(_text(x, HEIGHT - BOTTOM + 20, f"{10**power:,}", "middle"))
    for power in up.powers:
        y = up(10.0**power)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{10.0**power:g}", "end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "participating clients", "middle"))
    parts.append(_text(LEFT - 40, TOP - 12, "seconds a round", "start"))
    lowest = math.inf
    for label, kind, held in sorted(curves, key=lambda curve: curve[2][-1][1]):
        line = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in held)
        parts.append(f'<polyline class="{kind}" points="{line}"/>')
        parts += [f'<circle class="{kind}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.5"/>' for x, y in held]
        lowest = min(up(held[-1][1]) + 4, lowest - LINE)  # no label on another
        parts.append(_text(across(held[-1][0]) + 8, lowest, label, "start"))
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    title = "<title>Seconds a round against participating clients, fedlora and stock Flower</title>"
    return "\n".join([opening, title, *parts, "</svg>"]) + "\n"


class _Scale:
    """Powers of ten around the values, laid out between two places."""

    def __init__(self, values: Sequence[float], first: float, last: float) -> None:
        low = math.floor(math.log10(min(values)))
        high = max(low + 1, math.ceil(math.log10(max(values)) - 1e-9))
        self.powers = range(low, high + 1)
        self.low, self.span, self.first, self.last = low, high - low, first, last

    def __call__(self, value: float) -> float:
        return self.first + (self.last - self.first) * (math.log10(value) - self.low) / self.span


def _curves(rows: Rows, cases: Sequence[Case]) -> list[tuple[str, str, list[tuple[int, float]]]]:
    """(label, CSS class, points by clients) of each payload and arm that was run with everybody taking part."""
    whole = [case for case in cases if case.model == "tiny" and case.asked == case.clients and not case.null]
    found = []
    for size, held in groupby(
        sorted(whole, key=lambda case: (case.megabytes, case.asked)), lambda case: case.megabytes
    ):
        group = list(held)
        for arm, kind in ((OURS, "ours"), (FLOWER, "peer")):
            measured = [(case.asked, pooled(rows, case.name, arm)) for case in group]
            points = [(asked, figures["round_s"]) for asked, figures in measured if figures is not None]
            if points:
                found.append((f"{arm}, {size:g} MB", f"{kind}{' big' if size > 1 else ''}", points))
    return found


def _text(x: float, y: float, label: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(label)}</text>'
