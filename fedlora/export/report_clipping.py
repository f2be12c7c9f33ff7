"""The part of the report that tells how much of the public records' gradients the clip shortened."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fedlora.config.schema import RunConfig
from fedlora.export.charts import line_chart
from fedlora.export.page import figure
from fedlora.export.words import number
from fedlora.training.guards import CLIP_SHARE, clip_note


def clipping(rounds: Sequence[Mapping[str, Any]], config: RunConfig | None) -> str:
    """The share of clipped public records in each round that was scored; nothing where privacy is off."""
    points = [(int(line["round"]), float(line[CLIP_SHARE])) for line in rounds if CLIP_SHARE in line]
    if config is None or config.privacy == "none" or not points:
        return ""
    share = points[-1][1]
    said = (
        f"max_grad_norm {number(config.privacy.max_grad_norm)} clips {share:.0%} of the public test records"
    )
    note = clip_note(rounds, config.privacy)
    more = "" if note is None else f" {escape(note[0].upper() + note[1:])}."
    about = "Nobody is asked how many of the clients' own it clips: that is private."
    title = f"Share of public test records that are clipped, {share:.0%} in the last round that was scored"
    chart = figure(
        lambda width: line_chart(
            points,
            before=None,
            title=title,
            show=lambda value: f"{value:.0%}",
            name="clipped",
            unit="share of public records clipped",
            floor=0.0,
            width=width,
        )
    )
    curve = f"\n{chart}" if len(points) > 1 else ""
    text = f"In the last round that was scored {said} that were looked at. {about}{more}"
    return f"<h2>Clipping</h2>\n<p>{text}</p>{curve}"
