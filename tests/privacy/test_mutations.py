"""Each privacy-relevant line, broken on purpose, makes the check fail that is named beside it.

A mutant is the room's own source with one piece of text replaced, run under its own module names.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import fedlora.privacy

from . import checks

# In order of import: a later module sees the mutant of an earlier one.
MODULES = ("noise", "sampling", "clipping", "engine", "direct_engine", "step")


def room(module: str = "", old: str = "", new: str = "") -> SimpleNamespace:
    """The privacy room, with `old` replaced by `new` in one module; the real one is left alone."""
    names = [f"fedlora.privacy.{name}" for name in MODULES]
    kept = {name: sys.modules.get(name) for name in names}
    attributes = dict(vars(fedlora.privacy))
    try:
        loaded: dict[str, ModuleType] = {}
        for short, name in zip(MODULES, names, strict=True):
            path = Path(fedlora.privacy.__file__).with_name(f"{short}.py")
            text = path.read_text()
            if short == module:
                assert text.count(old) == 1, f"{path} holds {text.count(old)} of {old!r}; mend the mutation"
                text = text.replace(old, new)
            spec = importlib.util.spec_from_loader(name, loader=None)
            assert spec is not None
            loaded[short] = sys.modules[name] = importlib.util.module_from_spec(spec)
            exec(compile(text, str(path), "exec"), vars(loaded[short]))
    finally:
        for name, original in kept.items():
            sys.modules.pop(name, None)
            if original is not None:
                sys.modules[name] = original
        vars(fedlora.privacy).update(attributes)
    return SimpleNamespace(
        DirectEngine=loaded["direct_engine"].DirectEngine,
        private_gradient=loaded["step"].private_gradient,
        poisson_draw=loaded["sampling"].poisson_draw,
        SeededNoise=loaded["noise"].SeededNoise,
        clipped_sum=loaded["clipping"].clipped_sum,
    )


@dataclass(frozen=True)
class Mutation:
    name: str
    module: str
    old: str
    new: str
    caught_by: str


CLIP = "torch.clamp(max_grad_norm / squared_norms.sqrt(), max=1.0)"
FACTORS = "    factors = clip_factors(joint_squared_norms(gradients), max_grad_norm)\n"
SUM = "    sums = engine.clipped_sum(model, trained, losses, max_grad_norm)\n"
NOISE = "mechanism.noise_multiplier * mechanism.max_grad_norm * draw"
NEIGHBOURS = "neighbours_differ_by_at_most_the_bound"
EMPTY = "an_empty_draw_carries_the_full_noise_in_every_tensor"
FULL = "a_full_draw_carries_the_full_noise"
INDEPENDENT = "noise_of_steps_and_tensors_is_independent"
DIVISOR = "the_divisor_does_not_depend_on_the_draw"
MUTATIONS = (
    Mutation("no clip", "clipping", CLIP, "torch.ones_like(squared_norms)", NEIGHBOURS),
    Mutation("clip by the squared norm", "clipping", "squared_norms.sqrt()", "squared_norms", NEIGHBOURS),
    Mutation(
        "clip to twice the bound", "clipping", CLIP, CLIP.replace("max_grad", "2 * max_grad"), NEIGHBOURS
    ),
    Mutation("normalise, also small ones", "clipping", ", max=1.0)", ", max=1e9)", "the_same_as_real"),
    Mutation(
        "per-tensor clip",
        "clipping",
        FACTORS,
        "    if len(gradients) > 1:\n"
        "        return {k: clipped_sum({k: g}, max_grad_norm)[k] for k, g in gradients.items()}\n" + FACTORS,
        NEIGHBOURS,
    ),
    Mutation(
        "average before the clip",
        "clipping",
        FACTORS,
        "    n = len(next(iter(gradients.values())))\n"
        "    gradients = {k: g.mean(dim=0, keepdim=True) * n for k, g in gradients.items()}\n" + FACTORS,
        NEIGHBOURS,
    ),
    Mutation(
        "bias left out of the norm",
        "clipping",
        "for g in gradients.values()]",
        "for g in gradients.values() if g.ndim > 2]",
        NEIGHBOURS,
    ),
    Mutation(
        "non-finite counted",
        "clipping",
        "factors, 0.0)",
        "factors, 1.0)",
        "a_non_finite_record_is_as_good_as_absent",
    ),
    Mutation(
        "non-finite multiplied by zero",
        "clipping",
        "kept = factors > 0",
        "kept = factors >= 0",
        "a_non_finite_record_is_as_good_as_absent",
    ),
    Mutation("no noise", "step", NOISE, "0.0 * draw", EMPTY),
    Mutation("noise 3 % short", "step", NOISE, "0.97 * " + NOISE, EMPTY),
    Mutation("noise 3 % long", "step", NOISE, "1.03 * " + NOISE, EMPTY),
    Mutation("noise without the bound", "step", NOISE, "mechanism.noise_multiplier * draw", EMPTY),
    Mutation(
        "noise forgets one tensor",
        "step",
        "in sums.items()\n        }\n",
        "in sums.items()\n        } | dict(list(sums.items())[-1:])\n",
        EMPTY,
    ),
    Mutation(
        "empty draw skipped",
        "step",
        SUM,
        "    losses = list(losses)\n    if not losses:\n"
        "        return {k: torch.zeros_like(p) for k, p in trained.items()}\n" + SUM,
        EMPTY,
    ),
    Mutation(
        "noise only on an empty draw",
        "step",
        SUM,
        "    losses = list(losses)\n" + SUM + "    mechanism = None if losses else mechanism\n",
        FULL,
    ),
    Mutation(
        "realised batch size as divisor",
        "step",
        SUM,
        "    losses = list(losses)\n    expected_batch = max(1, sum(len(f()) for f in losses))\n" + SUM,
        DIVISOR,
    ),
    Mutation("noise divided once too often", "step", NOISE, NOISE + " / 16.0", EMPTY),
    Mutation("noise added after the division", "step", "(total / expected_batch)", "total", EMPTY),
    Mutation("the same noise each step", "step", "(*purpose, name)", "(name,)", INDEPENDENT),
    Mutation("the same noise in each tensor", "step", "(*purpose, name)", "purpose", INDEPENDENT),
    Mutation(
        "a stream for the seed alone",
        "noise",
        'key_for(self._seed, "normal", *purpose)',
        'key_for(self._seed, "normal")',
        INDEPENDENT,
    ),
    Mutation(
        "the last microbatch only",
        "direct_engine",
        "sums[name] += part",
        "sums[name] = part",
        "microbatches_change_nothing",
    ),
    Mutation(
        "the clip on the microbatch",
        "direct_engine",
        "clipped_sum(gradients, max_grad_norm)",
        "clipped_sum({k: g.sum(dim=0, keepdim=True) for k, g in gradients.items()}, max_grad_norm)",
        "microbatches_change_nothing",
    ),
    Mutation(
        "a layer's second use forgotten",
        "direct_engine",
        "collected[name] + gradient if",
        "gradient if",
        "the_same_as_real",
    ),
    Mutation(
        "unlisted parameters pass",
        "engine",
        "    _require_same_set(model, trained)\n",
        "",
        "what_is_trainable_but_not_noised_is_refused",
    ),
    Mutation(
        "batches of fixed size",
        "sampling",
        "    return torch.nonzero(taken).flatten()",
        "    order = source.uniform(records, purpose=purpose).argsort()\n"
        "    return order[: round(records * rate)]",
        "draws_are_poisson",
    ),
    Mutation(
        "rate 10 % too high",
        "sampling",
        "purpose=purpose) < rate",
        "purpose=purpose) < 1.1 * rate",
        "draws_are_poisson",
    ),
)


def _named(name: str):
    return {check.__name__: check for check in (*checks.CHECKS, the_same_as_real)}[name]


def the_same_as_real(changed: SimpleNamespace) -> None:
    """Clipped and whole gradients of a layer used twice, against each record alone through plain autograd."""
    from .models import one_at_a_time, perceptron

    for bound in (1e-3, 1e6):
        case = perceptron()
        got = changed.DirectEngine().clipped_sum(case.model, case.trained, case.micro_batches(5), bound)
        for name, wanted in one_at_a_time(case, bound).items():
            assert abs(got[name] - wanted).max() <= 1e-5 * max(
                wanted.abs().max(), 1e-3 * bound if bound < 1 else 1e-3
            )


@pytest.mark.parametrize("check", [*checks.CHECKS, the_same_as_real], ids=lambda check: check.__name__)
def test_the_real_room_passes(check):
    check(room())


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutants_are_caught(mutation):
    mutant = room(mutation.module, mutation.old, mutation.new)
    with pytest.raises(AssertionError):
        _named(mutation.caught_by)(mutant)
