"""One finished run, told in the words of summary.json and rounds.jsonl."""

from typing import Any

import pytest

from fedlora.privacy.noise import SEEDED
from fedlora.runs.promise import KEYS

HOSTILE = "<script>alert('x')</script>"


@pytest.fixture
def rounds() -> list[dict[str, Any]]:
    """Three rounds and the zero-step line: all answer; one refuses and one is silent; one is rejected."""
    names = ["client-0", "client-1", HOSTILE]
    quiet = {"refused": {}, "rejected": {}, "metric": "accuracy", "seconds": 2.0}
    return [
        {**quiet, "round": 0, "asked": [], "answered": [], "score": 0.25, "loss": 1.4, "epsilon_max": None},
        {**quiet, "round": 1, "asked": names, "answered": names, "score": 0.5, "loss": 1.2},
        {
            **quiet,
            "round": 2,
            "asked": names,
            "answered": names[:1],
            "refused": {HOSTILE: "budget"},
            "score": None,
        },
        {
            **quiet,
            "round": 3,
            "asked": names[:2],
            "answered": names[:1],
            "rejected": {"client-1": "a & b"},
            "score": 0.75,
            "loss": 0.8,
            "epsilon_max": 3.2,
        },
    ]


@pytest.fixture
def summary() -> dict[str, Any]:
    """summary.json of that run; the noise is seeded, as in every simulation."""
    return {
        "rounds_completed": 3,
        "clients": 3,
        "participations": {"client-0": 3, "client-1": 1, HOSTILE: 1},
        "metric": "accuracy",
        "score": 0.75,
        "score_before": 0.25,
        "private": True,
        "epsilon_max": 3.20001,
        "epsilon_by_client": {"client-0": 3.20001, "client-1": 1.5, HOSTILE: 1.5},
        "epsilon_replace_one_max": 4.9,
        "epsilon_replace_one_by_client": {"client-0": 4.9, "client-1": 2.25, HOSTILE: 2.25},
        "delta": 1e-5,
        "accountant": "pld",
        "accountants_agree": True,
        "unit": "record",
        "adjacency": "zero-out",
        "noise_source": SEEDED,
        "debits_by_client": {"client-0": 3, "client-1": 2, HOSTILE: 1},
        "lost_attempts": 1,
        "training": {"steps_max": 30, "noise_multiplier_min": 1.1, "sample_rate_max": 0.01},
        "evaluation": None,
        "tuning": {"tuned_on": "undeclared", "private_runs": None, "epsilon_max": None},
        "method": "fedsvd",
        "seconds": 6.0,
        "client_rounds_per_second": 0.833,
        "bytes_up_per_client_round": 295_000,
        "bytes_down_per_client_round": 590_000,
        "state_sha256": "0" * 64,
        "execution": "local",
        "versions": {"fedlora": "0.1.0", "ray": "not installed", "dp-accounting": "0.4", "opacus": "1.5"},
    }


@pytest.fixture
def not_private(summary: dict[str, Any]) -> dict[str, Any]:
    """The same run with `privacy: none`."""
    return {**summary, **dict.fromkeys(KEYS), "private": False}
