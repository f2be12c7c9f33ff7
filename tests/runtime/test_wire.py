"""A frame says exactly what was sent, or is refused."""

import hashlib
import json
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import WireError
from fedlora.runtime.wire import (
    DIGEST_BYTES,
    MAGIC,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)
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
)


def request(dtype: torch.dtype = torch.float32) -> TrainRequest:
    generator = torch.Generator().manual_seed(3)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    sites = {name: Factors(a=some(2, 5), b=some(3, 2)) for name in ("layer.0.query", "layer.0.value")}
    head = {"classifier.weight": some(4, 3), "classifier.bias": some(4)}
    adapters = Adapters(basis=3, scale=0.5, sites=sites, head=head)
    return TrainRequest(run="a run", round=12, adapters=adapters, work=LocalWork(steps=4, learning_rate=0.1))


def update() -> ClientUpdate:
    adapters = request().adapters
    delta = Delta(basis=3, sites={site: f.b for site, f in adapters.sites.items()}, head=adapters.head)
    spent = DpEvent(noise_multiplier=0.7312345678901234, sample_rate=0.1, steps=4)
    return ClientUpdate(client="clinic ü", run="a run", round=12, delta=delta, spent=spent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_request_survives_the_journey_bit_for_bit(dtype):
    sent = request(dtype)
    got = decode_request(encode_request(sent))
    assert (got.run, got.round, got.work) == (sent.run, sent.round, sent.work)
    assert (got.adapters.basis, got.adapters.scale) == (3, 0.5)
    for site, factors in sent.adapters.sites.items():
        assert torch.equal(got.adapters.sites[site].a, factors.a)
        assert torch.equal(got.adapters.sites[site].b, factors.b)
    assert all(torch.equal(got.adapters.head[name], value) for name, value in sent.adapters.head.items())


def test_an_update_survives_the_journey_bit_for_bit():
    got = decode_reply(encode_reply(update()))
    assert isinstance(got, ClientUpdate)
    assert (got.client, got.run, got.round, got.spent) == ("clinic ü", "a run", 12, update().spent)
    assert got.delta.basis == 3
    assert all(torch.equal(got.delta.sites[s], v) for s, v in update().delta.sites.items())
    assert encode_reply(got) == encode_reply(update())


@pytest.mark.parametrize("reason", list(RefusalReason))
def test_a_refusal_carries_a_code_and_nothing_else(reason):
    refusal = Refusal(client="c", run="r", round=1, reason=reason)
    assert decode_reply(encode_reply(refusal)) == refusal


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_no_damaged_frame_is_accepted(data):
    frame = bytearray(encode_reply(update()))
    kind = data.draw(st.sampled_from(["flip", "cut", "extend"]))
    at = data.draw(st.integers(0, len(frame) - 1))
    if kind == "flip":
        frame[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del frame[at:]
    else:
        frame += b"\0" * (1 + at)
    with pytest.raises(WireError):
        decode_reply(bytes(frame))


def resealed(header: dict, data: bytes = b"") -> bytes:
    """A frame with a true digest around a header of our choosing: what a hostile peer would send."""
    text = json.dumps(header).encode()
    body = MAGIC + struct.pack("<I", len(text)) + text + data
    return body + hashlib.sha256(body).digest()


GOOD = {"kind": "update", "client": "c", "run": "r", "round": 1, "basis": 0, "spent": None}


@pytest.mark.parametrize(
    "header",
    [
        {**GOOD, "tensors": [["b:x", "float32", [1 << 18, 1 << 18]]]},
        {**GOOD, "tensors": [["b:x", "float32", [-1, 4]]]},
        {**GOOD, "tensors": [["b:x", "object", [1]]]},
        {**GOOD, "tensors": [["b:x", "float32", ["many"]]]},
        {**GOOD, "tensors": [["b:x"]]},
        {**GOOD, "tensors": 7},
        {**GOOD, "tensors": [["b:x", "float32", [-1, -4]]]},
        {**GOOD, "tensors": [["b:x", "float32", [0, -1]]]},
        {**GOOD, "tensors": [["b:x", "float32", [0, 1 << 62, 1 << 62]]]},
        {**GOOD, "tensors": [["b:x", "float32", [0] * 100]]},
        {**GOOD, "tensors": [["b:x", "float32", [True, 0]]]},
        {**GOOD, "tensors": [["b:x", "float32", [0.0]]]},
        {**GOOD, "tensors": [["b:x", ["float32"], [0]]]},
        {**GOOD, "tensors": [[5, "float32", [0]]]},
        {**GOOD, "tensors": [], "round": math.inf},
        {**GOOD, "tensors": [], "round": math.nan},
        {**GOOD, "tensors": [], "round": 1.5},
        {**GOOD, "tensors": [], "round": True},
        {**GOOD, "tensors": [], "round": 10**400},
        {**GOOD, "tensors": [], "run": None},
        {**GOOD, "tensors": [], "client": ["c"]},
        {**GOOD, "tensors": [], "spent": [10**400, 0.1, 2]},
        {**GOOD, "tensors": [], "spent": [1.0, 0.1, math.inf]},
        {**GOOD, "tensors": [], "spent": "111"},
        {**GOOD, "tensors": [], "spent": 0},
        {**GOOD, "tensors": [], "spent": ["much"]},
        {**GOOD, "kind": "request", "tensors": []},
        {key: value for key, value in GOOD.items() if key != "run"} | {"tensors": []},
        {"kind": "refusal", "client": "c", "run": "r", "round": 1, "reason": "boredom", "tensors": []},
        {},
        [],
    ],
)
def test_a_hostile_header_is_refused_before_memory_is_asked_for(header):
    with pytest.raises(WireError):
        decode_reply(resealed(header))


ASKED = {
    "kind": "request",
    "run": "r",
    "round": 1,
    "basis": 0,
    "scale": 1.0,
    "steps": 1,
    "learning_rate": 0.1,
}


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({**ASKED, "tensors": [], "scale": 10**400}, 0),
        ({**ASKED, "tensors": [], "scale": "1"}, 0),
        ({**ASKED, "tensors": [], "steps": math.inf}, 0),
        ({**ASKED, "tensors": [], "basis": math.inf}, 0),
        ({**ASKED, "tensors": [[5, "float32", [1]]]}, 4),
        ({**ASKED, "tensors": [["b:x", "float32", [1]]]}, 4),
        ({**ASKED, "tensors": [["a:x", "float32", [1]], ["b:x", "float32", [1]]]}, 8),
        ({**ASKED, "tensors": [["b:x", "float32", [-1, -4]]]}, 16),
        ({**ASKED, "tensors": [["b:x", "float32", [0, -1]]]}, 0),
    ],
)
def test_a_hostile_request_is_refused(header, size):
    with pytest.raises(WireError):
        decode_request(resealed(header, b"\0" * size))


@pytest.mark.parametrize("decode", [decode_request, decode_reply])
def test_a_header_too_deep_to_read_is_refused(decode):
    body = MAGIC + struct.pack("<I", 200_000) + b"[" * 200_000
    with pytest.raises(WireError):
        decode(body + hashlib.sha256(body).digest())


def test_a_name_may_not_occur_twice():
    header = {**GOOD, "tensors": [["b:x", "float32", [1]], ["b:x", "float32", [1]]]}
    with pytest.raises(WireError, match="twice"):
        decode_reply(resealed(header, b"\0" * 8))


def test_a_header_longer_than_the_frame_is_refused():
    body = MAGIC + struct.pack("<I", 1 << 31)
    with pytest.raises(WireError, match="claims"):
        decode_request(body + hashlib.sha256(body).digest())
    with pytest.raises(WireError):
        decode_request(b"\0" * DIGEST_BYTES)


def test_an_update_of_one_adapter_has_one_length():
    lengths = {len(encode_reply(update())) for _ in range(3)}
    assert len(lengths) == 1


def test_half_precision_is_not_sent_silently():
    adapters = request(torch.float32).adapters
    delta = Delta(basis=0, sites={s: f.b.half() for s, f in adapters.sites.items()})
    with pytest.raises(WireError, match="float16"):
        encode_reply(ClientUpdate(client="c", run="r", round=1, delta=delta, spent=None))
