"""`fedlora doctor`: one line a finding, with the mend for whatever is not well, and a status that scripts can use."""

import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import typer

from fedlora.cli import doctor
from fedlora.cli.app import explain
from fedlora.doctor import line as doctor_line
from fedlora.doctor import machine as doctor_machine
from fedlora.doctor.config import config_lines
from fedlora.doctor.doctor import exit_status
from fedlora.doctor.line import Line, looked, within
from fedlora.doctor.machine import Probe, disk
from fedlora.doctor.server import Address, address, kit_lines, server_lines
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger import open_ledger
from fedlora.privacy.noise import OS_ENTROPY
from fedlora.provision.certificates import (
    authority_certificate,
    certificate_pem,
    key_pem,
    new_key,
    server_certificate,
)
from fedlora.provision.provision import provision, provision_node
from fedlora.values import DpEvent

BUDGET = Budget(target_epsilon=8.0, target_delta=1e-5, max_participations=2, accountant="pld")
STEPS = DpEvent(noise_multiplier=1.5, sample_rate=0.04, steps=2, expected_batch=16.0, max_draw=60)

app = typer.Typer(rich_markup_mode=None)
doctor.add_to(app)


@app.callback()
def _callback() -> None:
    """Keeps `doctor` a subcommand, as it is in the real app."""


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, the one message) as the console script would have them."""
    try:
        status = app(["doctor", *map(str, arguments)], prog_name="fedlora", standalone_mode=False)
        message = ""
    except Exception as error:
        message, status = explain(error)
    return status, capsys.readouterr().out, message


def no_gpu() -> Probe:
    """As torch answers on a machine without one; the probe's process is real, and quick."""
    return Probe('print(\'{"version": "2.13", "cuda": null, "threads": 1, "devices": []}\')')


def by_name(lines: Iterator[Line]) -> dict[str, Line]:
    """The last line of each name; each that is not ok says its mend, and only a failed one has a status."""
    found = list(lines)
    assert all(bool(line.mend) == (line.state != "ok") for line in found), found
    assert all(bool(line.exit_status) == (line.state == "fail") for line in found), found
    return {line.name: line for line in found}


def of(path: Path, *changes: tuple[str, str]) -> dict[str, Line]:
    """The lines of a config with some of its text changed."""
    for old, new in changes:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    return by_name(config_lines(path, no_gpu()))


def test_the_whole_command_tells_of_machine_config_and_kit_in_text_and_in_json(node, tmp_path, capsys):
    provision(tmp_path / "kit", nodes=2, now=datetime.now(UTC))
    status, out, _ = run(capsys, node, "--kit", tmp_path / "kit", "--format", "json")
    told = json.loads(out)
    lines = {line["name"]: line for line in told["lines"]}
    assert status == told["exit_status"] == 0, told
    assert told["failed"] == 0 and told["warned"] == sum(line["state"] == "warn" for line in told["lines"])
    assert {
        *("python", "packages", "flower", "entropy", "core dumps", "loopback", "threads", "triton", "torch"),
        *("gpu", "ray", "config", "device", "model", "records", "disk", "ledger folder", "ledger", "mark"),
        *("kit certificate", "kit secret", "kit key", "kit register", "kit modes"),
    } == lines.keys()
    assert lines["records"]["found"] == "360 here, 400 declared"
    assert not (tmp_path / "state").exists()  # nothing was changed
    status, out, _ = run(capsys, tmp_path / "none.yaml")
    assert status == 2 and "  fail  config" in out and "  -> " in out and "1 failed" in out


def test_what_cannot_be_an_address_is_a_usage_error(capsys):
    for wrong in ("nobody", "host:0", "host:70000", "a b:1", "http://host:1", "me@host:1", ":1"):
        status, out, message = run(capsys, "--server", wrong)
        assert (status, out) == (2, "") and "HOST:PORT" in message and repr(wrong) in message
    assert address("[::1]:80", None) == Address(host="::1", port=80)
    status, _, message = run(capsys, "--root-certificates", "ca.crt")
    assert status == 2 and "--server HOST:PORT" in message


def test_a_package_that_is_missing_or_of_another_version_is_named_with_its_install(monkeypatch):
    wanted = ["numpy>=99", "no-such-thing==1.0", "scipy", 'ruff>=99; extra == "dev"']
    monkeypatch.setattr(doctor_machine, "requires", lambda name: wanted)
    found = list(looked("packages", doctor_machine._packages))
    assert [(line.state, line.mend) for line in found] == [
        ("fail", "pip install 'numpy>=99'"),
        ("fail", "pip install 'no-such-thing==1.0'"),
    ]
    assert "no-such-thing is not installed" in found[1].found


def test_an_import_that_breaks_or_hangs_is_a_line_and_not_the_doctors_end(monkeypatch):
    monkeypatch.setattr(doctor_machine, "PROBE_S", 0.5)
    hangs = Probe("import time; time.sleep(60)").answer()
    monkeypatch.setattr(doctor_machine, "PROBE_S", 30.0)
    breaks = Probe("raise ImportError('libcudart.so.13: cannot open')").answer()
    killed = Probe("import os, signal; os.kill(os.getpid(), signal.SIGKILL)").answer()
    assert (hangs, killed) == ("not imported within 0.5 s", "ended with status -9")
    for said in (hangs, breaks, killed):
        (torch,), (ray,) = doctor_machine._torch(said), doctor_machine._ray(said)
        assert torch.state == ray.state == "fail" and torch.found == said
        assert [line.state for line in doctor_machine._gpu(said, None)] == ["ok"]
    assert "libcudart" in breaks


def test_a_gpu_that_torch_cannot_use_is_told_with_the_cause():
    def gpu(driver: str | None, **said: object) -> Line:
        (line,) = doctor_machine._gpu({"cuda": None, "devices": [], **said}, driver)
        return line

    assert gpu(None).state == "ok"
    assert "without CUDA" in gpu("570.1").found and gpu("570.1").state == "warn"
    assert "finds no device" in gpu("570.1", cuda="12.8").found
    assert gpu("570.1", cuda="12.8", devices=["H"]).found == "H, CUDA 12.8"


def test_threads_are_a_hint_and_more_of_them_than_cores_are_told(monkeypatch):
    cores = doctor_machine.usable_cores()
    for said, state in (
        (None, "warn" if cores > 1 else "ok"),
        ("1", "ok"),
        ("many", "warn"),
        ("4096", "warn"),
    ):
        if said is None:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert [line.state for line in doctor_machine._blas()] == [state]
    (torch,) = doctor_machine._torch({"version": "2.13", "threads": cores + 1})
    assert torch.state == "warn" and f"OMP_NUM_THREADS={cores}" in torch.mend


def test_a_disk_without_room_fails_and_a_nearly_full_one_is_told(monkeypatch, tmp_path):
    def state() -> str:
        (line,) = disk("disk", tmp_path / "not" / "made")
        assert str(tmp_path) in line.found
        return line.state

    for little, none, wanted in ((0, 0, "ok"), (1 << 60, 0, "warn"), (1 << 60, 1 << 60, "fail")):
        monkeypatch.setattr(doctor_machine, "LITTLE_BYTES", little)
        monkeypatch.setattr(doctor_machine, "NO_BYTES", none)
        assert state() == wanted


def test_what_never_answers_and_what_raises_are_failed_lines(monkeypatch):
    def hang() -> Iterator[Line]:
        within(lambda: time.sleep(5), 0.1)
        yield doctor_line.ok("x", "never")

    def divide() -> Iterator[Line]:
        yield doctor_line.ok("x", f"{'patient 4711' and 1 // 0}")

    (hung,), (raised,) = looked("x", hang), looked("x", divide)
    assert hung.state == raised.state == "fail" and "no answer" in hung.found
    assert "ZeroDivisionError" in raised.found and "4711" not in raised.found
    assert exit_status([hung, raised]) == 2 and exit_status([]) == 0


def test_a_run_whose_model_and_files_are_there_is_well(tiny_config, tmp_path):
    tiny_config()
    found = of(tmp_path / "run.yaml")
    assert {line.state for line in found.values()} == {"ok"} and found.keys() == {
        "config",
        "disk",
        "model",
        "data",
    }
    assert found["data"].found == "360 records to train on, 90 to score on"


def test_a_run_whose_model_or_file_is_missing_says_which(tiny_config, tiny_encoder, topic_files, tmp_path):
    tiny_config()
    found = of(
        tmp_path / "run.yaml", (str(tiny_encoder), "no/such-model"), (str(topic_files[1]), "nowhere.tsv")
    )
    assert (found["model"].state, found["data"].state) == ("fail", "fail")
    assert "no/such-model" in found["model"].found and "nowhere.tsv" in found["data"].found
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    found = of(tmp_path / "run.yaml", ("no/such-model", str(tmp_path / "empty")))
    assert "no safetensors" in found["model"].found


def test_a_config_that_is_wrong_is_told_line_by_line(tiny_config, tmp_path):
    tiny_config()
    path = tmp_path / "run.yaml"
    path.write_text(path.read_text().replace("rounds: 3", "rounds: 0").replace("cohort:", "cohrt:"))
    lines = list(config_lines(path, no_gpu()))
    assert len(lines) >= 2 and {(line.name, line.state) for line in lines} == {("config", "fail")}
    assert all(str(path) in line.found and line.mend for line in lines)


def test_what_hinders_a_node_is_told_before_it_starts(node, tmp_path):
    found = of(
        node,
        ("declared_records: 400", "declared_records: 300"),
        ("max_grad_norm: 1.0", "max_grad_norm: 1.0\ndevice: cuda"),
        (f"{tmp_path}/state", "/proc/fedlora"),
    )
    assert found["records"].found == "360, but 300 are declared"
    assert {name for name, line in found.items() if line.state == "fail"} == {
        "records",
        "device",
        "disk",
        "ledger folder",
    }
    (tmp_path / "state").write_text("")
    assert "is a file" in of(node, ("/proc/fedlora", f"{tmp_path}/state"))["ledger folder"].found


def test_a_ledger_in_memory_is_told_since_a_restart_loses_it(node, tmp_path, monkeypatch):
    from fedlora.doctor import config as doctor_config

    for kind, words in (("tmpfs", "is memory"), ("overlay", "container's own layer"), ("ext4", "fsynced")):
        monkeypatch.setattr(doctor_config, "_filesystem", lambda place, kind=kind: kind)
        assert words in of(node)["ledger folder"].found
    monkeypatch.undo()
    if Path("/proc/self/mounts").exists():
        assert doctor_config._filesystem(Path("/proc/self")) == "proc"
    assert list(tmp_path.glob(".fedlora-doctor-*")) == []


def test_overrides_hold_for_the_ledger_and_the_mark_too(node, tmp_path, capsys):
    spent(tmp_path).parent.rename(tmp_path / "moved")
    words = ("--set", f"ledger={tmp_path}/moved/ledger.jsonl", "--set", f"mark={tmp_path}/mark")
    status, out, _ = run(capsys, node, *words, "--format", "json")
    lines = {line["name"]: line for line in json.loads(out)["lines"]}
    assert status == 0 and "1 of 2 participations" in lines["ledger"]["found"]
    assert "same disk" in lines["mark"]["found"]
    status, _, message = run(capsys, "--set", "seed=1")
    assert status == 2 and "--set" in message


def spent(folder: Path) -> Path:
    """The ledger of one participation."""
    path = folder / "state" / "ledger.jsonl"
    book = open_ledger(path, client="site-0", dataset_fingerprint="d" * 64, noise_kind=OS_ENTROPY)
    book.debit("r", 1, "request", (STEPS,), max_grad_norm=1.0, budget=BUDGET)
    return path


def test_a_ledger_that_holds_is_well_and_one_that_does_not_is_status_3(node, tmp_path, capsys):
    assert of(node)["ledger"].found.endswith("yet: nothing was spent")
    path = spent(tmp_path)
    found = of(node)
    assert found["ledger"].state == "ok" and "1 of 2 participations, epsilon " in found["ledger"].found
    key = path.with_name("ledger.jsonl.key")
    kept = key.read_bytes()
    key.unlink()
    missing = of(node)["ledger"]
    assert (missing.state, missing.exit_status) == ("fail", 3) and str(key) in missing.found
    key.write_bytes(kept)
    path.write_text(path.read_text().replace('"steps": 2', '"steps": 1').replace('"r"', '"q"'))
    status, out, _ = run(capsys, node)
    assert status == 3 and "  fail  ledger " in out


def test_a_ledger_that_is_gone_is_missed_where_a_mark_remembers_it(node, tmp_path):
    mark = tmp_path / "mark"
    mark.write_text(json.dumps({"seq": 1, "head": "f" * 64}))
    found = of(node, ("max_grad_norm: 1.0", f"max_grad_norm: 1.0\nmark: {mark}"))
    assert (found["ledger"].state, found["ledger"].exit_status) == ("fail", 3)
    assert found["mark"].state == "warn" and "same disk" in found["mark"].found


def test_a_mark_on_another_disk_is_well(node, tmp_path):
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has no second disk at /dev/shm")
    assert of(node)["mark"].state == "warn"
    mark = f"{elsewhere}/fedlora-doctor-{os.getpid()}/mark"
    assert of(node, ("max_grad_norm: 1.0", f"max_grad_norm: 1.0\nmark: {mark}"))["mark"].state == "ok"


@contextmanager
def listening(
    certificate: Path | None = None, key: Path | None = None, *, ahead: timedelta = timedelta(0)
) -> Iterator[int]:
    """The port of an HTTP server on this machine, whose clock is so far ahead."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(time.time() + ahead.total_seconds())

        def log_message(self, format: str, *words: object) -> None: ...

    class Quiet(HTTPServer):
        def handle_error(self, request: object, client_address: object) -> None: ...

    server = Quiet(("127.0.0.1", 0), Answer)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def at(port: int, roots: Path | None = None, host: str = "localhost") -> dict[str, Line]:
    return by_name(server_lines(Address(host=host, port=port, roots=roots)))


def test_a_server_of_the_kit_is_well_and_each_fault_has_its_name(tmp_path):
    now = datetime.now(UTC)
    kit, other = tmp_path / "kit", tmp_path / "other"
    provision(kit, nodes=1, now=now)
    provision(other, nodes=1, now=now)
    with listening(kit / "server.crt", kit / "server.key") as port:
        for host in ("localhost", "127.0.0.1"):
            assert {line.state for line in at(port, kit / "ca.crt", host).values()} == {"ok"}
        assert "which " in at(port, other / "ca.crt")["certificate"].found
        assert "--root-certificates" in at(port)["certificate"].mend
        nowhere = at(port, tmp_path / "nowhere.crt")["certificate"]
        assert nowhere.state == "fail" and "nowhere.crt" in nowhere.found


@pytest.mark.parametrize(
    ("names", "began_days", "words"),
    [
        (["elsewhere"], 0, "not for localhost"),
        (["localhost"], -30, "ended on"),
        (["localhost"], -9, "ends on"),
    ],
)
def test_a_name_and_an_end_are_told_of_what_the_server_shows(tmp_path, names, began_days, words):
    began = datetime.now(UTC) + timedelta(days=began_days)
    signer, own = new_key(), new_key()
    authority = authority_certificate(signer, began)
    shown = server_certificate(
        own.public_key(), names, authority=authority, authority_key=signer, now=began, days=20
    )
    for name, content in (
        ("ca.crt", certificate_pem(authority)),
        ("server.crt", certificate_pem(shown)),
        ("server.key", key_pem(own)),
    ):
        (tmp_path / name).write_bytes(content)
    with listening(tmp_path / "server.crt", tmp_path / "server.key") as port:
        found = at(port, tmp_path / "ca.crt")["certificate"]
    assert words in found.found and found.state == ("warn" if "ends on" in words else "fail")


@pytest.mark.parametrize(("ahead_s", "state"), [(0, "ok"), (60, "warn"), (-400, "fail")])
def test_a_clock_that_is_apart_is_told_and_fails_where_flower_would_refuse(ahead_s, state):
    with listening(ahead=timedelta(seconds=ahead_s)) as port:
        found = at(port)
    assert found["clock"].state == state
    assert found["certificate"].state == "warn" and "no TLS" in found["certificate"].found


def test_a_port_that_is_closed_or_silent_is_told_in_time(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        began = time.monotonic()
        found = at(port)
        assert time.monotonic() - began < 12
        assert "no TLS handshake" in found["certificate"].found and found["server"].state == "ok"
    assert "nothing listens" in at(port)["server"].found
    assert at(port, host="no-such-host.invalid")["server"].state == "fail"


def test_a_kit_is_well_until_a_key_is_open_lost_or_another(tmp_path):
    kit = tmp_path / "kit"
    provision(kit, nodes=2, now=datetime.now(UTC))
    (kit / "ca.key").unlink()
    assert {line.state for line in by_name(kit_lines(kit, "localhost")).values()} == {"ok"}
    assert "not for fed.example" in by_name(kit_lines(kit, "fed.example"))["kit certificate"].found
    (kit / "node-1.key").chmod(0o644)
    (kit / "superexec.secret").unlink()
    provision_node(tmp_path / "spare", "node-2")
    (kit / "node-2.pub").write_bytes((tmp_path / "spare" / "node-2.pub").read_bytes())
    found = by_name(kit_lines(kit))
    assert "mode 644" in found["kit modes"].found and "chmod 600" in found["kit modes"].mend
    assert {name for name, line in found.items() if line.state == "fail"} == {
        "kit modes",
        "kit secret",
        "kit key",
    }


def test_what_a_node_was_given_is_a_kit_too_and_an_empty_folder_is_none(tmp_path):
    provision(tmp_path / "kit", nodes=1, now=datetime.now(UTC) - timedelta(days=400))
    own = tmp_path / "own"
    provision_node(own, "hospital-a")
    (own / "ca.crt").write_bytes((tmp_path / "kit" / "ca.crt").read_bytes())
    assert {line.state for line in by_name(kit_lines(own)).values()} == {"ok"}
    assert "ended on" in by_name(kit_lines(tmp_path / "kit"))["kit certificate"].found
    assert by_name(kit_lines(tmp_path / "kit"))["kit modes"].state == "warn"  # ca.key lies there
    assert by_name(kit_lines(tmp_path))["kit"].state == "fail"
