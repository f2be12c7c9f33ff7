"""Named randomness: one run seed, one stream for each purpose."""

import hashlib
import json


def key_for(seed: int, *purpose: str | int) -> bytes:
    """32 bytes that depend on every part of `purpose` and nothing else: the key of a stream of its own.

    Two purposes that differ anywhere give unrelated keys, so the order in which clients run cannot change a result.
    """
    return hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()


def seed_for(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed made like `key_for`, for generators that take a number. Not for noise.

    Example: seed_for(7, "cohort", 12). Torch's CPU generator uses only 32 bits of it.
    """
    return int.from_bytes(key_for(seed, *purpose)[:8], "little") >> 1
