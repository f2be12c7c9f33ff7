"""A data owner's node: own records, own ledger, own budget and noise. A server only says when it works.

A reply is on the node's disk, and its digest in the ledger, before it is sent. Asked the same again, the node
sends the same bytes: a second training under one debit would be a second release. If the bytes are lost, so is what
they cost: the next attempt is paid anew.
"""

import logging
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from fedlora.code_digest import code_digest
from fedlora.config.node import NodeConfig
from fedlora.data.own import own_records
from fedlora.data.records import Examples, Records, fingerprint
from fedlora.errors import DataError, LedgerError, PrivacyError, ShapeError, without_records
from fedlora.kernels.table import ops_for
from fedlora.privacy.accountants import agreed_epsilon
from fedlora.privacy.budget import Budget, would_exceed
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.ledger import Ledger, open_ledger, read_ledger
from fedlora.privacy.ledger_format import Debit
from fedlora.privacy.ledger_mark import marked, require_reached
from fedlora.privacy.noise import OsEntropyNoise
from fedlora.privacy.outbox import Kept, Outbox
from fedlora.privacy.sampling import poisson
from fedlora.training.agreed import agreed_digest
from fedlora.training.client import Node, calibrated, participation, request_digest, train, work_digest
from fedlora.training.examples import reader_of
from fedlora.training.load import load_model
from fedlora.training.model import AdaptedModel
from fedlora.training.personal import Personal, Start
from fedlora.transport.wire import decode_request, encode_reply
from fedlora.values import ClientUpdate, Mechanism, Refusal, RefusalReason, Sampling, TrainRequest, Witness

log = logging.getLogger(__name__)

MOST_NAME = 200
"""Characters of a run's name: it is the server's choice, and each debit holds it for ever."""


class DeployedNode:
    """Answers requests for one data owner. The model is loaded when first needed, and kept."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self._path = Path(config.ledger)
        self._mark = None if config.mark is None else Path(config.mark)
        self._outbox = Outbox(Path(f"{config.ledger}.outbox"))
        self._personal = Personal(Path(f"{config.ledger}.personal")) if config.work.own_b else None

    def ready(self) -> None:
        """Model and records are loaded and the noise is calibrated: whatever is wrong with node.yaml shows now."""
        _ = self._node

    def answer(self, frame: bytes, echo: Witness | None = None) -> bytes:
        """The reply's frame: an update, or a refusal with a code and no words. Nothing raises.

        It comes at a multiple of `reply_quantum_s` after the call.

        Args:
            frame: the server's request.
            echo: how far the server remembers this node's ledger to have come; the node does not work behind it.
        """
        began = time.monotonic()
        reply = self._reply(frame, echo)
        quantum = self.config.reply_quantum_s
        if quantum > 0:
            time.sleep(quantum - (time.monotonic() - began) % quantum)
        return reply

    def _reply(self, frame: bytes, echo: Witness | None) -> bytes:
        try:
            request = decode_request(frame)
        except Exception as error:
            log.error("malformed request: %s", without_records(error))
            return self._refusal("", 0, RefusalReason.BAD_REQUEST)
        try:
            with self._outbox.locked():
                return self._answered(request, echo)
        except Exception as error:
            log.error("round %d of run %.80r failed: %s", request.round, request.run, without_records(error))
            reason = RefusalReason.LEDGER if isinstance(error, LedgerError) else RefusalReason.FAILED
            return self._refusal(request.run, request.round, reason)

    def _answered(self, request: TrainRequest, echo: Witness | None) -> bytes:
        """Debit, train, keep, record, answer: each on disk before the next begins."""
        debits = self._whole_ledger(echo)
        run, round_, digest = request.run, request.round, request_digest(request)
        if echo is not None:
            self._outbox.forget_acknowledged(run, round_, echo)
        kept = self._outbox.find(run, round_)
        if kept is not None and kept.acknowledged:
            log.error("round %d of run %.80r is refused: its reply was acknowledged", round_, run)
            return self._refusal(run, round_, RefusalReason.BAD_REQUEST)
        if kept is not None and kept.request_digest == digest and self._recorded(kept):
            return kept.frame
        if (reason := self._refused(request, debits)) is not None:
            return self._refusal(run, round_, reason)
        reply = train(self._node, request, self._ledger)
        frame = encode_reply(reply)
        if isinstance(reply, ClientUpdate):
            assert reply.ledger is not None
            kept = Kept(run=run, round=round_, request_digest=digest, paid=reply.ledger, frame=frame)
            self._outbox.keep(kept)
            if not self._recorded(kept):
                raise LedgerError(
                    f"{self._path}: round {round_} of run {run!r} was paid again before its reply was kept; "
                    "let one process alone work with this ledger, and the server ask again"
                )
        return frame

    def _whole_ledger(self, echo: Witness | None) -> tuple[Debit, ...]:
        """All debits, of a ledger that holds whatever anybody saw of it: the replies here, the mark, the server."""
        contents = read_ledger(self._path) if self._path.exists() else None
        for seen in (self._outbox.furthest(), marked(self._mark), echo):
            require_reached(self._path, contents, seen)
        return () if contents is None else contents.debits

    def _refused(self, request: TrainRequest, debits: Sequence[Debit]) -> RefusalReason | None:
        """Why the request is refused before any record is read; None if only the records can tell."""
        fault = self._fault(request)
        if fault is None and self._is_paid_otherwise(request, debits):
            fault = "another request was paid for in this round"
        if fault is not None:
            log.error("round %d of run %.80r is refused: %s", request.round, request.run, fault)
            return RefusalReason.BAD_REQUEST
        sampling, mechanism = self._terms
        events = participation(mechanism, sampling, self.config.evaluation_noise, request.work.steps)
        spent = [debit.events for debit in debits]
        return RefusalReason.BUDGET if would_exceed(spent, events, Budget.of(self.config.budget)) else None

    def _recorded(self, kept: Kept) -> bool:
        """Whether these bytes may be sent: the ledger records them, from now on, as what came of their debit."""
        ledger = Ledger(self._path, read_ledger(self._path), self._mark)
        debit = ledger.find(kept.run, kept.round)
        if debit is None or ledger.witness(debit) != kept.paid:
            return False  # a later attempt was paid for and left nothing: the reply of an earlier one is void
        ledger.release(debit, kept.payload)
        return True

    def _is_paid_otherwise(self, request: TrainRequest, debits: Sequence[Debit]) -> bool:
        """Whether the ledger holds other work for this round of this run.

        Raises:
            ConfigError: this node's own B is damaged, or that of a round that it answered is gone.
        """
        start = Start(request=request, round=0)
        if request.work.own_b and self._personal is not None:
            answered = max(self._outbox.answered(request.run, request.round), default=0)
            self._personal.require(request.run, request.round, answered)
            start = self._personal.start(request)
        paid = [debit for debit in debits if (debit.run, debit.round) == (request.run, request.round)]
        return any(debit.request_digest != work_digest(request, start) for debit in paid)

    def _fault(self, request: TrainRequest) -> str | None:
        """Why the request does not fit this node; None if it does. No record is read; loads the adapters."""
        allowed, asked, adapters = self.config.work, request.work, request.adapters
        if not 1 <= len(request.run) <= MOST_NAME or not request.run.isprintable() or request.round < 1:
            return f"run {request.run[:MOST_NAME]!r} of {len(request.run)} characters, round {request.round}"
        if not 1 <= asked.steps <= allowed.local_steps:
            return f"{asked.steps} steps, this node takes 1 to {allowed.local_steps} (work.local_steps)"
        if not 0 < asked.learning_rate <= allowed.optimizer.lr:
            return f"learning rate {asked.learning_rate}, at most {allowed.optimizer.lr} (work.optimizer.lr)"
        if asked.proximal != (own := getattr(allowed.optimizer, "proximal", 0.0)):
            return f"a proximal term of {asked.proximal}, this node's is {own} (work.optimizer.proximal)"
        if asked.side != "b" and not self._model.trains_a:
            return f"side {asked.side!r}, but this node's A is frozen (lora.trains)"
        if asked.precondition != (rule := getattr(allowed.optimizer, "precondition", "none")):
            return (
                f"precondition {asked.precondition[:MOST_NAME]!r}, here {rule} (work.optimizer.precondition)"
            )
        if asked.own_b != allowed.own_b:
            return f"a B of each node's own: {asked.own_b}, here {allowed.own_b} (work.own_b)"
        if (foreign := self._foreign(request)) is not None:
            return foreign
        try:
            self._model.load(adapters)
        except ShapeError as error:
            return str(error)
        # The model's own type: what was finite in a wider one may be so no more.
        model = self._model
        loaded = [*(t for pair in model.live.values() for t in pair), *model.left.values()]
        loaded += [*model.rests().values(), *model.head().values()]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in loaded):
            return "adapters with numbers that are not finite"
        return None

    def _foreign(self, request: TrainRequest) -> str | None:
        """Why its code, its base model or its task is not what this node accepts; None if they are."""
        accepted, model = self.config.accept, agreed_digest(self.config)
        if request.base_model != model:
            return (
                f"base model {request.base_model!r}, here {model}; make model, task, lora.from_adapter and, where a "
                "head or pooler is drawn from it, seed agree with the run's"
            )
        if model not in (accepted.base_model or [model]):
            return f"base model {model}, accept.base_model {accepted.base_model}"
        for whose, code in (("this node's", code_digest()), ("the server's", request.code)):
            if code not in (accepted.code or [code]):
                return f"{whose} code is {code!r}, accept.code {accepted.code}"
        return None

    def _refusal(self, run: str, round_: int, reason: RefusalReason) -> bytes:
        return encode_reply(Refusal(client=self.config.client, run=run, round=round_, reason=reason))

    @cached_property
    def _model(self) -> AdaptedModel:
        config = self.config
        torch.set_num_threads(config.threads)
        classes, longest = tuple(config.classes), config.data.max_length
        model = load_model(config.model, config.task, config.lora, classes, config.seed, max_length=longest)
        model.peft_model.to(_device(config.device))
        return model

    @cached_property
    def _terms(self) -> tuple[Sampling, Mechanism]:
        return own_terms(self.config)

    @cached_property
    def _records(self) -> Records:
        config = self.config
        try:
            records = own_records(config)
        except DataError:
            # Its words name columns and labels, which in a file without a header line are a record's.
            raise DataError(
                "the records are not what node.yaml says; `fedlora check node.yaml` says more, on a screen of yours"
            ) from None
        if len(records) > config.declared_records:
            raise PrivacyError(
                f"more records than the {config.declared_records} of declared_records; declare at least as many"
            )
        return records

    @property
    def _ledger(self) -> Ledger:
        return open_ledger(
            self._path,
            client=self.config.client,
            dataset_fingerprint=self._fingerprint,
            noise_kind=OsEntropyNoise.kind,
            mark=self._mark,
        )

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._records)

    @cached_property
    def _examples(self) -> Examples:
        config = self.config
        name, max_length = config.model.name, config.data.max_length
        return reader_of(name=name, max_length=max_length, task_cfg=config.task)(self._records)

    @cached_property
    def _node(self) -> Node:
        config = self.config
        sampling, mechanism = self._terms
        return Node(
            client=config.client,
            model=self._model,
            examples=self._examples,
            declared_records=config.declared_records,
            sampling=sampling,
            optimizer=config.work.optimizer,
            mechanism=mechanism,
            alone=True,
            evaluation_noise=config.evaluation_noise,
            budget=Budget.of(config.budget),
            engine=DirectEngine(ops_for(config.model.kernels, self._model.device)),
            noise=OsEntropyNoise(),
            rank=config.rank,
            personal=self._personal,
        )


def own_terms(config: NodeConfig) -> tuple[Sampling, Mechanism]:
    """The node's draws, clip and noise: from its own budget and declared size, whatever a server says.

    Raises:
        PrivacyError: delta is too large for the records, or no noise meets the budget.
    """
    sampling = poisson(config.work.batch_size, config.declared_records)
    least = calibrated(
        Budget.of(config.budget),
        sampling,
        records=config.declared_records,
        local_steps=config.work.local_steps,
        evaluation_noise=config.evaluation_noise,
    )
    noise = max(least, config.min_noise_multiplier)
    mechanism = Mechanism(max_grad_norm=config.max_grad_norm, noise_multiplier=noise)
    once = participation(mechanism, sampling, config.evaluation_noise, config.work.local_steps)
    budget = config.budget
    agreed_epsilon(once * budget.max_participations, budget.target_delta, budget.accountant)
    return sampling, mechanism


def _device(wanted: str) -> str:
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted
