"""What a rogue sends: an honest frame taken apart, changed and sealed with a true digest, or something else."""

import gzip
import hashlib
import io
import json
import os
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fedlora.transport.flower_client import FRAME, frame_content, frame_of
from fedlora.transport.wire import DIGEST_BYTES, HEADER_ROOM, MAGIC, decode_reply, encode_reply
from fedlora.values import ClientUpdate
from tests.faults.grid import Fate

START = len(MAGIC) + 4
"""Where the header of a frame begins."""

Change = Callable[[bytes], bytes]
"""An honest frame -> what arrives instead of it."""


def sealed(text: bytes, numbers: bytes = b"") -> bytes:
    """A frame with this header and a true digest."""
    body = MAGIC + struct.pack("<I", len(text)) + text + numbers
    return body + hashlib.sha256(body).digest()


def parts(frame: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the numbers of an honest frame."""
    (length,) = struct.unpack("<I", frame[len(MAGIC) : START])
    return json.loads(frame[START : START + length]), frame[START + length : -DIGEST_BYTES]


def written(header: Mapping[str, Any]) -> bytes:
    """A header as an honest writer would fill it up, if it could hold such fields."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    names = json.dumps([header.get(n, "") for n in ("client", "run", "tensors")], separators=(",", ":"))
    return text.ljust(len(names) + HEADER_ROOM).encode()


def with_header(change: Callable[[dict[str, Any]], object]) -> Change:
    """The header is changed in place."""

    def changed(frame: bytes) -> bytes:
        header, numbers = parts(frame)
        change(header)
        return sealed(written(header), numbers)

    return changed


def says(**words: Any) -> Change:
    """Its own update, with other words about itself."""
    return with_update(lambda update: replace(update, **words))


def spent(**words: Any) -> Change:
    """Its own update, with other words about what it spent."""
    return with_update(lambda update: replace(update, spent=(replace(update.spent[0], **words),)))


def moved(change: Callable[[Tensor], Tensor], **words: Any) -> Change:
    """Its own update, with every tensor changed; words: as of `spent`."""

    def changed(update: ClientUpdate) -> ClientUpdate:
        sites = {site: change(tensor) for site, tensor in update.delta.sites.items()}
        head = {name: change(tensor) for name, tensor in update.delta.head.items()}
        events = (replace(update.spent[0], **words),)
        return replace(update, delta=replace(update.delta, sites=sites, head=head), spent=events)

    return with_update(changed)


def with_update(change: Callable[[ClientUpdate], ClientUpdate]) -> Change:
    """Another update, written as an honest one."""

    def changed(frame: bytes) -> bytes:
        update = decode_reply(frame)
        assert isinstance(update, ClientUpdate)
        return encode_reply(change(update))

    return changed


def flipped(at: Callable[[int], int]) -> Change:
    """One bit is another, at that place in a frame of that many bytes."""

    def changed(frame: bytes) -> bytes:
        place = at(len(frame))
        return frame[:place] + bytes([frame[place] ^ 4]) + frame[place + 1 :]

    return changed


def sends(change: Change) -> Fate:
    """The changed frame arrives."""
    return lambda asked, reply: [Message(frame_content(change(frame_of(reply.content))), reply_to=asked)]


def arrives(content: Callable[[bytes], RecordDict]) -> Fate:
    """These records arrive, made of the honest frame."""
    return lambda asked, reply: [Message(content(frame_of(reply.content)), reply_to=asked)]


def array(data: bytes, stype: str = FRAME, dtype: str = "uint8") -> Array:
    """An array of Flower with these bytes, whatever they are."""
    return Array(dtype=dtype, shape=(len(data),), stype=stype, data=data)


def records(**arrays: Array) -> RecordDict:
    """A message of arrays in our record."""
    return RecordDict({"fedlora": ArrayRecord(arrays)})


def _last_tensor(header: dict[str, Any]) -> list[Any]:
    return header["tensors"][-1]


def _named(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: _last_tensor(header).__setitem__(0, name)


def _typed(dtype: object) -> Callable[[dict[str, Any]], None]:
    return lambda header: _last_tensor(header).__setitem__(1, dtype)


def _first_number(value: float) -> Change:
    """One number of the whole update is another."""

    def changed(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return moved(changed)


def _with_sites(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Change:
    return with_update(
        lambda update: replace(update, delta=replace(update.delta, sites=change(dict(update.delta.sites))))
    )


def _first(change: Callable[[Tensor], Tensor]) -> Change:
    """The first site's tensor is changed."""
    return _with_sites(lambda sites: {**sites, min(sites): change(sites[min(sites)])})


DAMAGED: dict[str, Change] = {
    "a bit of the header": flipped(lambda size: START + 5),
    "a bit of the header's length": flipped(lambda size: len(MAGIC)),
    "a bit of the version": flipped(lambda size: len(MAGIC) - 1),
    "a bit of the numbers": flipped(lambda size: size - DIGEST_BYTES - 6),
    "a bit of the digest": flipped(lambda size: size - 1),
    "nothing": lambda frame: b"",
    "all but a byte": lambda frame: frame[:-1],
    "half": lambda frame: frame[: len(frame) // 2],
    "a byte behind": lambda frame: frame + b"\0",
    "itself twice": lambda frame: frame + frame,
}

UNREADABLE: dict[str, Change] = {
    "a tensor twice": with_header(
        lambda header: header["tensors"].append([_last_tensor(header)[0], "float32", [0]])
    ),
    "complex numbers": with_header(_typed("complex64")),
    "text": with_header(_typed("str")),
    "objects": with_header(_typed("object")),
    "half precision": with_header(_typed("float16")),
    "a shape of more": with_header(lambda header: _last_tensor(header).__setitem__(2, [1 << 18, 1 << 18])),
    "a reason that there is not": with_header(
        lambda header: header.update(kind="refusal", reason="boredom", tensors=[])
    ),
    "another client's name": says(client="site-1"),
    "a field that there is not": with_header(lambda header: header.update(seconds=1.5)),
    "a name of no known kind": with_header(_named("exp_avg:x")),
}
"""Frames with a true digest that no version of ours writes."""

UNFIT: dict[str, tuple[Change, str]] = {
    "a number that is none": (_first_number(torch.nan), "unsound"),
    "an infinite number": (_first_number(-torch.inf), "unsound"),
    "a shape that fits by broadcasting": (
        _first(lambda tensor: tensor[:1]),
        "has shape (1, 2), need (32, 2)",
    ),
    "a turned tensor": (_first(lambda tensor: tensor.T.contiguous()), "has shape (2, 32), need (32, 2)"),
    "no dimension": (_first(lambda tensor: tensor.sum().reshape(())), "has shape ()"),
    "twice the precision": (moved(lambda tensor: tensor.double()), "is torch.float64, need torch.float32"),
    "a tensor less": (
        _with_sites(lambda sites: {name: sites[name] for name in sorted(sites)[1:]}),
        "1 tensors missing [",
    ),
    "a tensor more": (
        _with_sites(lambda sites: sites | {"z": torch.full((1,), 1e-3)}),
        "0 tensors missing [], 1 unknown",
    ),
    "a thousand times the length": (moved(lambda tensor: 1000 * tensor), "unsound"),
    "less noise": (moved(lambda tensor: 0.3 * tensor), "unsound"),
}
"""Whole frames whose update cannot count, and the code or a part of the reason."""


class Mark:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def executables(path: Path) -> dict[str, bytes]:
    """Bytes that make a directory at `path` where somebody takes them for what they are."""
    saved, packed = io.BytesIO(), io.BytesIO()
    torch.save(Mark(path), saved)
    np.save(packed, np.array([Mark(path)], dtype=object), allow_pickle=True)
    return {"pickle": pickle.dumps(Mark(path)), "numpy": packed.getvalue(), "torch": saved.getvalue()}


def as_messages(name: str, data: bytes) -> dict[str, Callable[[bytes], RecordDict]]:
    """Such bytes as Flower can carry them."""
    return {
        f"{name} as frame": lambda frame: records(frame=array(data)),
        f"{name} as numpy's": lambda frame: records(frame=array(data, "numpy.ndarray", "object")),
        f"{name} in a header": lambda frame: frame_content(
            sealed(written({**parts(frame)[0], "tensors": [["b:x", "object", [1]]]}), data)
        ),
        f"{name} as config": lambda frame: RecordDict({"fedlora": ConfigRecord({"frame": data})}),
    }


def _in_field(text: str) -> bytes:
    return sealed(f'{{"kind":"update","round":{text}}}'.encode())


GREEDY: dict[str, Callable[[], bytes]] = {
    "a shape of 2^36 numbers": lambda: sealed(
        b'{"kind":"update","tensors":[["b:x","float32",[262144,262144]]]}'
    ),
    "a header of 2 GiB": lambda: MAGIC + struct.pack("<I", 1 << 31) + bytes(200),
    "a header of 2 GiB, sealed": lambda: _longer_than_itself(1 << 31),
    "brackets": lambda: _in_field("[" * 4_000_000),
    "braces": lambda: _in_field('{"":' * 1_000_000),
    "a number of 4 million digits": lambda: _in_field("1" * 4_000_000),
    "numbers of 4300 digits": lambda: _in_field("[" + ",".join(["1" * 4300] * 200) + "]"),
    "numbers beyond all": lambda: _in_field("[" + ",".join(["1e400"] * 100_000) + "]"),
    "what unpacks to 64 MiB": lambda: gzip.compress(bytes(64 << 20)),
    "the same, sealed": lambda: sealed(gzip.compress(bytes(64 << 20))),
}
"""Small frames that ask for much."""


def _longer_than_itself(length: int) -> bytes:
    body = MAGIC + struct.pack("<I", length)
    return body + hashlib.sha256(body).digest()


def renamed(name: str) -> Callable[[ClientUpdate], ClientUpdate]:
    """The first site has another name."""

    def changed(update: ClientUpdate) -> ClientUpdate:
        sites = {
            name if site == min(update.delta.sites) else site: t for site, t in update.delta.sites.items()
        }
        return replace(update, delta=replace(update.delta, sites=sites))

    return changed


_PLAIN = {"kind": "update", "client": "c", "run": "r", "round": 1, "basis": 0, "accuracy": None}
_PLAIN |= {"spent": [], "ledger": None}

MANY: dict[str, Callable[[], bytes]] = {
    "lists": lambda: _in_field("[" + ",".join(["[]"] * 1_300_000) + "]"),
    "objects": lambda: _in_field("[" + ",".join(["{}"] * 1_300_000) + "]"),
    "tensors": lambda: sealed(
        written({**_PLAIN, "tensors": [[f"b:{number:06}", "float32", [0]] for number in range(60_000)]})
    ),
}


def large(what: str, size: int) -> bytes:
    """A frame with about so many bytes of numbers."""
    if what == "junk":
        return bytes(size)
    whole = sealed(written({**_PLAIN, "tensors": [["b:x", "float32", [size // 4]]]}), bytes(size))
    return whole if what == "no such tensor" else whole[:-1] + bytes([whole[-1] ^ 1])
