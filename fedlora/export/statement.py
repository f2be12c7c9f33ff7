"""What a run promises about privacy, and what not: the same words in card, report and final table.

Everything is read from summary.json, whose figures are computed from ledgers; a config is never asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


def privacy_statement(summary: Mapping[str, Any]) -> Statement:
    """The privacy statement of a run, or that there is none.

    Args:
        summary: as in summary.json.
    """
    if not summary["private"]:
        return Statement(heading=NOT_PRIVATE, terms=(("Privacy", _NO_PROMISE),), not_protected=())
    return Statement(heading=headline(summary), terms=_terms(summary), not_protected=_not_protected(summary))


def _not_protected(summary: Mapping[str, Any]) -> tuple[str, ...]:
    if (public := summary.get("public_records")) is None:
        return _NOT_PROTECTED
    return (
        *_NOT_PROTECTED,
        f"the labelled records of {public}, of which the first subspace was made; they must be public",
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


def unit_text(unit: str) -> str:
    """The unit of a ledger in words."""
    return {"record": "one record of one client"}.get(unit, unit)


def tuning_text(tuning: Mapping[str, Any]) -> str:
    """What was declared about the choice of settings, and what it means for the promise."""
    match tuning["tuned_on"]:
        case "nothing":
            return "declared: settings were fixed in advance, by no data; no further cost"
        case "public-data":
            return "declared: settings were chosen on public data; no further cost"
        case "private runs":
            runs, cost = tuning["private_runs"], tuning["epsilon_max"]
            spent = _AT_THE_END if cost is None else f"together they spent epsilon {epsilon(cost)} at most"
            return f"declared: settings were chosen by {runs} runs like this one on the same records; {spent}"
        case _:
            return "not declared: whoever tuned on private records spent more than is said here"


def _terms(summary: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return (
        ("Unit", unit_text(summary["unit"])),
        ("Adjacency", _ADJACENCY.get(summary["adjacency"], str(summary["adjacency"]))),
        (
            "epsilon",
            f"{epsilon(summary['epsilon_max'])} for the client that spent most; of each: see the table",
        ),
        ("Replace-one epsilon", _replace_one(summary)),
        ("delta", number(summary["delta"])),
        ("Covers", _COVERS),
        ("Against", "the server, everybody who gets the model, and anybody on the network"),
        ("Evidence", _evidence(summary)),
        ("Training", _training(summary["training"])),
        ("Private evaluation", _evaluation(summary["evaluation"])),
        ("Accountant", _accountant(summary)),
        ("Noise", noise_label(summary["noise_source"])),
        ("Tuning", tuning_text(summary["tuning"])),
        *((("Began from", began_text(summary)),) if summary.get("began_from") else ()),
    )


def began_text(summary: Mapping[str, Any]) -> str:
    """Which adapter the run began from, and what it means for the promise."""
    found = summary.get("began_from")
    if not found:
        return "nothing but the base model"
    return (
        f"the adapter {found['name']!r}, SHA-256 {found['sha256']}; it is treated as public, so what it was trained on "
        "is no part of this promise"
    )


def _replace_one(summary: Mapping[str, Any]) -> str:
    found = summary["epsilon_replace_one_max"]
    told = _AT_THE_END if found is None else f"{epsilon(found)} at most, over all clients"
    return f"{told}; it holds if a record may be replaced by any other one"


def _evidence(summary: Mapping[str, Any]) -> str:
    debits, lost = sum(summary["debits_by_client"].values()), summary["lost_attempts"]
    if lost is None:
        return f"what the nodes say of {debits} participations; each node proves it by its own ledger"
    attempts = f", {lost} of them attempts that left no reply" if lost else ""
    return f"{debits} participations in hash-chained ledgers{attempts}; check them with fedlora budget verify"


def _accountant(summary: Mapping[str, Any]) -> str:
    def named(accountant: str) -> str:
        name, package = _ACCOUNTANTS[accountant]
        return f"{accountant} ({name}, {package} {summary['versions'].get(package, 'of an unknown version')})"

    reported, agree = summary["accountant"], summary["accountants_agree"]
    pair = "pld and prv" if reported == "rdp" else named("prv" if reported == "pld" else "pld")
    agreement = {
        True: f"{pair} {'agree with each other' if reported == 'rdp' else 'agrees'} within 0.01 + 1 %",
        False: f"{pair} did NOT agree on what some nodes report",
        None: f"compared with {pair} when the run ends",
    }
    return f"{named(reported)}, an upper bound; {agreement[agree]}"


def _training(training: Mapping[str, Any] | None) -> str:
    if training is None:
        return "nobody trained"
    return (
        f"at most {training['steps_max']:,} noised steps of a client, each on records drawn by chance at a rate of at "
        f"most {number(training['sample_rate_max'])}, with a noise multiplier of at least "
        f"{number(training['noise_multiplier_min'])}"
    )


def _evaluation(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "none: nothing but noised updates left a client"
    return (
        f"up to {evaluation['releases_max']} times a client told how many of its own records the model gets right, "
        f"with noise of {number(evaluation['noise_min'])} records or more; it is paid for above, and without it the "
        f"largest epsilon would be {epsilon(evaluation['epsilon_max_without'])}"
    )


_ACCOUNTANTS = {
    "pld": ("privacy loss distributions", "dp-accounting"),
    "prv": ("privacy random variables", "opacus"),
    "rdp": ("Renyi", "opacus"),
}
_ADJACENCY = {
    "zero-out": "zero-out: a record is there or is replaced by nothing; the number of records is public"
}
_AT_THE_END = "computed when the run ends"
_COVERS = "everything the client released in this run, all rounds, interruptions and resumes together"
_NO_PROMISE = (
    "none. Records were not clipped and no noise was added: assume that whoever holds this adapter, or saw "
    "the updates, can tell whose records it was trained on."
)
_NOT_PROTECTED = (
    "a person whose records lie with several clients, or fill several records of one: the epsilons add up",
    "what is true of a whole client or a whole population, such as its mix of labels: a private model still "
    "learns it, and no secure aggregation hides one client's noised updates from the server",
    "which clients took part, when, and how many records each declared",
    "timing beyond a node's reply quantum: how many quanta a round took may hint at how many records were drawn",
    "choices that were tuned on private records before this run, beyond what is declared under Tuning",
    "the test data, on which scores were computed in the clear; it must be public",
    "limits of arithmetic: sums and noise lie on a grid of powers of two, which is paid for, but the normal "
    "distribution itself is evaluated in float64",
    "a node that lies about what it does on its own machine: it gives away its own records only",
)
