"""Many updates become one: fresh ones of a round, remembered ones of the absent (FedStale, arXiv 2405.04171).

With memory = sum over all clients of weight * stale, a round touches its participants only, however many clients
there are; and each participant is one pass over one flat vector, after which it can be forgotten.
"""

from collections.abc import Mapping

from torch import Tensor

from fedlora.algebra.deltas import add, from_frame, into_frame, scale, tensors
from fedlora.algebra.flat import Layout
from fedlora.values import FRAME, Delta, Gauges, Site


class RunningMix:
    """sum over participants of factor * (fresh - beta * stale), and what it makes of the memory; one at a time.

    beta 0 is FedAvg, beta 1 is FedVARP (arXiv 2207.14130), between is FedStale. With factors weight / probability
    it is unbiased for every beta, whatever is remembered, as long as memory is the weighted sum of the same stale
    updates. Equal calls in equal order give equal bits; float sums in another order do not.
    """

    def __init__(self, memory: Delta, gauges: Mapping[int, Gauges]) -> None:
        """Nobody has taken part yet.

        Args:
            memory: the weighted sum of the stale updates of all clients, participants included, in the frame.
            gauges: of every basis that an update may come in.
        """
        memory.require_basis(FRAME)
        self.layout = Layout.of(memory)
        self._memory = memory
        self._gauges = gauges
        self._fresh: dict[int, Tensor] = {}
        self._stale: Tensor | None = None
        # As wide as the memory, so that ten thousand replacements leave no rounding behind.
        self._change: Tensor | None = None
        self._wide = tensors(memory)[0].dtype

    def add(self, fresh: Delta, factor: float) -> None:
        """The update takes part, in whatever basis it came; the sum turns at the end, once for all of a basis."""
        self._fresh[fresh.basis] = _plus(self._fresh.get(fresh.basis), self.layout.flat(fresh), factor)

    def replace(
        self,
        kept: Delta,
        stale: Delta | None,
        *,
        factor: float,
        weight: float,
        beta: float = 1.0,
        stale_beta: float = 1.0,
    ) -> None:
        """From now on `kept` is remembered of this participant, in the place of `stale`; both in the frame.

        Args:
            kept: exactly what will be recalled of it, which a narrow memory has rounded.
            stale: what was recalled of it until now; None: nothing.
            factor: as in `add`. weight: its share of the whole, by which it counts in the memory.
            beta: what `kept` is multiplied by wherever it counts; stale_beta: what `stale` was. For clients that have
                a beta of their own, beside that of `mixed` for all.

        Raises:
            BasisError: one of the two is not in the frame.
            ShapeError: names or shapes differ from the memory's.
        """
        kept.require_basis(FRAME)
        self._change = _plus(self._change, self.layout.flat(kept).to(self._wide), weight * beta)
        if stale is not None:
            stale.require_basis(FRAME)
            row = self.layout.flat(stale)
            self._change = _plus(self._change, row, -weight * stale_beta)
            self._stale = _plus(self._stale, row, factor * stale_beta)

    def mixed(self, basis: int, beta: float, divisor: float) -> Delta:
        """One update, in coordinates of `basis`: the sum over participants / divisor, plus beta * memory."""
        framed = scale(self._memory, beta)
        if self._stale is not None and beta:
            framed = add(framed, self.layout.delta_of(self._stale, FRAME), -beta / divisor)
        for other in sorted(self._fresh.keys() - {basis}):
            turned = into_frame(self.layout.delta_of(self._fresh[other], other), self._gauges[other])
            framed = add(framed, turned, 1 / divisor)
        mixed = from_frame(framed, self._gauges[basis])
        if basis in self._fresh:  # at home already: most of a round never has to turn
            mixed = add(mixed, self.layout.delta_of(self._fresh[basis], basis), 1 / divisor)
        return mixed

    def memory(self) -> Delta:
        """The memory once every participant's kept update has taken the place of its stale one."""
        if self._change is None:
            return self._memory
        return add(self._memory, self.layout.delta_of(self._change, FRAME))


class RunningProducts:
    """sum over participants of factor * (change of B) (change of A), (d_out, d_in) float64 a site; one at a time.

    With the sums of either change it gives the exact mean of the products (B + dB) (A + dA), which the product of the
    means is not.
    """

    def __init__(self) -> None:
        """Nobody has taken part yet."""
        self._sums: dict[Site, Tensor] = {}

    def add(self, fresh: Delta, factor: float) -> None:
        """The update takes part; sites without a change of both add nothing."""
        for site in fresh.sites.keys() & fresh.a.keys():
            product = fresh.sites[site].double() @ fresh.a[site].double()
            self._sums[site] = _plus(self._sums.get(site), product, factor)

    def mean(self, divisor: float) -> dict[Site, Tensor]:
        """The sums / divisor, by site."""
        return {site: self._sums[site] / divisor for site in sorted(self._sums)}


def _plus(total: Tensor | None, row: Tensor, factor: float) -> Tensor:
    return row * factor if total is None else total.add_(row, alpha=factor)
