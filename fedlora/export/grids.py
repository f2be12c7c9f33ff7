"""Charts with a row for each client and a column for each round, as SVG text: states, sizes, ages.

Colours are CSS classes of the page around, so light and dark follow the reader. Shapes repeat the colours.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

from fedlora.export.shapes import NARROW, WIDTH, box, disc, margins, mark, short, svg, text

Sizes = Mapping[tuple[str, int], float]
AGES = (0, 1, 2, 3, 5, 9)
"""The least age of each shade, in rounds; the last one is open."""


def matrix_chart(
    names: Sequence[str],
    rounds: Sequence[int],
    states: Mapping[tuple[str, int], str],
    *,
    title: str,
    width: float = WIDTH,
) -> str:
    """Who did what in which round. A state is answered, refused, rejected or silent; no entry: not asked."""

    def cell(name: str, index: int, x: float, y: float, radius: float) -> str:
        return mark(states.get((name, index), "not-asked"), x, y, 0.68 * radius)

    return _grid("participation", names, rounds, cell, title=title, width=width)


def age_chart(
    names: Sequence[str],
    rounds: Sequence[int],
    ages: Mapping[tuple[str, int], int],
    *,
    title: str,
    width: float = WIDTH,
) -> str:
    """How many rounds ago whom was last heard, as a shade and the size of a square; a ring: never. See `shade`."""

    def cell(name: str, index: int, x: float, y: float, radius: float) -> str:
        return age_mark(ages.get((name, index)), x, y, radius)

    return _grid("staleness", names, rounds, cell, title=title, width=width)


def shade(age: int) -> int:
    """Which of the shades an age has: 0 for heard in this very round."""
    return bisect_right(AGES, age) - 1


def age_mark(age: int | None, x: float, y: float, radius: float) -> str:
    """An age as a square that grows and darkens with it; None: never heard."""
    if age is None:
        return disc("none", x, y, 0.5 * radius)
    found = shade(age)
    side = 2 * radius * (0.4 + 0.6 * found / (len(AGES) - 1))
    return box(f"age-{found}", x, y, side, side)


def size_chart(
    names: Sequence[str], rounds: Sequence[int], sizes: Sizes, *, title: str, width: float = WIDTH
) -> str:
    """How much there was of whom in which round, as the area of a disc; a ring: none. No entry: nobody knows.

    Args:
        names: one row each. rounds: one column each.
        sizes: none negative; the largest fills its place.
        title: what the chart shows, for those who hear it.
        width: WIDTH or NARROW.
    """
    largest = max([*sizes.values(), 0.0]) or 1.0

    def cell(name: str, index: int, x: float, y: float, radius: float) -> str:
        size = sizes.get((name, index))
        if size is None:
            return mark("not-asked", x, y, radius)
        if size == 0:
            return disc("none", x, y, 0.34 * radius)
        return disc("answered", x, y, max(radius * math.sqrt(size / largest), 1.5))

    return _grid("sizes", names, rounds, cell, title=title, width=width)


def _grid(
    name: str,
    names: Sequence[str],
    rounds: Sequence[int],
    cell: Callable[[str, int, float, float, float], str],
    *,
    title: str,
    width: float,
) -> str:
    """Rows of clients, columns of rounds; `cell` draws client, round, x, y into a place of that radius.

    Of more rounds than a phone has room for, it shows the latest, and its axis says so.
    """
    (left, _, letters), right, top, pitch = margins(width), 16, 12, 24 if len(names) <= 30 else 15
    shown = rounds[-int((width - left - right) / 9) :] if width == NARROW else rounds
    wide = min(36.0, (width - left - right) / len(shown))
    height = top + pitch * len(names) + 44
    parts = [
        text(left - 10, top + pitch * row + pitch / 2 + 4, short(name, letters), anchor="end")
        for row, name in enumerate(names)
    ]
    for row, client in enumerate(names):
        for column, index in enumerate(shown):
            x, y = left + wide * (column + 0.5), top + pitch * (row + 0.5)
            parts.append(cell(client, index, x, y, min(wide, pitch) / 2))
    every = math.ceil(len(shown) / max(1, int((width - left) / 36)))
    parts += [
        text(left + wide * (column + 0.5), height - 24, str(index), anchor="middle")
        for column, index in enumerate(shown)
        if column % every == 0
    ]
    axis = "round" if len(shown) == len(rounds) else f"round, the latest {len(shown)}"
    parts.append(text(left + wide * len(shown) / 2, height - 4, axis, anchor="middle", kind="faint"))
    return svg(name, title, height, parts, width=width)
