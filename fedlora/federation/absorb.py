"""The server's states: the first one, the next one after a round, and the one without a client that left.

Pure: state in, state out. What the replies of a round amount to, `gather` says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.algebra.deltas import add, empty_memory, scale, tensors
from fedlora.algebra.factors import is_diagonal, orthonormalise
from fedlora.algebra.warm import begun_with
from fedlora.config import schema
from fedlora.config.ranks import rank_of
from fedlora.errors import ConfigError, IncompleteError
from fedlora.federation.gather import Gathered
from fedlora.methods import Method
from fedlora.methods.server import server_optimizer
from fedlora.methods.subspace import Public
from fedlora.values import (
    Adapters,
    Delta,
    Factors,
    Gauges,
    Recurrence,
    RoundReport,
    ServerState,
    Site,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Absorbed:
    """A round's outcome."""

    state: ServerState
    report: RoundReport


def start(
    shapes: Mapping[Site, tuple[int, int]],
    *,
    head: Mapping[str, Tensor],
    lora_cfg: schema.Lora,
    method: Method,
    dtype: torch.dtype,
    public: Mapping[Site, Public] | None = None,
    products: Mapping[Site, Factors] | None = None,
) -> ServerState:
    """The state before the first round: basis 0, nothing remembered, the frame spanning the first A; B is zero, but
    for sites whose product is given.

    The memory is float64, whatever the rest is.

    Args:
        shapes: (d_out, d_in) of each adapted site.
        head: starting values of a trained head; empty if there is none.
        lora_cfg: `r`, `rank_pattern` and `lora_alpha` are read.
        method: its subspace gives the first factors.
        dtype: of every tensor of the state.
        public: of each site, what the method's subspace looks at.
        products: of some sites, the B A to begin with, at this run's scale; of no higher rank than the site's.

    Raises:
        ConfigError: lora.r exceeds a side of a site.
    """
    ranks = {site: rank_of(lora_cfg, site) for site in sorted(shapes)}
    for site, r in ranks.items():
        if r > min(shapes[site]):
            raise ConfigError(
                f"lora.r {r} exceeds a side of {site!r}, {tuple(shapes[site])}; lower it to {min(shapes[site])} or less"
            )
    sites = {
        site: method.subspace.first(site, shapes[site], r, dtype, (public or {}).get(site))
        for site, r in ranks.items()
    }
    for site, product in (products or {}).items():
        sites[site] = begun_with(sites[site], product)
    first_head = {name: tensor.to(dtype) for name, tensor in sorted(head.items())}
    adapters = Adapters(basis=0, scale=lora_cfg.lora_alpha / lora_cfg.r, sites=sites, head=first_head)
    return _in_new_frame(round=0, adapters=adapters)


def absorb(
    state: ServerState, gathered: Gathered, *, method: Method, federation: schema.Federation
) -> Absorbed:
    """The state after the round whose replies were gathered: the step is taken, then the subspace moves or is left.

    The step is what the server's optimiser makes of the mixed update. Of `federation`, `server` and `keep_gauges` are
    read.

    Without any answer B still moves by beta * memory, and stays if beta is 0: where shares are normalised such a round
    says nothing, so the optimiser sleeps; with importance its zero is a sample, and under MIFA it is a round as any. An
    adaptive beta of the next round knows this one.
    """
    number = gathered.report.round
    step, moments = gathered.step, state.moments
    if gathered.heard or method.mixing.steps_without_answers(federation.participation):
        step, moments = server_optimizer(federation.server).step(step, moments, state.gauges[-1])
    # A client that went a share of its way in both factors would have gone its square in their product.
    products = {site: federation.server.lr**2 * mean for site, mean in gathered.products.items()}
    moved = method.mean.moved(state.adapters, step, products, number)
    adapters = method.subspace.move(
        moved, number, softens=bool(gathered.heard), next_side=method.side(number + 1)
    )
    if step.a or method.subspace.leaves(number):
        adapters = replace(adapters, basis=state.adapters.basis + 1)
        return Absorbed(state=_in_new_frame(round=number, adapters=adapters), report=gathered.report)
    after = ServerState(
        round=number,
        adapters=adapters,
        frame=state.frame,
        gauges=_extended(state, adapters, federation.keep_gauges),
        memory=gathered.memory,
        remembered={**state.remembered, **gathered.heard},
        recurrence=gathered.recurrence,
        own={**state.own, **gathered.own},
        moments=moments,
    )
    return Absorbed(state=after, report=gathered.report)


def forget(
    state: ServerState, client: str, remembered: Delta | None, weight: float, *, counted: float = 1.0
) -> ServerState:
    """The state as if the client, now gone from the roster, had left nothing in the memory; the model stays.

    Its remembered update is subtracted, and the rest is divided by 1 - weight, since the shares of all others
    grow by that factor, under uniform weighting and by examples alike. An adaptive beta and the server's
    optimiser begin anew: their sums hold what the client sent.

    Args:
        state: between two rounds.
        client: who leaves.
        remembered: its last update, in the frame; None if it was never heard.
        weight: its share just before it leaves.
        counted: what its remembered update is multiplied by in the memory, beside its share and a beta of its own.

    Raises:
        IncompleteError: the state has heard the client, but no remembered update is given though the memory
            is in use.
    """
    if remembered is None and client in state.remembered and _holds_anything(state.memory):
        # Taking it for zero would count its share of the memory for ever.
        raise IncompleteError(
            f"the update of {client!r} remembered from round {state.remembered[client]} is missing; restore it"
        )
    beta = state.own[client].beta if client in state.own else 1.0
    memory = state.memory if remembered is None else add(state.memory, remembered, -weight * beta * counted)
    # The last member leaves only what rounding left.
    memory = scale(memory, 1 / (1 - weight) if weight < 1 else 0.0)
    others = {name: heard for name, heard in state.remembered.items() if name != client}
    own = {name: held for name, held in state.own.items() if name != client}
    after = replace(state, memory=memory, remembered=others, own=own)
    if client not in state.remembered:
        return after  # no sum holds anything of it
    return replace(after, recurrence=Recurrence(), moments=())


def _in_new_frame(*, round: int, adapters: Adapters) -> ServerState:
    """The state whose frame spans the A that is there; nothing is remembered in it."""
    frame = {site: orthonormalise(factors.a).q for site, factors in adapters.sites.items()}
    return ServerState(
        round=round,
        adapters=adapters,
        frame=frame,
        gauges=(_gauges(adapters, frame),),
        memory=empty_memory(adapters),
    )


def _holds_anything(delta: Delta) -> bool:
    return any(bool(tensor.any()) for tensor in tensors(delta))


def _gauges(adapters: Adapters, frame: Mapping[Site, Tensor]) -> Gauges:
    sites = {site: _gauge(adapters.sites[site], frame[site]) for site in sorted(frame)}
    return Gauges(basis=adapters.basis, sites=sites)


def _gauge(factors: Factors, rows: Tensor) -> Tensor:
    # Under singular values A stays, and what rounding leaves beside a gauge's ones must not mix them.
    if is_diagonal(factors):
        return torch.eye(len(rows), dtype=rows.dtype)
    return (factors.a.double() @ rows.double().T).to(rows.dtype)


def _extended(state: ServerState, adapters: Adapters, keep_gauges: int) -> tuple[Gauges, ...]:
    if adapters.basis == state.adapters.basis:
        return state.gauges
    # keep_gauges bases back, and the current one.
    return (*state.gauges, _gauges(adapters, state.frame))[-keep_gauges - 1 :]
