"""The part of the report that shows what the model says."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.export.page import texts


def what_it_says(samples: Sequence[Mapping[str, Any]]) -> str:
    """Prompts with their continuations before and after training, as plain text; nothing where there are none."""
    if not samples:
        return ""
    rows = [[str(sample[key]) for key in ("prompt", "before", "after")] for sample in samples]
    count = "The first public test prompt" if len(rows) == 1 else f"The first {len(rows)} public test prompts"
    text = (
        f"{count}, each continued with the likeliest tokens, by the base model and with the trained adapter."
    )
    heads = ("Prompt", "Before training", "After training")
    return f"<h2>What the model says</h2>\n<p>{text}</p>\n{texts(heads, rows)}"
