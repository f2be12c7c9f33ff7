"""Where the frozen sides come from and how A moves: chosen once, then fixed, or turned within its row space, or left.

All that a choice may look at is public, the weights and text that belongs to nobody, so it costs no privacy.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedlora.algebra.factors import orthonormalise, refactorise, soft_thresholded, truncated
from fedlora.errors import ShapeError
from fedlora.seeds import seed_for
from fedlora.values import Adapters, Factors, Side, Site

Init = Literal["orthonormal", "centred", "kaiming", "principal", "activations", "gradients"]
Left = Literal["orthonormal", "principal", "gradients"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Public:
    """What the frozen weights and public text say of a site, float64; None where it was not asked for.

    mean_input: (d_in,), of its input over public text.
    input_rows: (r, d_in) orthonormal rows along which that input varies most, the strongest first.
    weight_rows: (r, d_in), its weight's first right singular vectors. weight_columns: (r, d_out), its left ones.
    gradient_rows, gradient_columns: likewise of that weight's gradient on public labelled records.
    """

    mean_input: Tensor | None = None
    input_rows: Tensor | None = None
    weight_rows: Tensor | None = None
    weight_columns: Tensor | None = None
    gradient_rows: Tensor | None = None
    gradient_columns: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subspace:
    """The rows of A and, where a core is trained, the columns of its left frame.

    init: where the first A comes from. left: where the left frame does; None: there is none, B is trained whole.
    refactor_every: rounds between two refactorisations; None leaves A as it began.
    dense: a refactorisation is the SVD of the formed product, as FedSVD's authors run it, whose right singular vectors
        lie in row(A) only where B has full rank; else by way of A's own rows, whatever B is.
    diagonal: of the core, its diagonal alone is trained.
    soft_threshold: what each refactorisation takes off every singular value of B A.
    singular_values: where a refactorisation puts them: to B, so that A is orthonormal; shared, a square root to each
        side; or to the side that the next round trains, so that the frozen one is orthonormal.
    restart_every: rounds after which the product goes into the rest and new directions are drawn; None: never.
    restart_rows: how many directions do, the weakest; None: all.
    seed: of the run, for all that is drawn; `methods.build` sets it.
    """

    init: Init
    refactor_every: int | None
    left: Left | None = None
    dense: bool = False
    diagonal: bool = False
    soft_threshold: float = 0.0
    singular_values: Literal["b", "shared", "trained"] = "b"
    restart_every: int | None = None
    restart_rows: int | None = None
    seed: int = 0

    def first(
        self,
        site: Site,
        shape: tuple[int, int],
        r: int,
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
            dtype: of the result.
            public: what `init` and `left` look at.

        Raises:
            ShapeError: r exceeds a side.
        """
        d_out, d_in = shape
        public = public or Public()
        a = self._first_a(seed_for(self.seed, "first-a", site), (r, d_in), public)
        if self.left is None:
            return Factors(a=a.to(dtype), b=torch.zeros(d_out, r, dtype=dtype))
        left = self._left(seed_for(self.seed, "left", site), (r, d_out), public).T.contiguous().to(dtype)
        core = torch.zeros(1 if self.diagonal else r, r, dtype=dtype)
        return Factors(a=a.to(dtype), b=core, left=left)

    def _first_a(self, seed: int, shape: tuple[int, int], public: Public) -> Tensor:
        match self.init:
            case "orthonormal":
                return orthonormalise(_normal(seed, shape)).q
            case "centred":
                mean = _known(public.mean_input, "the site's mean input", shape[1:])
                return orthonormalise(_without(_normal(seed, shape), mean)).q
            case "kaiming":
                return _uniform(seed, shape)
            case "principal":
                return _known(public.weight_rows, "the site's weight", shape)
            case "activations":
                return _known(public.input_rows, "the site's inputs", shape)
            case "gradients":
                return _known(public.gradient_rows, "the site's gradient", shape)

    def _left(self, seed: int, shape: tuple[int, int], public: Public) -> Tensor:
        match self.left:
            case "principal":
                return _known(public.weight_columns, "the site's weight", shape)
            case "gradients":
                return _known(public.gradient_columns, "the site's gradient", shape)
            case _:
                return orthonormalise(_normal(seed, shape)).q

    def leaves(self, round: int) -> bool:
        """Whether A leaves its row space after `round`, so that nothing kept in its frame means anything any more."""
        return self._restarts(round) or (self.dense and self._refactorises(round))

    def _restarts(self, round: int) -> bool:
        return self.restart_every is not None and round % self.restart_every == 0

    def _refactorises(self, round: int) -> bool:
        return self.refactor_every is not None and round % self.refactor_every == 0

    def move(
        self, adapters: Adapters, round: int, *, softens: bool = True, next_side: Side = "b"
    ) -> Adapters:
        """After `round`: the same model, but for the threshold, in a new basis, or the same object.

        Args:
            adapters: after the round's update.
            round: rounds completed, this one included; every refactor_every-th one refactorises.
            softens: whether the threshold is taken off.
            next_side: what the next round trains.
        """
        names = sorted(adapters.sites)
        if self._restarts(round):
            sites = {site: self._restarted(adapters, site, round) for site in names}
        elif self._refactorises(round):
            threshold = self.soft_threshold if softens else 0.0
            sites = {site: self._refactored(adapters.sites[site], threshold, next_side) for site in names}
        else:
            return adapters
        return replace(adapters, basis=adapters.basis + 1, sites=sites)

    def _refactored(self, factors: Factors, threshold: float, next_side: Side) -> Factors:
        if self.singular_values == "trained" and next_side == "a":
            if not bool(factors.b.any()):
                return factors  # a product of zero says nothing of its sides
            turned = refactorise(factors.b.T, factors.a.T)
            return replace(factors, a=turned.b.T.contiguous(), b=turned.a.T.contiguous())
        new = (
            truncated(factors.b @ factors.a, len(factors.a))
            if self.dense
            else refactorise(factors.a, factors.b)
        )
        new = replace(factors, a=new.a.to(factors.a.dtype), b=new.b.to(factors.b.dtype))
        b = soft_thresholded(new.b, threshold) if threshold else new.b
        product = replace(factors, a=new.a, b=b)
        return _shared(product) if self.singular_values == "shared" else product

    def _restarted(self, adapters: Adapters, site: Site, round: int) -> Factors:
        """The same sum of rest and product, in which the weakest directions, or all, have become part of the rest."""
        old = adapters.sites[site]
        new = refactorise(old.a, old.b)
        rows = len(new.a) if self.restart_rows is None else min(self.restart_rows, len(new.a))
        kept = len(new.a) - rows
        gone = adapters.scale * (new.b[:, kept:].double() @ new.a[kept:].double())
        rest = gone if old.rest is None else old.rest.double() + gone
        a = torch.cat([new.a[:kept].double(), self._drawn(site, new.a[:kept], rows, round)])
        b = torch.cat([new.b[:, :kept], torch.zeros_like(new.b[:, kept:])], dim=1)
        return Factors(a=a.to(old.a.dtype), b=b, rest=rest.to(old.b.dtype))

    def _drawn(self, site: Site, stay: Tensor, rows: int, round: int) -> Tensor:
        """New directions: uniform where all are new and the first were, else orthonormal, also to those that stay."""
        seed, shape = seed_for(self.seed, "new-a", round, site), (rows, stay.shape[1])
        if self.init == "kaiming" and len(stay) == 0:
            return _uniform(seed, shape)
        draw = _normal(seed, shape)
        return orthonormalise(draw - (draw @ stay.double().T) @ stay.double()).q


def _normal(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _uniform(seed: int, shape: tuple[int, ...]) -> Tensor:
    # PEFT calls kaiming_uniform_ with a = sqrt(5), which makes the bound 1 / sqrt(d_in).
    draw = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * draw - 1) / math.sqrt(shape[1])


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


LEAST_SHARE = 1e-6
"""Of the largest singular value: less is not shared, or A would lose a direction for ever."""


def _shared(factors: Factors) -> Factors:
    """The same product, its singular values' square roots on either side; the same object where it is zero."""
    lengths = factors.b.double().norm(dim=0)
    if not bool(lengths.any()):
        return factors
    root = lengths.clamp_min(LEAST_SHARE * float(lengths.max())).sqrt().to(factors.b.dtype)
    return replace(factors, a=root[:, None] * factors.a, b=factors.b / root)
