"""The bytes that travel: one frame for requests and replies, the same in every runtime.

A frame is MAGIC, the length of a JSON header (4 bytes, little-endian), the header, the raw little-endian numbers of
every tensor in the header's order, and the SHA-256 of all that. Nothing is executed on the way in, no length is
believed before it is checked against the frame's own, and a frame has exactly one valid length.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.algebra.digest import named_tensors
from fedlora.errors import ShapeError, WireError
from fedlora.values import (
    Adapters,
    ClientUpdate,
    Delta,
    DpEvent,
    Factors,
    LocalWork,
    Refusal,
    RefusalReason,
    Reply,
    TrainRequest,
)

MAGIC = b"fedlora\x01"
DIGEST_BYTES = 32
MAX_HEADER_BYTES = 1 << 22
MAX_DIMENSIONS = 8
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def encode_request(request: TrainRequest) -> bytes:
    """The frame of a request."""
    adapters = request.adapters
    header = {
        "kind": "request",
        "run": request.run,
        "round": request.round,
        "basis": adapters.basis,
        "scale": adapters.scale,
        "steps": request.work.steps,
        "learning_rate": request.work.learning_rate,
    }
    return _encode(header, named_tensors(adapters))


def decode_request(frame: bytes) -> TrainRequest:
    """The request in `frame`; WireError when it is anything else."""
    header, tensors = _decode(frame, "request")
    with _Strict("request"):
        sites = sorted({name[2:] for name in tensors if name[:2] in ("a:", "b:")})
        return TrainRequest(
            run=_text(header["run"]),
            round=_whole(header["round"]),
            adapters=Adapters(
                basis=_whole(header["basis"]),
                scale=_number(header["scale"]),
                sites={site: Factors(a=tensors[f"a:{site}"], b=tensors[f"b:{site}"]) for site in sites},
                head=_named(tensors, "head:"),
            ),
            work=LocalWork(steps=_whole(header["steps"]), learning_rate=_number(header["learning_rate"])),
        )


def encode_reply(reply: Reply) -> bytes:
    """The frame of an update or a refusal."""
    header: dict[str, Any] = {"client": reply.client, "run": reply.run, "round": reply.round}
    if isinstance(reply, Refusal):
        return _encode({"kind": "refusal", **header, "reason": reply.reason.value}, {})
    spent = reply.spent
    header |= {"basis": reply.delta.basis, "spent": None}
    if spent is not None:
        header["spent"] = [spent.noise_multiplier, spent.sample_rate, spent.steps]
    tensors = {f"b:{site}": reply.delta.sites[site] for site in sorted(reply.delta.sites)}
    tensors |= {f"head:{name}": reply.delta.head[name] for name in sorted(reply.delta.head)}
    return _encode({"kind": "update", **header}, tensors)


def decode_reply(frame: bytes) -> Reply:
    """The update or refusal in `frame`; WireError when it is neither."""
    header, tensors = _decode(frame, "update", "refusal")
    with _Strict("reply"):
        client, run, round_ = _text(header["client"]), _text(header["run"]), _whole(header["round"])
        if header["kind"] == "refusal":
            return Refusal(client=client, run=run, round=round_, reason=RefusalReason(header["reason"]))
        event = None
        if header["spent"] is not None:
            noise, rate, steps = header["spent"]
            event = DpEvent(noise_multiplier=_number(noise), sample_rate=_number(rate), steps=_whole(steps))
        delta = Delta(
            basis=_whole(header["basis"]), sites=_named(tensors, "b:"), head=_named(tensors, "head:")
        )
        return ClientUpdate(client=client, run=run, round=round_, delta=delta, spent=event)


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
            raise WireError(f"malformed {self.what} header: {error!r}") from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _whole(value: object) -> int:
    if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
        raise TypeError(f"{value!r} is no whole number of 64 bits")
    return value


def _number(value: object) -> float:
    if type(value) is not float and type(value) is not int:
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _encode(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    table = [
        [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        for name, tensor in tensors.items()
    ]
    text = json.dumps({**header, "tensors": table}, sort_keys=True, separators=(",", ":")).encode()
    blobs = [
        tensor.detach().cpu().contiguous().numpy().astype(_wire_dtype(tensor), copy=False).tobytes()
        for tensor in tensors.values()
    ]
    body = b"".join([MAGIC, struct.pack("<I", len(text)), text, *blobs])
    return body + hashlib.sha256(body).digest()


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
            raise WireError(f"a {header['kind']!r} where one of {kinds} belongs")
        return header, _tensors(header.pop("tensors"), frame[start + length : -DIGEST_BYTES])


def _tensors(table: list[Any], data: bytes) -> dict[str, Tensor]:
    sizes = [_elements(shape) * _DTYPES[dtype].itemsize for _, dtype, shape in table]
    if sum(sizes) != len(data):
        raise WireError(f"tensor table asks for {sum(sizes)} bytes, the frame holds {len(data)}")
    tensors: dict[str, Tensor] = {}
    offset = 0
    for (name, dtype, shape), size in zip(table, sizes, strict=True):
        if _text(name) in tensors:
            raise WireError(f"tensor {name!r} occurs twice")
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
