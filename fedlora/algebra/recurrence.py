"""How much of what is remembered comes back: the line through a round's pairs (remembered, fresh), by its two sums.

A client that sent h = mu_old + noise_old, E|noise_old|^2 = v, now sends D = mu + noise. Who is drawn moves a round
by D - beta h, of which the square is least at beta = <D, h> / |h|^2. The two noises are independent: E<D, h> =
<mu, mu_old>, while E|h|^2 = |mu_old|^2 + v holds the noise already. So the plain ratio estimates
<mu, mu_old> / (|mu_old|^2 + v), which for a signal at rest is SNR / (1 + SNR), and least also
for what repeated noise adds over an absence. With v subtracted from |h|^2 it would tell how slowly the signal moves,
and repeat noise as if there were none.

Where shares are divided by those who took part, or a fixed number is drawn, what all clients have in common costs no
variance, and mu stands for its deviation from the mean: the line then goes through the middle of the points.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedlora.algebra.flat import Layout
from fedlora.values import Delta, Recurrence

Row = NDArray[np.float64]

LEAST_LEFT = 1e-9
"""Of |h|^2, once the middle is subtracted. Below it is rounding: one pair, or the same update of everybody."""


class RunningRecurrence:
    """Takes the pairs of a round one by one, each a pass over flat vectors, after which it can be forgotten."""

    def __init__(self, layout: Layout, *, centred: bool) -> None:
        """No pair yet. centred: the line goes through the middle of the points, not through zero."""
        self._layout = layout
        self._centred = centred
        self._total = self._product = self._energy = 0.0
        self._fresh: Row = np.zeros(layout.numbers if centred else 0)
        self._stale: Row = np.zeros(layout.numbers if centred else 0)

    def add(self, fresh: Delta, stale: Delta | None, weight: float) -> Recurrence:
        """The client was heard again; or for the first time, when what is remembered is zero. Of this pair alone.

        Args:
            fresh: what will be remembered of it. stale: what was, in the same frame.
            weight: how much this pair counts; the square of the factor of the client's update, whose variance it is.
        """
        self._total += weight
        if stale is None and not self._centred:
            return Recurrence()
        new = _row(self._layout.flat(fresh))
        if self._centred:
            self._fresh += weight * new
        if stale is None:
            return Recurrence()
        old = _row(self._layout.flat(stale))
        # Not torch's sums, nor a BLAS: what they round to depends on the number of threads.
        pair = Recurrence(product=float(np.add.reduce(new * old)), energy=float(np.add.reduce(old * old)))
        self._product += weight * pair.product
        self._energy += weight * pair.energy
        if self._centred:
            self._stale += weight * old
        return pair

    def sums(self) -> Recurrence:
        """Of the pairs so far; both zero where they say nothing."""
        product, energy = self._product, self._energy
        if self._centred and self._total:
            product -= float(np.add.reduce(self._fresh * self._stale)) / self._total
            energy -= float(np.add.reduce(self._stale * self._stale)) / self._total
        if energy <= LEAST_LEFT * self._energy:
            return Recurrence()
        return Recurrence(product=product, energy=energy)


def _row(flat: Tensor) -> Row:
    return flat.double().numpy()
