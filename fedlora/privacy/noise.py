"""Where randomness comes from: the operating system on a real node, a seed in simulation."""

import os
from typing import Protocol

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from fedlora.seeds import key_for

SEEDED = "seeded"
OS_ENTROPY = "os-entropy"
BY_THE_NODES = "by the nodes"
"""Of a server's run: each node drew its own, which no update can prove. No NoiseSource has this kind."""


class NoiseSource(Protocol):
    """Laws: draws of different purposes are independent; `kind` tells reports whether they are secret."""

    @property
    def kind(self) -> str:
        """ "seeded" (simulation: whoever knows the seed can subtract the noise) or "os-entropy"."""
        ...

    def normal(self, shape: tuple[int, ...], *, dtype: torch.dtype, purpose: tuple[str | int, ...]) -> Tensor:
        """Independent standard normals on the CPU, drawn in float64 and rounded to dtype."""
        ...

    def uniform(self, count: int, *, purpose: tuple[str | int, ...]) -> Tensor:
        """Independent uniforms (count,) in [0, 1), float64, multiples of 2**-53."""
        ...


class SeededNoise:
    """One keystream for each purpose of one seed, so that equal runs are equal bit for bit. For simulation only.

    Asking twice for one purpose gives the same numbers: name run, round, client, step and tensor in it, or noise
    repeats. The streams differ from those of a real node in their keys alone.
    """

    kind = SEEDED

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def normal(self, shape: tuple[int, ...], *, dtype: torch.dtype, purpose: tuple[str | int, ...]) -> Tensor:
        """Standard normals of this purpose; see `NoiseSource.normal`."""
        words = _keystream(torch.Size(shape).numel(), key_for(self._seed, "normal", *purpose))
        return _normals(words).reshape(shape).to(dtype)

    def uniform(self, count: int, *, purpose: tuple[str | int, ...]) -> Tensor:
        """Uniforms of this purpose; see `NoiseSource.uniform`."""
        return _uniforms(_keystream(count, key_for(self._seed, "uniform", *purpose)))


class OsEntropyNoise:
    """AES-256-CTR keystreams, each under its own key from the operating system.

    Every call takes a fresh key and forgets it. No state outlives a call, so there is nothing that a fork, a
    pickled copy, a restart or a global seed could repeat, and `purpose` has nothing left to separate.
    """

    kind = OS_ENTROPY

    def normal(self, shape: tuple[int, ...], *, dtype: torch.dtype, purpose: tuple[str | int, ...]) -> Tensor:
        """Standard normals nobody can repeat; see `NoiseSource.normal`."""
        return _normals(_keystream(torch.Size(shape).numel(), os.urandom(32))).reshape(shape).to(dtype)

    def uniform(self, count: int, *, purpose: tuple[str | int, ...]) -> Tensor:
        """Uniforms nobody can repeat; see `NoiseSource.uniform`."""
        return _uniforms(_keystream(count, os.urandom(32)))


def _keystream(words: int, key: bytes) -> Tensor:
    """64-bit words (words,) as int64, unpredictable to whoever lacks the 32-byte key."""
    if words == 0:
        return torch.empty(0, dtype=torch.int64)
    cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16)))
    return torch.frombuffer(bytearray(cipher.encryptor().update(bytes(8 * words))), dtype=torch.int64)


def _uniforms(words: Tensor) -> Tensor:
    return _shifted(words, 11).to(torch.float64) * 2.0**-53


def _normals(words: Tensor) -> Tensor:
    """Standard normals by the inverse of the distribution function: 63 bits for the size, one for the sign.

    The probability (k + 1/2) / 2**64 lies in [2**-65, 1/2] for 63-bit k, so neither 0 nor 1 can occur; both
    tails are equally fine and reach 9.2 standard deviations, beyond which lies less than 2**-64 of the mass.
    """
    size = torch.special.ndtri((_shifted(words, 1).to(torch.float64) + 0.5) * 2.0**-64)
    return torch.where((words & 1).bool(), size, -size)


def _shifted(words: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask takes the copies of the sign bit away.
    return (words >> bits) & ((1 << (64 - bits)) - 1)
