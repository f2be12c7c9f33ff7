"""One process that plays simulated clients: the base model is loaded once, clients come and go."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedlora.config.schema import Privacy, RunConfig, Runtime
from fedlora.data.holdings import open_holdings
from fedlora.data.records import Examples
from fedlora.data.tokenise import fingerprint
from fedlora.errors import LedgerError, WireError, without_records
from fedlora.privacy.budget import Budget
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.engine import Engine
from fedlora.privacy.ledger import Ledger, open_ledger
from fedlora.privacy.noise import SeededNoise
from fedlora.seeds import seed_for
from fedlora.training.client import Node, train
from fedlora.training.model import load_model
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
    """

    config: RunConfig
    run: str
    run_dir: Path
    holdings: Path
    classes: tuple[str, ...]
    terms: Mapping[int, Terms]


class Host:
    """Plays any client of the run. Simulated noise is seeded: whoever knows the seed can remove it."""

    def __init__(self, setup: HostSetup) -> None:
        config = setup.config
        torch.set_num_threads(config.runtime.threads)
        self.setup = setup
        self.holdings = open_holdings(setup.holdings)
        self.model = load_model(config.model, config.task, config.lora, setup.classes, config.seed)
        self.noise = SeededNoise(seed_for(config.seed, "client randomness"))

    def answer(self, clients: Sequence[str], request: TrainRequest) -> list[Reply]:
        """Their replies, in the order of `clients`. Whatever goes wrong with one is its refusal, with a code only.

        Raises:
            LedgerError: a ledger on this machine cannot be trusted; its owner has to look before anything goes on.
        """
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
        examples = self.holdings[client]
        try:
            return train(self._node(client, examples), request, self._ledger(client, examples))
        except LedgerError:
            raise
        except Exception as error:  # words of a failure could carry a record
            log.error("%s failed in round %d: %s", client, request.round, without_records(error))
            return Refusal(client=client, run=request.run, round=request.round, reason=RefusalReason.FAILED)

    def _node(self, client: str, examples: Examples) -> Node:
        config, terms = self.setup.config, self.setup.terms[len(examples)]
        privacy = None if config.privacy == "none" else config.privacy
        return Node(
            client=client,
            model=self.model,
            examples=examples,
            declared_records=len(examples),
            sampling=terms.sampling,
            optimizer=config.federation.optimizer,
            mechanism=terms.mechanism,
            # A simulated server is honest; a narrow type rounds by 1 % of the bound even then.
            alone=terms.mechanism is not None and self.model.peft_model.dtype.itemsize < 4,
            evaluation_noise=privacy and privacy.evaluation_noise,
            budget=privacy and Budget.of(privacy),
            engine=engine_of(privacy),
            noise=self.noise,
        )

    def _ledger(self, client: str, examples: Examples) -> Ledger | None:
        if self.setup.config.privacy == "none":
            return None
        path = ledger_path(self.setup.run_dir, client)
        return open_ledger(
            path, client=client, dataset_fingerprint=fingerprint(examples), noise_kind=self.noise.kind
        )


def engine_of(privacy: Privacy | None) -> Engine:
    """The engine that the config names. Opacus is imported only where it is used."""
    if privacy is not None and privacy.engine == "opacus":
        from fedlora.privacy.opacus_engine import OpacusEngine

        return OpacusEngine()
    return DirectEngine()


def worker_count(runtime: Runtime, cores: int) -> int:
    """Worker processes of a run on so many cores."""
    return max(1, cores // runtime.threads) if runtime.workers == "auto" else runtime.workers


def ledger_path(run_dir: Path, client: str) -> Path:
    """Where a simulated client keeps its ledger."""
    return run_dir / "ledgers" / f"{client}.jsonl"
