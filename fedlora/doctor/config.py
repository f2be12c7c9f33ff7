"""What `fedlora doctor` finds behind a config: the model, the records, and of a node the ledger and its mark."""

import importlib.util
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedlora.config.data import Files, HuggingFace
from fedlora.config.kinds import is_node
from fedlora.config.load import dump_config, load_config, load_node
from fedlora.config.node import NodeConfig, NodeFiles
from fedlora.config.schema import Model, RunConfig
from fedlora.disk import fsync
from fedlora.doctor.cluster import cluster_lines
from fedlora.doctor.line import Line, fail, failed, looked, ok, warn, within
from fedlora.doctor.machine import Probe, disk, existing
from fedlora.errors import ConfigError, LedgerError, ModelError

MUCH_BYTES = 32 << 20
"""A file larger than this is opened, but not read: a line should not take long."""
SLOW_S = 0.5
"""An fsync that takes longer makes every participation wait several times."""


def config_lines(path: Path, torch: Probe, overrides: Sequence[str] = ()) -> Iterator[Line]:
    """Of a run.yaml or a node.yaml; what is wrong with the text itself ends it."""
    try:
        config = (load_node if is_node(path, overrides) else load_config)(path, overrides)
    except ConfigError as error:
        for told in str(error).splitlines():
            yield failed("config", ConfigError(told))
        return
    if isinstance(config, NodeConfig):
        yield ok("config", f"{path} of node {config.client}")
        yield from _node(config, torch)
    else:
        yield ok("config", f"{path}, a run of {config.federation.rounds} rounds")
        yield from looked("disk", lambda: disk("disk", Path(config.output)))
        yield from looked("model", lambda: _model(config.model))
        yield from looked("data", lambda: _run_data(config))
        if (address := config.runtime.address) is not None:
            yield from looked("ray cluster", lambda: cluster_lines(address))


def _node(config: NodeConfig, torch: Probe) -> Iterator[Line]:
    ledger = Path(config.ledger)
    yield from looked("device", lambda: _device(config, torch))
    yield from looked("model", lambda: _model(config.model))
    yield from looked("records", lambda: _records(config))
    yield from looked("disk", lambda: disk("disk", ledger.parent))
    yield from looked("ledger folder", lambda: _folder(ledger))
    yield from looked("ledger", lambda: _ledger(config))
    yield from looked("mark", lambda: _mark(config))


def _device(config: NodeConfig, torch: Probe) -> Iterator[Line]:
    said = torch.answer()
    if config.device == "cuda" and (isinstance(said, str) or not said["devices"]):
        yield fail("device", "cuda, but torch finds no GPU", "see the line gpu, or write device: auto")
    else:
        yield ok("device", config.device)


def _model(model: Model) -> Iterator[Line]:
    """Where it lies; nothing is downloaded and no weight is read."""
    from fedlora.data.hub import hub_within_reach
    from fedlora.training.checkpoints import locate

    try:
        with _offline():
            place = locate(model.name)
    except ModelError as error:
        is_hub_name = 0 < model.name.count("/") < 2 and not model.name.startswith((".", "~", "/"))
        if is_hub_name and hub_within_reach():
            yield warn(
                "model",
                f"{model.name} is not on this machine, but the hub is within reach",
                f"the first run fetches it; to do so now: hf download {model.name}",
            )
            return
        yield failed("model", error)
        return
    files = sorted(place.glob("*.safetensors"))
    if not files:
        yield fail(
            "model", f"no safetensors weights in {place}", "save it again: save_pretrained writes them"
        )
        return
    within(lambda: [file.open("rb").close() for file in files])
    yield ok("model", f"{model.name} at {place}")


@contextmanager
def _offline() -> Iterator[None]:
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def _run_data(config: RunConfig) -> Iterator[Line]:
    from fedlora.data import load_corpus
    from fedlora.data.own import file_records

    data = config.data
    if isinstance(data, HuggingFace):
        if importlib.util.find_spec("datasets") is None:
            yield fail("data", "the package datasets is not installed", "pip install 'fedlora[huggingface]'")
        else:
            yield ok("data", f"{data.path} of the hub or its cache, which is not looked for here")
    elif not isinstance(data, Files):
        yield ok("data", "docstrings of the packages installed here")
    elif (size := sum(_readable(path) for path in (data.train, data.test))) > MUCH_BYTES:
        yield ok("data", f"{data.train} and {data.test} can be opened, {size >> 20} MiB; they were not read")
    else:
        corpus = load_corpus(data, config.task, config.seed)
        yield ok("data", f"{len(corpus.train):,} records to train on, {len(corpus.test):,} to score on")
        if data.public is not None:
            public = file_records(data.public, data, config.task, corpus.classes)
            yield ok("public data", f"{len(public):,} records for the first subspace, covered by no epsilon")


def _records(config: NodeConfig) -> Iterator[Line]:
    from fedlora.data.own import own_records

    if not isinstance(config.data, NodeFiles):
        yield ok("records", "docstrings of the packages installed here: nothing to protect")
        return
    if (size := _readable(config.data.train)) > MUCH_BYTES:
        yield ok("records", f"{config.data.train} can be opened, {size >> 20} MiB; it was not read")
        return
    count, declared = len(own_records(config)), config.declared_records
    if count > declared:
        yield fail("records", f"{count:,}, but {declared:,} are declared", "declare at least as many")
    else:
        yield ok("records", f"{count:,} here, {declared:,} declared")


def _readable(path: str) -> int:
    """Bytes of a file that can be opened. What it is not, reading it says; 0 if it is not there."""
    file = Path(path).expanduser()
    if not file.is_file():
        return 0
    within(lambda: file.open("rb").close())
    return file.stat().st_size


def _folder(ledger: Path) -> Iterator[Line]:
    """A debit is on the disk before a record is touched: so the disk has to say truly when it is."""
    folder = existing(ledger.parent)
    if blocked := [one for one in ledger.absolute().parents if one.exists() and not one.is_dir()]:
        yield fail("ledger folder", f"{blocked[0]} is a file", "name another path in `ledger:`")
        return
    began = time.monotonic()
    within(lambda: _write_and_remove(folder))
    took_s = time.monotonic() - began
    kind = _filesystem(folder)
    found = f"{folder} can be written and fsynced"
    if folder != ledger.parent.absolute():
        found += f"; {ledger.parent} will be made there"
    if kind in ("tmpfs", "ramfs", "overlay"):
        where = "a container's own layer" if kind == "overlay" else "memory"
        yield warn(
            "ledger folder",
            f"{folder} is {where} ({kind}), and goes with it",
            "put the ledger on a disk or volume that stays: losing it means losing the guarantee",
        )
    elif took_s > SLOW_S:
        yield warn("ledger folder", f"{found}, in {took_s:.1f} s", "a faster disk spares every round some")
    else:
        yield ok("ledger folder", found)


def _write_and_remove(folder: Path) -> None:
    descriptor, name = tempfile.mkstemp(prefix=".fedlora-doctor-", dir=folder)
    try:
        os.write(descriptor, b"fsync")
        os.fsync(descriptor)
        fsync(folder)
    finally:
        os.close(descriptor)
        os.unlink(name)  # noqa: PTH108  (what mkstemp gave)


def _filesystem(place: Path) -> str:
    """The type of what is mounted at `place`, as the kernel names it; empty where it does not say."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return ""
    best, kind = "", ""
    for line in mounts.read_text().splitlines():
        point, found = line.split()[1:3]
        point = point.encode().decode("unicode_escape")  # a blank is \040 there
        if place.resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, found
    return kind


def _ledger(config: NodeConfig) -> Iterator[Line]:
    from fedlora.privacy.ledger_mark import marked
    from fedlora.privacy.noise import SEEDED
    from fedlora.privacy.outbox import Outbox
    from fedlora.runs.verify import verified

    ledger = Path(config.ledger)
    mark = None if config.mark is None else Path(config.mark)
    if not ledger.exists() and Outbox(Path(f"{ledger}.outbox")).furthest() is None and marked(mark) is None:
        yield ok("ledger", f"none at {ledger} yet: nothing was spent")
        return
    with tempfile.TemporaryDirectory() as folder:  # the node with its overrides, as a file
        told = Path(folder) / "node.yaml"
        told.write_text(dump_config(config))
        (row,) = verified(told)
    if row["objection"] is not None:
        raise LedgerError(f"{row['objection']}; keep the node still until that is understood")
    key = ledger.with_name(f"{ledger.name}.key")
    if row["noise_source"] != SEEDED and not key.exists():
        raise LedgerError(f"{key} is missing, so nobody can tell whose records {ledger} is of; restore it")
    most = config.budget.max_participations
    yield ok("ledger", f"holds: {row['debits']} of {most} participations, epsilon {row['epsilon']:.3g}")


def _mark(config: NodeConfig) -> Iterator[Line]:
    if config.mark is None:
        yield warn(
            "mark",
            "none: a ledger that is lost together with its replies would not be noticed",
            "name in `mark:` a file on another disk or volume",
        )
        return
    folder, beside = existing(Path(config.mark).parent), existing(Path(config.ledger).parent)
    within(lambda: _write_and_remove(folder))
    if folder.stat().st_dev == beside.stat().st_dev:
        yield warn(
            "mark",
            f"{config.mark} is on the same disk as the ledger: what takes the one takes the other",
            "name in `mark:` a file on another disk or volume",
        )
    else:
        yield ok("mark", f"{config.mark}, on another disk than the ledger")
