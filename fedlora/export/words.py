"""Numbers as people read them, the same in the command line, the card and the report."""

import math
from collections.abc import Mapping
from typing import Any

HIGH_IS_GOOD = {"accuracy": True, "perplexity": False}
"""What is better of each metric."""


def epsilon(value: float | None) -> str:
    """Rounded up to three decimals, or digits if it is small: never less than what was spent. A dash for nothing."""
    if value is None or not math.isfinite(value):
        return "-" if value is None else "unbounded"
    decimals = 3 if value >= 0.1 or value <= 0 else 2 - math.floor(math.log10(value))
    # 1e-6 of the last decimal is float noise: 7.98 must not turn into 7.981.
    up = math.ceil(value * 10**decimals - 1e-6) / 10**decimals
    return f"{up:.{decimals}f}".rstrip("0").rstrip(".")


def number(value: float | None) -> str:
    """Four significant digits: `7.981`, `1e-05`; a dash for nothing."""
    return "-" if value is None else f"{value:.4g}"


def score(metric: str, value: float | None) -> str:
    """A score as people say it: accuracies in per cent, everything else as a number."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"{value:.4g}"


def nothing_learnt(summary: Mapping[str, Any]) -> str | None:
    """What to try next where a run's score is no better than before; None where it is, or is not known."""
    before, after = summary["score_before"], summary["score"]
    if before is None or after is None:
        return None
    if after > before if HIGH_IS_GOOD.get(summary["metric"], True) else after < before:
        return None
    noise = "more records for each owner, fewer rounds or a higher epsilon leave less noise; "
    rates = "if the loss rose, lower federation.optimizer.lr; fedlora sweep tries rates on public data of the kind"
    return f"nothing that shows: {noise if summary['private'] else ''}{rates}"


def duration(seconds: float) -> str:
    """Seconds as people say them: `48 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def bytes_text(count: float | None) -> str:
    """Bytes as people say them, in powers of 1000: `295 kB`; a dash for nothing."""
    if count is None:
        return "-"
    power = 0 if count < 1 else min(int(math.log10(count) / 3), 3)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"
