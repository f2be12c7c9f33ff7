import socket
import time

import pytest

from fedlora.data.hub import hub_within_reach
from tests.data.unfriendly import unfriendly_hub


@pytest.fixture
def endpoint():
    with unfriendly_hub() as address:
        yield address


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "*")


def test_any_answer_is_within_reach_unless_offline_was_asked_for(monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert hub_within_reach()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub_within_reach()


def test_no_answer_is_known_within_the_time_limit(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection, never answers
        silent_place = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for place in ("http://127.0.0.1:9", "http://no-such-host.invalid", silent_place, "no address"):
            monkeypatch.setenv("HF_ENDPOINT", place)
            start = time.monotonic()
            assert not hub_within_reach(timeout_s=0.5)
            assert time.monotonic() - start < 2.0
