"""Which cases of a test run each time, and which are for `make slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], *always: Any) -> list[Any]:
    """Parameters of a test whose every case takes long: all but those given again are marked slow."""
    cases = list(cases)
    assert set(always) <= set(cases), always
    return [case if case in always else pytest.param(case, marks=pytest.mark.slow) for case in cases]
