"""Strings planted in records turn up nowhere: not in what is sent, nor in what is written or logged."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from fedlora.deploy.node import DeployedNode
from fedlora.runtime.simulate import simulate
from fedlora.training import client as client_module
from fedlora.transport.wire import decode_reply, encode_request
from fedlora.values import ClientUpdate, RefusalReason
from tests.deploy.nodes import first_request, node_config, reason

TEXT, LABEL = "canary4711text", "canary4711label"
CANARY = "canary4711"


def planted(source: Path, to: Path, *, label: str | None = None, header: bool = True) -> Path:
    """The records of `source`, each with a canary in its text; the last ones labelled `label`."""
    first, *rows = source.read_text().splitlines()
    fields = [row.split("\t") for row in rows]
    place = first.split("\t").index("sentence")
    for row in fields:
        row[place] = f"{row[place]} {TEXT}"
    for row in fields[-3:] if label else []:
        row[first.split("\t").index("topic")] = label
    lines = ["\t".join(row) for row in fields]
    to.write_text("\n".join([first, *lines] if header else lines[-1:] + lines) + "\n")
    return to


def found_in(texts: Iterable[bytes | str]) -> list[str]:
    """Whatever holds a canary in any of the ways that it could be written."""
    forms = [CANARY.encode(code) for code in ("utf-8", "utf-16-le", "utf-32-le")]
    raw = [text.encode() if isinstance(text, str) else text for text in texts]
    return [repr(text[:200]) for text in raw if any(form in text.lower() for form in forms)]


def written(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def all_logs(caplog, capfd) -> Callable[[], list[str]]:
    """Everything logged by anybody at any level, and everything printed."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="fedlora")

    def read() -> list[str]:
        printed = capfd.readouterr()
        return [caplog.text, printed.out, printed.err]

    return read


class Owner:
    """A node in a folder of its own, its records elsewhere, and the tap on what it sends."""

    def __init__(self, folder: Path, model: Path, records: Path, **changes: object) -> None:
        self.folder = folder / "node"
        self.folder.mkdir()
        config = node_config(self.folder, model, records)
        self.config = config.model_copy(update=changes)
        self.frame = encode_request(first_request(self.config))
        self.tap: list[bytes] = []

    def answer(self) -> bytes:
        self.tap.append(DeployedNode(self.config).answer(self.frame))
        return self.tap[-1]

    def leaks(self, logs: Iterable[str]) -> list[str]:
        return found_in([*self.tap, *logs, *written(self.folder).values()])


def test_the_search_finds_a_canary_where_there_is_one(tmp_path, topic_files):
    records = planted(topic_files[0], tmp_path / "records.tsv", label=LABEL)
    assert len(found_in(written(tmp_path).values())) == 1
    assert found_in([f"x {TEXT}", CANARY.upper(), "nothing", LABEL.encode("utf-16-le")]) and records.exists()


@pytest.mark.parametrize("evaluation_noise", [None, 30.0])
def test_nothing_that_a_node_sends_writes_or_logs_holds_a_record(
    tmp_path, tiny_encoder, topic_files, all_logs, evaluation_noise
):
    records = planted(topic_files[0], tmp_path / "records.tsv")
    owner = Owner(tmp_path, tiny_encoder, records, evaluation_noise=evaluation_noise)
    assert isinstance(decode_reply(owner.answer()), ClientUpdate)
    assert owner.answer() == owner.tap[0]
    assert sorted(path.suffix for path in written(owner.folder)) == ["", ".jsonl", ".key", ".reply", ".yaml"]
    assert owner.leaks(all_logs()) == []


class UnprintableError(Exception):
    """Its text is a record in whatever way it is asked for."""

    def __str__(self) -> str:
        return TEXT

    __repr__ = __str__


@pytest.mark.parametrize(
    "error",
    [RuntimeError(TEXT), KeyError(TEXT), UnicodeError(TEXT), MemoryError(TEXT), UnprintableError(TEXT)],
    ids=repr,
)
@pytest.mark.parametrize("where", ["_local_steps", "would_exceed", "losses", "descend"])
def test_an_exception_whose_text_is_a_record_leaves_as_a_code(
    tmp_path, tiny_encoder, topic_files, all_logs, monkeypatch, error, where
):
    def breaks(*anything: object) -> None:
        try:
            raise ValueError(f"before: {TEXT}")
        except ValueError as first:
            raise error from first

    monkeypatch.setattr(client_module, where, breaks)
    owner = Owner(tmp_path, tiny_encoder, planted(topic_files[0], tmp_path / "records.tsv"))
    assert reason(owner.answer()) == RefusalReason.FAILED
    assert owner.leaks(all_logs()) == []


@pytest.mark.parametrize(
    ("label", "header"),
    [(LABEL, True), (LABEL, False), (None, False)],
    ids=["unknown", "no header", "texts first"],
)
def test_records_that_are_not_what_node_yaml_says_leave_no_trace(
    tmp_path, tiny_encoder, topic_files, all_logs, label, header
):
    records = planted(topic_files[0], tmp_path / "records.tsv", label=label, header=header)
    owner = Owner(tmp_path, tiny_encoder, records)
    assert reason(owner.answer()) == RefusalReason.FAILED
    logs = all_logs()
    assert "fedlora check node.yaml" in logs[0]
    assert owner.leaks(logs) == []
    assert not Path(owner.config.ledger).exists()


@pytest.mark.parametrize("name", ["records.csv", "records.jsonl", "records.parquet", "records.tsv"])
def test_a_file_that_cannot_be_read_leaves_no_trace(tmp_path, tiny_encoder, topic_files, all_logs, name):
    records = tmp_path / name
    records.write_bytes(
        f'sentence\ttopic\n"{TEXT}" x\t"{LABEL}\t{LABEL}\n{{"sentence": {TEXT}\n'.encode() + b"\xff\n"
    )
    owner = Owner(tmp_path, tiny_encoder, records)
    assert reason(owner.answer()) == RefusalReason.FAILED
    assert owner.leaks(all_logs()) == []


@pytest.mark.parametrize("evaluation_noise", [None, 30.0])
def test_a_simulation_leaves_no_record_in_its_directory_or_its_logs(
    tiny_config, topic_files, tmp_path, all_logs, evaluation_noise
):
    records = planted(topic_files[0], tmp_path / "records.tsv")
    config = tiny_config(
        data__train=str(records), federation__rounds=2, privacy__evaluation_noise=evaluation_noise
    )
    heard: list[object] = []
    run_dir = simulate(config, tmp_path / "run", heard.append)
    assert len(written(run_dir)) > 5
    assert found_in([*written(run_dir).values(), *map(repr, heard), *all_logs()]) == []


def test_a_simulation_whose_training_fails_over_a_record_says_a_code(
    tiny_config, topic_files, tmp_path, all_logs, monkeypatch
):
    def breaks(*anything: object) -> None:
        raise RuntimeError(TEXT)

    monkeypatch.setattr(client_module, "_local_steps", breaks)
    records = planted(topic_files[0], tmp_path / "records.tsv")
    config = tiny_config(data__train=str(records), federation__rounds=1)
    with pytest.raises(Exception, match="clients answered") as stopped:
        simulate(config, tmp_path / "run", lambda event: None)
    assert found_in([str(stopped.value), *written(tmp_path / "run").values(), *all_logs()]) == []
