"""Everything a run needs before its first round, worked out without writing a byte."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedlora.config.load import config_digest
from fedlora.config.schema import RunConfig
from fedlora.data import load_corpus
from fedlora.data.partition import partition
from fedlora.data.records import Examples
from fedlora.data.tokenise import tokenise
from fedlora.federation.events import Listener, Stage
from fedlora.federation.plan import require_plannable
from fedlora.methods import Method, build
from fedlora.privacy.budget import Budget
from fedlora.privacy.sampling import poisson
from fedlora.runs.beginning import first_state, origin
from fedlora.runtime.host import Terms
from fedlora.training.client import calibrated
from fedlora.training.model import AdaptedModel, load_model, load_tokenizer
from fedlora.values import Mechanism, Member, Origin, ServerState


@dataclass(frozen=True, slots=True, kw_only=True)
class Clients:
    """The simulated data owners: their records, the public test data, and what each is held to."""

    examples: Mapping[str, Examples]
    test: Examples
    classes: tuple[str, ...]
    members: tuple[Member, ...]
    terms: Mapping[str, Terms]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run, ready to start. `origin.run` names it: the digest of everything that decides its result."""

    config: RunConfig
    origin: Origin
    clients: Clients
    method: Method
    model: AdaptedModel

    def first_state(self) -> ServerState:
        """The zero-step state."""
        return first_state(self.config, self.model, self.method)


def prepare(config: RunConfig, listener: Listener) -> Prepared:
    """The run that `config` describes; every mistake that can be found before training is found here."""
    # What public text says of the model must not depend on the number of cores.
    torch.set_num_threads(config.runtime.threads)
    clients = gather_clients(config, listener)
    listener(Stage(name=f"loading {config.model.name}"))
    model = load_model(config.model, config.task, config.lora, clients.classes, config.seed)
    return Prepared(
        config=config,
        origin=origin(config, config_digest(config)[:16]),
        clients=clients,
        method=build(config.method, config.lora),
        model=model,
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
    examples = {client: train.select(parts[client]) for client in sorted(parts)}
    members = tuple(Member(client=client, examples=len(held)) for client, held in examples.items())
    require_plannable(members, config.federation)
    if config.privacy != "none":
        listener(Stage(name="calibrating noise"))
    terms = {member.client: client_terms(config, member) for member in members}
    return Clients(examples=examples, test=test, classes=corpus.classes, members=members, terms=terms)


def client_terms(config: RunConfig, member: Member) -> Terms:
    """The sampling rate of a client of this declared size, and the noise its whole budget is calibrated for.

    Raises:
        PrivacyError: delta is too large for the size, or no noise meets the budget.
    """
    federation, privacy = config.federation, config.privacy
    sampling = poisson(federation.batch_size, member.examples)
    if privacy == "none":
        return Terms(sampling=sampling, mechanism=None)
    sigma = calibrated(
        Budget.of(privacy),
        sampling,
        records=member.examples,
        local_steps=federation.local_steps,
        evaluation_noise=privacy.evaluation_noise,
    )
    mechanism = Mechanism(max_grad_norm=privacy.max_grad_norm, noise_multiplier=sigma)
    return Terms(sampling=sampling, mechanism=mechanism)
