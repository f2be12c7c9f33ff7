"""How long the updates of a round are, and how long the noise in them is expected to be: what tells signal from noise.

Post-processing of what was released, and constants of the configuration: it costs no privacy.
"""

import math
from collections.abc import Mapping

from fedlora.config.schema import Federation, Sgd
from fedlora.federation.work import work
from fedlora.privacy.gaussian import noise_energy
from fedlora.values import Released

DIGITS = 6
"""Significant ones of a length in rounds.jsonl: no sum's last bits, and half the bytes."""


def lengths(
    released: Mapping[str, Released], federation: Federation, max_grad_norm: float | None
) -> dict[str, dict[str, float]]:
    """For a round's line, by client: `update_norm`, and `noise_norm` of those whose noise is known, if there are any.

    Args:
        released: of each update that counted.
        federation: `optimizer` and `rounds` are read.
        max_grad_norm: every client's clip; None where none is known.
    """
    found = {"update_norm": {client: _short(update.length) for client, update in released.items()}}
    noise = {client: noise_length(update, federation, max_grad_norm) for client, update in released.items()}
    known = {client: _short(length) for client, length in noise.items() if length is not None}
    if known:
        found["noise_norm"] = known
    return found


def noise_length(update: Released, federation: Federation, max_grad_norm: float | None) -> float | None:
    """The root of the expected squared length of the noise in an update; None where it is not known.

    SGD adds lr / expected_batch times each step's noise, and steps are independent: steps * (lr / expected_batch)^2 *
    E|noise of a step|^2. A proximal term leaves 1 - lr * proximal of it at each later step. An AdamW step says nothing
    of its noise, nor does a preconditioned one without its A and B.
    """
    spent, optimizer = update.spent, federation.optimizer
    if spent is None or spent.expected_batch is None or max_grad_norm is None:
        return None
    if not isinstance(optimizer, Sgd) or optimizer.precondition != "none":
        return None
    asked = work(update.round, federation)
    left = 1 - asked.learning_rate * asked.proximal
    steps = sum(left ** (2 * later) for later in range(spent.steps))
    energy = noise_energy(max_grad_norm, spent.noise_multiplier, update.numbers)
    return asked.learning_rate / spent.expected_batch * math.sqrt(steps * energy)


def _short(length: float) -> float:
    return float(f"{length:.{DIGITS}g}")
