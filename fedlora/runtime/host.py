"""One process that plays simulated clients: the base model is loaded once, clients come and go."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fedlora.algebra.deltas import mapped
from fedlora.config.schema import Privacy, RunConfig
from fedlora.data.holdings import open_holdings
from fedlora.data.records import Examples
from fedlora.data.tokenise import fingerprint
from fedlora.errors import ConfigError, LedgerError, PrivacyError, WireError, without_records
from fedlora.kernels.table import Ops, ops_for
from fedlora.privacy.budget import Budget
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.engine import Engine
from fedlora.privacy.ledger import Ledger, open_ledger
from fedlora.privacy.noise import SeededNoise
from fedlora.privacy.stacked import stackable
from fedlora.runs.own_b import personal
from fedlora.runs.rundir import STATES
from fedlora.runtime.gpu import no_gpu
from fedlora.seeds import seed_for
from fedlora.training.checkpoints import base_digest
from fedlora.training.client import Node, train
from fedlora.training.load import load_model
from fedlora.training.model import AdaptedModel
from fedlora.training.prefix import Prefix, frozen_prefix
from fedlora.training.states import with_states
from fedlora.training.together import clients_together, train_together
from fedlora.transport.wire import decode_request, encode_reply
from fedlora.values import Mechanism, Refusal, RefusalReason, Reply, Sampling, TrainRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a simulated client is held to. mechanism: None only where privacy is off."""

    sampling: Sampling
    mechanism: Mechanism | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSetup:
    """All that a host needs to play any client of a run, small enough to send.

    holdings: the directory of the clients' records. terms: by number of records.
    together: how many clients share a forward pass; 1: each has its own.
    """

    config: RunConfig
    run: str
    run_dir: Path
    holdings: Path
    classes: tuple[str, ...]
    terms: Mapping[int, Terms]
    together: int


class Host:
    """Plays any client of the run. Simulated noise is seeded: whoever knows the seed can remove it."""

    def __init__(self, setup: HostSetup, model: AdaptedModel | None = None) -> None:
        """model: as it is loaded for this run, whatever adapters it has; None: it is loaded."""
        config = setup.config
        torch.set_num_threads(config.runtime.threads)
        self.setup = setup
        self.holdings = open_holdings(setup.holdings)
        self.model = model or load_model(config.model, config.task, config.lora, setup.classes, config.seed)
        if config.runtime.device == "cuda":
            require_gpu()
            self.model.peft_model.to("cuda")
        self.engine = engine_of(config.privacy, ops_for(config.model.kernels, self.model.device))
        own = config.runtime.cache_prefix is True and self.holdings.examples.states is None
        self.prefix = frozen_prefix(self.model) if own else None
        self.noise = SeededNoise(seed_for(config.seed, "client randomness"))

    def answer(self, clients: Sequence[str], request: TrainRequest) -> list[Reply]:
        """Their replies, in the order of `clients`. Whatever goes wrong with one is its refusal, with a code only.

        Where clients share forward passes, all of these do: who they are decides the last bits of their updates.

        Raises:
            LedgerError: a ledger on this machine cannot be trusted; its owner has to look before anything goes on.
            ConfigError: the disk has no room for the frozen layers' states, or a client's own B is damaged.
        """
        if self.setup.together > 1:
            try:
                nodes = [self._node(client) for client in clients]
                replies = train_together(nodes, request, [self._ledger(node) for node in nodes])
                return [at_home(reply) for reply in replies]
            except (LedgerError, ConfigError):
                raise
            except Exception as error:
                # Of one of them: each has its own answer when asked alone, and none pays twice.
                log.error("round %d: %s; one by one instead", request.round, without_records(error))
        return [self._answer(client, request) for client in clients]

    def answer_frame(self, client: str, frame: bytes) -> bytes:
        """The reply's frame to a request's, for runtimes that carry bytes; raises as `answer` does."""
        try:
            request = decode_request(frame)
        except WireError as error:
            log.error("%s got a malformed request: %s", client, error)
            return encode_reply(
                Refusal(client=client, run=self.setup.run, round=0, reason=RefusalReason.BAD_REQUEST)
            )
        return encode_reply(self._answer(client, request))

    def _answer(self, client: str, request: TrainRequest) -> Reply:
        try:
            node = self._node(client)
            return at_home(train(node, request, self._ledger(node)))
        except (LedgerError, ConfigError):
            raise
        except Exception as error:  # words of a failure could carry a record
            log.error("%s failed in round %d: %s", client, request.round, without_records(error))
            return Refusal(client=client, run=request.run, round=request.round, reason=RefusalReason.FAILED)

    def _node(self, client: str) -> Node:
        config, examples = self.setup.config, self.holdings[client]
        terms = self.setup.terms[len(examples)]
        privacy = None if config.privacy == "none" else config.privacy
        alone = runs_alone(config, self.model)
        return Node(
            client=client,
            model=self.model,
            examples=examples,
            states=None if self.prefix is None else partial(self._with_states, client, self.prefix),
            declared_records=len(examples),
            sampling=terms.sampling,
            optimizer=config.federation.optimizer,
            mechanism=terms.mechanism,
            alone=alone,
            evaluation_noise=privacy and privacy.evaluation_noise,
            budget=privacy and Budget.of(privacy),
            engine=self.engine,
            noise=self.noise,
            rank=(config.federation.ranks or {}).get(client),
            personal=personal(self.setup.run_dir, client),
        )

    def _with_states(self, client: str, prefix: Prefix, examples: Examples) -> Examples:
        """With what the frozen layers make of the records, from a file of the client's."""
        config = self.setup.config
        return with_states(
            self.setup.run_dir / STATES / client,
            self.model,
            prefix,
            examples,
            base_model=base_digest(config.model),
            # Beside others, a record would leave its rounding in states that outlive its own draw.
            alone=config.privacy != "none",
        )

    def _ledger(self, node: Node) -> Ledger | None:
        if self.setup.config.privacy == "none":
            return None
        path = ledger_path(self.setup.run_dir, node.client)
        return open_ledger(
            path,
            client=node.client,
            dataset_fingerprint=fingerprint(node.examples),
            noise_kind=self.noise.kind,
        )


def require_gpu() -> None:
    """This process can train on a GPU.

    Raises:
        ConfigError: it cannot.
    """
    if not torch.cuda.is_available():
        raise no_gpu()


def at_home(reply: Reply) -> Reply:
    """The reply with its numbers in main memory, where the server adds them up."""
    if isinstance(reply, Refusal):
        return reply
    return replace(reply, delta=mapped(reply.delta, Tensor.cpu))


def runs_alone(config: RunConfig, model: AdaptedModel) -> bool:
    """Whether records run by themselves: a simulated server is honest, but a narrow type rounds by 1 % of the bound."""
    return config.privacy != "none" and model.peft_model.dtype.itemsize < 4


def shared_passes(config: RunConfig, model: AdaptedModel) -> int:
    """How many clients share a forward pass: as the config says, and 1 where they cannot, which the log explains."""
    trained = model.trained
    tokens = model.intake.most_tokens(config.data.max_length)
    asked = clients_together(config, sum(parameter.numel() for parameter in trained.values()), tokens)
    if asked == 1 or config.runtime.kind == "flower":
        return 1
    why = "records that must run alone" if runs_alone(config, model) else None
    if model.trains_a:
        why = "an A that is trained"
    if config.task.kind == "dpo":
        why = "records of two sequences (task.kind: dpo)"
    if config.federation.ranks is not None:
        why = "clients that train some columns only (federation.ranks)"
    try:
        if config.privacy != "none" and config.privacy.engine != "direct":
            why = "an engine other than direct"
        stackable(model.peft_model, trained)
    except PrivacyError as error:
        why = str(error)
    if why is not None:
        log.warning("runtime.clients_together %s: %s; clients train one by one", asked, why)
    return asked if why is None else 1


def engine_of(privacy: Privacy | Literal["none"], ops: Ops) -> Engine:
    """The engine that the config names; direct computes with `ops`. Opacus is imported only where it is used."""
    if privacy != "none" and privacy.engine == "opacus":
        from fedlora.privacy.opacus_engine import OpacusEngine

        return OpacusEngine()
    return DirectEngine(ops)


def ledger_path(run_dir: Path, client: str) -> Path:
    """Where a simulated client keeps its ledger."""
    return run_dir / "ledgers" / f"{client}.jsonl"
