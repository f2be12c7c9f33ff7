"""What `fedlora check` says of a data owner's node.yaml, alone and beside a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.cli.output import Format, only_ours, pairs, show
from fedlora.errors import ConfigError
from fedlora.export.words import epsilon, number

if TYPE_CHECKING:
    from fedlora.deploy.preview_node import NodePreview


def check_fit(run: Path, node: Path, overrides: Sequence[str], form: Format) -> None:
    """Passes a node that would take part in the run, and says so.

    Args:
        run: its YAML file.
        node: the data owner's.
        overrides: of the run.
        form: of what is printed.

    Raises:
        ConfigError: it would not; a line for each key, with FILE:LINE. Or the two are not a run and a node.
    """
    from fedlora.config.kinds import is_node
    from fedlora.config.load import load_config, load_node, origin_of, origins_of
    from fedlora.config.located import located

    if is_node(run, overrides) or not is_node(node):
        raise ConfigError(f"{run}, {node}: not a run and a node; write fedlora check run.yaml node.yaml")
    ours, theirs = load_node(node), load_config(run, overrides)
    from fedlora.deploy.fit import misfits

    with located(run, overrides), only_ours():
        found = misfits(theirs, ours)
    if found:
        origins = origins_of(node)
        raise ConfigError("\n".join(f"{origin_of(one.key, origins)}: {one.words}" for one in found))
    told = f"{node} would take part in {run}: model, task, lora, classes, work, clip and budget agree"
    show({"fits": True}, told, form)


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
