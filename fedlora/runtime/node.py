"""A data owner's node: own records, own ledger, own budget and noise. A server only says when it works.

A reply is on the node's disk before it is sent, under its run and round. Asked the same again, the node sends
the same bytes: a second training under one debit would be a second release.
"""

import logging
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from fedlora.config.node import NodeConfig, NodeDocstrings, NodeFiles
from fedlora.config.schema import Task
from fedlora.data import load_corpus
from fedlora.data.files import load_table
from fedlora.data.partition import partition
from fedlora.data.records import Examples, Records
from fedlora.data.tables import Columns, Table, corpus_from
from fedlora.data.tokenise import fingerprint, tokenise
from fedlora.errors import ConfigError, DataError, LedgerError, ShapeError
from fedlora.privacy.budget import Budget
from fedlora.privacy.calibration import check_delta, noise_multiplier
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.ledger import Ledger, open_ledger, read_ledger
from fedlora.privacy.ledger_format import RESTORE
from fedlora.privacy.noise import OsEntropyNoise
from fedlora.runtime.outbox import Outbox
from fedlora.runtime.wire import decode_request, encode_reply
from fedlora.training.client import Node, request_digest, train
from fedlora.training.model import AdaptedModel, load_model, load_tokenizer
from fedlora.values import ClientUpdate, Mechanism, Refusal, RefusalReason, TrainRequest

log = logging.getLogger(__name__)


class DeployedNode:
    """Answers requests for one data owner. The model is loaded when first needed, and kept."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self._outbox = Outbox(Path(f"{config.ledger}.outbox"))

    def answer(self, frame: bytes) -> bytes:
        """The reply's frame: an update, or a refusal with a code and no words. Nothing raises."""
        try:
            request = decode_request(frame)
        except Exception as error:
            log.error("malformed request: %s", error)
            return self._refusal("", 0, RefusalReason.BAD_REQUEST)
        try:
            with self._outbox.locked():
                return self._answered(request)
        except Exception:
            log.exception("round %d of run %r failed", request.round, request.run)
            return self._refusal(request.run, request.round, RefusalReason.FAILED)

    def _answered(self, request: TrainRequest) -> bytes:
        self._require_paid()
        run, round_, digest = request.run, request.round, request_digest(request)
        kept = self._outbox.find(run, round_)
        if kept is not None:
            asked, reply = kept
            return reply if asked == digest else self._refusal(run, round_, RefusalReason.BAD_REQUEST)
        if (fault := self._fault(request)) is not None:
            log.error("round %d of run %r is refused: %s", round_, run, fault)
            return self._refusal(run, round_, RefusalReason.BAD_REQUEST)
        paid = self._ledger.find(run, round_)
        if paid is not None:
            log.error(
                "round %d of run %r is paid, but its reply is lost; it cannot be made again", round_, run
            )
            same = paid.request_digest == digest
            return self._refusal(run, round_, RefusalReason.FAILED if same else RefusalReason.BAD_REQUEST)
        reply = train(self._node, request, self._ledger)
        frame = encode_reply(reply)
        if isinstance(reply, ClientUpdate):
            self._outbox.keep(run, round_, digest, frame)
        return frame

    def _require_paid(self) -> None:
        """Every reply given is in the ledger, which was therefore not lost, rolled back or begun anew."""
        given = self._outbox.given()
        if not given:
            return
        path = Path(self.config.ledger)
        entries = read_ledger(path).entries if path.exists() else ()
        if unpaid := sorted(given - {(entry.run, entry.round) for entry in entries}):
            raise LedgerError(
                f"{path}: {len(unpaid)} replies in {self._outbox.directory} are not among its {len(entries)} "
                f"debits, the first is round {unpaid[0][1]} of run {unpaid[0][0]!r}; {RESTORE}"
            )

    def _fault(self, request: TrainRequest) -> str | None:
        """Why the request does not fit this node; None if it does. Loads its adapters into the model."""
        allowed, asked, adapters = self.config.work, request.work, request.adapters
        if not request.run or request.round < 1:
            return f"run {request.run!r}, round {request.round}"
        if not 1 <= asked.steps <= allowed.local_steps:
            return f"{asked.steps} steps, this node takes 1 to {allowed.local_steps} (work.local_steps)"
        if not 0 < asked.learning_rate <= allowed.optimizer.lr:
            return f"learning rate {asked.learning_rate}, at most {allowed.optimizer.lr} (work.optimizer.lr)"
        tensors = [t for factors in adapters.sites.values() for t in (factors.a, factors.b)]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in [*tensors, *adapters.head.values()]):
            return "adapters with numbers that are not finite"
        try:
            self._model.load(adapters)
        except ShapeError as error:
            return str(error)
        return None

    def _refusal(self, run: str, round_: int, reason: RefusalReason) -> bytes:
        return encode_reply(Refusal(client=self.config.client, run=run, round=round_, reason=reason))

    @cached_property
    def _model(self) -> AdaptedModel:
        config = self.config
        torch.set_num_threads(config.threads)
        model = load_model(config.model, config.task, config.lora, tuple(config.classes), config.seed)
        model.peft_model.to(_device(config.device))
        return model

    @cached_property
    def _examples(self) -> Examples:
        config = self.config
        tokenizer = load_tokenizer(config.model.name)
        return tokenise(own_records(config), tokenizer, config.data.max_length)

    @cached_property
    def _ledger(self) -> Ledger:
        return open_ledger(
            Path(self.config.ledger),
            client=self.config.client,
            dataset_fingerprint=fingerprint(self._examples),
            noise_kind=OsEntropyNoise.kind,
        )

    @cached_property
    def _node(self) -> Node:
        config = self.config
        mechanism = own_mechanism(config, len(self._examples))
        return Node(
            client=config.client,
            model=self._model,
            examples=self._examples,
            batch_size=config.work.batch_size,
            sample_rate=mechanism.sample_rate,
            optimizer=config.work.optimizer,
            mechanism=mechanism,
            budget=Budget.of(config.budget),
            engine=DirectEngine(),
            noise=OsEntropyNoise(),
        )


def own_mechanism(config: NodeConfig, records: int) -> Mechanism:
    """The node's noise, clip and rate: from its own budget and declared size, whatever a server says.

    Raises:
        PrivacyError: delta is too large for the records, or no noise meets the budget.
    """
    budget, work = config.budget, config.work
    check_delta(budget.target_delta, max(config.declared_records, records))
    rate = min(1.0, work.batch_size / config.declared_records)
    steps = budget.max_participations * work.local_steps
    least = noise_multiplier(budget.target_epsilon, budget.target_delta, rate, steps, budget.accountant)
    return Mechanism(
        max_grad_norm=config.max_grad_norm,
        noise_multiplier=max(least, config.min_noise_multiplier),
        sample_rate=rate,
    )


def own_records(config: NodeConfig) -> Records:
    """The node's records, labels as indices into `classes`.

    Raises:
        DataError: they are not there, or not what node.yaml says.
    """
    if isinstance(config.data, NodeDocstrings):
        corpus = load_corpus(config.data, config.task, config.data.seed)
        if config.classes and corpus.classes != tuple(config.classes):
            raise DataError(
                f"classes are {config.classes}, the docstrings have {list(corpus.classes)}; list those"
            )
        parts = partition(corpus.train, config.data.partition, config.data.seed)
        if config.data.part not in parts:
            raise ConfigError(f"data.part {config.data.part!r} is none of {sorted(parts)}; name one of them")
        return corpus.train.select(parts[config.data.part])
    return _file_records(config.data, config.task, config.classes)


def _file_records(data: NodeFiles, task: Task, classes: list[str]) -> Records:
    causal = task.kind == "causal-lm"
    text = (data.text,) if isinstance(data.text, str) else tuple(data.text)
    columns = Columns(text=text, label=None if causal else data.label)
    table = load_table(data.train, columns.names())
    # A row for each class in front, so that a node which lacks one numbers them as all do; cut off below.
    known = Table(
        origin=table.origin,
        columns={name: [*classes, *column] for name, column in table.columns.items()},
        lines=[*[0] * len(classes), *table.lines],
    )
    corpus = corpus_from(known, known, columns, causal=causal)
    if unknown := sorted(set(corpus.classes) - set(classes)):
        raise DataError(
            f"{data.train}: labels {unknown} are not among classes {classes}; add them on every node"
        )
    records = corpus.train.select(np.arange(len(classes), len(corpus.train)))
    if records.labels is None:
        return records
    number = np.array([classes.index(name) for name in corpus.classes], dtype=np.int64)
    return Records(texts=records.texts, labels=number[records.labels])


def _device(wanted: str) -> str:
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted
