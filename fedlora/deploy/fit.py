"""Whether a data owner's node would take part in a run: what one would refuse of the other, before either starts."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.code_digest import code_digest
from fedlora.config.asking import expected_cohort
from fedlora.config.combinations import require_servable
from fedlora.config.data import Docstrings
from fedlora.config.located import flat
from fedlora.config.node import NodeConfig
from fedlora.config.schema import RunConfig
from fedlora.config.section import Section
from fedlora.data import load_corpus
from fedlora.data.docstrings import packages_of
from fedlora.errors import ModelError
from fedlora.runs.budgets import node_ledger
from fedlora.training.agreed import OF_NO_LOSS, agreed_digest, drawn
from fedlora.training.checkpoints import base_digest
from fedlora.training.places import local

_FREE = ("init", "from_adapter", *OF_NO_LOSS)
"""Keys of `lora` and `task` that a node does not need: a request brings what they decide, or the digest tells it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """A key of node.yaml that does not go with the run, and what is to be written instead."""

    key: tuple[str, ...]
    words: str


def misfits(run: RunConfig, node: NodeConfig) -> list[Misfit]:
    """Everything for which this node would refuse this run's requests, or its server what the node sends, before either
    begins: what the node spent on this very run is spent, too.

    Reads the run's public records for their classes, and the node's ledger for what is spent; no record of the node.

    Raises:
        ConfigError: no node can take part in the run, or its records cannot be read.
        ModelError: the two name different base models, and one of them is not here.
        LedgerError: the node's ledger is damaged.
    """
    require_servable(run)
    return [
        *_model(run, node),
        *_accepted(run, node),
        *_same("task", run.task, node.task),
        *_same("lora", run.lora, node.lora),
        *_classes(run, node),
        *_work(run, node),
        *_clip(run, node),
        *_rank(run, node),
        *_budget(run, node),
    ]


def _model(run: RunConfig, node: NodeConfig) -> Iterator[Misfit]:
    def named(config: RunConfig | NodeConfig) -> tuple[str | None, ...]:
        return config.model.name, config.model.quantization, config.lora.from_adapter

    if named(run) != named(node):
        ours, theirs = (_digest(config, _base) for config in (node, run))
        if ours != theirs:
            yield _differ(("model",), f"base model {ours[:12]}", f"{theirs[:12]} ({run.model.name})")
    ours, theirs = (_drawn(config) for config in (node, run))
    if None not in (ours, theirs) and ours != theirs:
        yield _differ(("seed",), ours, theirs)


def _accepted(run: RunConfig, node: NodeConfig) -> Iterator[Misfit]:
    """The server's code is taken to be this fedlora's."""
    for key, listed, there in (
        ("base_model", node.accept.base_model, lambda: _digest(run, agreed_digest)),
        ("code", node.accept.code, code_digest),
    ):
        if listed and there() not in listed:
            yield _differ(("accept", key), ", ".join(one[:12] for one in listed), there()[:12])


def _base(config: RunConfig | NodeConfig) -> str:
    return base_digest(config.model, config.lora, config.task)


def _drawn(config: RunConfig | NodeConfig) -> str | None:
    """As `drawn`, as far as it can be told without asking the hub for the model."""
    return drawn(config, poolers=local(config.model.name) is not None)


def _digest(config: RunConfig | NodeConfig, of: Callable[[RunConfig | NodeConfig], str]) -> str:
    try:
        return of(config)
    except ModelError as error:
        raise ModelError(f"{error}; or check where both base models are, since they differ by name") from None


def _same(name: str, theirs: Section, ours: Section) -> Iterator[Misfit]:
    there, here = _leaves(theirs), _leaves(ours)
    for key in sorted(there.keys() | here.keys()):
        if there.get(key) != here.get(key):
            yield _differ((name, *key), here.get(key), there.get(key))


def _leaves(section: Section) -> Mapping[tuple[str, ...], Any]:
    found = flat(section.model_dump(mode="json"))
    return {key: sorted(v) if isinstance(v, list) else v for key, v in found if key[0] not in _FREE}


def _classes(run: RunConfig, node: NodeConfig) -> Iterator[Misfit]:
    if run.task.causal:
        classes: list[str] = []
    elif isinstance(run.data, Docstrings):
        classes = packages_of(run.data)  # known without a look at them
    else:
        classes = [*load_corpus(run.data, run.task, run.seed).classes]
    if classes != node.classes:
        yield _differ(("classes",), node.classes, classes)


def _work(run: RunConfig, node: NodeConfig) -> Iterator[Misfit]:
    asked, allowed = run.federation, node.work
    if asked.local_steps > allowed.local_steps:
        most = f"{allowed.local_steps} at most"
        yield _differ(("work", "local_steps"), most, f"{asked.local_steps} (federation.local_steps)")
    theirs, ours = asked.optimizer, allowed.optimizer
    if theirs.lr > ours.lr:
        yield _differ(
            ("work", "optimizer", "lr"), f"{ours.lr} at most", f"{theirs.lr} (federation.optimizer.lr)"
        )
    for key, absent in (("name", ""), ("proximal", 0.0), ("precondition", "none")):
        there, here = getattr(theirs, key, absent), getattr(ours, key, absent)
        if there != here:
            yield _differ(("work", "optimizer", key), here, there)
    if (own_b := run.method.own_b) != allowed.own_b:
        yield _differ(("work", "own_b"), allowed.own_b, f"{own_b} (method.name {run.method.name})")


def _clip(run: RunConfig, node: NodeConfig) -> Iterator[Misfit]:
    if run.privacy != "none" and run.privacy.max_grad_norm != node.max_grad_norm:
        there = f"{run.privacy.max_grad_norm} (privacy.max_grad_norm), and a server takes no update of another length"
        yield _differ(("max_grad_norm",), node.max_grad_norm, there)


def _rank(run: RunConfig, node: NodeConfig) -> Iterator[Misfit]:
    there = (run.federation.ranks or {}).get(node.client)
    if there != node.rank:
        yield _differ(("rank",), node.rank, f"{there} (federation.ranks of {node.client!r})")


def _budget(run: RunConfig, node: NodeConfig) -> Iterator[Misfit]:
    clients = run.data.partition.clients
    if clients is None:
        return
    expected = run.federation.rounds * expected_cohort(run.federation, clients) / clients
    ledger = node_ledger(node)
    left = node.budget.max_participations - (0 if ledger is None else len(ledger.debits))
    if expected > left:
        words = (
            f"budget.max_participations: {left} left here, but the run asks each node about {expected:.3g} times; "
            "raise it (more noise), or lower federation.rounds there"
        )
        yield Misfit(key=("budget", "max_participations"), words=words)


def _differ(key: tuple[str, ...], here: object, there: object) -> Misfit:
    return Misfit(
        key=key, words=f"{'.'.join(key)}: {here} here, the run has {there}; make the two files agree"
    )
