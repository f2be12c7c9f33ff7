"""A toy client whose canaries say before the clip what gradient they want; the rest of it is ordinary.

A canary's loss is linear in each adapted layer's output over inputs that are the rows of the identity, so its
per-example gradient is a matrix that we choose, and the real engine finds it as it finds any other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora.seeds import seed_for

LAYERS, WIDTH, RANK = 6, 64, 8
REAL_RECORDS = 1500
CANARIES = 1000
OVERSHOOT = 50.0
"""Canaries ask for that many times the bound: one below it would never notice a clip that is off."""
_LOSS_SCALE = 0.02
"""Puts the gradients of real records, in units of the bound, on both sides of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One audited data owner: real records 0 to 1499, then the canaries that a coin let in.

    included: canary numbers held, sorted; each is in with probability 1/2, secret from whoever guesses.
    directions: by trained name, (canaries, WIDTH, RANK): unit vectors over all layers, equal mass in each.
    """

    name: str
    model: nn.Module
    trained: Mapping[str, nn.Parameter]
    inputs: Tensor
    targets: Tensor
    included: Tensor
    directions: Mapping[str, Tensor]
    bound: float

    @property
    def records(self) -> int:
        """How many records it holds: a little over or under REAL_RECORDS + CANARIES / 2."""
        return len(self.inputs) + len(self.included)

    def losses(self, drawn: Tensor) -> list[Callable[[], Tensor]]:
        """The microbatches of a draw: the real records in it, then the canaries; none for an empty draw."""
        real = drawn[drawn < len(self.inputs)]
        canaries = self.canaries_of(drawn)
        return [
            *([lambda: self._real_losses(real)] if len(real) else []),
            *([lambda: self._canary_losses(canaries)] if len(canaries) else []),
        ]

    def canaries_of(self, drawn: Tensor) -> Tensor:
        """Numbers of the canaries among the records drawn."""
        return self.included[drawn[drawn >= len(self.inputs)] - len(self.inputs)]

    def _real_losses(self, real: Tensor) -> Tensor:
        error = (self.model(self.inputs[real]) - self.targets[real]).square().sum(dim=1)
        return _LOSS_SCALE * self.bound * error

    def _canary_losses(self, canaries: Tensor) -> Tensor:
        # y = eye @ weight.T, so d sum(y * G.T) / d weight = G for the matrix G that we ask for.
        layers = dict(self.model.named_modules())
        rows = torch.eye(RANK).expand(len(canaries), RANK, RANK)
        total = torch.zeros(len(canaries))
        for name, directions in self.directions.items():
            wanted = OVERSHOOT * self.bound * directions[canaries]
            y = layers[name.removesuffix(".weight")](rows)
            total = total + (y * wanted.transpose(1, 2)).sum(dim=(1, 2))
        return total


class Toy(nn.Module):
    """Six residual layers x + tanh(W x + B A x) / 2 of width 64, W and A frozen, B (64, 8) trained from zero."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.b = nn.ModuleList(nn.Linear(RANK, WIDTH, bias=False) for _ in range(LAYERS))
        for layer in range(LAYERS):
            nn.init.zeros_(self.b[layer].weight)  # pyright: ignore[reportArgumentType]
        shape = (LAYERS, WIDTH, WIDTH)
        self.register_buffer("w", torch.randn(shape, generator=generator) / WIDTH**0.5)
        self.register_buffer("a", torch.randn((LAYERS, RANK, WIDTH), generator=generator) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(n, WIDTH) to (n, WIDTH)."""
        for layer, b in enumerate(self.b):
            x = x + 0.5 * torch.tanh(x @ self.w[layer].T + b(x @ self.a[layer].T))  # pyright: ignore
        return x


def client(name: str, bound: float, seed: int) -> Client:
    """A data owner of this name: its own records, canaries and coins, all from the seed."""
    generator = torch.Generator().manual_seed(seed_for(seed, "audit", name))
    model = Toy(generator)
    trained = {path: p for path, p in model.named_parameters() if p.requires_grad}
    inputs = torch.randn((REAL_RECORDS, WIDTH), generator=generator)
    with (
        torch.no_grad()
    ):  # nothing in common to learn: gradients of real records have no mean to drown canaries
        targets = model(inputs) + torch.randn((REAL_RECORDS, WIDTH), generator=generator)
    coins = torch.rand(CANARIES, generator=generator) < 0.5
    directions = {path: _unit(generator) / LAYERS**0.5 for path in trained}
    return Client(
        name=name,
        model=model,
        trained=trained,
        inputs=inputs,
        targets=targets,
        included=torch.nonzero(coins).flatten(),
        directions=directions,
        bound=bound,
    )


def _unit(generator: torch.Generator) -> Tensor:
    """Random directions (CANARIES, WIDTH, RANK), each of norm 1."""
    flat = torch.randn((CANARIES, WIDTH * RANK), generator=generator)
    return (flat / flat.norm(dim=1, keepdim=True)).reshape(CANARIES, WIDTH, RANK)
