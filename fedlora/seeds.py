"""Named randomness: one run seed, one stream for each purpose."""

import hashlib


def seed_for(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that depends on every part of `purpose` and nothing else.

    Example: seed_for(7, "noise", "client-03", 12). Two purposes that differ anywhere give unrelated
    seeds, so the order in which clients run cannot change a result.
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
