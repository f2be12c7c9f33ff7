"""Where A comes from and how it moves: drawn once, then fixed, or turned within its row space."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedlora.algebra.factors import orthonormalise, refactorise
from fedlora.seeds import seed_for
from fedlora.values import Adapters, Factors, Site


@dataclass(frozen=True, slots=True, kw_only=True)
class Subspace:
    """The rows of A.

    init: how the first A is drawn.
    refactor_every: rounds between two refactorisations; None leaves A as drawn.
    """

    init: Literal["orthonormal", "centred", "kaiming"]
    refactor_every: int | None

    def first_a(
        self,
        site: Site,
        shape: tuple[int, int],
        seed: int,
        dtype: torch.dtype,
        mean_input: Tensor | None = None,
    ) -> Tensor:
        """The first A of a site, the same for equal seed and site, whatever other sites there are.

        Drawn in float64, so that runs of different dtypes start from the same subspace.

        Args:
            site: names the stream of the draw.
            shape: (r, d_in), r <= d_in.
            seed: of the run.
            dtype: of the result.
            mean_input: (d_in,), what `centred` rows are orthogonal to; needed by it alone.

        Raises:
            ShapeError: orthonormal rows are asked for and r exceeds d_in.
        """
        generator = torch.Generator().manual_seed(seed_for(seed, "first-a", site))
        match self.init:
            case "orthonormal":
                return orthonormalise(torch.randn(shape, generator=generator, dtype=torch.float64)).q.to(
                    dtype
                )
            case "centred":
                draw = torch.randn(shape, generator=generator, dtype=torch.float64)
                return orthonormalise(_without(draw, mean_input)).q.to(dtype)
            case "kaiming":
                # PEFT calls kaiming_uniform_ with a = sqrt(5), which makes the bound 1 / sqrt(d_in).
                draw = torch.rand(shape, generator=generator, dtype=torch.float64)
                return ((2 * draw - 1) / math.sqrt(shape[1])).to(dtype)

    def move(self, adapters: Adapters, round: int) -> Adapters:
        """After `round`: the same model with orthonormal A in a new basis, or the very same object.

        Args:
            adapters: after the round's update.
            round: rounds completed, this one included; every refactor_every-th one refactorises.
        """
        if self.refactor_every is None or round % self.refactor_every:
            return adapters
        sites = {site: _refactored(adapters.sites[site]) for site in sorted(adapters.sites)}
        return replace(adapters, basis=adapters.basis + 1, sites=sites)


def _without(rows: Tensor, direction: Tensor | None) -> Tensor:
    assert direction is not None, "init centred needs the site's mean input"
    unit = torch.nn.functional.normalize(direction.double(), dim=0)
    return rows - (rows @ unit)[:, None] * unit


def _refactored(factors: Factors) -> Factors:
    new = refactorise(factors.a, factors.b)
    return Factors(a=new.a, b=new.b)
