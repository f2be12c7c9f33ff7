"""How the mean of what was sent moves the model, where it is the product B A that computes and not its factors."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from fedlora.algebra.deltas import applied
from fedlora.values import Adapters, Delta, Factors, Site


class Mean(Protocol):
    """Pure."""

    @property
    def products(self) -> bool:
        """Whether it asks for the mean of (change of B) (change of A), d_out x d_in numbers a site at the server."""
        ...

    @property
    def leaves_rest(self) -> bool:
        """Whether the frozen weight takes something up, which every request then carries."""
        ...

    def moved(self, adapters: Adapters, step: Delta, products: Mapping[Site, Tensor], round: int) -> Adapters:
        """The model after a round, in the same basis.

        Args:
            adapters: that the round began with.
            step: the mean change of each factor, after the server's optimiser.
            products: the mean of the products of the same changes, (d_out, d_in) float64 a site; empty if not asked
                for, or if nobody was heard.
            round: that ends.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OfFactors:
    """Each factor moves by its own mean: exact where one of the two is frozen, FedIT where none is."""

    products: bool = False
    leaves_rest: bool = False

    def moved(self, adapters: Adapters, step: Delta, products: Mapping[Site, Tensor], round: int) -> Adapters:
        """See Mean."""
        return applied(adapters, step)


BY_FACTOR = OfFactors()


def mean_product(factors: Factors, step: Delta, site: Site, product: Tensor | None) -> Tensor:
    """The mean of (B + dB_k) (A + dA_k) over clients, (d_out, d_in) float64, with no client's product formed.

    It is B A + B mean(dA) + mean(dB) A + mean(dB dA).

    Args:
        factors: B and A, that the round began with.
        step: the means of dA and dB.
        site: whose they are.
        product: the mean of dB dA; None: zero.
    """
    a, b = factors.a.double(), factors.b.double()
    mean_a, mean_b = step.a[site].double(), step.sites[site].double()
    total = b @ (a + mean_a) + mean_b @ a
    return total if product is None else total + product


def with_sites(adapters: Adapters, sites: Mapping[Site, Factors]) -> Adapters:
    """The adapters with these factors, each tensor in the type that its site had."""
    cast = {}
    for site, new in sites.items():
        like = adapters.sites[site].b
        rest = None if new.rest is None else new.rest.to(like.dtype)
        cast[site] = replace(new, a=new.a.to(like.dtype), b=new.b.to(like.dtype), rest=rest)
    return replace(adapters, sites=cast)


def plus_rest(rest: Tensor | None, more: Tensor) -> Tensor:
    """The rest with `more` taken up, float64."""
    return more.double() if rest is None else rest.double() + more
