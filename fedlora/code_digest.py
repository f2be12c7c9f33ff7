"""Which fedlora this is, so that an owner can accept the one that was reviewed and no other."""

import hashlib
from functools import cache
from pathlib import Path

import fedlora


@cache
def code_digest() -> str:
    """SHA-256 over the names and bytes of every Python file of the installed package, in sorted order."""
    root = Path(fedlora.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
