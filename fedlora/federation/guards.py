"""What must be true of every round, whatever was configured: the model moves, noise is in it, and it stays finite.

A guard that fails raises before the round is committed, so the last good one is what the run goes on from.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from scipy.special import gammaincinv
from torch import Tensor

from fedlora.algebra.deltas import tensors
from fedlora.algebra.digest import named_tensors
from fedlora.config.schema import Federation
from fedlora.errors import GuardError
from fedlora.federation.cohort import Cohort
from fedlora.federation.gather import Gathered
from fedlora.federation.lengths import noise_length
from fedlora.federation.ranks import trained_numbers
from fedlora.values import Adapters, ClientUpdate, Released, Reply, ServerState, TrainRequest

FALSE_ALARM = 1e-9
"""Probability at most, an update, that noise as it should be is taken for missing; or a round, bad luck for a fault."""
ROUNDED = 1e-3
"""Part of an energy that float32 may round away on the way from the noise to the update."""


def require_sound(
    before: ServerState,
    gathered: Gathered,
    after: ServerState,
    scored: Mapping[str, Any],
    federation: Federation,
) -> None:
    """Passes a round whose model moved, if anybody answered, and whose numbers are all finite, the score's included.

    Args:
        before: the state that the round began with.
        gathered: what its replies amount to.
        after: the state it would end in.
        scored: `loss` and `score` of that, where it was scored.
        federation: says how many records a round is expected to draw.

    Raises:
        GuardError: it is not so; names the round, and the tensor or the number.
    """
    kept = f"the model of round {before.round} is kept"
    for name, tensor in named_tensors(after.adapters).items():
        if not bool(torch.isfinite(tensor).all()):
            wrong = int((~torch.isfinite(tensor)).sum())
            raise GuardError(
                f"round {after.round}: {name!r} has {wrong} entries that are not finite after the step; {kept}: export "
                "it, or begin again with a lower federation.optimizer.lr"
            )
    require_finite_score(after.round, scored, kept)
    if gathered.report.answered and not _moved(before, gathered, after, federation):
        raise GuardError(
            f"round {after.round}: {len(gathered.report.answered)} updates counted, but the model did not move at all; "
            f"{kept}: raise federation.optimizer.lr or server.lr if float32 loses such steps, else something "
            "between training and the mean is broken"
        )


def require_finite_score(round_: int, scored: Mapping[str, Any], kept: str) -> None:
    """Passes a score and a loss that are numbers, or are not there. kept: what is left, for the message."""
    for name in ("loss", "score"):
        value = scored.get(name)
        if value is not None and not math.isfinite(value):
            raise GuardError(
                f"round {round_}: the {name} on the test data is {value}; {kept}: look for test records that the model "
                "cannot read, export it, or begin again with a lower federation.optimizer.lr"
            )


def _moved(before: ServerState, gathered: Gathered, after: ServerState, federation: Federation) -> bool:
    """Whether the mean update and the model it led to are something; a model that has moved before may rest.

    With private noise in it no mean of updates is zero. Without, gradients can vanish for good, but not at the start,
    unless nobody's draw had a record.
    """
    released = gathered.report.released.values()
    noised = any(update.spent is not None for update in released)
    if not noised and not _untouched(before.adapters):
        return True
    if (
        not noised
        and not any(update.length for update in released)
        and _may_be_empty(len(released), federation)
    ):
        return True
    old, new = named_tensors(before.adapters), named_tensors(after.adapters)
    same = old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    return not same and any(bool(tensor.any()) for tensor in tensors(gathered.step))


def _may_be_empty(clients: int, federation: Federation) -> bool:
    """Whether all Poisson draws of so many clients may well have been empty: (1 - b / n)^n is at most e^-b."""
    return math.exp(-clients * federation.local_steps * federation.batch_size) > FALSE_ALARM


def _untouched(adapters: Adapters) -> bool:
    """Whether the adapters still add nothing to any weight."""
    return not any(bool(f.b.any()) or f.rest is not None for f in adapters.sites.values())


class Guarded:
    """A Cohort of simulated clients: an update that lacks its noise is no client's fault but ours, and stops the run.

    A server refuses such an update instead (`deploy.soundness`), since it is the node that lacks something.
    """

    def __init__(self, cohort: Cohort, federation: Federation, max_grad_norm: float | None) -> None:
        """max_grad_norm: every client's clip; None where privacy is off, and nothing is looked at."""
        self.cohort = cohort
        self.federation = federation
        self.max_grad_norm = max_grad_norm

    def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterator[Reply]:
        """See Cohort.

        Raises:
            GuardError: an update lacks the noise that it says is in it.
        """
        for reply in self.cohort.ask(clients, request):
            if isinstance(reply, ClientUpdate) and self.max_grad_norm is not None:
                fault = noise_missing(reply, self.federation, self.max_grad_norm)
                if fault is not None:
                    raise GuardError(
                        f"round {request.round}: {reply.client!r} sent an update in which {fault}; nothing of the "
                        "round counts: run `fedlora audit` to find out which step lost it, mend it, then resume"
                    )
            yield reply

    def close(self) -> None:
        """See Cohort."""
        self.cohort.close()


def noise_missing(
    update: ClientUpdate, federation: Federation, max_grad_norm: float, part: float = 1.0
) -> str | None:
    """Which tensor lacks the noise that the update says is in it, seen from the update alone; None if none does.

    Whatever a client's last step began from, its noise is independent of that, and of its own gradient. So the energy
    of what has n numbers is at least as likely to exceed any bound as that of n numbers of this noise alone, which is
    chi-square. The bound is what that falls below with probability FALSE_ALARM, shared among the tensors. Where the
    optimiser hides the noise's length, a noised tensor still cannot be zero.

    Args:
        update: of a private client; not-a-number in it is left to who sifts.
        federation: its optimiser, ranks and rounds are read.
        max_grad_norm: the client's clip.
        part: of the expected length of the noise that is asked for.
    """
    if not update.spent:
        return "no noise is accounted for"
    parts = _trained_parts(update, federation)
    numbers = trained_numbers(update, federation)
    last = replace(update.spent[0], steps=1)
    expected = noise_length(
        Released(round=update.round, length=0.0, numbers=numbers, spent=last), federation, max_grad_norm
    )
    for name, tensor in parts.items():
        energy, count = float(tensor.double().square().sum()), tensor.numel()
        if count == 0:
            continue
        if energy == 0.0:
            return f"{name!r} is all zero"
        if expected is None:
            continue
        share = FALSE_ALARM / len(parts)
        least = (1 - ROUNDED) * part**2 * expected**2 / numbers * 2 * float(gammaincinv(count / 2, share))
        if energy < least:
            return (
                f"{name!r} is {math.sqrt(energy):.3g} long, but the noise of one step alone, multiplier "
                f"{update.spent[0].noise_multiplier:g} at max_grad_norm {max_grad_norm:g}, makes it longer than "
                f"{math.sqrt(least):.3g}"
            )
    return None


def _trained_parts(update: ClientUpdate, federation: Federation) -> dict[str, Tensor]:
    """Every tensor that was trained, of B those columns alone that the client trains."""
    k, delta = (federation.ranks or {}).get(update.client), update.delta
    # A rogue's b may be a number, and is left to who sifts.
    sites = {site: b[..., :k] if b.ndim else b for site, b in delta.sites.items()}
    a = {f"A of {site}": tensor for site, tensor in delta.a.items()}
    return dict(sorted({**sites, **a, **delta.head}.items()))
