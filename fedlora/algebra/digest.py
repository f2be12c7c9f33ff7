"""One fingerprint for named tensors."""

import hashlib
from collections.abc import Mapping

from torch import Tensor

from fedlora.values import Adapters


def named_tensors(adapters: Adapters) -> dict[str, Tensor]:
    """Every tensor of `adapters` under its wire name, in wire order: a and b site by site, then the head."""
    named = {
        f"{factor}:{site}": getattr(adapters.sites[site], factor)
        for site in sorted(adapters.sites)
        for factor in ("a", "b")
    }
    return named | {f"head:{name}": adapters.head[name] for name in sorted(adapters.head)}


def digest(tensors: Mapping[str, Tensor], *words: str | int) -> str:
    """Hex SHA-256 of `words` and of names, dtypes, shapes and bytes in the mapping's order."""
    sha = hashlib.sha256("\x1f".join(map(str, words)).encode())
    for name, tensor in tensors.items():
        sha.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
