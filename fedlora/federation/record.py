"""One remembered update as bytes of a fixed length: exact, in bfloat16, or as whole numbers of eight bits.

The tensors stand one after another, sites before head, each in sorted order, little-endian. `int8` puts the binary
exponent of each tensor's unit before them, 2 bytes a tensor. What was rounded once is rounded to itself, so whoever
sums what is kept sums exactly what will be recalled.

Bytes of n numbers in t tensors: float32 4 n (8 n in a float64 run), bfloat16 2 n, int8 n + 2 t.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedlora.errors import ShapeError
from fedlora.values import FRAME, Delta

Kept: TypeAlias = Literal["float32", "bfloat16", "int8"]
"""How numbers are kept. float32 stands for the run's own precision, whichever that is: nothing is rounded."""

EXPONENT = np.dtype("<i2")
LARGEST_WHOLE = 127
"""Of a signed byte, -128 left out: what is kept of -x is minus what is kept of x."""
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One tensor of every record: part of a delta (sites or head), name there, shape, and dtype in the run."""

    part: str
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """How every update of a run becomes a record, and comes back."""

    kept: Kept
    fields: tuple[Field, ...]

    @classmethod
    def of(cls, delta: Delta, kept: Kept) -> "Codec":
        """For this delta, and every other one of its run."""
        return cls(kept=kept, fields=_fields(delta))

    @classmethod
    def read(cls, text: str) -> "Codec":
        """What `text` wrote. ValueError, KeyError or TypeError: it is something else."""
        words = json.loads(text)
        fields = tuple(Field(**{**field, "shape": tuple(field["shape"])}) for field in words["fields"])
        return cls(kept=words["kept"], fields=fields)

    @property
    def text(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def size(self) -> int:
        """Bytes of a record."""
        exponents = EXPONENT.itemsize * len(self.fields) if self.kept == "int8" else 0
        return exponents + sum(self._bytes(field) for field in self.fields)

    def encode(self, delta: Delta) -> bytes:
        """The record of a delta in the frame, `size` bytes.

        Raises:
            BasisError: the delta is in another basis.
            ShapeError: its names, shapes or dtypes are not those of the run.
        """
        delta.require_basis(FRAME)
        if (got := _fields(delta)) != self.fields:
            strange = sorted(set(got) ^ set(self.fields), key=str)[:2]
            raise ShapeError(f"an update with other tensors than the run's cannot be remembered: {strange}")
        tensors = [getattr(delta, field.part)[field.name] for field in self.fields]
        if self.kept != "int8":
            return b"".join(
                _written(tensor, self._stored(f)) for f, tensor in zip(self.fields, tensors, strict=True)
            )
        exponents = [_exponent(tensor) for tensor in tensors]
        numbers = [
            _written(_whole(tensor, e), torch.int8) for tensor, e in zip(tensors, exponents, strict=True)
        ]
        return b"".join([np.array(exponents, dtype=EXPONENT).tobytes(), *numbers])

    def decode(self, record: bytes) -> Delta:
        """The delta of a record, in the run's own dtypes.

        Raises:
            ShapeError: the record is not `size` bytes long.
        """
        if len(record) != self.size:
            raise ShapeError(f"a record of {len(record)} bytes, need {self.size}")
        exponents, start = [0] * len(self.fields), 0
        if self.kept == "int8":
            exponents = np.frombuffer(record, EXPONENT, count=len(self.fields)).tolist()
            start = EXPONENT.itemsize * len(self.fields)
        own = bytearray(record)  # tensors need memory that may be written, though nobody writes it
        parts: dict[str, dict[str, Tensor]] = {"sites": {}, "head": {}}
        for field, exponent in zip(self.fields, exponents, strict=True):
            count = math.prod(field.shape)
            stored = (
                torch.frombuffer(own, dtype=self._stored(field), count=count, offset=start)
                if count
                else torch.empty(0, dtype=self._stored(field))
            )
            if self.kept == "int8":
                stored = stored.double() * math.ldexp(1.0, exponent)
            parts[field.part][field.name] = stored.to(_DTYPES[field.dtype]).reshape(field.shape)
            start += self._bytes(field)
        return Delta(basis=FRAME, sites=parts["sites"], head=parts["head"])

    def rounded(self, delta: Delta) -> Delta:
        """The delta as it comes back from its record. Pure; rounding it again changes nothing."""
        return delta if self.kept == "float32" else self.decode(self.encode(delta))

    def _stored(self, field: Field) -> torch.dtype:
        own = {"bfloat16": torch.bfloat16, "int8": torch.int8}
        return own.get(self.kept, _DTYPES[field.dtype])

    def _bytes(self, field: Field) -> int:
        return math.prod(field.shape) * self._stored(field).itemsize


def _fields(delta: Delta) -> tuple[Field, ...]:
    def of(part: str, tensors: Mapping[str, Tensor]) -> list[Field]:
        return [
            Field(
                part=part,
                name=name,
                shape=tuple(tensors[name].shape),
                dtype=str(tensors[name].dtype).removeprefix("torch."),
            )
            for name in sorted(tensors)
        ]

    return (*of("sites", delta.sites), *of("head", delta.head))


def _written(tensor: Tensor, dtype: torch.dtype) -> bytes:
    # Numpy knows no bfloat16; the machines that run this are little-endian.
    return tensor.detach().cpu().to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _exponent(tensor: Tensor) -> int:
    """The least e with every entry at most 127 * 2^e, so that units are powers of two and products with them exact.

    The largest entry then is more than 63.5 units and rounds to 64 or more, so it asks for the same e again. Where a
    unit would be below the dtype's smallest normal number, that is the unit, for the same exactness.
    """
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    assert math.isfinite(largest), "only finite updates are absorbed"
    mantissa, exponent = math.frexp(largest)
    least = math.frexp(torch.finfo(tensor.dtype).smallest_normal)[1] - 1
    if largest == 0.0:
        return least
    return max(exponent - 7 + (mantissa * 128 > LARGEST_WHOLE), least)


def _whole(tensor: Tensor, exponent: int) -> Tensor:
    # In float64, where the quotient by a power of two is exact; ties go to the even number.
    return (tensor.detach().cpu().double() * math.ldexp(1.0, -exponent)).round().to(torch.int8)
