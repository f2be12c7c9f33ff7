"""What a data owner's node will do, told without training: its noise, its budget, the digests it may accept."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.code_digest import code_digest
from fedlora.config.load import load_node, origin_of, origins_of
from fedlora.config.node import NodeConfig, NodeFiles
from fedlora.data.own import own_records
from fedlora.deploy.node import own_terms
from fedlora.errors import ConfigError, LedgerError, PrivacyError
from fedlora.privacy.accountants import epsilon
from fedlora.privacy.calibration import check_delta
from fedlora.runs.budgets import node_budget
from fedlora.training.agreed import agreed_digest
from fedlora.training.client import participation


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePreview:
    """The answer of `fedlora check node.yaml`.

    records: how many there are; None where they cannot be read from here.
    epsilon_once, epsilon_all: of one participation and of max_participations, at the budget's delta.
    spent: the row of `fedlora budget` for this node.
    code, base_model: what `accept` may list.
    """

    client: str
    declared_records: int
    records: int | None
    sample_rate: float
    max_draw: int
    noise_multiplier: float
    max_grad_norm: float
    local_steps: int
    delta: float
    epsilon_once: float
    epsilon_all: float
    spent: dict[str, Any]
    code: str
    base_model: str
    notes: tuple[str, ...]


def preview_node(path: Path, overrides: Sequence[str] = ()) -> NodePreview:
    """Everything `fedlora check node.yaml` prints; reads the records only to count them, and writes nothing.

    Raises:
        ConfigError, PrivacyError: whatever the node would refuse to work with, with FILE:LINE.
        LedgerError: its ledger is damaged or edited.
    """
    config = load_node(path, overrides)
    origins = origins_of(path, overrides)

    def at(*key: str) -> AbstractContextManager[None]:
        return _told_of(".".join(key), origin_of(key, origins))

    with at("budget", "target_delta"):
        check_delta(config.budget.target_delta, config.declared_records)
    with at("budget", "target_epsilon"):
        sampling, mechanism = own_terms(config)
    with at("model", "name"):
        base_model = agreed_digest(config)
    with at("data"):
        records = _count(config)
    with at("declared_records"):
        _require_declared(config, records)
    once = participation(mechanism, sampling, config.evaluation_noise, config.work.local_steps)
    delta, accountant = config.budget.target_delta, config.budget.accountant
    return NodePreview(
        client=config.client,
        declared_records=config.declared_records,
        records=records,
        sample_rate=sampling.rate,
        max_draw=sampling.max_draw,
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=mechanism.max_grad_norm,
        local_steps=config.work.local_steps,
        delta=delta,
        epsilon_once=epsilon(once, delta, accountant),
        epsilon_all=epsilon(once * config.budget.max_participations, delta, accountant),
        spent=node_budget(config),
        code=code_digest(),
        base_model=base_model,
        notes=tuple(_notes(config, records, mechanism.noise_multiplier, base_model)),
    )


_WORDS = {"privacy.": "budget.", "federation.": "work."}
"""Calibration speaks of the keys of a run; a node has the same under other names."""


@contextmanager
def _told_of(name: str, origin: str) -> Iterator[None]:
    """A ConfigError or PrivacyError of the block begins `FILE:LINE: key`, as those of the YAML itself do."""
    try:
        yield
    except LedgerError:
        raise
    except (ConfigError, PrivacyError) as error:
        said = str(error)
        for theirs, ours in _WORDS.items():
            said = said.replace(theirs, ours)
        raise type(error)(f"{origin}: {said if said.startswith(name) else f'{name}: {said}'}") from None


def _count(config: NodeConfig) -> int | None:
    if config.data.source == "files" and not Path(config.data.train).exists():
        return None
    return len(own_records(config).texts)


def _require_declared(config: NodeConfig, records: int | None) -> None:
    if records is not None and records > config.declared_records:
        raise PrivacyError(f"{config.declared_records}, but there are {records}; declare at least as many")


def _notes(config: NodeConfig, records: int | None, noise: float, base_model: str) -> Iterator[str]:
    if records is None and isinstance(config.data, NodeFiles):
        yield f"records not counted: data.train {config.data.train!r} is not there; mend it, or check on the node"
    if noise == config.min_noise_multiplier:
        yield "the noise is min_noise_multiplier, more than the budget needs"
    if config.mark is None:
        yield "no mark: a ledger lost together with its replies goes unnoticed; set mark: PATH on another volume"
    accept = config.accept
    if accept.code is None:
        yield "accept.code lists nothing, so any fedlora is taken; paste the line above once you have reviewed it"
    elif code_digest() not in accept.code:
        yield "accept.code does not list this fedlora: every request will be refused"
    if accept.base_model is not None and base_model not in accept.base_model:
        yield "accept.base_model does not list this base model: every request will be refused"
