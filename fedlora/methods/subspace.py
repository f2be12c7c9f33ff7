"""Where the frozen sides come from and how A moves: chosen once, then fixed, or turned within its row space.

All that a choice may look at is public, the weights and text that belongs to nobody, so it costs no privacy.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedlora.algebra.factors import orthonormalise, refactorise, soft_thresholded
from fedlora.errors import ShapeError
from fedlora.seeds import seed_for
from fedlora.values import Adapters, Factors, Site

Init = Literal["orthonormal", "centred", "kaiming", "principal", "activations"]
Left = Literal["orthonormal", "principal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Public:
    """What the frozen weights and public text say of a site, float64; None where it was not asked for.

    mean_input: (d_in,), of its input over public text.
    input_rows: (r, d_in) orthonormal rows along which that input varies most, the strongest first.
    weight_rows: (r, d_in), its weight's first right singular vectors. weight_columns: (r, d_out), its left ones.
    """

    mean_input: Tensor | None = None
    input_rows: Tensor | None = None
    weight_rows: Tensor | None = None
    weight_columns: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subspace:
    """The rows of A and, where a core is trained, the columns of its left frame.

    init: where the first A comes from. left: where the left frame does; None: there is none, B is trained whole.
    refactor_every: rounds between two refactorisations; None leaves A as it began.
    soft_threshold: what each refactorisation takes off every singular value of B A.
    """

    init: Init
    refactor_every: int | None
    left: Left | None = None
    soft_threshold: float = 0.0

    def first(
        self,
        site: Site,
        shape: tuple[int, int],
        r: int,
        seed: int,
        dtype: torch.dtype,
        public: Public | None = None,
    ) -> Factors:
        """The factors that a site begins with, B or the core zero: the same for equal seed and site, whatever others
        there are.

        Drawn in float64, so that runs of different dtypes start from the same subspace.

        Args:
            site: names the streams of the draws.
            shape: (d_out, d_in).
            r: rank, of A and of the left frame.
            seed: of the run.
            dtype: of the result.
            public: what `init` and `left` look at.

        Raises:
            ShapeError: r exceeds a side.
        """
        d_out, d_in = shape
        public = public or Public()
        a = self._first_a(seed_for(seed, "first-a", site), (r, d_in), public)
        if self.left is None:
            return Factors(a=a.to(dtype), b=torch.zeros(d_out, r, dtype=dtype))
        if self.left == "principal":
            rows = _known(public.weight_columns, "the site's weight", (r, d_out))
        else:
            rows = orthonormalise(_normal(seed_for(seed, "left", site), (r, d_out))).q
        left = rows.T.contiguous().to(dtype)
        return Factors(a=a.to(dtype), b=torch.zeros(r, r, dtype=dtype), left=left)

    def _first_a(self, seed: int, shape: tuple[int, int], public: Public) -> Tensor:
        match self.init:
            case "orthonormal":
                return orthonormalise(_normal(seed, shape)).q
            case "centred":
                mean = _known(public.mean_input, "the site's mean input", shape[1:])
                return orthonormalise(_without(_normal(seed, shape), mean)).q
            case "kaiming":
                # PEFT calls kaiming_uniform_ with a = sqrt(5), which makes the bound 1 / sqrt(d_in).
                draw = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                return (2 * draw - 1) / math.sqrt(shape[1])
            case "principal":
                return _known(public.weight_rows, "the site's weight", shape)
            case "activations":
                return _known(public.input_rows, "the site's inputs", shape)

    def move(self, adapters: Adapters, round: int, *, softens: bool = True) -> Adapters:
        """After `round`: the same model, but for the threshold, with orthonormal A in a new basis, or the same object.

        Args:
            adapters: after the round's update.
            round: rounds completed, this one included; every refactor_every-th one refactorises.
            softens: whether the threshold is taken off.
        """
        if self.refactor_every is None or round % self.refactor_every:
            return adapters
        threshold = self.soft_threshold if softens else 0.0
        sites = {site: _refactored(adapters.sites[site], threshold) for site in sorted(adapters.sites)}
        return replace(adapters, basis=adapters.basis + 1, sites=sites)


def _normal(seed: int, shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _known(fact: Tensor | None, what: str, shape: tuple[int, ...]) -> Tensor:
    if fact is None or fact.shape != shape:
        told = None if fact is None else tuple(fact.shape)
        raise ShapeError(
            f"what is known of {what} is {told}, need {shape}; lower lora.r to what the site has"
        )
    return fact


def _without(rows: Tensor, direction: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(direction.double(), dim=0)
    return rows - (rows @ unit)[:, None] * unit


def _refactored(factors: Factors, threshold: float) -> Factors:
    new = refactorise(factors.a, factors.b)
    return replace(factors, a=new.a, b=soft_thresholded(new.b, threshold) if threshold else new.b)
