"""What a power cut leaves: SIGKILL never tests fsync, since the kernel writes what a dead process has written.

The disk here forgets: a file holds what it held when it was last fsynced, under the names that its directory had when
that was last fsynced. Each step of a node is let begin only with the one before on such a disk.
"""

import hashlib
import os
import stat
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora import disk
from fedlora.deploy.journal import Journal, Reported
from fedlora.deploy.node import DeployedNode
from fedlora.errors import LedgerError
from fedlora.privacy.ledger import Ledger, read_ledger
from fedlora.privacy.outbox import Outbox
from fedlora.training import client as client_module
from fedlora.transport.wire import encode_request
from tests.deploy.nodes import first_request, node_config
from tests.deploy.test_journal import SOUND, SOUNDNESS, Claims, asked_in


class Disk:
    """What of `root` is on the disk, by what was fsynced; `lost` names the fsyncs that do not happen."""

    def __init__(self, root: Path, lost: Callable[[Path], bool] = lambda path: False) -> None:
        self.root, self.lost = root, lost
        self.dropped: list[Path] = []
        self._content: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {root.stat().st_ino: {}}
        self._fsync = os.fsync

    def fsync(self, descriptor: int) -> None:
        """In the place of os.fsync."""
        self._fsync(descriptor)
        path, found = Path(f"/proc/self/fd/{descriptor}").readlink(), os.fstat(descriptor)
        if self.lost(path):
            self.dropped.append(path)
        elif stat.S_ISDIR(found.st_mode):
            self._names[found.st_ino] = {each.name: each.inode() for each in os.scandir(path)}
        else:
            self._content[found.st_ino] = path.read_bytes()

    def promised(self, path: Path) -> None:
        """SQLite has committed this database, which it syncs where nobody sees it; it keeps its word here."""
        if path.exists():
            self._content[path.stat().st_ino] = path.read_bytes()
            self._names.setdefault(path.parent.stat().st_ino, {})[path.name] = path.stat().st_ino

    def read(self, path: Path) -> bytes | None:
        """The file after a power cut; None if it is not there."""
        number = self.root.stat().st_ino
        for name in path.relative_to(self.root).parts:
            number = self._names.get(number, {}).get(name)
            if number is None:
                return None
        return self._content.get(number)

    def left(self, path: Path, to: Path) -> Path:
        """The file after a power cut, copied; nothing is copied if it is not there."""
        to.unlink(missing_ok=True)
        if (content := self.read(path)) is not None:
            to.write_bytes(content)
        return to


class Watched:
    """A node whose every step looks at what the disk holds of the one before."""

    def __init__(self, config, folder: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config, self.disk, self.copy = config, disk, folder / "copy"
        self.faults: list[str] = []
        self.steps: list[str] = []
        monkeypatch.setattr(os, "fsync", disk.fsync)
        self._before(monkeypatch, client_module, "_local_steps", self._training)
        self._before(monkeypatch, Ledger, "release", self._releasing)

    def answer(self, request) -> bytes:
        self.request = request
        frame = DeployedNode(self.config).answer(encode_request(request))
        self._sending(frame)
        return frame

    def _before(
        self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, look: Callable[[], None]
    ) -> None:
        real = getattr(owner, name)

        def looked(*arguments: object, **named: object) -> object:
            look()
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, looked)

    def _expect(self, step: str, holds: bool) -> None:
        self.steps.append(step)
        if not holds:
            self.faults.append(step)

    def _ledger(self):
        path = self.disk.left(Path(self.config.ledger), self.copy)
        try:
            return read_ledger(path)
        except LedgerError:
            return None

    def _kept(self):
        (path,) = [
            path for path in self._outbox().glob("*.reply") if f"{self.request.round:06d}" in path.name
        ]
        return self.disk.read(path)

    def _outbox(self) -> Path:
        return Path(f"{self.config.ledger}.outbox")

    def _paid(self, contents) -> list[int]:
        return [d.seq for d in contents.debits if d.round == self.request.round] if contents else []

    def _training(self) -> None:
        self._expect("training begins with its debit on disk", bool(self._paid(self._ledger())))

    def _releasing(self) -> None:
        found = Outbox(self._outbox()).find("r", self.request.round)
        kept = self._kept()
        whole = found is not None and kept is not None and kept.endswith(found.frame)
        self._expect("the release is recorded with the reply on disk", whole)

    def _sending(self, frame: bytes) -> None:
        contents, kept = self._ledger(), self._kept()
        digest = hashlib.sha256(frame).hexdigest()
        recorded = contents is not None and digest in [contents.released(s) for s in self._paid(contents)]
        self._expect("the reply is sent with its digest in the ledger on disk", recorded)
        self._expect("the reply is sent with its bytes on disk", kept is not None and kept.endswith(frame))
        if self.config.mark is not None:
            mark = self.disk.read(Path(self.config.mark))
            told = contents is not None and mark is not None and contents.head.encode() in mark
            self._expect("the reply is sent with the mark on disk", told)


@pytest.fixture
def config(tmp_path, tiny_encoder, topic_files):
    folder = tmp_path / "node"
    folder.mkdir()
    config = node_config(folder, tiny_encoder, topic_files[0], participations=4)
    return config.model_copy(update={"mark": str(folder / "elsewhere" / "mark")})


def rounds(config, tmp_path, monkeypatch, lost: Callable[[Path], bool] = lambda path: False) -> Watched:
    """Two rounds, the second one asked twice."""
    disk_ = Disk(tmp_path / "node", lost)
    node = Watched(config, tmp_path, disk_, monkeypatch)
    request = first_request(config)
    for number in (1, 2, 2):
        node.answer(replace(request, round=number))
    return node


@pytest.mark.fault("F37")
def test_each_step_of_a_round_begins_with_the_one_before_on_the_disk(config, tmp_path, monkeypatch):
    node = rounds(config, tmp_path, monkeypatch)
    assert node.faults == []
    sent = [
        "the reply is sent with its digest in the ledger on disk",
        "the reply is sent with its bytes on disk",
        "the reply is sent with the mark on disk",
    ]
    made = ["training begins with its debit on disk", "the release is recorded with the reply on disk", *sent]
    assert node.steps == [*made, *made, made[1], *sent]


@pytest.mark.parametrize(
    ("lost", "fault"),
    [
        (lambda path: True, "training begins with its debit"),
        (lambda path: path.is_dir(), "training begins with its debit"),
        (lambda path: path.is_file(), "training begins with its debit"),
        (lambda path: path.name == "ledger.jsonl", "training begins with its debit"),
        (lambda path: path.name == "state", "training begins with its debit"),
        (lambda path: path.name == "node", "training begins with its debit"),
        (lambda path: path.name.endswith(".reply.part"), "recorded with the reply"),
        (lambda path: path.name == "ledger.jsonl.outbox", "recorded with the reply"),
        (lambda path: path.name == ".mark.part", "with the mark"),
        (lambda path: path.name == "elsewhere", "with the mark"),
    ],
    ids=[
        "any",
        "folders",
        "files",
        "ledger",
        "its folder",
        "the folder above",
        "reply",
        "outbox",
        "mark",
        "its",
    ],
)
@pytest.mark.fault("F37")
def test_a_node_that_leaves_out_an_fsync_is_found_out(config, tmp_path, monkeypatch, lost, fault):
    node = rounds(config, tmp_path, monkeypatch, lost)
    assert node.disk.dropped
    assert any(fault in found for found in node.faults)


@pytest.mark.fault("F37")
def test_a_release_that_is_not_synced_is_found_out(config, tmp_path, monkeypatch):
    calls = []

    def every_second(path: Path) -> bool:
        calls.append(path)
        return path.name == "ledger.jsonl" and [p.name for p in calls].count("ledger.jsonl") % 2 == 0

    node = rounds(config, tmp_path, monkeypatch, every_second)
    assert any("its digest in the ledger" in found for found in node.faults)


def test_a_node_that_trains_before_it_pays_is_found_out(config, tmp_path, monkeypatch):
    real = client_module.train

    def first_trains(node, request, ledger):
        node.model.load(request.adapters)
        client_module._local_steps(node, request)
        return real(node, request, ledger)

    monkeypatch.setattr("fedlora.deploy.node.train", first_trains)
    node = rounds(config, tmp_path, monkeypatch)
    assert "training begins with its debit on disk" in node.faults


@contextmanager
def _recording(disk_: Disk, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", disk_.fsync)
        yield


@pytest.mark.parametrize(
    "lost", [None, lambda path: path.is_file(), lambda path: path.is_dir()], ids=["none", "files", "folders"]
)
@pytest.mark.fault("F37")
def test_the_servers_journal_is_on_disk_before_anybody_uses_an_update(tmp_path, monkeypatch, lost):
    folder = tmp_path / "run"
    folder.mkdir()
    disk_ = Disk(folder, lost or (lambda path: False))
    with _recording(disk_, monkeypatch):
        cohort = Reported(Claims(SOUND), Journal(folder / "spent.jsonl"), SOUNDNESS)
        found = []
        for number in (1, 2):
            for _ in cohort.ask(["site-0"], asked_in(number)):
                found.append((disk_.read(folder / "spent.jsonl") or b"").count(b"\n") == number)
    assert found == [lost is None] * 2


@pytest.mark.fault("F37")
def test_a_file_that_was_written_durably_is_the_old_or_the_new_at_every_moment(tmp_path, monkeypatch):
    folder = tmp_path / "made" / "by us"
    disk_ = Disk(tmp_path)
    with _recording(disk_, monkeypatch):
        disk.make_directory(folder)
        for number in range(3):
            disk.write_durably(folder / "file", f"text {number}")
            assert disk_.read(folder / "file") == f"text {number}".encode()
