"""What a round would take on M machines of G actors each, from what it takes here; the arithmetic is in the table."""

from collections.abc import Sequence

from at_scale.cases import OURS, Case
from at_scale.figures import Rows, pooled

SIZES = ((1, 2), (1, 16), (4, 16), (16, 64))
ASKED = 1000
LINK_MB_S = 1250.0
"""Of a link of 10 Gbit/s at the driver."""


def extrapolated(rows: Rows, cases: Sequence[Case]) -> str:
    """Markdown: for each case with real work, the seconds of a round of 1,000 clients, term by term.

    An upper bound: what a client-round costs beside its step is taken as the driver's alone, though part of it is done
    by the actors, and nothing overlaps. Actors elsewhere are taken to be as fast as here.
    """
    null = sorted((case.megabytes, pooled(rows, case.name, OURS)) for case in cases if case.null)
    work = [case for case in cases if case.model == "minilm" and pooled(rows, case.name, OURS)]
    if len(null) < 2 or not work or any(found is None for _, found in null):
        return "No extrapolation: it needs both null cases and one of MiniLM."
    (small, low), (large, high) = null[0], null[-1]
    assert low is not None and high is not None
    each_mb = (high["overhead_ms"] - low["overhead_ms"]) / (large - small)
    lines = [
        f"Beside its step a client-round costs h = {low['overhead_ms']:.3g} ms + {each_mb:.3g} ms x MB "
        f"(null work, {small:g} and {large:g} MB). A round of S = {ASKED:,} on M machines of G actors is at most "
        f"S j / (M G) + S h + (S + M) MB / {LINK_MB_S:g} MB/s.",
        "",
        "| work | M x G | S j / (M G) | S h | link | round | client-rounds/s | driver bound from |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in work:
        found = pooled(rows, case.name, OURS)
        assert found is not None
        for machines, actors in SIZES:
            driver_s = ASKED * max(0.0, low["overhead_ms"] + each_mb * (case.megabytes - small)) / 1e3
            jobs_s = ASKED * found["job_s"] / (machines * actors)
            link_s = (ASKED + machines) * case.megabytes / LINK_MB_S
            whole = jobs_s + driver_s + link_s
            lines.append(
                f"| {case.name}, j = {1e3 * found['job_s']:.3g} ms | {machines} x {actors} | {jobs_s:.2f} s "
                f"| {driver_s:.2f} s | {link_s:.2f} s | {whole:.2f} s | {ASKED / whole:.0f} "
                f"| {ASKED * found['job_s'] / driver_s:.0f} actors |"
            )
    return "\n".join(lines)
