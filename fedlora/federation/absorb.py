"""The server's states: the first one, the next one after a round, and those around a change of the roster.

Pure: state in, state out. What the replies of a round amount to, `gather` says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.algebra.deltas import add, applied, scale, zeros_like
from fedlora.algebra.factors import orthonormalise
from fedlora.config import schema
from fedlora.errors import ConfigError, IncompleteError
from fedlora.federation.gather import Gathered
from fedlora.methods import Method
from fedlora.methods.server import server_optimizer
from fedlora.methods.subspace import Public
from fedlora.values import (
    FRAME,
    Adapters,
    Delta,
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
    seed: int,
    dtype: torch.dtype,
    public: Mapping[Site, Public] | None = None,
) -> ServerState:
    """The state before the first round: basis 0, B zero, nothing remembered, the frame spanning the first A.

    The memory is float64, whatever the rest is.

    Args:
        shapes: (d_out, d_in) of each adapted site.
        head: starting values of a trained head; empty if there is none.
        lora_cfg: `r` and `lora_alpha` are read.
        method: its subspace gives the first factors.
        seed: of the run.
        dtype: of every tensor of the state.
        public: of each site, what the method's subspace looks at.

    Raises:
        ConfigError: lora.r exceeds a side of a site.
    """
    r = lora_cfg.r
    for site, shape in sorted(shapes.items()):
        if r > min(shape):
            raise ConfigError(
                f"lora.r {r} exceeds a side of {site!r}, {tuple(shape)}; lower it to {min(shape)} or less"
            )
    sites = {
        site: method.subspace.first(site, shape, r, seed, dtype, (public or {}).get(site))
        for site, shape in sorted(shapes.items())
    }
    first_head = {name: tensor.to(dtype) for name, tensor in sorted(head.items())}
    adapters = Adapters(basis=0, scale=lora_cfg.lora_alpha / r, sites=sites, head=first_head)
    frame = {site: orthonormalise(factors.a).q for site, factors in sites.items()}
    memory = _wide(replace(zeros_like(adapters), basis=FRAME))
    return ServerState(
        round=0, adapters=adapters, frame=frame, gauges=(_gauges(adapters, frame),), memory=memory
    )


def absorb(
    state: ServerState, gathered: Gathered, *, method: Method, federation: schema.Federation
) -> Absorbed:
    """The state after the round whose replies were gathered: the step is taken, then the subspace moves.

    The step is what the server's optimiser makes of the mixed update. Of `federation`, `server` and `keep_gauges` are
    read.

    Without any answer B still moves by beta * memory, and stays if beta is 0: where shares are normalised such a round
    says nothing, so the optimiser sleeps; with importance its zero is a sample. An adaptive beta of the next
    round knows this one.
    """
    number = gathered.report.round
    step, moments = gathered.step, state.moments
    if gathered.heard or federation.participation == "importance":
        step, moments = server_optimizer(federation.server).step(step, moments, state.gauges[-1])
    adapters = method.subspace.move(applied(state.adapters, step), number, softens=bool(gathered.heard))
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


def forget(state: ServerState, client: str, remembered: Delta | None, weight: float) -> ServerState:
    """The state as if the client, now gone from the roster, had left nothing in the memory; the model stays.

    Its remembered update is subtracted, and the rest is divided by 1 - weight, since the shares of all others
    grow by that factor, under uniform weighting and by examples alike. An adaptive beta and the server's
    optimiser begin anew: their sums hold what the client sent.

    Args:
        state: between two rounds.
        client: who leaves.
        remembered: its last update, in the frame; None if it was never heard.
        weight: its share just before it leaves.

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
    memory = state.memory if remembered is None else add(state.memory, remembered, -weight * beta)
    # The last member leaves only what rounding left.
    memory = scale(memory, 1 / (1 - weight) if weight < 1 else 0.0)
    others = {name: heard for name, heard in state.remembered.items() if name != client}
    own = {name: held for name, held in state.own.items() if name != client}
    after = replace(state, memory=memory, remembered=others, own=own)
    if client not in state.remembered:
        return after  # no sum holds anything of it
    return replace(after, recurrence=Recurrence(), moments=())


def admit(state: ServerState, weight: float) -> ServerState:
    """The state once a new client holds a share of `weight`: other shares, and so the memory, shrink."""
    return replace(state, memory=scale(state.memory, 1 - weight))


def _wide(delta: Delta) -> Delta:
    """In float64, where a sum that clients join and leave for ever stays the sum of those who are in it."""
    sites = {site: tensor.double() for site, tensor in delta.sites.items()}
    return replace(delta, sites=sites, head={name: tensor.double() for name, tensor in delta.head.items()})


def _holds_anything(delta: Delta) -> bool:
    return any(bool(tensor.any()) for named in (delta.sites, delta.head) for tensor in named.values())


def _gauges(adapters: Adapters, frame: Mapping[Site, Tensor]) -> Gauges:
    sites = {
        site: (adapters.sites[site].a.double() @ frame[site].double().T).to(frame[site].dtype)
        for site in sorted(frame)
    }
    return Gauges(basis=adapters.basis, sites=sites)


def _extended(state: ServerState, adapters: Adapters, keep_gauges: int) -> tuple[Gauges, ...]:
    if adapters.basis == state.adapters.basis:
        return state.gauges
    # keep_gauges bases back, and the current one.
    return (*state.gauges, _gauges(adapters, state.frame))[-keep_gauges - 1 :]
