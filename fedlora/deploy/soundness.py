"""Whether an update can be what it says of itself. It finds what went wrong at a node; a liar it does not."""

import math
from dataclasses import dataclass

from fedlora.algebra.deltas import joint_norm
from fedlora.config.schema import Federation
from fedlora.federation.guards import noise_missing
from fedlora.federation.lengths import noise_length
from fedlora.federation.ranks import trained_numbers
from fedlora.federation.work import work
from fedlora.transport.flower_client import MOST_RECORDS
from fedlora.values import ClientUpdate, DpEvent, Released

LEAST_NOISE, MOST_NOISE = 1e-2, 1e4
"""An event outside is no participation, and one at the end of the run could stop the accountants."""
SPREAD = 0.5
"""How far the length of noise may be from its expectation, as a part of it, however many numbers there are."""
DEVIATIONS = 6
"""The same in standard deviations, which are 1 / sqrt(2 n) of the length for n trained numbers, after however many
steps: a core has few."""
DRAWS = 6
"""Standard deviations by which the number of records drawn may exceed its expectation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Soundness:
    """What a server knows of its nodes' work before it hears of it.

    max_grad_norm: every node's clip; None where none of them clips.
    """

    federation: Federation
    max_grad_norm: float | None

    def objection(self, update: ClientUpdate) -> str | None:
        """Why the update cannot be what it says it is; None if it can."""
        clips = self.max_grad_norm is not None
        if not update.spent or not all(self._can_be_spent(event) for event in update.spent):
            return f"it says it spent {update.spent}"
        if clips and update.spent[0].expected_batch is None:
            return f"it does not say how many records a step draws: {update.spent[0]}"
        return self._objection_to_length(update) or (self._objection_to_parts(update) if clips else None)

    def _can_be_spent(self, event: DpEvent) -> bool:
        batch, most = event.expected_batch, event.max_draw
        cut = batch is not None and most is not None and 1 <= batch <= min(most, MOST_RECORDS)
        return (
            LEAST_NOISE <= event.noise_multiplier <= MOST_NOISE
            and 0 < event.sample_rate <= 1
            and 1 <= event.steps <= self.federation.local_steps
            and (cut or (batch is None and most is None))
        )

    def _objection_to_length(self, update: ClientUpdate) -> str | None:
        """Under SGD an update is noise of a known length, and a clipped gradient for each record that was drawn."""
        event = update.spent[0]
        length = joint_norm(update.delta)
        numbers = trained_numbers(update, self.federation)
        released = Released(round=update.round, length=length, numbers=numbers, spent=event)
        noise = noise_length(released, self.federation, self.max_grad_norm)
        if noise is None or self.max_grad_norm is None or event.expected_batch is None:
            return None
        unit = work(update.round, self.federation).learning_rate * self.max_grad_norm / event.expected_batch
        drawn = event.steps * event.expected_batch
        signal = unit * (drawn + DRAWS * (math.sqrt(drawn) + 1))
        spread = max(SPREAD, DEVIATIONS / math.sqrt(2 * released.numbers))
        least, most = max(0.0, 1 - spread) * noise, (1 + spread) * noise + signal
        if not math.isfinite(length):
            return "it has entries that are not finite"
        if not least <= length <= most:
            return (
                f"its length is {length:.3g}, but with noise multiplier {event.noise_multiplier:g} and max_grad_norm "
                f"{self.max_grad_norm:g} it is from {least:.3g} to {most:.3g}; compare max_grad_norm in its node.yaml "
                "with this run's"
            )
        return None

    def _objection_to_parts(self, update: ClientUpdate) -> str | None:
        """Noise is in every number that was trained; a mean would count what was not."""
        k = (self.federation.ranks or {}).get(update.client)
        for site, b in sorted(update.delta.sites.items()):
            idle = int((b[:, :k] == 0).all(dim=0).sum()) if b.ndim == 2 and len(b) else 0
            if idle:
                return (
                    f"{idle} columns of {site!r} are all zero, so no noise is in them; compare rank in its node.yaml "
                    "with this run's federation.ranks"
                )
        if self.max_grad_norm is None:
            return None
        return noise_missing(update, self.federation, self.max_grad_norm, 1 - SPREAD)
