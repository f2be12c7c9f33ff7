"""What `fedlora check node.yaml` prints for people."""

from typing import TYPE_CHECKING

from fedlora.cli.output import pairs
from fedlora.export.words import epsilon, number

if TYPE_CHECKING:
    from fedlora.deploy.preview_node import NodePreview


def node_text(found: "NodePreview") -> str:
    """The node as its owner reads it; the digests as they are pasted into `accept:`."""
    spent, most = found.spent, found.spent["max_participations"]
    records = "not counted" if found.records is None else f"{found.records:,} here"
    drawn = f"each on records drawn at rate {number(found.sample_rate)}, at most {found.max_draw}"
    rows = [
        ("client", found.client),
        ("records", f"{found.declared_records:,} declared, {records}"),
        ("steps", f"{found.local_steps} in a participation, {drawn}"),
        ("noise multiplier", f"{number(found.noise_multiplier)} x norm {number(found.max_grad_norm)}"),
        (
            "epsilon",
            f"{epsilon(found.epsilon_once)} of one participation, {epsilon(found.epsilon_all)} of all {most}",
        ),
        ("delta", number(found.delta)),
        (
            "spent",
            f"{epsilon(spent['epsilon'])} of {number(spent['target_epsilon'])} in {_participations(found)}",
        ),
        ("left", number(spent["left"])),
    ]
    accept = f'accept:\n  code: ["{found.code}"]\n  base_model: ["{found.base_model}"]'
    shown = f"  To pin this fedlora and this base model, put into node.yaml:\n\n{accept}\n"
    notes = [f"  note: {note}" for note in found.notes]
    return "\n".join([pairs(rows), "", shown, *notes]).rstrip()


def _participations(found: "NodePreview") -> str:
    done = f"{found.spent['participations']} of {found.spent['max_participations']} participations"
    return done if found.spent["verified"] else f"{done}; no ledger yet"
