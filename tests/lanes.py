"""Which cases of a test run each time, and which are for `make slow`."""

from collections.abc import Iterable

import pytest


def mostly_slow(names: Iterable[str], *always: str) -> list:
    """Parameters of a test whose every case is a run of its own: all but those named are marked slow."""
    names = list(names)
    assert set(always) <= set(names), always
    return [name if name in always else pytest.param(name, marks=pytest.mark.slow) for name in names]
