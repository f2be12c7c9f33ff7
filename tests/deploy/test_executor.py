"""The resident executor's loop: runs no code of the server's, tells no error's words, outlives the SuperNode."""

import gc
import logging
import os
import signal
import ssl
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from fedlora.transport.flower_client import Hello, client_app, frame_of  # isort: skip
import uvicorn
from flwr.app import Context, Message
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError

from fedlora.deploy import executor, supernode
from fedlora.deploy.endpoint import UnwantedError
from fedlora.deploy.executor import Stop, alone, attend
from fedlora.errors import ConfigError
from tests.deploy.sites import Site, attending, self_signed, until


@pytest.fixture
def site() -> Iterator[Site]:
    found = Site()
    yield found
    found.stop()


def echoing(context: Context, frame: bytes, echo: object) -> bytes:
    if frame == b"raise":
        raise RuntimeError("a record's own words")
    return b"answer to " + frame


def app_of(answer: Callable = echoing) -> Callable[[Message, Context], Message]:
    return client_app(lambda context: Hello(client="site-0", records=1, classes=()), answer)


def test_a_message_is_answered_by_our_app_though_the_servers_cannot_even_be_installed(site):
    with attending(app_of(), site.node()):
        for number in range(3):
            site.send(b"%d" % number)
            assert frame_of(site.reply().content) == b"answer to %d" % number


def test_no_word_of_an_exception_leaves_neither_in_the_reply_nor_in_the_tasks_details(site, caplog):
    with attending(app_of(), site.node()):
        for frame, kind in ((b"raise", "train"), (b"", "train.nothing_of_this_name")):
            site.send(frame, kind)
            error = site.reply().error
            assert error.reason == "the node's own log says why"
    assert {task.status.details for task in site.state.get_tasks()} == {""}
    assert "a record's own words" not in caplog.text


def test_it_waits_for_a_supernode_that_is_not_there_and_attaches_again_after_a_restart(site, caplog):
    caplog.set_level(logging.INFO)
    site.stop()
    with attending(app_of(), site.node()):
        time.sleep(1.5)
        site.start()
        site.send(b"one")
        site.reply()
        site.stop()
        time.sleep(1.5)
        site.start()
        site.send(b"two")
        site.reply()
    states = [line.split()[0] for line in caplog.messages if "SuperNode at" in line]
    assert states == ["waiting", "attached", "waiting", "attached"]  # not a line for each poll


def test_a_reply_to_a_supernode_that_forgot_the_task_is_dropped_and_the_next_message_answered(site, caplog):
    def answer(context: Context, frame: bytes, echo: object) -> bytes:
        if frame == b"one":
            site.stop()
            site.start()
        return frame

    with attending(app_of(answer), site.node()):
        site.send(b"one")
        until(lambda: "a task was lost" in caplog.text)
        site.send(b"two")
        site.reply()


@pytest.mark.fault("F18")
def test_half_a_message_is_given_back_for_its_sender_to_ask_again_and_the_next_one_is_answered(
    site, monkeypatch
):
    monkeypatch.setattr(supernode.Patience, "__init__", lambda self: setattr(self, "seconds", 0.5))
    with attending(app_of(), site.node()):
        site.send_half(b"one")
        assert site.reply().error.code == ErrorCode.MESSAGE_UNAVAILABLE
        site.send(b"two")
        assert frame_of(site.reply().content) == b"answer to two"


def test_a_message_is_waited_for_as_long_as_its_pieces_come():
    """However long the whole takes; and the longer, the more half messages there were."""
    came: list[str] = []

    def pull(piece: str) -> bytes:
        if piece not in came:
            raise ObjectUnavailableError(piece)
        return b""

    patient = supernode._while_it_comes(pull, 0.3)
    for piece in ("one", "two", "three"):
        time.sleep(0.2)
        with pytest.raises(ObjectUnavailableError):
            patient(piece)
        came.append(piece)
        assert patient(piece) == b""
    time.sleep(0.31)
    with pytest.raises(ObjectPullError, match="none came for"):
        patient("four")
    patience = supernode.Patience()
    waits = [(patience.seconds, patience.grow())[0] for _ in range(5)]
    assert waits == [20, 40, 80, 160, 160]


def test_a_wrong_secret_a_missing_one_and_an_address_of_something_else_end_it_with_the_reason():
    site = Site(secret=b"right")
    try:
        for secret in (b"wrong", None):
            with pytest.raises(UnwantedError, match=r"refuses the secret; give as --secret-file"):
                attend(app_of(), site.node(secret), Stop())
        with attending(app_of(), site.node(b"right")):
            site.send(b"one")
            assert not site.reply().has_error()
    finally:
        site.stop()
    app = uvicorn.Server(uvicorn.Config(_nothing, host="127.0.0.1", port=site.port, log_level="critical"))
    thread = threading.Thread(target=app.run, daemon=True)
    thread.start()
    with pytest.raises(UnwantedError, match="is no SuperNode"):
        until(lambda: app.started)
        attend(app_of(), site.node(), Stop())
    app.should_exit = True
    thread.join(10)


async def _nothing(scope, receive, send) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})


@pytest.mark.fault("F47")
def test_another_release_of_flwr_on_the_other_end_is_refused_by_name(site, monkeypatch):
    from flwr.supercore import runtime_version_compatibility as versions

    def of_another(component_name: str) -> versions.RuntimeVersionMetadata:
        return versions.RuntimeVersionMetadata("flwr", "1.39.0", component_name)

    monkeypatch.setattr(versions.RuntimeVersionMetadata, "from_local_component", of_another)
    with pytest.raises(UnwantedError, match=r"1\.39\.0"):
        attend(app_of(), site.node(), Stop())


def test_only_one_executor_serves_a_ledger_and_the_refusal_names_the_lock(tmp_path):
    ledger = tmp_path / "state" / "ledger.jsonl"
    with (
        alone(ledger),
        pytest.raises(ConfigError, match=r"ledger\.jsonl\.lock is held by another process"),
        alone(ledger),
    ):
        pass
    with alone(ledger):
        pass


def test_no_message_is_kept_in_memory_once_it_is_answered(site):
    size, messages = 200_000, 10
    with attending(app_of(), site.node()):
        for number in range(5 + messages):
            if number == 5:
                tracemalloc.start()
            site.send(bytes([number]) * size)
            site.reply()
            site.state.delete_messages()
            site.objects.clear()
        gc.collect()
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert grown < messages * size / 2


@pytest.mark.parametrize(("signals", "grace_s"), [([signal.SIGTERM], 0.5), ([signal.SIGINT] * 2, 60.0)])
def test_told_to_stop_in_mid_message_it_says_so_to_the_server_and_ends_in_seconds(
    site, monkeypatch, signals, grace_s
):
    monkeypatch.setattr(executor, "GRACE_S", grace_s)

    def tell() -> None:
        for number in signals:
            time.sleep(0.5)
            os.kill(os.getpid(), number)

    def answer(context: Context, frame: bytes, echo: object) -> bytes:
        threading.Thread(target=tell).start()
        time.sleep(60)
        return frame

    site.send(b"one")
    stop, began = Stop(), time.monotonic()
    with stop.heard():
        attend(app_of(answer), site.node(), stop)
    assert time.monotonic() - began < 5
    assert site.reply().error.reason == "the node is stopping"


def test_told_to_stop_a_message_that_is_nearly_done_is_still_answered(site):
    def answer(context: Context, frame: bytes, echo: object) -> bytes:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        return frame

    site.send(b"one")
    stop = Stop()
    with stop.heard():
        attend(app_of(answer), site.node(), stop)
    assert frame_of(site.reply().content) == b"one"


def test_work_that_takes_longer_than_a_tasks_token_lives_is_still_delivered(site, monkeypatch):
    # As made by Flower: a token lives for two intervals of 30 s, and a heartbeat comes every 20 s or so.
    monkeypatch.setattr("flwr.supercore.corestate.in_memory_corestate.HEARTBEAT_DEFAULT_INTERVAL", 2)
    monkeypatch.setattr("flwr.supercore.heartbeat.HEARTBEAT_DEFAULT_INTERVAL", 6)

    def answer(context: Context, frame: bytes, echo: object) -> bytes:
        time.sleep(6)
        return frame

    with attending(app_of(answer), site.node()):
        site.send(b"one")
        assert not site.reply().has_error()


def test_over_tls_a_certificate_of_the_given_authority_is_trusted_and_another_ends_it(tmp_path):
    certificate = self_signed(tmp_path / "ours")
    site = Site(certificate=certificate)
    try:
        with attending(app_of(), site.node(tls=ssl.create_default_context(cafile=str(certificate)))):
            site.send(b"one")
            assert not site.reply().has_error()
        foreign = self_signed(tmp_path / "foreign")
        with pytest.raises(UnwantedError, match=r"is not trusted.*--root-certificates"):
            attend(app_of(), site.node(tls=ssl.create_default_context(cafile=str(foreign))), Stop())
    finally:
        site.stop()
