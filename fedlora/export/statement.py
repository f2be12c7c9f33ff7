"""What a run promises about privacy, and what not: the same words in card, report and final table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.config.schema import RunConfig
from fedlora.export.words import epsilon, number
from fedlora.privacy import noise

NOT_PRIVATE = "NOT PRIVATE"
SIMULATION = "SIMULATION: not a guarantee"
REPORTED = "as the nodes report it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """The promise: a heading, its terms as (name, value), and what stays outside it."""

    heading: str
    terms: tuple[tuple[str, str], ...]
    not_protected: tuple[str, ...]


def privacy_statement(summary: Mapping[str, Any], target_epsilon: float | None = None) -> Statement:
    """The privacy statement of a finished run, or that there is none.

    Args:
        summary: as in summary.json.
        target_epsilon: what the noise was calibrated for, if known.
    """
    if not summary["private"]:
        return Statement(heading=NOT_PRIVATE, terms=(("Privacy", _NO_PROMISE),), not_protected=())
    return Statement(
        heading=headline(summary), terms=_terms(summary, target_epsilon), not_protected=_NOT_PROTECTED
    )


def headline(summary: Mapping[str, Any]) -> str:
    """The promise in one line, with the words that take it back where it is none."""
    if not summary["private"]:
        return NOT_PRIVATE
    promise = f"epsilon {epsilon(summary['epsilon_max'])} at delta {number(summary['delta'])}"
    taken_back = reservation(summary)
    return promise if taken_back is None else f"{promise} ({taken_back})"


def reservation(summary: Mapping[str, Any]) -> str | None:
    """What keeps the promise of a private run from being a guarantee; None where nothing does."""
    match summary["noise_source"]:
        case noise.OS_ENTROPY:
            return None
        case noise.BY_THE_NODES:
            return REPORTED
        case _:
            return SIMULATION


def noise_label(noise_source: str | None) -> str:
    """Where the noise came from. Seeded noise is a simulation: whoever knows the seed can subtract it."""
    match noise_source:
        case noise.OS_ENTROPY:
            return "entropy of the operating system"
        case noise.BY_THE_NODES:
            return "drawn by each node; its own ledger is the authority"
        case noise.SEEDED:
            return f"seeded ({SIMULATION})"
        case _:
            return f"unknown ({SIMULATION})"


def calibrated_for(summary: Mapping[str, Any], config: RunConfig) -> float | None:
    """The epsilon that the noise was calibrated for; None where nothing was, or each node did so itself."""
    if config.privacy == "none" or summary["noise_source"] == noise.BY_THE_NODES:
        return None
    return config.privacy.target_epsilon


def _terms(summary: Mapping[str, Any], target_epsilon: float | None) -> tuple[tuple[str, str], ...]:
    target = (
        "" if target_epsilon is None else f"; the noise was calibrated for at most {number(target_epsilon)}"
    )
    return (
        ("Unit", "one record of one client"),
        (
            "Adjacency",
            "zero-out: a record is there or is replaced by nothing; the number of records is public",
        ),
        ("epsilon", f"{epsilon(summary['epsilon_max'])} for the client that spent most{target}"),
        ("delta", number(summary["delta"])),
        (
            "Covers",
            "everything the client released in this run, all rounds, interruptions and resumes together",
        ),
        ("Against", "the server, everybody who gets the model, and anybody on the network"),
        ("Accountant", str(summary["accountant"])),
        ("Noise", noise_label(summary["noise_source"])),
    )


METHODS = {"fedsvd": "FedSVD", "ffa": "FFA-LoRA", "fedavg": "FedAvg of LoRA B"}
"""Names as the papers write them."""

_NO_PROMISE = (
    "none. Records were not clipped and no noise was added: assume that whoever holds this adapter, or saw "
    "the updates, can tell whose records it was trained on."
)
_NOT_PROTECTED = (
    "a person whose records lie with several clients, or fill several records of one: the epsilons add up",
    "which clients took part, when, and how many records each declared",
    "choices that were tuned on private records before this run: learning rates, rounds, prompts",
    "the test data, on which scores were computed in the clear; it must be public",
    "what is true of a whole population: a private model still learns it",
    "a client that lies about what it does on its own machine",
)
