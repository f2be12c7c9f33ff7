"""Adapters as named tensors and back, and one fingerprint for what is named."""

import hashlib
from collections.abc import Mapping

from torch import Tensor

from fedlora.values import Adapters, Factors

FACTORS = ("a", "b", "left", "rest")


def named_tensors(adapters: Adapters) -> dict[str, Tensor]:
    """Every tensor of `adapters` under its wire name, in wire order: a, b, left, rest site by site, then the head."""
    named = {
        f"{factor}:{site}": tensor
        for site in sorted(adapters.sites)
        for factor in FACTORS
        if (tensor := getattr(adapters.sites[site], factor)) is not None
    }
    return named | {f"head:{name}": adapters.head[name] for name in sorted(adapters.head)}


def adapters_of(named: Mapping[str, Tensor], *, basis: int, scale: float) -> Adapters:
    """The adapters whose tensors these are, under their wire names; other names are left alone.

    Raises:
        KeyError: a site has no a or no b.
    """
    sites = sorted(
        {name[len(f"{factor}:") :] for name in named for factor in FACTORS if name.startswith(f"{factor}:")}
    )
    return Adapters(
        basis=basis,
        scale=scale,
        sites={
            site: Factors(
                a=named[f"a:{site}"],
                b=named[f"b:{site}"],
                left=named.get(f"left:{site}"),
                rest=named.get(f"rest:{site}"),
            )
            for site in sites
        },
        head=under(named, "head:"),
    )


def under(named: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names, sorted."""
    return {name[len(prefix) :]: named[name] for name in sorted(named) if name.startswith(prefix)}


def digest(tensors: Mapping[str, Tensor], *words: str | int) -> str:
    """Hex SHA-256 of `words` and of names, dtypes, shapes and bytes in the mapping's order."""
    sha = hashlib.sha256("\x1f".join(map(str, words)).encode())
    for name, tensor in tensors.items():
        sha.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
