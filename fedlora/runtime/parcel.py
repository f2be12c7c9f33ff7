"""Requests and replies as plain words and one array of numbers, for processes that trust each other.

Ray carries a numpy array through shared memory without copying it, and pickles a torch tensor. Nothing is digested
here; what crosses a network to somebody else is a frame (`transport/wire.py`).
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.algebra.deltas import tensors
from fedlora.algebra.digest import adapters_of, named_tensors
from fedlora.algebra.flat import Layout
from fedlora.errors import ShapeError
from fedlora.values import (
    ClientUpdate,
    DpEvent,
    LocalWork,
    Refusal,
    RefusalReason,
    Reply,
    TrainRequest,
    Witness,
)

Parcel: TypeAlias = tuple[Any, NDArray]
"""Words (tuples, lists, strings, numbers; no class of ours) and the numbers that they speak of."""


def pack_request(request: TrainRequest) -> Parcel:
    """The request, its adapters' numbers one after the other, (numbers,).

    Raises:
        ShapeError: adapters of more than one number type.
    """
    adapters = request.adapters
    named = named_tensors(adapters)
    values = list(named.values())
    words = {
        "named": (request.run, request.base_model, request.code, request.round),
        "work": {name: getattr(request.work, name) for name in LocalWork.__dataclass_fields__},
        "adapters": (adapters.basis, adapters.scale),
        "names": list(named),
        "shapes": [tuple(tensor.shape) for tensor in values],
    }
    _require_one_type(values)
    flat = torch.cat([tensor.detach().cpu().flatten() for tensor in values]) if values else torch.zeros(0)
    return words, flat.numpy()


def unpack_request(parcel: Parcel) -> TrainRequest:
    """The request that was packed, in memory of its own."""
    words, numbers = parcel
    flat = torch.from_numpy(numbers.copy())
    sizes = [torch.Size(shape).numel() for shape in words["shapes"]]
    parts = zip(words["names"], flat.split(sizes), words["shapes"], strict=True)
    run, base_model, code, number = words["named"]
    basis, scale = words["adapters"]
    return TrainRequest(
        run=run,
        base_model=base_model,
        code=code,
        round=number,
        adapters=adapters_of(
            {name: part.view(shape) for name, part, shape in parts}, basis=basis, scale=scale
        ),
        work=LocalWork(**words["work"]),
    )


def pack_replies(replies: Sequence[Reply], layout: Layout) -> Parcel:
    """Replies of one group, their updates the rows of one array (updates, layout.numbers)."""
    updates = [reply for reply in replies if isinstance(reply, ClientUpdate)]
    numbers = [tensor for update in updates for tensor in tensors(update.delta)]
    _require_one_type(numbers)
    dtype = numbers[0].dtype if numbers else torch.float32
    rows = torch.empty(len(updates), layout.numbers, dtype=dtype)
    for row, update in zip(rows, updates, strict=True):
        layout.write(update.delta, row)
    return [_words(reply) for reply in replies], rows.numpy()


def unpack_replies(parcel: Parcel, layout: Layout) -> Iterator[Reply]:
    """The replies that were packed, in their order; tensors are views of the array, which may be read-only."""
    words, numbers = parcel
    rows = iter(_tensor(numbers))
    for client, run, number, reason, told in words:
        if reason is not None:
            yield Refusal(client=client, run=run, round=number, reason=RefusalReason(reason))
            continue
        basis, spent, ledger, accuracy = told
        yield ClientUpdate(
            client=client,
            run=run,
            round=number,
            delta=layout.delta_of(next(rows), basis),
            spent=tuple(DpEvent(**event) for event in spent),
            ledger=ledger and Witness(seq=ledger[0], head=ledger[1]),
            accuracy=accuracy,
        )


def _words(reply: Reply) -> tuple[Any, ...]:
    named = (reply.client, reply.run, reply.round)
    if isinstance(reply, Refusal):
        return (*named, reply.reason.value, None)
    spent = [{name: getattr(event, name) for name in DpEvent.__dataclass_fields__} for event in reply.spent]
    return (*named, None, (reply.delta.basis, spent, reply.ledger and astuple(reply.ledger), reply.accuracy))


def _require_one_type(tensors: Sequence[Tensor]) -> None:
    if len(found := {tensor.dtype for tensor in tensors}) > 1:
        raise ShapeError(f"tensors of {sorted(map(str, found))} where one number type is needed")


def _tensor(numbers: NDArray) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no read-only tensors; values are never written in place
        return torch.from_numpy(np.asarray(numbers))
