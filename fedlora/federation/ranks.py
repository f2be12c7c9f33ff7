"""Clients of unequal rank: who trains which columns of B, and what divides the sum of each column.

Known from the configuration, never from an update: a column of zeros could be noise that was left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fedlora.algebra.deltas import tensors
from fedlora.config.schema import Federation
from fedlora.methods.mixing import Participation
from fedlora.values import Adapters, ClientUpdate, Delta, RoundPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """r: columns of every B. fewer: of clients who train only the first so many, less than r; all others train all."""

    r: int
    fewer: Mapping[str, int]

    @classmethod
    def of(cls, adapters: Adapters, federation: Federation) -> "Ranks":
        """The ranks that the config gives, for a model whose B have as many columns as these."""
        r = min((factors.a.shape[0] for factors in adapters.sites.values()), default=0)
        given = federation.ranks or {}
        return cls(r=r, fewer={client: given[client] for client in sorted(given) if given[client] < r})

    def fault(self, update: ClientUpdate, basis: int) -> str | None:
        """Why an update, its tensors as needed, does not count as one of its client's rank in a round of this basis."""
        k, delta = self.fewer.get(update.client), update.delta
        if k is None:
            return None
        if delta.basis != basis:
            return (
                f"trained the first {k} of {self.r} columns of basis {delta.basis}, which are no columns of basis "
                f"{basis}; raise federation.deadline_s, or refactor less often"
            )
        for site in sorted(delta.sites):
            moved = int((delta.sites[site][:, k:] != 0).any(dim=0).sum())
            if moved:
                return (
                    f"{site!r} has {moved} columns beyond the client's {k} that are not zero; its rank is not that of "
                    "federation.ranks"
                )
        return None


def trained_numbers(update: ClientUpdate, federation: Federation) -> int:
    """How many numbers the update was trained in: all of its own, but for columns that its client does not train."""
    k, delta = (federation.ranks or {}).get(update.client), update.delta
    every = sum(tensor.numel() for tensor in tensors(delta))
    return every if k is None else every - sum(b[..., k:].numel() for b in delta.sites.values() if b.ndim)


class ColumnMeans:
    """Turns a round's step into the mean over those who trained each column; one participant at a time."""

    def __init__(self, ranks: Ranks) -> None:
        """Nobody has taken part yet."""
        self._ranks = ranks
        self._factors = [0.0] * ranks.r

    def add(self, client: str, factor: float) -> None:
        """The client takes part with this factor, see `Mixing.factor`."""
        for column in range(self._ranks.fewer.get(client, self._ranks.r)):
            self._factors[column] += factor

    def of(self, step: Delta, plan: RoundPlan, participation: Participation, divisor: float) -> Delta:
        """The step whose every column was divided by what it should be; the head, which all train, stays.

        normalised: by the summed factors of those heard who trained the column. importance: by the summed weight of
        all members who would, so that its mean over all cohorts is the weighted mean of their updates. A column that
        nobody trained does not move.

        Args:
            step: the sum / divisor, in the basis of the round.
            plan: of the round.
            participation: see `Mixing.factor`.
            divisor: what has divided all columns so far.
        """
        if not self._ranks.fewer:
            return step
        due = self._factors if participation == "normalised" else self._members(plan)
        shares = [divisor / share if share else 0.0 for share in due]
        return replace(step, sites={site: _scaled(b, shares) for site, b in step.sites.items()})

    def _members(self, plan: RoundPlan) -> list[float]:
        """Of each column, the summed weight of all members who train it; exactly 1 where all do, 0 where none."""
        r, here = self._ranks.r, {c: k for c, k in self._ranks.fewer.items() if c in plan.weight}
        away, clients = [0.0] * r, [0] * r
        for client, k in here.items():
            away[k] += plan.weight[client]
            clients[k] += 1
        lacks = [sum(away[: column + 1]) for column in range(r)]
        none = [sum(clients[: column + 1]) == len(plan.weight) for column in range(r)]
        return [0.0 if alone else 1.0 - lack for alone, lack in zip(none, lacks, strict=True)]


def _scaled(b: Tensor, shares: list[float]) -> Tensor:
    """b (d_out, r), each column times its share."""
    return b * b.new_tensor(shares)
