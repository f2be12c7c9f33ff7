"""What a disk or a wire may do to bytes."""


def flipped(data: bytes) -> bytes:
    """All of them, the last with another bit."""
    return data[:-1] + bytes([data[-1] ^ 1])
