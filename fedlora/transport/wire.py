"""The bytes that travel: one frame for requests and replies, the same in every runtime.

A frame is MAGIC, the length of a JSON header (4 bytes, little-endian), the header, the raw little-endian numbers of
every tensor in the header's order, and the SHA-256 of all that. Nothing is executed on the way in, no length is
believed before it is checked against the frame's own, and every message has exactly one frame.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.algebra.digest import adapters_of, named_tensors, under
from fedlora.errors import ShapeError, WireError
from fedlora.transport import FRAME_VERSION, QUOTED
from fedlora.values import (
    ClientUpdate,
    Delta,
    DpEvent,
    LocalWork,
    Refusal,
    RefusalReason,
    Reply,
    Side,
    TrainRequest,
    Witness,
)

MAGIC = b"fedlora" + bytes([FRAME_VERSION])
DIGEST_BYTES = 32
MAX_HEADER_BYTES = 1 << 19
"""Room for some thousand tensors; as JSON it takes forty times as much memory to read."""
MAX_DIMENSIONS = 8
HEADER_ROOM = 1024
"""Bytes of a header for all but names and shapes. What numbers leave of it is blank, so that they do not show in a
frame's length: an update of given adapters has one length, in every round."""
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def encode_request(request: TrainRequest) -> bytes:
    """The frame of a request."""
    adapters = request.adapters
    header = {
        "kind": "request",
        "run": request.run,
        "base_model": request.base_model,
        "code": request.code,
        "round": request.round,
        "basis": adapters.basis,
        "scale": adapters.scale,
        "steps": request.work.steps,
        "learning_rate": request.work.learning_rate,
    }
    if request.work.proximal:  # without it, a frame is what it was before there was such a thing
        header["proximal"] = request.work.proximal
    if request.work.precondition != "none":
        header["precondition"] = request.work.precondition
    if request.work.side != "b":
        header["side"] = request.work.side
    if request.work.own_b:
        header["own_b"] = True
    return _encode(header, named_tensors(adapters))


def decode_request(frame: bytes) -> TrainRequest:
    """The request in `frame`; WireError when it is anything else."""
    header, tensors = _decode(frame, "request")
    with _Strict("request"):
        request = TrainRequest(
            run=_text(header["run"]),
            base_model=_text(header["base_model"]),
            code=_text(header["code"]),
            round=_whole(header["round"]),
            adapters=adapters_of(tensors, basis=_whole(header["basis"]), scale=_number(header["scale"])),
            work=LocalWork(
                steps=_whole(header["steps"]),
                learning_rate=_number(header["learning_rate"]),
                proximal=_number(header.get("proximal", 0.0)),
                precondition=_text(header.get("precondition", "none")),
                side=_side(header.get("side", "b")),
                own_b=_yes_or_no(header.get("own_b", False)),
            ),
        )
        _require_the_one_way(frame, encode_request(request))
        return request


def encode_reply(reply: Reply) -> bytes:
    """The frame of an update or a refusal."""
    header: dict[str, Any] = {"client": reply.client, "run": reply.run, "round": reply.round}
    if isinstance(reply, Refusal):
        return _encode({"kind": "refusal", **header, "reason": reply.reason.value}, {})
    header |= {"basis": reply.delta.basis, "spent": [astuple(event) for event in reply.spent]}
    header |= {"ledger": reply.ledger and astuple(reply.ledger), "accuracy": reply.accuracy}
    tensors = {f"b:{site}": reply.delta.sites[site] for site in sorted(reply.delta.sites)}
    tensors |= {f"head:{name}": reply.delta.head[name] for name in sorted(reply.delta.head)}
    tensors |= {f"a:{site}": reply.delta.a[site] for site in sorted(reply.delta.a)}
    return _encode({"kind": "update", **header}, tensors)


def decode_reply(frame: bytes) -> Reply:
    """The update or refusal in `frame`; WireError when it is neither."""
    header, tensors = _decode(frame, "update", "refusal")
    with _Strict("reply"):
        reply = _refusal(header) if header["kind"] == "refusal" else _update(header, tensors)
        _require_the_one_way(frame, encode_reply(reply))
        return reply


def _refusal(header: dict[str, Any]) -> Refusal:
    return Refusal(
        client=_text(header["client"]),
        run=_text(header["run"]),
        round=_whole(header["round"]),
        reason=RefusalReason(header["reason"]),
    )


def _update(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> ClientUpdate:
    basis, sites, head = _whole(header["basis"]), under(tensors, "b:"), under(tensors, "head:")
    a = under(tensors, "a:")
    return ClientUpdate(
        client=_text(header["client"]),
        run=_text(header["run"]),
        round=_whole(header["round"]),
        delta=Delta(basis=basis, sites=sites, head=head, a=a),
        spent=tuple(event_of(words) for words in _list(header["spent"])),
        ledger=None if header["ledger"] is None else _witness(header["ledger"]),
        accuracy=None if header["accuracy"] is None else _number(header["accuracy"]),
    )


def _require_the_one_way(frame: bytes, written: bytes) -> None:
    """Nothing is in a frame beside what was read from it: no other field, tensor, order or filling."""
    if frame != written:
        raise WireError(f"{len(frame)} bytes that are not written as this version writes them")


def event_of(words: object) -> DpEvent:
    """The event in a list of its five numbers; what is no such list raises TypeError or ValueError."""
    noise, rate, steps, expected, most = _list(words)
    return DpEvent(
        noise_multiplier=_number(noise),
        sample_rate=_number(rate),
        steps=_whole(steps),
        expected_batch=None if expected is None else _number(expected),
        max_draw=None if most is None else _whole(most),
    )


def _witness(words: object) -> Witness:
    seq, head = _list(words)
    if len(_text(head)) > 64:
        raise ValueError("no digest has so many digits")
    return Witness(seq=_whole(seq), head=_text(head))


_MALFORMED = (
    *(KeyError, IndexError, TypeError, AttributeError, ValueError),
    *(OverflowError, RuntimeError, ShapeError),  # RecursionError is a RuntimeError, and so are torch's own
)


class _Strict:
    """Turns whatever a missing, mistyped or senseless header field raises into a WireError."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _MALFORMED):
            raise WireError(f"malformed {self.what} header: {repr(error)[:QUOTED]}") from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    value.encode()  # half a surrogate pair is no text that anybody could pass on
    return value


def _side(value: object) -> Side:
    sides: tuple[Side, ...] = ("b", "a", "both")
    for side in sides:
        if value == side:
            return side
    raise ValueError(f"{value!r} is no side; there are {sides}")


def _yes_or_no(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return value


def _whole(value: object) -> int:
    if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
        raise TypeError(f"{value!r} is no whole number of 64 bits")
    return value


def _number(value: object) -> float:
    if type(value) is not float and type(value) is not int:
        raise TypeError(f"{value!r} is no number")
    if not math.isfinite(value):
        raise ValueError(f"{value!r} is not finite")
    return float(value)


def _encode(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    table = [
        [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        for name, tensor in tensors.items()
    ]
    text = _header({**header, "tensors": table})
    blobs = [
        tensor.detach().cpu().contiguous().numpy().astype(_wire_dtype(tensor), copy=False).tobytes()
        for tensor in tensors.values()
    ]
    body = b"".join([MAGIC, struct.pack("<I", len(text)), text, *blobs])
    return body + hashlib.sha256(body).digest()


def _header(fields: dict[str, Any]) -> bytes:
    """The one way to write these fields, filled up with blanks."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    names = json.dumps([fields.get(name, "") for name in ("client", "run", "tensors")], separators=(",", ":"))
    length = len(names) + HEADER_ROOM
    if len(text) > length:
        raise WireError(f"header of {len(text)} bytes, {length} is the most for its names and shapes")
    return text.ljust(length)


def _wire_dtype(tensor: Tensor) -> str:
    if tensor.dtype not in _DTYPES.values():
        raise WireError(f"cannot send {tensor.dtype}; updates travel as float32 or float64")
    return "<f8" if tensor.dtype == torch.float64 else "<f4"


def _decode(frame: bytes, *kinds: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    start = len(MAGIC) + 4
    if len(frame) < start + DIGEST_BYTES or frame[: len(MAGIC)] != MAGIC:
        raise WireError(f"{len(frame)} bytes that do not begin like a fedlora frame of this version")
    if hashlib.sha256(frame[:-DIGEST_BYTES]).digest() != frame[-DIGEST_BYTES:]:
        raise WireError("frame digest differs: bytes were lost or changed on the way; send them again")
    (length,) = struct.unpack("<I", frame[len(MAGIC) : start])
    if length > min(MAX_HEADER_BYTES, len(frame) - start - DIGEST_BYTES):
        raise WireError(f"header claims {length} bytes in a frame of {len(frame)}")
    with _Strict("frame"):
        header = json.loads(frame[start : start + length])
        if header["kind"] not in kinds:
            raise WireError(f"a {str(header['kind'])[:QUOTED]!r} where one of {kinds} belongs")
        return header, _tensors(header["tensors"], frame[start + length : -DIGEST_BYTES])


def _tensors(table: list[Any], data: bytes) -> dict[str, Tensor]:
    sizes = [_elements(shape) * _DTYPES[dtype].itemsize for _, dtype, shape in table]
    if sum(sizes) != len(data):
        raise WireError(f"tensor table asks for {sum(sizes)} bytes, the frame holds {len(data)}")
    tensors: dict[str, Tensor] = {}
    offset = 0
    for (name, dtype, shape), size in zip(table, sizes, strict=True):
        if _text(name) in tensors:
            raise WireError(f"tensor {name[:QUOTED]!r} occurs twice")
        numbers = np.frombuffer(
            data, dtype="<f8" if dtype == "float64" else "<f4", count=math.prod(shape), offset=offset
        )
        tensors[name] = torch.from_numpy(numbers.astype(numbers.dtype.newbyteorder("="))).reshape(shape)
        offset += size
    return tensors


def _elements(shape: list[Any]) -> int:
    if len(shape) > MAX_DIMENSIONS or any(_whole(size) < 0 for size in shape):
        raise ValueError(f"{shape!r} is no shape of at most {MAX_DIMENSIONS} dimensions")
    _whole(math.prod(max(size, 1) for size in shape))  # what an empty tensor's strides have to hold
    return math.prod(shape)
