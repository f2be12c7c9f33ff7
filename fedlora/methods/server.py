"""What the server makes of a round's mixed update before it moves the model: post-processing of what was released.

Whatever outlives a round is kept in the canonical frame, float64, where a refactorisation changes no coordinate.
"""

from dataclasses import dataclass
from typing import Protocol, TypeAlias, assert_never

import torch

from fedlora.algebra.deltas import add, from_frame, into_frame, scale
from fedlora.algebra.flat import Layout
from fedlora.config.server import Server, ServerAdam, ServerMomentum, ServerSgd
from fedlora.values import FRAME, Delta, Gauges

Moments: TypeAlias = tuple[Delta, ...]


class ServerOptimizer(Protocol):
    """Pure: what it remembers goes in and comes out."""

    def step(self, mixed: Delta, moments: Moments, gauges: Gauges) -> tuple[Delta, Moments]:
        """What to add to the model, in the basis of `mixed`, and what to remember.

        Args:
            mixed: the round's update, in the basis of `gauges`.
            moments: what the last round's step left; none: it is the first.
            gauges: of the basis that the model is in.
        """
        ...


def server_optimizer(server_cfg: Server) -> ServerOptimizer:
    """The optimiser that the config names."""
    match server_cfg:
        case ServerSgd():
            return Sgd(lr=server_cfg.lr)
        case ServerMomentum():
            return Momentum(lr=server_cfg.lr, momentum=server_cfg.momentum)
        case ServerAdam():
            return Adam(
                lr=server_cfg.lr, beta_1=server_cfg.beta_1, beta_2=server_cfg.beta_2, tau=server_cfg.tau
            )
        case _:
            assert_never(server_cfg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sgd:
    """lr * mixed; with lr 1 the mean itself."""

    lr: float

    def step(self, mixed: Delta, moments: Moments, gauges: Gauges) -> tuple[Delta, Moments]:
        """See ServerOptimizer; nothing is remembered."""
        return scale(mixed, self.lr), ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Momentum:
    """FedAvgM (arXiv 1909.06335): lr * m with m = momentum * m + mixed. Linear, so any basis gives the same model."""

    lr: float
    momentum: float

    def step(self, mixed: Delta, moments: Moments, gauges: Gauges) -> tuple[Delta, Moments]:
        """See ServerOptimizer. What is new does not pass through the frame, so momentum 0 is `Sgd` to the bit."""
        first = into_frame(mixed, gauges)
        if not moments:
            return scale(mixed, self.lr), (first,)
        moved = add(mixed, from_frame(moments[0], gauges), self.momentum)
        return scale(moved, self.lr), (add(first, moments[0], self.momentum),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam:
    """FedAdam (arXiv 2003.00295, algorithm 2): lr * m / (sqrt(v) + tau) for each coordinate of the frame.

    m = beta_1 m + (1 - beta_1) mixed and v = beta_2 v + (1 - beta_2) mixed^2, from m = 0 and v = tau^2, without a
    correction of either start. Squares do not turn with a basis; in the frame, which no round moves, they need not.
    """

    lr: float
    beta_1: float
    beta_2: float
    tau: float

    def step(self, mixed: Delta, moments: Moments, gauges: Gauges) -> tuple[Delta, Moments]:
        """See ServerOptimizer."""
        layout = Layout.of(mixed)
        new = layout.flat(into_frame(mixed, gauges))
        first, second = torch.zeros_like(new), torch.full_like(new, self.tau**2)
        if moments:
            first, second = (layout.flat(moment) for moment in moments)
        first = self.beta_1 * first + (1 - self.beta_1) * new
        second = self.beta_2 * second + (1 - self.beta_2) * new.square()
        moved = layout.delta_of(self.lr * first / (second.sqrt() + self.tau), FRAME)
        return from_frame(moved, gauges), (layout.delta_of(first, FRAME), layout.delta_of(second, FRAME))
