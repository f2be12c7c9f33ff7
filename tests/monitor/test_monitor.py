"""A run watched from afar, over real sockets on loopback: the same figures, bounded, and each trouble by its name."""

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedlora.cli import serve
from fedlora.cli.follow import require_one_source, status_of_server, status_text
from fedlora.cli.output import Format
from fedlora.config.load import dump_config
from fedlora.config.schema import RunConfig
from fedlora.disk import write_durably
from fedlora.errors import ConfigError, FedLoraError, IncompleteError, LedgerError
from fedlora.federation.absences import MISSED
from fedlora.monitor import metrics as monitor_metrics
from fedlora.monitor import view as monitor_view
from fedlora.monitor.address import MonitorAddress, monitor_address
from fedlora.monitor.client import ask_status, follow
from fedlora.monitor.messages import SERVICE, round_message, round_words
from fedlora.monitor.metrics import metrics_text
from fedlora.monitor.proto import monitor_pb2
from fedlora.monitor.proto.monitor_pb2 import EventsRequest, Round
from fedlora.monitor.service import Bound, Limits, monitored
from fedlora.monitor.view import View, found_in
from fedlora.provision.certificates import (
    authority_certificate,
    certificate_pem,
    key_pem,
    new_key,
    server_certificate,
)
from fedlora.runs.rundir import SPENT, Roster, save_roster
from fedlora.runs.summary import run_status, summary_so_far
from fedlora.values import Member
from tests.provision.handshakes import handshakes

NOW = datetime.now(UTC)
QUICK = Limits(poll_s=0.05)
NODES = ("site-a", "site-b", "site-c")
EVENT = [1.5, 0.1, 2, 10.0, 95]


@dataclass(frozen=True)
class Pair:
    certificate: Path
    key: Path
    roots: Path


def pair(folder: Path, *, names: tuple[str, ...] = ("localhost", "127.0.0.1"), made: datetime = NOW) -> Pair:
    """A certificate of two days, and the authority that signed it."""
    folder.mkdir()
    authority_key, key = new_key(), new_key()
    authority = authority_certificate(authority_key, NOW)
    certificate = server_certificate(
        key.public_key(), names, authority=authority, authority_key=authority_key, now=made, days=2
    )
    found = Pair(folder / "server.crt", folder / "server.key", folder / "ca.crt")
    found.certificate.write_bytes(certificate_pem(certificate))
    found.key.write_bytes(key_pem(key))
    found.roots.write_bytes(certificate_pem(authority))
    return found


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(tmp_path_factory.mktemp("tls") / "own")


def line(number: int, **changes: object) -> dict:
    nobody = {"asked": [], "answered": [], "refused": {}, "rejected": {}, "accuracy_told": {}}
    asked = {
        "asked": list(NODES), "answered": ["site-a"], "refused": {"site-b": "budget", "site-c": "failed; no_data"},
        "rejected": {"site-c": "update of round 1 came late"}, "accuracy_told": {"site-a": 0.71},
    }  # fmt: skip
    scored = {"metric": "accuracy", "score": 0.25 + number / 100, "loss": 1.5, "epsilon_max": None}
    return {
        "round": number,
        **(asked if number else nobody),
        **scored,
        "seconds": 2.0 * bool(number),
        **changes,
    }


def spend(run: Path, number: int) -> None:
    """What a server journals before it uses the reply of the one node that answered."""
    told = {
        "client": "site-a",
        "round": number,
        "spent": [EVENT],
        "ledger": [number, "0" * 64],
        "payload": "0",
    }
    with (run / SPENT).open("a") as file:
        file.write(json.dumps(told) + "\n")


def add(run: Path, number: int, **changes: object) -> None:
    """The round is done."""
    if number:
        spend(run, number)
    with (run / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(line(number, **changes)) + "\n")


def finish(run: Path) -> None:
    summary = summary_so_far(run)
    (run / ".summary.json.part").write_text(json.dumps(summary))
    (run / ".summary.json.part").replace(run / "summary.json")


@pytest.fixture
def run(tmp_path: Path, tiny_config: Callable[..., RunConfig]) -> Path:
    """A server's run of four rounds, two of them done."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(tiny_config(federation__rounds=4)))
    save_roster(run, Roster(run="r", members=tuple(Member(client=name, examples=100) for name in NODES)))
    for number in range(3):
        add(run, number)
    return run


def at(bound: Bound, roots: Path | None = None, host: str = "127.0.0.1") -> MonitorAddress:
    return MonitorAddress(host=host, port=bound.port, roots=roots)


def in_background(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def until(holds: Callable[[], bool], limit_s: float = 10.0) -> None:
    ends = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < ends, "it never came true"
        time.sleep(0.02)


def test_a_monitor_tells_what_the_directory_holds_and_changes_nothing_in_it(run, tls):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with monitored(run, port=0, certificate=tls.certificate, key=tls.key) as bound:
        found = ask_status(at(bound, tls.roots))
        lines = list(zip(range(3), follow(at(bound, tls.roots), 0), strict=False))
    here = run_status(run)
    assert bound.tls and found["epsilon_by_client"]["site-a"] > 0
    reasons = found.pop("refusals_by_reason")
    assert found == {name: here[name] for name in found}
    assert reasons == {"budget": 2, "failed": 2, "no_data": 2}
    assert lines == [(number, line(number)) for number in range(3)]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_the_table_from_afar_is_the_table_of_the_directory(run, capsys):
    here = status_text(str(run), found_in(run), "not finished").splitlines()
    with monitored(run, port=0) as bound:
        status_of_server(f"127.0.0.1:{bound.port}", None, Format.TEXT)
        there = capsys.readouterr().out.splitlines()
        status_of_server(f"127.0.0.1:{bound.port}", None, Format.JSON)
        document = json.loads(capsys.readouterr().out)
    assert there[2:] == here[2:]  # all but the title and how to go on
    assert there[0] == f"127.0.0.1:{bound.port}" and "not finished" in there[1]
    assert document["epsilon_max"] == run_status(run)["epsilon_max"]
    assert "  refusals       4 refused (2 budget, 2 failed, 2 no_data), 2 rejected" in here
    assert "  round 2        1 of 3 answered; budget: site-b; failed: site-c; no_data: site-c" in here
    assert [line.split()[:2] for line in here[-3:]] == [["site-a", "2"], ["site-b", "0"], ["site-c", "0"]]


def test_a_round_that_too_few_answered_is_the_newest_until_it_is_done(run):
    missed = {"round": 3, "asked": list(NODES), "answered": [], "refused": dict.fromkeys(NODES, "budget")}
    with monitored(run, port=0) as bound:
        assert ask_status(at(bound))["newest"]["round"] == 2
        write_durably(run / MISSED, json.dumps({**missed, "rejected": {}}))
        until(lambda: ask_status(at(bound))["newest"] == {**missed, "rejected": {}})
    told = status_text("r", found_in(run), "u").splitlines()
    assert "  round 3        0 of 3 answered, too few; budget: site-a, site-b, site-c" in told
    add(run, 3, refused={})
    assert found_in(run)["newest"]["round"] == 3
    assert not any(line.startswith("  round 3") for line in status_text("r", found_in(run), "u").splitlines())


def test_of_many_clients_those_that_spent_most_and_those_of_whom_nobody_knows_come_first(run):
    names = [f"site-{number:03d}" for number in range(100)]
    found = found_in(run)
    many = {
        **found, "participations": dict.fromkeys(names, 1), "bytes_up_per_client_round": 12_000,
        "epsilon_by_client": {name: number / 10 for number, name in enumerate(names)} | {"site-007": None},
    }  # fmt: skip
    text = status_text("r", many, "u").splitlines()
    assert "  bytes          - down and 12 kB up, a client and round" in text
    assert [one.split()[0] for one in text[-21:-18]] == ["site-007", "site-099", "site-098"]
    assert text[-21].split()[-1] == "unknown" and text[-1] == "  and 80 more: --format json has them all"
    bare = status_text("r", {**many, "private": False, "epsilon_by_client": None}, "u").splitlines()
    assert bare[-21].split() == ["site-000", "1"] and "  epsilon        NOT PRIVATE" in bare


def test_a_follower_gets_each_round_once_as_it_is_done_and_stops_with_the_run(run):
    heard: list[int] = []
    with monitored(run, port=0, limits=QUICK) as bound:
        thread = in_background(lambda: heard.extend(one["round"] for one in follow(at(bound), 1)))
        until(lambda: heard == [] or heard == [1, 2])
        add(run, 3)
        spend(run, 4)
        with (run / "rounds.jsonl").open("a") as file:
            half = json.dumps(line(4)) + "\n"
            file.write(half[:40])  # a line torn by a crash is none
            file.flush()
            time.sleep(0.3)
            assert thread.is_alive()
            file.write(half[40:])
        finish(run)
        thread.join(10)
    assert heard == [1, 2, 3, 4]


def test_following_prints_what_a_simulation_prints_and_then_the_table(run, capsys):
    add(run, 3)
    add(run, 4)
    finish(run)
    with monitored(run, port=0, limits=QUICK) as bound:
        status_of_server(f"127.0.0.1:{bound.port}", None, Format.JSON, follow=True)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert json.loads(out)["finished"] is True
    assert lines[1] == "3 clients, 4 rounds"
    assert lines[2] == "round 1/4  1 of 3 answered  accuracy 26.0 %"
    assert lines[-1].startswith("round 4/4  1 of 3 answered") and "left" not in err


def test_what_rounds_do_not_hold_today_is_not_told_tomorrow(run):
    """A key that somebody adds to rounds.jsonl does not leave the machine by itself."""
    told = round_words(round_message({**line(1), "raw_losses": {"site-a": 0.3}, "metric": "\ud800"}))
    assert told == {**line(1), "metric": "?"}
    assert set(told) == set(line(1))


def test_the_checked_in_messages_are_those_of_the_proto_file():
    """Nobody needs protoc, so nothing else would notice that the one was changed without the other."""
    text = (Path(monitor_pb2.__file__).parent / "monitor.proto").read_text()
    written = {
        message: dict(re.findall(r"(\w+) = (\d+);", body))
        for message, body in re.findall(r"^message (\w+) \{(.*?)\}$", text, re.DOTALL | re.MULTILINE)
    }
    made = {
        name: {field.name: str(field.number) for field in message.fields}
        for name, message in monitor_pb2.DESCRIPTOR.message_types_by_name.items()
    }
    service = monitor_pb2.DESCRIPTOR.services_by_name["Monitor"]
    assert written == made and made["Round"]["seconds"] == "11"
    assert service.full_name == SERVICE
    assert re.findall(r"rpc (\w+)", text) == [method.name for method in service.methods]


def test_a_follower_that_reads_nothing_holds_its_own_place_only(run):
    many = {"rejected": {f"site-{number}": "x" * 1000 for number in range(50)}}
    for number in range(3, 60):
        add(run, number, **many)
    finish(run)
    with monitored(run, port=0, limits=Limits(streams=2, poll_s=0.05)) as bound, channel(bound) as slow:
        call = events(slow)(EventsRequest(), timeout=60)
        assert next(call).round == 0  # and no more
        for _ in range(3):
            assert [one["round"] for one in follow(at(bound), 50)] == list(range(50, 60))
        assert ask_status(at(bound))["finished"]
        assert call.is_active()
        call.cancel()


def test_followers_beyond_the_limit_are_told_so_and_a_place_comes_free(run):
    with monitored(run, port=0, limits=Limits(streams=2, poll_s=0.05)) as bound, channel(bound) as wide:
        calls = [events(wide)(EventsRequest(), timeout=60) for _ in range(2)]
        assert [next(call).round for call in calls] == [0, 0]
        with pytest.raises(IncompleteError, match="2 follow this run already; try later"):
            next(follow(at(bound)))
        assert ask_status(at(bound))["rounds"] == 4
        calls[0].cancel()
        until(lambda: has_room(bound))
        calls[1].cancel()


def test_the_place_of_one_who_reads_nothing_comes_free_with_the_age_of_its_connection(run):
    for number in range(3, 60):
        add(run, number, rejected={f"site-{one}": "x" * 1000 for one in range(50)})
    limits = Limits(streams=1, poll_s=0.05, connection_age_s=4, connection_grace_s=0.5)
    with monitored(run, port=0, limits=limits) as bound, channel(bound) as slow:
        call = events(slow)(EventsRequest(), timeout=60)
        assert next(call).round == 0  # and no more
        with pytest.raises(IncompleteError, match="1 follow this run already"):
            next(follow(at(bound)))
        until(lambda: has_room(bound))


def test_a_follower_whose_connection_gets_too_old_makes_a_new_one_and_hears_each_round_once(run):
    limits = Limits(poll_s=0.05, connection_age_s=0.3, connection_grace_s=0.2)
    heard: list[int] = []
    with monitored(run, port=0, limits=limits) as bound:
        thread = in_background(lambda: heard.extend(one["round"] for one in follow(at(bound))))
        time.sleep(2.0)
        add(run, 3)
        add(run, 4)
        finish(run)
        thread.join(20)
    assert heard == [0, 1, 2, 3, 4]


def has_room(bound: Bound) -> bool:
    try:
        return next(follow(at(bound)))["round"] == 0
    except IncompleteError:
        return False


def test_a_request_beyond_the_limit_is_refused_before_it_is_read(run):
    with monitored(run, port=0) as bound, channel(bound) as plain:
        status = plain.unary_unary(f"/{SERVICE}/Status")
        with pytest.raises(grpc.RpcError) as caught:
            status(b"x" * 2000, timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert ask_status(at(bound))["rounds"] == 4


def test_the_standard_health_service_stands_beside_it(run):
    with monitored(run, port=0) as bound, channel(bound) as plain:
        health = health_pb2_grpc.HealthStub(plain)
        for name in ("", SERVICE):
            found = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert found.status == health_pb2.HealthCheckResponse.SERVING


def test_a_directory_without_a_run_is_one_clear_error_unless_it_may_come_later(run, tmp_path):
    nowhere = tmp_path / "nowhere"
    with (
        pytest.raises(ConfigError, match=r"nowhere holds no run: there is no such directory"),
        monitored(nowhere, port=0),
    ):
        pass
    with monitored(nowhere, port=0, wait=True, limits=QUICK) as bound:
        with pytest.raises(IncompleteError, match="the run has not begun"):
            ask_status(at(bound))
        later = follow(at(bound))
        thread = in_background(lambda: (time.sleep(0.3), run.rename(nowhere)))
        assert next(later)["round"] == 0
        later.close()
        thread.join()
        until(lambda: _is_told(bound))


def _is_told(bound: Bound) -> bool:
    try:
        return ask_status(at(bound))["rounds_completed"] == 2
    except IncompleteError:
        return False


def test_damage_is_told_by_its_kind_and_a_strangers_exception_is_not_told(run):
    with monitored(run, port=0) as bound:
        rounds, spent = (run / "rounds.jsonl").read_text(), (run / SPENT).read_text()
        (run / "rounds.jsonl").write_text("{]\n" + rounds)
        with pytest.raises(ConfigError, match=r"rounds\.jsonl is damaged"):
            ask_status(at(bound))
        with pytest.raises(ConfigError, match=r"rounds\.jsonl is damaged"):
            next(follow(at(bound)))
    (run / "rounds.jsonl").write_text(rounds + '{"round": 3, "asked": 1}\n{"round": 4, "score": "secret"}\n')
    with (
        monitored(run, port=0) as bound,
        pytest.raises(FedLoraError, match="the monitor's own log") as caught,
    ):
        list(follow(at(bound), 4))
    assert "secret" not in str(caught.value) and "score" not in str(caught.value)
    (run / "rounds.jsonl").write_text(rounds)
    (run / SPENT).write_text('{"secret": 1}\n' + spent)
    with monitored(run, port=0) as bound:
        with pytest.raises(FedLoraError, match="the monitor's own log says why") as caught:
            ask_status(at(bound))
        assert "secret" not in str(caught.value) and "KeyError" not in str(caught.value)
    (run / SPENT).write_text(spent)
    (run / "roster.json").unlink()
    (run / "ledgers").mkdir()
    (run / "ledgers" / "client-0.jsonl").write_text("{}\n")
    with monitored(run, port=0) as bound, pytest.raises(LedgerError):
        ask_status(at(bound))


def test_epsilon_is_computed_once_however_many_ask(run, monkeypatch):
    asked = []

    def slow(run_dir: Path) -> dict:
        asked.append(run_dir)
        time.sleep(0.3)
        return run_status(run_dir)

    monkeypatch.setattr(monitor_view, "run_status", slow)
    view = View(run, least_age_s=60.0)
    threads = [in_background(view.status) for _ in range(8)]
    for thread in threads:
        thread.join()
    add(run, 3)  # it rests now, so the older figures have to do
    assert (len(asked), view.status()["rounds_completed"]) == (1, 2)
    finish(run)  # but not at the end
    assert (len(asked), view.status()["finished"], len(asked)) == (1, True, 2)


def test_plain_text_stays_on_this_machine(run, tls):
    with (
        pytest.raises(ConfigError, match=r"--host: '0\.0\.0\.0' is reached from outside"),
        monitored(run, host="0.0.0.0", port=0),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="belong together"),
        monitored(run, port=0, certificate=tls.certificate),
    ):
        pass
    with pytest.raises(
        ConfigError, match=r"server\.example is not this machine, so it is spoken to in TLS only"
    ):
        monitor_address("server.example:9095", None)


def test_a_certificate_that_cannot_work_is_refused_at_the_start(run, tls, tmp_path):
    other, old = pair(tmp_path / "other"), pair(tmp_path / "old", made=NOW - timedelta(days=9))
    with (
        pytest.raises(ConfigError, match="is not for the key"),
        monitored(run, port=0, certificate=tls.certificate, key=other.key),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="ended on"),
        monitored(run, port=0, certificate=old.certificate, key=old.key),
    ):
        pass


def test_a_port_that_is_taken_is_named(run):
    with monitored(run, port=0, metrics_port=0) as bound:
        with (
            pytest.raises(ConfigError, match=f"--port: 127.0.0.1:{bound.port} cannot be used"),
            monitored(run, port=bound.port),
        ):
            pass
        with (
            pytest.raises(ConfigError, match=r"--metrics-port: .* cannot be used"),
            monitored(run, port=0, metrics_port=bound.metrics_port),
        ):
            pass


def test_each_reason_not_to_trust_a_certificate_has_its_own_words_and_next_move(run, tls, tmp_path, capsys):
    other, elsewhere = pair(tmp_path / "other"), pair(tmp_path / "elsewhere", names=("elsewhere.example",))
    old = pair(tmp_path / "old", made=NOW - timedelta(days=9))
    young = pair(tmp_path / "young", made=NOW + timedelta(days=9))
    with monitored(run, port=0, certificate=tls.certificate, key=tls.key) as bound:
        refused(at(bound, other.roots), ConfigError, "was issued by .* copy ca.crt from the kit")
        refused(at(bound), ConfigError, "speaks TLS; give --root-certificates FILE")
    with monitored(run, port=0, certificate=elsewhere.certificate, key=elsewhere.key) as bound:
        refused(
            at(bound, elsewhere.roots),
            ConfigError,
            "is for elsewhere.example, not for 127.0.0.1; reach it by",
        )
        refused(
            at(bound, elsewhere.roots, "localhost"),
            ConfigError,
            "not for localhost; reach it by one of those",
        )
    with handshakes(old.certificate, old.key) as port:
        refused(address(port, old.roots), ConfigError, "ended on .*; here it is .*; renew it")
    with handshakes(young.certificate, young.key) as port:
        refused(address(port, young.roots), ConfigError, "begins on .*; set this machine's clock")
    with monitored(run, port=0) as bound:
        refused(
            at(bound, tls.roots), ConfigError, "does not speak TLS; start `fedlora monitor` there with --cert"
        )
    with handshakes(tls.certificate, tls.key) as port:
        refused(
            address(port, tls.roots),
            ConfigError,
            "speaks TLS but no gRPC; give the port of `fedlora monitor`",
        )
    missing = MonitorAddress(host="127.0.0.1", port=1, roots=tmp_path / "none.crt")
    refused(missing, ConfigError, "--root-certificates: .*none.crt cannot be read")
    refused(address(1, tls.key), ConfigError, "holds no PEM certificate")


def test_a_server_that_is_not_there_is_one_message_and_worth_another_try(run, tls):
    with monitored(run, port=0) as bound:
        pass
    refused(at(bound), IncompleteError, "nothing listens there; start `fedlora monitor` beside the server")
    with pytest.raises(IncompleteError, match="nothing listens there"):
        next(follow(at(bound)))
    unknown = MonitorAddress(host="no-such-host.invalid", port=9, roots=tls.roots)
    refused(unknown, IncompleteError, "no machine of the name 'no-such-host.invalid'|cannot be reached")
    assert (IncompleteError.exit_status, ConfigError.exit_status) == (4, 2)


def test_another_grpc_service_is_no_monitor():
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    refused(address(port, None), ConfigError, "speaks gRPC but is no monitor")
    server.stop(0).wait()


def test_a_follower_outlives_a_restart_of_the_monitor_and_misses_no_round(run):
    heard: list[int] = []
    with monitored(run, port=0, limits=QUICK) as bound:
        thread = in_background(lambda: heard.extend(one["round"] for one in follow(at(bound), patience_s=30)))
        time.sleep(0.5)
    add(run, 3)
    with monitored(run, port=bound.port, limits=QUICK):
        add(run, 4)
        finish(run)
        thread.join(20)
    assert heard == [0, 1, 2, 3, 4]


def test_one_who_follows_a_run_that_has_not_begun_outlives_a_restart_too(run, tmp_path):
    heard: list[int] = []
    later = tmp_path / "later"
    with monitored(later, port=0, wait=True, limits=QUICK) as bound:
        thread = in_background(lambda: heard.extend(one["round"] for one in follow(at(bound))))
        time.sleep(0.5)
    finish(run)
    run.rename(later)
    with monitored(later, port=bound.port, limits=QUICK):
        thread.join(20)
    assert heard == [0, 1, 2]


def test_a_follower_that_a_monitor_never_comes_back_to_gives_up(run):
    with monitored(run, port=0, limits=QUICK) as bound:
        lines = follow(at(bound), patience_s=1.5)
        assert next(lines)["round"] == 0
        assert [next(lines)["round"] for _ in range(2)] == [1, 2]
    with pytest.raises(IncompleteError, match="nothing listens there"):
        next(lines)


@pytest.mark.parametrize(
    "text",
    ["localhost", "localhost:", ":9", "localhost:0", "localhost:99999", "http://a:9", "::1:9", "localhost:٣"],
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ConfigError, match="is no HOST:PORT"):
        monitor_address(text, None)


def test_addresses_of_this_machine_may_be_ipv6():
    assert monitor_address("[::1]:9", None).target == "[::1]:9"
    assert monitor_address("localhost:9", None).host == "localhost"


def test_status_takes_a_directory_or_a_server_and_no_servers_option_with_a_directory():
    require_one_source(Path("run"), None, follow=False, roots=None)
    require_one_source(None, "a:1", follow=True, roots=Path("ca.crt"))
    here = Path("run")
    for run_dir, server, words in ((None, None, "one of them"), (here, "a:1", "one of them")):
        with pytest.raises(ConfigError, match=words):
            require_one_source(run_dir, server, follow=False, roots=None)
    with pytest.raises(ConfigError, match="--follow belongs to --server"):
        require_one_source(here, None, follow=True, roots=None)
    with pytest.raises(ConfigError, match="--root-certificates belongs to --server"):
        require_one_source(here, None, follow=False, roots=here)


def test_prometheus_gets_the_same_figures(run):
    with monitored(run, port=0, metrics_port=0) as bound:
        kind, text = scraped(f"http://127.0.0.1:{bound.metrics_port}/metrics")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            scraped(f"http://127.0.0.1:{bound.metrics_port}/config.yaml")
    found, samples = run_status(run), parsed(text)
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    assert samples["fedlora_rounds_completed"] == 2 and samples["fedlora_run_finished"] == 0
    assert samples['fedlora_epsilon{client="site-a"}'] == found["epsilon_by_client"]["site-a"]
    assert samples['fedlora_refused_replies{reason="no_data"}'] == 2
    assert samples['fedlora_score{metric="accuracy",model="newest"}'] == 0.27
    assert samples['fedlora_client_participations{client="site-c"}'] == 0
    assert "fedlora_update_bytes" not in text  # not known: no sample
    assert samples["fedlora_last_round_asked"] == 3 and samples["fedlora_last_round_answered"] == 1
    assert samples["fedlora_last_round_refused"] == 2 and samples["fedlora_last_round_rejected"] == 1
    assert samples["fedlora_last_round_seconds"] == 2.0 and "public_clip_share" not in text


def test_the_bytes_of_a_reply_and_the_public_clip_share_are_figures_where_they_are_known(run):
    (run / "replies").mkdir()
    (run / "replies" / "0.frame").write_bytes(b"\0" * 1234)
    add(run, 3, public_clip_share=0.25)
    view = View(run)
    samples = parsed(metrics_text(view.status(), view.last_round()))
    assert samples["fedlora_last_round_reply_bytes"] == 1234
    assert samples["fedlora_last_round_public_clip_share"] == 0.25


def test_a_server_that_serves_its_figures_listens_on_this_machine_alone_and_only_when_asked(run, caplog):
    with serve._metrics(run, None):
        assert not [t for t in threading.enumerate() if "serve_forever" in t.name]
    with caplog.at_level("INFO"), serve._metrics(run, 0):
        (address,) = re.findall(r"http://127\.0\.0\.1:\d+/metrics", caplog.text)
        assert parsed(scraped(address)[1])["fedlora_rounds_completed"] == 2
    with pytest.raises(urllib.error.URLError):
        scraped(address)


def test_a_run_that_cannot_be_read_is_a_figure_too(tmp_path):
    with monitored(tmp_path / "later", port=0, metrics_port=0, wait=True) as bound:
        _, text = scraped(f"http://127.0.0.1:{bound.metrics_port}/metrics")
    assert parsed(text) == {"fedlora_run_readable": 0.0}


def test_labels_and_numbers_are_written_as_the_format_has_them(run):
    found = View(run).status()
    odd = {'a"b': 1.0, "c\\d": None, "e\nf": float("inf"), "ü": float("nan")}
    lines = metrics_text({**found, "epsilon_by_client": odd, "epsilon_max": None}).splitlines()
    assert [text for text in lines if text.startswith("fedlora_epsilon")] == [
        "fedlora_epsilon_unknown_clients 1",
        'fedlora_epsilon{client="a\\"b"} 1',
        'fedlora_epsilon{client="e\\nf"} +Inf',
        'fedlora_epsilon{client="ü"} NaN',
    ]
    names = [text.split()[2] for text in lines if text.startswith("# TYPE")]
    assert len(names) == len(set(names))


def test_with_a_certificate_the_figures_travel_in_tls(run, tls):
    with monitored(run, port=0, metrics_port=0, certificate=tls.certificate, key=tls.key) as bound:
        trusting = ssl.create_default_context(cafile=str(tls.roots))
        _, text = scraped(f"https://127.0.0.1:{bound.metrics_port}/metrics", trusting)
        assert parsed(text)["fedlora_rounds"] == 4
        with pytest.raises(OSError):
            scraped(f"http://127.0.0.1:{bound.metrics_port}/metrics")


def test_connections_that_say_nothing_are_few_and_end(run, tls, monkeypatch):
    monkeypatch.setattr(monitor_metrics, "PATIENCE_S", 1.0)
    with monitored(run, port=0, metrics_port=0, certificate=tls.certificate, key=tls.key) as bound:
        assert bound.metrics_port is not None
        before = threading.active_count()
        idle = [socket.create_connection(("127.0.0.1", bound.metrics_port)) for _ in range(40)]
        time.sleep(0.3)
        assert threading.active_count() - before <= 2 * monitor_metrics.CONNECTIONS
        trusting = ssl.create_default_context(cafile=str(tls.roots))
        ends = time.monotonic() + 60
        while True:  # a reader has no more patience shown to it than they have, which a busy machine may need
            try:
                _, text = scraped(f"https://127.0.0.1:{bound.metrics_port}/metrics", trusting)
                break
            except OSError:
                assert time.monotonic() < ends
        assert parsed(text)["fedlora_rounds"] == 4
        for connection in idle:
            connection.close()


def test_many_connections_that_say_nothing_do_not_keep_a_reader_out(run, tls):
    with monitored(run, port=0, certificate=tls.certificate, key=tls.key) as bound:
        idle = [socket.create_connection(("127.0.0.1", bound.port)) for _ in range(100)]
        assert ask_status(at(bound, tls.roots))["rounds"] == 4
        for connection in idle:
            connection.close()


MONITOR = """
import signal, sys, threading, typer
from fedlora.cli import follow

def stop():
    if sys.stdin.readline():
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

threading.Thread(target=stop, daemon=True).start()
app = typer.Typer()
app.callback()(lambda: None)
follow.add_to(app)
app(sys.argv[1:])
"""
"""The command, with a thread that gets a SIGTERM when it is told."""


@pytest.mark.parametrize("thread", ["main", "other"])
def test_the_command_serves_until_it_is_told_to_stop(run, tls, thread):
    """A sleep does not end by a signal that the kernel hands to another thread."""
    words = [sys.executable, "-c", MONITOR, "monitor", str(run), "--port", "0", "--metrics-port", "0"]
    words += ["--certificate", str(tls.certificate), "--key", str(tls.key)]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, **pipes, text=True, env=dict(os.environ)) as process:
        assert process.stdin is not None and process.stderr is not None
        first, second = process.stderr.readline(), process.stderr.readline()
        port = first.split("127.0.0.1:")[1].split()[0]
        found = ask_status(monitor_address(f"localhost:{port}", tls.roots))
        if thread == "main":
            process.send_signal(signal.SIGTERM)
        else:
            time.sleep(1)  # the main one sleeps by now
            print(file=process.stdin, flush=True)
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert found["rounds_completed"] == 2 and "(TLS)" in first and "https://" in second


def refused(server: MonitorAddress, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        ask_status(server, timeout_s=10)
    assert type(caught.value) is kind


def address(port: int, roots: Path | None) -> MonitorAddress:
    return MonitorAddress(host="127.0.0.1", port=port, roots=roots)


def channel(bound: Bound) -> grpc.Channel:
    return grpc.insecure_channel(f"127.0.0.1:{bound.port}")


def events(channel: grpc.Channel) -> Callable:
    return channel.unary_stream(
        f"/{SERVICE}/Events",
        request_serializer=EventsRequest.SerializeToString,
        response_deserializer=Round.FromString,
    )


def scraped(url: str, context: ssl.SSLContext | None = None) -> tuple[str, str]:
    with urllib.request.urlopen(url, timeout=10, context=context) as reply:
        return reply.headers["Content-Type"], reply.read().decode()


def parsed(text: str) -> dict[str, float]:
    assert text.endswith("\n")
    lines = [one for one in text.splitlines() if not one.startswith("#")]
    return {name: float(value) for name, value in (one.rsplit(" ", 1) for one in lines)}
