"""One client, one round: what a data owner's node does with a request, whatever carried it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from fedlora.algebra.digest import digest, named_tensors
from fedlora.config.schema import Optimizer
from fedlora.data.records import Examples
from fedlora.privacy.budget import Budget, would_exceed
from fedlora.privacy.calibration import check_delta, noise_multiplier
from fedlora.privacy.engine import Engine
from fedlora.privacy.evaluation import private_mean, spent_on_mean
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.noise import SEEDED, NoiseSource
from fedlora.privacy.sampling import poisson_draw
from fedlora.privacy.step import private_gradient, spent
from fedlora.training.batches import ALONE, TOKEN_BUDGET
from fedlora.training.descent import descend, optimizer_over
from fedlora.training.leading import leading_columns
from fedlora.training.model import AdaptedModel
from fedlora.training.personal import OwnB, Personal, Start
from fedlora.training.tasks import losses, record_accuracies
from fedlora.values import (
    ClientUpdate,
    Delta,
    DpEvent,
    Mechanism,
    Refusal,
    RefusalReason,
    Reply,
    Sampling,
    TrainRequest,
    Witness,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A data owner: its records, the model it trains and the limits that no server can move.

    declared_records: how many, as told to the server; never less than there are.
    mechanism and budget: None only where the configuration says `privacy: none`.
    alone: each record runs by itself. Kernels round a record's gradient by who is beside it, and a server that chooses
        the weights can blow that up to the clipping bound; batched, an honest server and wide numbers are assumed.
    evaluation_noise: std of the noise on the number of own records that the model gets right, told in every round;
        None: nothing is told.
    states: the records with what the frozen layers make of them, see `training.states`; None: computed in each step.
    rank: how many columns of every B are trained, clipped, noised and changed, the first ones; None: all.
    personal: where its own B is kept, for runs that leave each client its own; None: it takes part in none of them.
    """

    client: str
    model: AdaptedModel
    examples: Examples
    declared_records: int
    sampling: Sampling
    optimizer: Optimizer
    mechanism: Mechanism | None
    alone: bool
    evaluation_noise: float | None
    budget: Budget | None
    engine: Engine
    noise: NoiseSource
    states: Callable[[Examples], Examples] | None = None
    rank: int | None = None
    personal: Personal | None = None


def train(node: Node, request: TrainRequest, ledger: Ledger | None) -> Reply:
    """The client's reply; what it spends is durable in `ledger` before a record is drawn.

    The same request again costs nothing where noise is seeded, since it ends in the same bytes. A node with noise
    from the operating system keeps what it sent (the deployed app's outbox) and pays for what it lost.

    Args:
        node: whose turn it is.
        request: what the server asks; only the start, the number of steps and the learning rate are its to choose.
        ledger: of this data set; None exactly when node.mechanism is None.

    Returns:
        The noised update, or a Refusal that names no record: BUDGET, NO_DATA, BAD_REQUEST.

    Raises:
        ConfigError: the client's own B is damaged or gone; nothing was paid.
        GuardError: that B is no longer finite. It is noised, so this says nothing that the update would not.
        LedgerError, PrivacyError: the ledger cannot be written, or is not of this mechanism; nothing was paid.
        ShapeError: what the server sent does not fit the model.
    """
    start = started(node, request)
    entry = enter(node, request, ledger, work_digest(request, start))
    if isinstance(entry, Refusal):
        return entry
    request = start.request
    node = with_what_is_kept(node)
    node.model.load(request.adapters)
    accuracy = told_accuracy(node, request)
    with leading_columns(node.model, node.rank) as narrowed:
        _local_steps(replace(node, model=narrowed), request)
    delta = node.model.delta(request.adapters, request.work.side)
    if request.work.own_b:
        _keep_b(node, request, start)
    return update_of(node, request, entry, delta, accuracy)


def started(node: Node, request: TrainRequest) -> Start:
    """What the client works on: the request, or that with the client's own B."""
    if not request.work.own_b or node.personal is None:
        return Start(request=request, round=0)
    return node.personal.start(request)


def _keep_b(node: Node, request: TrainRequest, start: Start) -> None:
    """The client's B is kept as the round left it; made of noised gradients, so it is paid for as they are."""
    assert node.personal is not None  # `enter` refuses who keeps none
    sites = {site: b.detach() for site, (_, b) in node.model.live.items()}
    node.personal.keep(request.run, OwnB(round=request.round, began=start.round, sites=sites))


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Leave to touch records, paid for. spent and ledger: as `ClientUpdate` has them."""

    spent: tuple[DpEvent, ...]
    ledger: Witness | None


def enter(
    node: Node, request: TrainRequest, ledger: Ledger | None, asked: str | None = None
) -> Entry | Refusal:
    """What the work spends is durable in `ledger`, or the reason why this client stays away.

    Args:
        node: whose turn it is.
        request: what the server asks.
        ledger: of this data set; None exactly when node.mechanism is None.
        asked: `work_digest`, from who has it; None: there is no B of its own, and it is `request_digest(request)`.
    """

    def refuse(reason: RefusalReason) -> Refusal:
        return Refusal(client=node.client, run=request.run, round=request.round, reason=reason)

    if len(node.examples) == 0:
        return refuse(RefusalReason.NO_DATA)
    if request.work.side != "b" and not node.model.trains_a:
        return refuse(RefusalReason.BAD_REQUEST)
    if request.work.own_b and node.personal is None:
        return refuse(RefusalReason.BAD_REQUEST)
    events = participation(node.mechanism, node.sampling, node.evaluation_noise, request.work.steps)
    if node.mechanism is None:
        return Entry(spent=events, ledger=None)
    assert ledger is not None and node.budget is not None
    asked = request_digest(request) if asked is None else asked
    earlier = ledger.find(request.run, request.round)
    if earlier is not None and earlier.request_digest != asked:
        return refuse(RefusalReason.BAD_REQUEST)
    free = earlier is not None and ledger.header.noise == SEEDED
    if not free and would_exceed([past.events for past in ledger.debits], events, node.budget):
        return refuse(RefusalReason.BUDGET)
    debit = ledger.debit(
        request.run,
        request.round,
        asked,
        events,
        max_grad_norm=node.mechanism.max_grad_norm,
        budget=node.budget,
    )
    return Entry(spent=events, ledger=ledger.witness(debit))


def with_what_is_kept(node: Node) -> Node:
    """The node, its records with the states that the frozen layers leave; touches them, so only after `enter`."""
    return node if node.states is None else replace(node, examples=node.states(node.examples), states=None)


def update_of(
    node: Node, request: TrainRequest, entry: Entry, delta: Delta, accuracy: float | None
) -> ClientUpdate:
    """The reply of a client that has done its work."""
    return ClientUpdate(
        client=node.client,
        run=request.run,
        round=request.round,
        delta=delta,
        spent=entry.spent,
        ledger=entry.ledger,
        accuracy=accuracy,
    )


def participation(
    mechanism: Mechanism | None, sampling: Sampling, evaluation_noise: float | None, steps: int
) -> tuple[DpEvent, ...]:
    """All that one round of work releases: `steps` private steps and, if told, one noised accuracy."""
    if mechanism is None:
        return ()
    told = () if evaluation_noise is None else (spent_on_mean(evaluation_noise),)
    return (spent(mechanism, sampling, steps), *told)


def request_digest(request: TrainRequest) -> str:
    """What makes two requests the same one."""
    work = request.work
    words = (
        request.run,
        request.base_model,
        request.round,
        request.adapters.basis,
        repr(request.adapters.scale),
    )
    # What came later is named where it is there, so that requests without it keep their digest.
    more = (repr(work.proximal),) if work.proximal else ()
    more += (f"precondition={work.precondition}",) if work.precondition != "none" else ()
    more += (f"side={work.side}",) if work.side != "b" else ()
    more += ("own_b",) if work.own_b else ()
    return digest(named_tensors(request.adapters), *words, work.steps, repr(work.learning_rate), *more)


def work_digest(request: TrainRequest, start: Start) -> str:
    """What makes two pieces of work the same one, for a debit: the request, and the B that it begins with."""
    asked = request_digest(request)
    if not request.work.own_b:
        return asked
    return digest({}, "own b", asked, request_digest(start.request))


def calibrated(
    budget: Budget, sampling: Sampling, *, records: int, local_steps: int, evaluation_noise: float | None
) -> float:
    """The noise multiplier at which all the participations that a budget allows stay within it.

    Raises:
        PrivacyError: delta is too large for the records, or no noise meets the budget.
    """
    check_delta(budget.target_delta, records)
    told = [] if evaluation_noise is None else [spent_on_mean(evaluation_noise)]
    return noise_multiplier(
        budget.target_epsilon,
        budget.target_delta,
        sampling,
        budget.max_participations * local_steps,
        budget.accountant,
        beside=told * budget.max_participations,
    )


def told_accuracy(node: Node, request: TrainRequest) -> float | None:
    """The noised accuracy of the model as the round begins with it; None where the node tells none."""
    if node.mechanism is None or node.evaluation_noise is None:
        return None
    return private_mean(
        record_accuracies(node.model, node.examples),
        node.declared_records,
        node.evaluation_noise,
        noise=node.noise,
        purpose=("accuracy", request.run, node.client, request.round),
    )


def _local_steps(node: Node, request: TrainRequest) -> None:
    """`work.steps` DP-SGD steps, their number and divisor independent of the data; an empty draw is a step."""
    trained = node.model.trained_on(request.work.side)
    optimizer = optimizer_over(trained, node.optimizer, request.work.learning_rate, node.model)
    token_budget = ALONE if node.alone else TOKEN_BUDGET
    for step in range(request.work.steps):
        drawn = drawn_records(node, request, step)
        gradient = private_gradient(
            node.engine,
            node.model.peft_model,
            trained,
            losses(node.model, node.examples, drawn.numpy(), token_budget),
            mechanism=node.mechanism,
            expected_batch=node.sampling.expected_batch,
            noise=node.noise,
            purpose=noise_purpose(node, request, step),
            sequences_per_record=node.examples.sequences_per_record,
        )
        descend(optimizer, trained, gradient)


def drawn_records(node: Node, request: TrainRequest, step: int) -> Tensor:
    """Indices (k,) of the node's records that take part in this step."""
    purpose = ("draw", *_step_of(node, request, step))
    return poisson_draw(len(node.examples), node.sampling, node.noise, purpose)


def noise_purpose(node: Node, request: TrainRequest, step: int) -> tuple[str | int, ...]:
    """The name of the noise that this client adds in this step, and in no other."""
    return ("noise", *_step_of(node, request, step))


def _step_of(node: Node, request: TrainRequest, step: int) -> tuple[str | int, ...]:
    # The run is part of it: the same seed in another run must not repeat noise that a ledger pays for twice.
    return (request.run, node.client, request.round, step)
