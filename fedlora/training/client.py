"""One client, one round: what a data owner's node does with a request, whatever carried it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora.algebra.digest import digest, named_tensors
from fedlora.config.schema import AdamW, Optimizer
from fedlora.data.records import Examples
from fedlora.privacy.engine import Engine
from fedlora.privacy.ledger import Budget, Ledger, would_exceed
from fedlora.privacy.noise import NoiseSource
from fedlora.privacy.sampling import poisson_draw
from fedlora.privacy.step import private_gradient, spent
from fedlora.training.model import AdaptedModel
from fedlora.training.tasks import losses
from fedlora.values import (
    ClientUpdate,
    Mechanism,
    Refusal,
    RefusalReason,
    Reply,
    TrainRequest,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A data owner: its records, the model it trains and the limits that no server can move.

    batch_size: expected size of a draw and divisor of every step, a constant of the configuration.
    sample_rate: of the draws where privacy is off; under privacy the mechanism's own rate is drawn at and paid for.
    mechanism and budget: None only where the configuration says `privacy: none`.
    """

    client: str
    model: AdaptedModel
    examples: Examples
    batch_size: int
    sample_rate: float
    optimizer: Optimizer
    mechanism: Mechanism | None
    budget: Budget | None
    engine: Engine
    noise: NoiseSource


def train(node: Node, request: TrainRequest, ledger: Ledger | None) -> Reply:
    """The client's reply; what it spends is durable in `ledger` before a record is drawn.

    The same request again is answered again without a second debit: seeded noise makes the bytes the same, and a
    node with noise from the operating system keeps what it sent (the deployed app's outbox).

    Args:
        node: whose turn it is.
        request: what the server asks; only the start, the number of steps and the learning rate are its to choose.
        ledger: of this data set; None exactly when node.mechanism is None.

    Returns:
        The noised update, or a Refusal that names no record: BUDGET, NO_DATA, BAD_REQUEST.
    """

    def refuse(reason: RefusalReason) -> Refusal:
        return Refusal(client=node.client, run=request.run, round=request.round, reason=reason)

    if len(node.examples) == 0:
        return refuse(RefusalReason.NO_DATA)
    event = node.mechanism and spent(node.mechanism, request.work.steps)
    if event is not None:
        assert ledger is not None and node.budget is not None and node.mechanism is not None
        asked = request_digest(request)
        earlier = ledger.find(request.run, request.round)
        if earlier is not None and earlier.request_digest != asked:
            return refuse(RefusalReason.BAD_REQUEST)
        if earlier is None and would_exceed(ledger.events, event, node.budget):
            return refuse(RefusalReason.BUDGET)
        ledger.debit(
            request.run,
            request.round,
            asked,
            event,
            max_grad_norm=node.mechanism.max_grad_norm,
            budget=node.budget,
        )
    node.model.load(request.adapters)
    _local_steps(node, request)
    delta = node.model.delta(request.adapters)
    return ClientUpdate(client=node.client, run=request.run, round=request.round, delta=delta, spent=event)


def request_digest(request: TrainRequest) -> str:
    """What makes two requests the same one."""
    work = request.work
    words = (request.run, request.round, request.adapters.basis, repr(request.adapters.scale))
    return digest(named_tensors(request.adapters), *words, work.steps, repr(work.learning_rate))


def _local_steps(node: Node, request: TrainRequest) -> None:
    """`work.steps` DP-SGD steps, their number and divisor independent of the data; an empty draw is a step."""
    trained = node.model.trained
    rate = node.sample_rate if node.mechanism is None else node.mechanism.sample_rate
    optimizer = _optimizer(trained, node.optimizer, request.work.learning_rate)
    for step in range(request.work.steps):
        # The run is part of it: the same seed in another run must not repeat noise that a ledger pays for twice.
        purpose = (request.run, node.client, request.round, step)
        drawn = poisson_draw(len(node.examples), rate, node.noise, ("draw", *purpose))
        gradient = private_gradient(
            node.engine,
            node.model.peft_model,
            trained,
            losses(node.model, node.examples, drawn.numpy()),
            mechanism=node.mechanism,
            expected_batch=float(node.batch_size),
            noise=node.noise,
            purpose=("noise", *purpose),
        )
        _step(optimizer, trained, gradient)


def _optimizer(trained: Mapping[str, nn.Parameter], config: Optimizer, lr: float) -> torch.optim.Optimizer:
    if isinstance(config, AdamW):
        return torch.optim.AdamW(trained.values(), lr=lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(trained.values(), lr=lr)


def _step(
    optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter], gradient: Mapping[str, Tensor]
) -> None:
    for name, parameter in trained.items():
        parameter.grad = gradient[name].to(parameter.dtype)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
