"""Everything a run needs before its first round; only `save_for_hosts` writes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fedlora.config.load import config_digest
from fedlora.config.schema import RunConfig
from fedlora.data import load_corpus
from fedlora.data.holdings import Holdings
from fedlora.data.partition import partition
from fedlora.data.records import Examples
from fedlora.data.tokenise import tokenise
from fedlora.federation.events import Listener, Stage
from fedlora.federation.plan import require_plannable
from fedlora.methods import Method, build
from fedlora.privacy.budget import Budget
from fedlora.privacy.sampling import poisson
from fedlora.runs.beginning import first_state, origin
from fedlora.runs.forgetting import remaining
from fedlora.runs.rundir import HOLDINGS
from fedlora.runtime.host import HostSetup, Terms, require_gpu, shared_passes
from fedlora.runtime.world.world import World
from fedlora.runtime.world.world import build as build_world
from fedlora.training.client import calibrated
from fedlora.training.load import load_model, load_tokenizer
from fedlora.training.model import AdaptedModel
from fedlora.values import Mechanism, Member, Origin, ServerState


@dataclass(frozen=True, slots=True, kw_only=True)
class Clients:
    """The simulated data owners: their records, the public test data, and by record count what each is held to."""

    examples: Holdings
    test: Examples
    classes: tuple[str, ...]
    members: tuple[Member, ...]
    terms: Mapping[int, Terms]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run, ready to start. `origin.run` names it: the digest of everything that decides its result.

    world: when its clients are there; None: always.
    """

    config: RunConfig
    origin: Origin
    clients: Clients
    method: Method
    model: AdaptedModel
    world: World | None

    def first_state(self) -> ServerState:
        """The zero-step state."""
        return first_state(self.config, self.model, self.method)

    def save_for_hosts(self, run_dir: Path) -> HostSetup:
        """What hosts are told; the clients' records lie under `run_dir`, readable by its owner, from here on.

        Not those of clients that the run has forgotten.
        """
        clients, directory = self.clients, run_dir.absolute() / HOLDINGS
        members = remaining(run_dir, clients.members)
        held = clients.examples
        if len(members) < len(held):
            held = held.only({member.client for member in members})
        held.save(directory)
        return HostSetup(
            config=self.config,
            run=self.origin.run,
            run_dir=run_dir.absolute(),
            holdings=directory,
            classes=clients.classes,
            terms=clients.terms,
            together=shared_passes(self.config, self.model),
        )

    def without_records(self) -> "Prepared":
        """The same run for a server's eyes: members and what they are held to, but nobody's records."""
        nothing = Holdings.of(self.clients.test.select(np.arange(0)), {})
        return replace(self, clients=replace(self.clients, examples=nothing))


def prepare(config: RunConfig, listener: Listener) -> Prepared:
    """The run that `config` describes; every mistake that can be found before training is found here."""
    if config.runtime.device == "cuda" and config.runtime.address is None:
        require_gpu()
    # What public text says of the model must not depend on the number of cores.
    torch.set_num_threads(config.runtime.threads)
    clients = gather_clients(config, listener)
    names = [member.client for member in clients.members]
    world = None if config.world is None else build_world(config.world, names, config.seed)
    listener(Stage(name=f"loading {config.model.name}"))
    model = load_model(config.model, config.task, config.lora, clients.classes, config.seed)
    return Prepared(
        config=config,
        origin=origin(config, config_digest(config)[:16]),
        clients=clients,
        method=build(config.method, config.lora),
        model=model,
        world=world,
    )


def gather_clients(config: RunConfig, listener: Listener) -> Clients:
    """Reads, tokenises and deals out the records; calibrates each client's noise."""
    tokenizer = load_tokenizer(config.model.name)
    listener(Stage(name=f"reading {config.data.source}"))
    corpus = load_corpus(config.data, config.task, config.seed)
    parts = partition(corpus.train, config.data.partition, config.seed)
    listener(Stage(name=f"tokenising {len(corpus.train.texts):,} records for {len(parts)} clients"))
    train = tokenise(corpus.train, tokenizer, config.data.max_length)
    test = tokenise(corpus.test, tokenizer, config.data.max_length)
    examples = Holdings.of(train, parts)
    members = tuple(
        Member(client=client, examples=int(records))
        for client, records in zip(examples, np.diff(examples.bounds), strict=True)
    )
    require_plannable(members, config.federation)
    if config.privacy != "none":
        listener(Stage(name="calibrating noise"))
    sizes = sorted({member.examples for member in members})
    terms = {records: client_terms(config, records) for records in sizes}
    return Clients(examples=examples, test=test, classes=corpus.classes, members=members, terms=terms)


def client_terms(config: RunConfig, records: int) -> Terms:
    """The sampling rate of a client of so many declared records, and the noise its whole budget is calibrated for.

    Raises:
        PrivacyError: delta is too large for the size, or no noise meets the budget.
    """
    federation, privacy = config.federation, config.privacy
    sampling = poisson(federation.batch_size, records)
    if privacy == "none":
        return Terms(sampling=sampling, mechanism=None)
    sigma = calibrated(
        Budget.of(privacy),
        sampling,
        records=records,
        local_steps=federation.local_steps,
        evaluation_noise=privacy.evaluation_noise,
    )
    mechanism = Mechanism(max_grad_norm=privacy.max_grad_norm, noise_multiplier=sigma)
    return Terms(sampling=sampling, mechanism=mechanism)
