"""Several simulated clients at once: one forward and backward pass of the frozen base for all of their records.

Each has its own copy of what is trained, its own draws, clips, noise and debit; what they share is arithmetic that
does not depend on who owns a record. So each reply is that of `client.train`, to the rounding of a float.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedlora.config.schema import RunConfig
from fedlora.data.records import Examples, concatenate
from fedlora.errors import PrivacyError
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.engine import TrainedLinear
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.noise import SEEDED
from fedlora.privacy.stacked import stackable, stacked
from fedlora.privacy.step import Release, private_gradients
from fedlora.training.batches import TOKEN_BUDGET
from fedlora.training.client import (
    Entry,
    Node,
    drawn_records,
    enter,
    noise_purpose,
    request_digest,
    told_accuracy,
    update_of,
    with_what_is_kept,
)
from fedlora.training.descent import descend, optimizer_over
from fedlora.training.model import LORA_B, AdaptedModel
from fedlora.training.packing import MOST_NUMBERS, overhead_of, packed_groups
from fedlora.training.tasks import losses
from fedlora.values import Adapters, Delta, Refusal, Reply, TrainRequest


def clients_together(config: RunConfig, trained_numbers: int, tokens: int) -> int:
    """How many clients share a forward pass: as the config says; for `auto`, as many as fill a micro-batch.

    Clients whose own draws fill one gain nothing. The machine has no say, so the same config gives the same run
    on any.

    Args:
        config: of the run.
        trained_numbers: of one client's B and head.
        tokens: of a record at most, as the model's layers see it.
    """
    asked = config.runtime.clients_together
    if asked != "auto":
        return asked
    drawn = config.federation.batch_size * tokens
    return max(1, min(TOKEN_BUDGET // drawn, MOST_NUMBERS // trained_numbers))


def _difference(nodes: Sequence[Node], request: TrainRequest) -> str | None:
    """What keeps these clients from sharing a forward pass, for people; None where nothing does."""
    first = nodes[0]
    for what, differ in (
        ("clients of different models", any(node.model is not first.model for node in nodes)),
        ("an engine other than direct", any(type(node.engine) is not DirectEngine for node in nodes)),
        ("an A that is trained", first.model.trains_a),
        ("a B of each client's own", request.work.own_b),
        ("records that must run alone", any(node.alone for node in nodes)),
        ("records of two sequences", any(node.examples.sequences_per_record > 1 for node in nodes)),
        ("noise that is not seeded", any(node.noise.kind != SEEDED for node in nodes)),
        ("different optimizers", any(node.optimizer != first.optimizer for node in nodes)),
        ("different bounds", len({node.mechanism and node.mechanism.max_grad_norm for node in nodes}) > 1),
        ("clients that train some columns only", any(node.rank is not None for node in nodes)),
        ("one client twice", len({node.client for node in nodes}) < len(nodes)),
    ):
        if differ:
            return what
    return None


def train_together(
    nodes: Sequence[Node], request: TrainRequest, ledgers: Sequence[Ledger | None]
) -> list[Reply]:
    """The reply of each client, as `client.train` gives it to float tolerance, and what it spends paid likewise.

    All debits are durable before any record is drawn. An error ends the work of all; the same clients may then be
    asked one by one, and pay nothing twice.

    Args:
        nodes: whose turn it is, at least one; of one model, with seeded noise and the direct engine.
        request: what the server asks of each.
        ledgers: of each node.

    Raises:
        PrivacyError: these clients cannot share a forward pass.
    """
    if (obstacle := _difference(nodes, request)) is not None:
        raise PrivacyError(f"{len(nodes)} clients together: {obstacle}; train them one by one")
    layers = stackable(nodes[0].model.peft_model, nodes[0].model.trained)  # before anybody pays
    asked = request_digest(request)
    entries = [enter(node, request, ledger, asked) for node, ledger in zip(nodes, ledgers, strict=True)]
    working = [
        with_what_is_kept(node)
        for node, entry in zip(nodes, entries, strict=True)
        if isinstance(entry, Entry)
    ]
    done: dict[str, tuple[Delta, float | None]] = {}
    if working:
        working[0].model.load(request.adapters)
        told = [told_accuracy(node, request) for node in working]
        deltas = _local_steps(working, request, layers)
        done = {node.client: (delta, value) for node, delta, value in zip(working, deltas, told, strict=True)}
    return [
        entry if isinstance(entry, Refusal) else update_of(node, request, entry, *done[node.client])
        for node, entry in zip(nodes, entries, strict=True)
    ]


def _local_steps(
    nodes: Sequence[Node], request: TrainRequest, layers: tuple[TrainedLinear, ...]
) -> list[Delta]:
    """Each client's change after `work.steps` steps, all clients in step."""
    adapted, engine = nodes[0].model, nodes[0].engine
    assert isinstance(engine, DirectEngine)
    overhead = overhead_of(adapted)
    with stacked(adapted.peft_model, adapted.trained, layers, len(nodes)) as stack:
        optimizer = optimizer_over(stack.trained, nodes[0].optimizer, request.work.learning_rate, adapted)
        for step in range(request.work.steps):
            draws = [drawn_records(node, request, step) for node in nodes]
            releases = [
                Release(
                    mechanism=node.mechanism,
                    expected_batch=node.sampling.expected_batch,
                    noise=node.noise,
                    purpose=noise_purpose(node, request, step),
                )
                for node in nodes
            ]
            packed = _packed(adapted, [node.examples for node in nodes], draws, overhead)
            descend(optimizer, stack.trained, private_gradients(engine, stack, packed, releases))
        return [
            _delta(adapted, {name: value[row] for name, value in stack.trained.items()}, request.adapters)
            for row in range(len(nodes))
        ]


def _packed(
    adapted: AdaptedModel, examples: Sequence[Examples], draws: Sequence[Tensor], overhead: float
) -> Iterator[tuple[Tensor, Callable[[], Tensor]]]:
    """All drawn records in micro-batches of like length: the owner of each record, and the call of its losses.

    Which records share one is decided by the draws and the order of the clients alone.
    """
    pack = concatenate([held.select(draw.numpy()) for held, draw in zip(examples, draws, strict=True)])
    owners = torch.repeat_interleave(torch.arange(len(draws)), torch.tensor([len(draw) for draw in draws]))
    device = adapted.device
    most = max(1, MOST_NUMBERS // sum(parameter.numel() for parameter in adapted.trained.values()))
    for group in packed_groups(adapted.intake.footprints(pack), overhead=overhead, most_records=most):
        # The losses come in the group's own order: it is sorted already.
        (run,) = losses(adapted, pack, group)
        yield owners[group].to(device), run


def _delta(adapted: AdaptedModel, trained: Mapping[str, Tensor], start: Adapters) -> Delta:
    """As `AdaptedModel.delta`, of one client's copies."""

    def change(name: str, value: Tensor) -> Tensor:
        return trained[name].detach() - value.to(trained[name])

    return Delta(
        basis=start.basis,
        sites={site: change(f"{site}{LORA_B}", start.sites[site].b) for site in adapted.sites},
        head={name: change(name, start.head[name]) for name in trained if not name.endswith(LORA_B)},
    )
