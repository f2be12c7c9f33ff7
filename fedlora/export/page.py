"""The plain HTML around a report: the style sheet, tables, and a text that can hold no markup."""

from collections.abc import Callable, Iterable, Sequence
from html import escape

from fedlora.export.shapes import NARROW, PALETTE, SERIES_STYLE, WIDTH

STYLE = (
    """
:root { color-scheme: light dark; --paper: #fbfbf9; --sheet: #ffffff; --ink: #1c2024; --faint: #5f6872;
  --rule: #dfe2e5;
  --accent: #0b6e74; --soft: #e3f1f1; --warn: #a84300; --bad: #b3162c; --warnsoft: #fdf0e4; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #14171a; --sheet: #1b1f23; --ink: #e6e8ea;
  --faint: #9aa4ae;
  --rule: #343a40; --accent: #5cc7c9; --soft: #173436; --warn: #f0a35e; --bad: #ff7d86;
  --warnsoft: #33261a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 48px 0 6px; letter-spacing: -0.005em; }
h3 { font-size: 16px; margin: 24px 0 6px; }
p { margin: 0 0 12px; max-width: 68ch; }
.lead { color: var(--faint); margin-bottom: 24px; overflow-wrap: anywhere; }
.flag { display: inline-block; padding: 3px 10px; border-radius: 999px; background: var(--soft);
  color: var(--accent);
  font-weight: 600; font-size: 14px; margin: 0 6px 6px 0; }
.flag.warn { background: var(--warnsoft); color: var(--warn); }
.figures { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1px; margin: 20px 0 0; padding: 0;
  background: var(--rule); border: 1px solid var(--rule); border-radius: 10px; overflow: hidden; }
.figures div { background: var(--sheet); padding: 16px 18px; display: flex; flex-direction: column; }
.figures dt { color: var(--faint); font-size: 13px; }
.figures dd { margin: 0; font-size: 26px; font-weight: 600; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.figures small { color: var(--faint); font-size: 13px; font-weight: 400; }
figure { margin: 14px 0 8px; padding: 18px 16px 10px; background: var(--sheet);
  border: 1px solid var(--rule);
  border-radius: 10px; overflow-x: auto; }
svg { display: block; width: 100%; min-width: 560px; height: auto; }
svg.narrow { display: none; min-width: 0; }
svg.key { display: inline-block; width: 16px; min-width: 0; height: 16px; vertical-align: -3px;
  margin-right: 5px; }
.keys span { margin-right: 18px; white-space: nowrap; color: var(--faint); font-size: 14px; }
svg text { fill: var(--ink); font-size: 12.5px; font-variant-numeric: tabular-nums; }
svg text.faint { fill: var(--faint); } svg text.strong { font-weight: 600; }
.strong, .faint { paint-order: stroke; stroke: var(--sheet); stroke-width: 3px; }
.grid { stroke: var(--rule); } .limit { stroke: var(--faint); stroke-width: 1.5; stroke-dasharray: 5 4; }
.curve { fill: none; stroke: var(--accent); stroke-width: 2.5; stroke-linejoin: round;
  stroke-linecap: round; }
.dot { fill: var(--sheet); stroke: var(--accent); stroke-width: 2.5; } .bar { fill: var(--accent); }
  .bar.over { fill: var(--bad); }
.answered { fill: var(--accent); } .refused { fill: var(--warn); } .hole { fill: var(--sheet); }
.rejected { stroke: var(--bad); stroke-width: 2.5; fill: none; } .silent { fill: none; stroke: var(--warn);
  stroke-width: 1.5; }
.none { fill: none; stroke: var(--faint); }
.not-asked { fill: var(--faint); opacity: .6; } .band { fill: var(--accent); opacity: .22; }
polyline.limit { fill: none; }
.age-0 { fill: var(--accent); opacity: .55; } .age-1 { fill: var(--warn); opacity: .3; }
.age-2 { fill: var(--warn); opacity: .45; } .age-3 { fill: var(--warn); opacity: .6; }
.age-4 { fill: var(--warn); opacity: .8; } .age-5 { fill: var(--warn); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 10px 0; font-size: 15px;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 7px 14px 7px 0;
  border-bottom: 1px solid var(--rule); overflow-wrap: anywhere; }
.scroll th, .scroll td { overflow-wrap: break-word; } .scroll td:first-child { white-space: nowrap; }
.texts td { width: 33%; white-space: pre-wrap; }
th { font-weight: 500; color: var(--faint); } tbody th { width: 32%; } td.number { text-align: right; }
details { margin: 6px 0; } summary { cursor: pointer; color: var(--faint); font-size: 14px; }
pre { background: var(--sheet); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px;
  overflow-x: auto; font-size: 13.5px; }
.statement { border-left: 4px solid var(--accent); padding-left: 18px; margin-top: 14px; }
.statement.warn { border-color: var(--warn); }
footer { margin-top: 56px; color: var(--faint); font-size: 14px; overflow-wrap: anywhere; }
@media screen and (max-width: 600px) {
  main { padding: 24px 16px 48px; } h1 { font-size: 25px; } h2 { margin-top: 40px; }
  .figures { grid-template-columns: repeat(2, 1fr); } .figures div { padding: 12px; }
  .figures dd { font-size: 21px; } figure { padding: 12px 8px 8px; }
  figure:has(svg.narrow) svg:not(.narrow) { display: none; } svg.narrow { display: block; }
  .scroll table { font-size: 13.5px; } .scroll th, .scroll td { padding-right: 10px; }
  .statement { padding-left: 12px; } ul { padding-left: 20px; }
  .texts thead { display: none; } .texts tr { display: block; padding: 10px 0; }
  .texts td { display: block; width: auto; border: 0; padding: 0 0 8px; }
  .texts td::before { content: attr(data-head); display: block; color: var(--faint); font-size: 13px; }
  .texts tr { border-bottom: 1px solid var(--rule); } }
@page { margin: 15mm 14mm 16mm; }
@media print {
  :root { color-scheme: light; --paper: #fff; --sheet: #fff; }
  body { font-size: 10.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; } p { max-width: none; } table, pre { font-size: 9pt; }
  svg { min-width: 0; max-height: 225mm; } svg.key { max-height: none; }
  h2, h3, summary, h2 + p, .keys { break-after: avoid; } h2 { margin-top: 26px; }
  figure, .figures, tr, li { break-inside: avoid; } thead { display: table-header-group; }
  .promise { break-before: page; } p, li { orphans: 3; widows: 3; }
  .scroll, pre, figure { overflow: visible; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  .scroll th, .scroll td { overflow-wrap: anywhere; } .scroll td:first-child { white-space: normal; }
  details::details-content { content-visibility: visible; block-size: auto; }
  summary { list-style: none; } }
"""
    + SERIES_STYLE
    + "\n"
    + "".join(f".part-{place} {{ fill: {colour}; }}\n" for place, colour in enumerate(PALETTE))
)


def page(title: str, body: Iterable[str]) -> str:
    """One self-contained HTML document; `body` is markup, `title` is text."""
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>"
    )
    inside = "\n".join(body)
    top = f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>'
    return f"{top}\n<body>\n<main>\n{inside}\n</main>\n</body>\n</html>\n"


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values, both plain text."""
    lines = [f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows]
    return "\n".join(["<table>", "<tbody>", *lines, "</tbody>", "</table>"])


def figure(draw: Callable[[float], str]) -> str:
    """A chart as `draw` draws it at a width, once for a desk and once for a phone: the page shows one of them."""
    return f"<figure>\n{draw(WIDTH)}\n{draw(NARROW)}\n</figure>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a head, all plain text; it scrolls by itself where it is wider than the page."""
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f'<div class="scroll">{_table("", heads, lines)}</div>'


def texts(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of long plain texts: side by side, on a phone each under its head."""
    lines = [
        "".join(
            f'<td data-head="{escape(name)}">{escape(cell)}</td>'
            for name, cell in zip(heads, row, strict=True)
        )
        for row in rows
    ]
    return _table(' class="texts"', heads, lines)


def _table(kind: str, heads: Sequence[str], lines: Iterable[str]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    return "\n".join(
        [
            f"<table{kind}>",
            f"<thead><tr>{head}</tr></thead>",
            "<tbody>",
            *(f"<tr>{x}</tr>" for x in lines),
            "</tbody>",
            "</table>",
        ]
    )


def folded(label: str, inside: str) -> str:
    """Markup that opens on a click; `label` is text."""
    return f"<details><summary>{escape(label)}</summary>\n{inside}\n</details>"
