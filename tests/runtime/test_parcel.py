"""What crosses between our own processes arrives as it was sent, and its numbers are not copied."""

import numpy as np
import pytest
import torch

from fedlora.algebra.deltas import trainable
from fedlora.algebra.flat import Layout
from fedlora.errors import ShapeError
from fedlora.runtime.parcel import pack_replies, pack_request, unpack_replies, unpack_request
from fedlora.transport.wire import encode_reply, encode_request
from fedlora.values import (
    Adapters,
    ClientUpdate,
    Delta,
    DpEvent,
    Factors,
    LocalWork,
    Refusal,
    RefusalReason,
    TrainRequest,
    Witness,
)


def request_of(dtype: torch.dtype = torch.float32) -> TrainRequest:
    draw = torch.Generator().manual_seed(3)
    sites = {
        name: Factors(
            a=torch.randn(2, n, generator=draw, dtype=dtype), b=torch.randn(m, 2, generator=draw, dtype=dtype)
        )
        for name, n, m in (("z.query", 5, 3), ("a.value", 4, 6))
    }
    head = {"weight": torch.randn(3, 4, generator=draw, dtype=dtype)}
    adapters = Adapters(basis=4, scale=0.5, sites=sites, head=head)
    work = LocalWork(steps=2, learning_rate=0.1, proximal=0.25, precondition="allora")
    return TrainRequest(run="r", base_model="m", code="c", round=7, adapters=adapters, work=work)


def update_of(request: TrainRequest, client: str, value: float) -> ClientUpdate:
    sites = {site: torch.full_like(factors.b, value) for site, factors in request.adapters.sites.items()}
    head = {name: torch.full_like(tensor, -value) for name, tensor in request.adapters.head.items()}
    event = DpEvent(noise_multiplier=1.5, sample_rate=0.25, steps=2, expected_batch=4.0, max_draw=9)
    return ClientUpdate(
        client=client,
        run="r",
        round=7,
        delta=Delta(basis=4, sites=sites, head=head),
        spent=(event, DpEvent(noise_multiplier=2.0, sample_rate=1.0, steps=1)),
        ledger=Witness(seq=3, head="ab"),
        accuracy=0.5,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_request_arrives_bit_for_bit(dtype):
    request = request_of(dtype)
    arrived = unpack_request(pack_request(request))
    assert encode_request(arrived) == encode_request(request)


def test_replies_of_a_group_arrive_bit_for_bit_and_in_order():
    request = request_of()
    layout = Layout.of(trainable(request.adapters))
    refusal = Refusal(client="b", run="r", round=7, reason=RefusalReason.BUDGET)
    bare = ClientUpdate(client="d", run="r", round=7, delta=update_of(request, "d", 2.0).delta, spent=())
    replies = [update_of(request, "a", 1.0), refusal, update_of(request, "c", 3.0), bare]
    arrived = list(unpack_replies(pack_replies(replies, layout), layout))
    assert [encode_reply(reply) for reply in arrived] == [encode_reply(reply) for reply in replies]
    assert [encode_reply(reply) for reply in unpack_replies(pack_replies([refusal], layout), layout)] == [
        encode_reply(refusal)
    ]


def test_arrived_updates_are_views_of_the_one_array_even_where_it_is_read_only():
    request = request_of()
    layout = Layout.of(trainable(request.adapters))
    words, numbers = pack_replies([update_of(request, name, 1.0) for name in "ab"], layout)
    numbers.setflags(write=False)
    for row, reply in zip(numbers, unpack_replies((words, numbers), layout), strict=True):
        assert isinstance(reply, ClientUpdate)
        assert layout.flat(reply.delta).data_ptr() == row.ctypes.data
        assert np.shares_memory(numbers, layout.flat(reply.delta).numpy())


def test_words_hold_no_class_of_ours():
    request = request_of()
    words, _ = pack_replies([update_of(request, "a", 1.0)], Layout.of(trainable(request.adapters)))
    kinds: set[type] = set()

    def look(value: object) -> None:
        kinds.add(type(value))
        children = (
            value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        )
        for child in children:
            look(child)

    look(words)
    assert kinds <= {list, tuple, dict, str, int, float, type(None)}


def test_tensors_of_two_number_types_are_refused_rather_than_rounded():
    request = request_of()
    mixed = Adapters(
        basis=4, scale=0.5, sites=request.adapters.sites, head={"weight": torch.zeros(2, dtype=torch.float64)}
    )
    broken = TrainRequest(run="r", base_model="m", code="c", round=7, adapters=mixed, work=request.work)
    with pytest.raises(ShapeError, match="float64"):
        pack_request(broken)
