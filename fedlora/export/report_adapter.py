"""The part of the report that says what the adapter is: its spectrum, and how it stands to the weights it changes."""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fedlora.export.charts import Panel, panels_chart
from fedlora.export.page import figure, folded, pairs, table
from fedlora.export.words import number

_SHOWN_SITES = 24
"""Panels of the chart; more could not be read. The numbers of all sites are in diagnostics.json."""


def what_the_adapter_is(found: Mapping[str, Any] | None) -> str:
    """Spectra, effective ranks, explained shares and intruder dimensions; nothing where nothing was measured."""
    if found is None or not found["sites"]:
        return ""
    sites: Mapping[str, Any] = found["sites"]
    labels = site_labels(list(sites))
    most = sorted(sites, key=lambda site: -_first(sites[site]))[:_SHOWN_SITES]
    panels = [_panel(labels[site], sites[site]) for site in sites if site in most]
    title = f"Singular values of the update at {len(panels)} of {len(sites)} adapted layers, on one scale"
    note = f" The {len(panels)} largest of {len(sites)}." if len(panels) < len(sites) else ""
    text = (
        "Singular values of what the adapter adds to each layer's weight, the largest first, all on one scale; the "
        "number is the first one's. The "
        "effective rank is how many of them count: the exponential of their entropy. Noise alone fills all "
        f"directions alike.{note}"
    )
    chart = figure(lambda width: panels_chart(panels, title=title, show=number, width=width))
    every = folded("Layer by layer", _table(found, labels))
    return f"<h2>What the adapter is</h2>\n<p>{text}</p>\n{chart}\n{pairs(_whole(found))}\n{_words(found)}\n{every}"


def site_labels(sites: Sequence[str]) -> dict[str, str]:
    """Short names that still tell the layers apart: the number in the path and its last words."""
    for words in range(1, max((site.count(".") + 1 for site in sites), default=1) + 1):
        labels = {site: _label(site, words) for site in sites}
        if len(set(labels.values())) == len(labels):
            return labels
    return {site: site for site in sites}


def _label(site: str, words: int) -> str:
    last = ".".join(site.split(".")[-words:])
    numbered = re.search(r"\.(\d+)\.", site)
    return last if numbered is None else f"{numbered[1]} {last}"


def _panel(label: str, site: Mapping[str, Any]) -> Panel:
    return label, f"effective rank {site['effective_rank']:.2f}", site["singular_values"]


def _first(site: Mapping[str, Any]) -> float:
    return max(site["singular_values"], default=0.0)


def _whole(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The adapter in a few lines: means over its layers, each counting alike."""
    sites = list(found["sites"].values())
    ranks = [site["effective_rank"] for site in sites]
    rows = [
        (
            "Effective rank",
            f"{fmean(ranks):.2f} of {found['directions']} on average, from {min(ranks):.2f} to {max(ranks):.2f}",
        )
    ]
    beside = [site["beside"] for site in sites if site["beside"] is not None]
    if not beside:
        return rows
    of = "" if len(beside) == len(sites) else f" (measured at {len(beside)} of {len(sites)} layers)"
    intruders = sum(each["intruders"] for each in beside)
    looked_at = sum(_looked_at(found, site) for site in sites if site["beside"] is not None)
    rows.append(("Size", f"{_percent(fmean(each['relative_norm'] for each in beside))} of the weights{of}"))
    rows += [(name, _share(beside, side)) for side, name in _SIDES.items()]
    rows.append(("Intruder dimensions", f"{intruders} of {looked_at} looked at{of}"))
    return rows


_SIDES = {
    "left": "Inside the weights' first output directions",
    "right": "Inside their first input directions",
    "both": "Inside both",
}


def _looked_at(found: Mapping[str, Any], site: Mapping[str, Any]) -> int:
    return min(found["intruders_among"], *site["shape"])


def _share(beside: Sequence[Mapping[str, Any]], side: str) -> str:
    share, chance = (fmean(each[of][side] for each in beside) for of in ("explained", "by_chance"))
    return f"{_percent(share)} of the update's energy, by chance {_percent(chance)}"


def _words(found: Mapping[str, Any]) -> str:
    if all(site["beside"] is None for site in found["sites"].values()):
        return ""
    return (
        f"<p>First directions are a weight's first {found['directions']} singular vectors, as many as the adapter has. "
        f"An intruder is one of the first {found['intruders_among']} left singular vectors of the changed weight that "
        f"is new: its cosine with every one of the weight before is below {found['intruder_below']:g} "
        "(arXiv 2410.21228, which ties them to forgetting).</p>"
    )


def _table(found: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    heads = ("Layer", "Largest value", "Effective rank", "Size", "Outputs", "Inputs", "Intruders")
    return table(heads, [_row(found, labels[site], found["sites"][site]) for site in found["sites"]])


def _row(found: Mapping[str, Any], label: str, site: Mapping[str, Any]) -> tuple[str, ...]:
    rank, beside = f"{site['effective_rank']:.2f}", site["beside"]
    if beside is None:
        return label, number(_first(site)), rank, "-", "-", "-", "-"
    explained = beside["explained"]
    return (
        label,
        number(_first(site)),
        rank,
        _percent(beside["relative_norm"]),
        _percent(explained["left"]),
        _percent(explained["right"]),
        f"{beside['intruders']} of {_looked_at(found, site)}",
    )


def _percent(share: float) -> str:
    """Two digits, or whole per cents."""
    shown = 100 * share
    if shown >= 9.95:
        return f"{shown:.0f} %"
    return f"{shown:.1f} %" if shown >= 0.95 else f"{shown:.2g} %"
