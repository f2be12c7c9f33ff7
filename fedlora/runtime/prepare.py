"""Everything a run needs before its first round; only `save_for_hosts` writes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora.config.load import run_name
from fedlora.config.schema import RunConfig
from fedlora.data import load_corpus
from fedlora.data.corpus import require_apart
from fedlora.data.holdings import Holdings, dealt
from fedlora.data.partition import partition
from fedlora.data.records import Examples
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
from fedlora.tracking.telling import require_trackers
from fedlora.training.checkpoints import base_digest
from fedlora.training.client import calibrated
from fedlora.training.examples import reader_of
from fedlora.training.first_token import narrow_last_layer
from fedlora.training.load import load_model
from fedlora.training.model import AdaptedModel
from fedlora.training.prefix import frozen_prefix
from fedlora.training.states import shared_states
from fedlora.values import Mechanism, Member, Origin, ServerState

DRAWS_THAT_PAY = 2
"""Draws of each record, on average over all runs: a pass alone, which states need, takes two to three times as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What runs side by side on the same records share. draws: expected of records, by all of the runs together."""

    directory: Path
    draws: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Clients:
    """The simulated data owners: their records, the public test data, and by record count what each is held to.

    numbers: (n,) of each record of `examples`, its place in the training data. repeated: different texts of the test
    that are to train on too, of a private run.
    """

    examples: Holdings
    numbers: NDArray[np.int64]
    test: Examples
    classes: tuple[str, ...]
    members: tuple[Member, ...]
    terms: Mapping[int, Terms]
    repeated: int


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

    def spare_the_model(self) -> None:
        """Where records come with their states, the model is spared what it can be above as well.

        After the first state alone: that may ask what passes through layers which are cut short from here on. Results
        are comparable to a float's rounding either way.
        """
        if self.clients.test.states is not None:
            narrow_last_layer(self.model)

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


def prepare(
    config: RunConfig, listener: Listener, shared: Shared | None = None, *, to_train: bool = True
) -> Prepared:
    """The run that `config` describes; every mistake that can be found before training is found here.

    Args:
        config: the run.
        listener: told of what happens.
        shared: where runs side by side keep what frozen layers make of their records; None: this one is by itself.
        to_train: False: it is only scored, and no noise is calibrated.
    """
    require_trackers(config.tracking)
    if config.runtime.device == "cuda" and config.runtime.address is None:
        require_gpu()
    # What public text says of the model must not depend on the number of cores.
    torch.set_num_threads(config.runtime.threads)
    clients = gather_clients(config, listener, to_train=to_train)
    names = [member.client for member in clients.members]
    world = None if config.world is None else build_world(config.world, names, config.seed)
    listener(Stage(name=f"loading {config.model.name}"))
    longest = config.data.max_length
    model = load_model(
        config.model, config.task, config.lora, clients.classes, config.seed, max_length=longest
    )
    return Prepared(
        config=config,
        origin=origin(config, run_name(config)),
        clients=clients if shared is None else _with_shared_states(clients, model, config, shared, listener),
        method=build(config.method, config.lora, config.seed),
        model=model,
        world=world,
    )


def gather_clients(config: RunConfig, listener: Listener, *, to_train: bool = True) -> Clients:
    """Reads, tokenises and deals out the records; calibrates each client's noise, if they are to train."""
    listener(Stage(name=f"reading {config.data.source}"))
    corpus = load_corpus(config.data, config.task, config.seed)
    repeated = 0 if config.privacy == "none" else require_apart(corpus, config.data)
    parts = partition(corpus.train, config.data.partition, config.seed)
    listener(Stage(name=f"tokenising {len(corpus.train.texts):,} records for {len(parts)} clients"))
    read = reader_of(name=config.model.name, max_length=config.data.max_length, task_cfg=config.task)
    train, test = read(corpus.train), read(corpus.test)
    examples, numbers = Holdings.of(train, parts), dealt(parts)
    members = tuple(
        Member(client=client, examples=int(records))
        for client, records in zip(examples, np.diff(examples.bounds), strict=True)
    )
    require_plannable(members, config.federation)
    held_to = config if to_train else config.model_copy(update={"privacy": "none"})
    if held_to.privacy != "none":
        listener(Stage(name="calibrating noise"))
    sizes = sorted({member.examples for member in members})
    terms = {records: client_terms(held_to, records) for records in sizes}
    return Clients(
        examples=examples,
        numbers=numbers,
        test=test,
        classes=corpus.classes,
        members=members,
        terms=terms,
        repeated=repeated,
    )


def _with_shared_states(
    clients: Clients, model: AdaptedModel, config: RunConfig, shared: Shared, listener: Listener
) -> Clients:
    """Training and test records with their states; without, where no layers lie below or too few records are drawn."""
    held = clients.examples
    if shared.draws < DRAWS_THAT_PAY * len(held.examples) or (prefix := frozen_prefix(model)) is None:
        return clients
    listener(Stage(name="running the frozen layers over all records, unless another run has"))
    kept = partial(shared_states, shared.directory, model, prefix, base_model=base_digest(config.model))
    # In the order of the training data, so that runs that deal them out otherwise find the same file.
    train = kept(held.examples.select(np.argsort(clients.numbers)), alone=True).select(clients.numbers)
    return replace(clients, examples=replace(held, examples=train), test=kept(clients.test, alone=False))


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
