"""A frame says exactly what was sent, or is refused."""

import hashlib
import json
import math
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import WireError
from fedlora.training.client import request_digest
from fedlora.transport.wire import (
    DIGEST_BYTES,
    HEADER_ROOM,
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
    Witness,
)


def request(dtype: torch.dtype = torch.float32) -> TrainRequest:
    generator = torch.Generator().manual_seed(3)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    sites = {name: Factors(a=some(2, 5), b=some(3, 2)) for name in ("layer.0.query", "layer.0.value")}
    head = {"classifier.weight": some(4, 3), "classifier.bias": some(4)}
    adapters = Adapters(basis=3, scale=0.5, sites=sites, head=head)
    work = LocalWork(steps=4, learning_rate=0.1)
    return TrainRequest(
        run="a run", base_model="b" * 64, code="c" * 64, round=12, adapters=adapters, work=work
    )


def update(**changes: object) -> ClientUpdate:
    adapters = request().adapters
    delta = Delta(basis=3, sites={site: f.b for site, f in adapters.sites.items()}, head=adapters.head)
    steps = DpEvent(
        noise_multiplier=0.7312345678901234, sample_rate=0.1, steps=4, expected_batch=64.0, max_draw=216
    )
    told = DpEvent(noise_multiplier=50.0, sample_rate=1.0, steps=1)
    whole = ClientUpdate(
        client="clinic ü",
        run="a run",
        round=12,
        delta=delta,
        spent=(steps, told),
        ledger=Witness(seq=17, head="d" * 64),
        accuracy=0.7312345678901234,
    )
    return replace(whole, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_request_survives_the_journey_bit_for_bit(dtype):
    sent = request(dtype)
    got = decode_request(encode_request(sent))
    assert (got.run, got.round, got.work) == (sent.run, sent.round, sent.work)
    assert (got.base_model, got.code) == (sent.base_model, sent.code)
    assert (got.adapters.basis, got.adapters.scale) == (3, 0.5)
    for site, factors in sent.adapters.sites.items():
        assert torch.equal(got.adapters.sites[site].a, factors.a)
        assert torch.equal(got.adapters.sites[site].b, factors.b)
    assert all(torch.equal(got.adapters.head[name], value) for name, value in sent.adapters.head.items())


def test_left_frames_and_what_else_a_step_does_survive_the_journey_and_are_absent_where_there_are_none():
    plain = request()
    sites = {
        site: replace(f, b=f.b[:2], left=torch.eye(3)[:, :2]) for site, f in plain.adapters.sites.items()
    }
    work = replace(plain.work, proximal=0.25, precondition="lora-pro")
    cores = replace(plain, adapters=replace(plain.adapters, sites=sites), work=work)
    back = decode_request(encode_request(cores))
    assert back.work == cores.work
    assert all(torch.equal(back.adapters.sites[site].left, f.left) for site, f in sites.items())
    diagonal = {site: replace(f, b=f.b[:1]) for site, f in sites.items()}
    back = decode_request(encode_request(replace(plain, adapters=replace(plain.adapters, sites=diagonal))))
    assert all(torch.equal(back.adapters.sites[site].b, f.b) for site, f in diagonal.items())
    frame = encode_request(plain)
    assert b"left:" not in frame and b"proximal" not in frame and b"precondition" not in frame


@pytest.mark.parametrize("side", ["a", "both"])
def test_rests_and_the_side_survive_the_journey_and_are_absent_where_there_are_none(side):
    plain = request()
    sites = {site: replace(f, rest=f.b @ f.a) for site, f in plain.adapters.sites.items()}
    work = replace(plain.work, side=side)
    sent = replace(plain, adapters=replace(plain.adapters, sites=sites), work=work)
    back = decode_request(encode_request(sent))
    assert back.work == work
    assert all(torch.equal(back.adapters.sites[site].rest, f.rest) for site, f in sites.items())
    frame = encode_request(plain)
    assert b"rest:" not in frame and b"side" not in frame
    odd = encode_request(sent).replace(f'"side":"{side}"'.encode(), b'"side":"' + b"x" * len(side) + b'"')
    whole = odd[:-DIGEST_BYTES] + hashlib.sha256(odd[:-DIGEST_BYTES]).digest()
    with pytest.raises(WireError, match="is no side"):
        decode_request(whole)


def test_that_each_client_has_its_own_b_survives_the_journey_and_is_absent_where_none_has():
    plain = request()
    work = replace(plain.work, side="both", own_b=True)
    sent = encode_request(replace(plain, work=work))
    assert decode_request(sent).work == work and b"own_b" not in encode_request(plain)
    for told, fault in ((b'"no!"', "neither true nor false"), (b"false", "not written as")):
        odd = sent.replace(b'"own_b":true', b'"own_b":' + told).replace(b"}  ", b"} ", 1)  # as long as before
        whole = odd[:-DIGEST_BYTES] + hashlib.sha256(odd[:-DIGEST_BYTES]).digest()
        with pytest.raises(WireError, match=fault):
            decode_request(whole)


@pytest.mark.parametrize(
    ("side", "frame", "digest"),
    [
        ("b", "3d87210d4470c6eb", "e27ecf59a7457f5e"),
        ("both", "900ca902daf0b078", "1542b88e88b688c6"),
    ],
)
def test_frames_and_digests_of_requests_are_what_they_were(side, frame, digest):
    """As nodes and ledgers of earlier versions have them: written down from the commit before `own_b`."""
    sites = {"x": Factors(a=torch.arange(10.0).reshape(2, 5), b=torch.arange(6.0).reshape(3, 2))}
    adapters = Adapters(basis=1, scale=0.5, sites=sites)
    work = LocalWork(steps=4, learning_rate=0.1, side=side)
    asked = TrainRequest(run="r", base_model="b", code="c", round=2, adapters=adapters, work=work)
    assert hashlib.sha256(encode_request(asked)).hexdigest().startswith(frame)
    assert request_digest(asked).startswith(digest)


@pytest.mark.parametrize("side", ["a", "both"])
def test_changes_of_a_survive_the_journey(side):
    one = update()
    a = {site: torch.randn(2, 5) for site in one.delta.sites}
    delta = replace(one.delta, a=a, sites={} if side == "a" else one.delta.sites)
    back = decode_reply(encode_reply(replace(one, delta=delta))).delta
    assert back.sites.keys() == delta.sites.keys() and back.head.keys() == delta.head.keys()
    assert all(torch.equal(back.a[site], change) for site, change in a.items())
    assert b'"a:' not in encode_reply(one)


def test_an_update_survives_the_journey_bit_for_bit():
    got = decode_reply(encode_reply(update()))
    assert isinstance(got, ClientUpdate)
    assert (got.client, got.run, got.round, got.spent) == ("clinic ü", "a run", 12, update().spent)
    assert (got.ledger, got.accuracy) == (update().ledger, update().accuracy)
    assert got.delta.basis == 3
    assert all(torch.equal(got.delta.sites[s], v) for s, v in update().delta.sites.items())
    assert encode_reply(got) == encode_reply(update())


@pytest.mark.parametrize("reason", list(RefusalReason))
def test_a_refusal_carries_a_code_and_nothing_else(reason):
    refusal = Refusal(client="c", run="r", round=1, reason=reason)
    assert decode_reply(encode_reply(refusal)) == refusal


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
@pytest.mark.fault("F26")
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


def written(header: object) -> bytes:
    """As `_header` writes it, of any length and content."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    fields = header if isinstance(header, dict) else {}
    names = [fields.get(name, "") for name in ("client", "run", "tensors")]
    return text.ljust(len(json.dumps(names, separators=(",", ":"))) + HEADER_ROOM).encode()


def resealed(header: dict, data: bytes = b"") -> bytes:
    """A frame with a true digest around a header of our choosing: what a hostile peer would send."""
    text = written(header)
    body = MAGIC + struct.pack("<I", len(text)) + text + data
    return body + hashlib.sha256(body).digest()


EVENT = [1.0, 0.1, 2, None, None]
GOOD = {
    "kind": "update",
    "client": "c",
    "run": "r",
    "round": 1,
    "basis": 0,
    "spent": [EVENT],
    "ledger": [1, "a"],
    "accuracy": None,
}


def test_the_hostile_headers_below_are_refused_for_what_is_wrong_in_them():
    assert isinstance(decode_reply(resealed({**GOOD, "tensors": []})), ClientUpdate)
    assert isinstance(decode_request(resealed({**ASKED, "tensors": []})), TrainRequest)


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
        {**GOOD, "tensors": [], "spent": [[10**400, 0.1, 2, None, None]]},
        {**GOOD, "tensors": [], "spent": [[1.0, 0.1, math.inf, None, None]]},
        {**GOOD, "tensors": [], "spent": [[math.nan, 0.1, 2, None, None]]},
        {**GOOD, "tensors": [], "spent": [[1.0, 0.1, 2]]},
        {**GOOD, "tensors": [], "spent": EVENT},
        {**GOOD, "tensors": [], "spent": None},
        {**GOOD, "tensors": [], "spent": "111"},
        {**GOOD, "tensors": [], "spent": 0},
        {**GOOD, "tensors": [], "spent": ["much"]},
        {**GOOD, "tensors": [], "spent": [EVENT] * 100},
        {**GOOD, "tensors": [], "ledger": [1]},
        {**GOOD, "tensors": [], "ledger": ["1", "a"]},
        {**GOOD, "tensors": [], "ledger": [1, 2]},
        {**GOOD, "tensors": [], "ledger": "1a"},
        {**GOOD, "tensors": [], "accuracy": math.nan},
        {**GOOD, "tensors": [], "accuracy": "high"},
        {key: value for key, value in GOOD.items() if key != "accuracy"} | {"tensors": []},
        {**GOOD, "tensors": [], "seconds": 1.5},
        {**GOOD, "tensors": [["exp_avg:x", "float32", [0]]]},
        {**GOOD, "tensors": [["head:x", "float32", [0]], ["b:x", "float32", [0]]]},
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
    "base_model": "b",
    "code": "c",
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
        ({**ASKED, "tensors": [], "code": None}, 0),
        ({key: value for key, value in ASKED.items() if key != "base_model"} | {"tensors": []}, 0),
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


@pytest.mark.fault("F27")
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


LITTLE = DpEvent(noise_multiplier=1.0, sample_rate=1.0, steps=1)
MUCH = DpEvent(
    noise_multiplier=-1.2345678901234567e-300,
    sample_rate=1.2345678901234567e-300,
    steps=-(1 << 63),
    expected_batch=1.2345678901234567e-300,
    max_draw=-(1 << 63),
)


@pytest.mark.parametrize(
    "changes",
    [
        {"round": 1},
        {"round": (1 << 63) - 1},
        {"ledger": Witness(seq=1, head="0" * 64)},
        {"ledger": Witness(seq=(1 << 63) - 1, head="0" * 64)},
        {"ledger": None},
        {"accuracy": None},
        {"accuracy": 0.0},
        {"accuracy": -1.2345678901234567e-300},
        {"spent": ()},
        {"spent": (LITTLE,)},
        {"spent": (MUCH, MUCH)},
        {
            "round": 1 << 62,
            "ledger": Witness(seq=1 << 62, head="0" * 64),
            "spent": (MUCH, MUCH),
            "accuracy": 1e-300,
        },
    ],
)
def test_an_update_of_given_adapters_has_one_length_whatever_its_numbers_are(changes):
    frame = encode_reply(update(**changes))
    assert len(frame) == len(encode_reply(update()))
    assert encode_reply(decode_reply(frame)) == frame


def test_a_refusal_of_any_reason_in_any_round_has_one_length():
    refusals = [
        Refusal(client="c", run="r", round=n, reason=why) for why in RefusalReason for n in (1, 1 << 60)
    ]
    assert len({len(encode_reply(refusal)) for refusal in refusals}) == 1


def test_a_refusal_has_no_field_for_words():
    frame = encode_reply(Refusal(client="c", run="r", round=1, reason=RefusalReason.FAILED))
    (length,) = struct.unpack("<I", frame[len(MAGIC) : len(MAGIC) + 4])
    header = json.loads(frame[len(MAGIC) + 4 :][:length])
    assert header == {
        "kind": "refusal",
        "client": "c",
        "run": "r",
        "round": 1,
        "reason": "failed",
        "tensors": [],
    }


def _framed(text: bytes) -> bytes:
    body = MAGIC + struct.pack("<I", len(text)) + text
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    "repad",
    [
        lambda text: text + b" ",
        lambda text: text[:-1],
        lambda text: text.rstrip(),
        lambda text: b" " + text[:-1],
        lambda text: text[:-1] + b"\n",
        lambda text: text[:-1] + b"\t",
        lambda text: text.replace(b",", b", ", 1)[:-1],
        lambda text: text.replace(b'"round":1', b'"round":1,"round":1').rstrip().ljust(len(text)),
        lambda text: text.replace(b"0.1", b"0.10")[:-1],
    ],
)
def test_a_header_filled_up_in_another_way_is_refused(repad):
    text = written({**GOOD, "tensors": []})
    assert isinstance(decode_reply(_framed(text)), ClientUpdate)
    assert repad(text) != text
    with pytest.raises(WireError, match="not written as this version writes them"):
        decode_reply(_framed(repad(text)))


def test_what_does_not_fit_beside_names_and_shapes_is_not_sent():
    with pytest.raises(WireError, match="is the most for its names and shapes"):
        encode_reply(update(spent=(LITTLE,) * 100))


def test_half_precision_is_not_sent_silently():
    adapters = request(torch.float32).adapters
    delta = Delta(basis=0, sites={s: f.b.half() for s, f in adapters.sites.items()})
    with pytest.raises(WireError, match="float16"):
        encode_reply(ClientUpdate(client="c", run="r", round=1, delta=delta, spent=()))
