"""Each privacy-relevant line, broken on purpose, makes the check fail that is named beside it."""

import pytest

from . import checks
from .mutants import Mutation, room

CLIP = "torch.clamp(max_grad_norm / norms, max=1.0)"
FACTORS = "    factors = clip_factors(ops.norms(rows), max_grad_norm)\n"
SUM = "    sums = engine.clipped_sum(model, trained, losses, release.bound, sequences_per_record)\n"
REPLACED = "__import__('dataclasses').replace"
NEIGHBOURS = "neighbours_differ_by_at_most_the_bound"
SIZES = "gradients_of_any_size_end_within_the_bound"
UNREACHED = "what_no_gradient_reaches_is_refused"
NARROW = "narrow_gradients_are_summed_wide"
WIDE = "numbers_beyond_a_chunk_count"
NON_FINITE = "a_non_finite_record_is_as_good_as_absent"
ALONE = "sums_are_those_of_each_record_alone"
EMPTY = "an_empty_draw_carries_the_full_noise_in_every_tensor"
FULL = "a_full_draw_carries_the_full_noise"
INDEPENDENT = "noise_of_steps_and_tensors_is_independent"
DIVISOR = "the_divisor_does_not_depend_on_the_draw"
MICRO = "microbatches_change_nothing"
COUPLED = "what_couples_records_is_refused"
PAID = "noise_pays_for_the_rounding_of_the_sum"
GRID = "everything_released_lies_on_the_grid"
LAW = "normals_are_standard_normal"
UNREPEATED = "nobody_repeats_the_entropy_of_the_system"
STREAMS = "a_stream_depends_on_its_key_alone"
UNIFORM = "uniforms_are_uniform"
SPENT = "what_is_spent_is_what_is_used"
POISSON = "draws_are_poisson"
CONSTANTS = "rate_and_divisor_are_constants_of_the_configuration"

CLIPPING = (
    Mutation("no clip", "clipping", CLIP, "torch.ones_like(norms)", NEIGHBOURS),
    Mutation("clip by the squared norm", "clipping", "max_grad_norm / norms,",
             "max_grad_norm / norms.square(),", NEIGHBOURS),
    Mutation("clip to twice the bound", "clipping", CLIP, CLIP.replace("max_grad", "2 * max_grad"),
             NEIGHBOURS),
    Mutation("clip to a little less than the bound", "clipping", CLIP, CLIP.replace("max_grad", "0.99 * max_grad"),
             "one_clipped_record_has_the_norm_of_the_bound"),
    Mutation("normalise, also small ones", "clipping", ", max=1.0)", ", max=1e9)", ALONE),
    Mutation("squares in float32", "torch_ops", "vector_norm(part, dim=1, dtype=torch.float64)",
             "vector_norm(part, dim=1).double()", SIZES),
    Mutation("scaled in float32", "torch_ops", "shares @ part.to(torch.float64)",
             "(shares.float() @ part.float()).double()", WIDE),
    Mutation("numbers beyond the first chunk left out of the norm", "torch_ops",
             "vector_norm(torch.stack(parts), dim=0)", "vector_norm(torch.stack(parts[:1]), dim=0)", WIDE),
    Mutation("chunks' norms added", "torch_ops", "torch.linalg.vector_norm(torch.stack(parts), dim=0)",
             "torch.stack(parts).sum(dim=0)", WIDE),
    Mutation("chunks in another order", "torch_ops", "torch.cat(parts, dim=1)",
             "torch.cat([*parts[1:], parts[0]], dim=1)", WIDE),
    Mutation("tokens summed in bfloat16", "torch_ops", "    wide_dy, wide_h = dy.to(out.dtype), h.to(out.dtype)",
             "    wide_dy, wide_h = dy, h\n    out[:] = torch.einsum('ntm,ntr->nmr', dy, h)\n    return", NARROW),
    Mutation("a bias summed in bfloat16", "torch_ops", "torch.sum(wide, dim=1, out=out)",
             "out[:] = torch.stack([w.to(dy.dtype).cumsum(0)[-1] for w in wide])", NARROW),
    Mutation("average before the clip", "clipping", FACTORS,
             "    rows = rows.mean(dim=0, keepdim=True) * len(rows)\n" + FACTORS, NEIGHBOURS),
    Mutation("part of a row left out of the norm", "clipping", "clip_factors(ops.norms(rows), max_grad_norm)\n"
             "    return _weighted(ops, rows, factors[None]", "clip_factors(ops.norms(rows[:, 1:]), max_grad_norm)\n"
             "    return _weighted(ops, rows, factors[None]", NEIGHBOURS),
    Mutation("non-finite counted", "clipping", "nan_to_num(nan=0.0)", "nan_to_num(nan=1.0)", NON_FINITE),
    Mutation("non-finite left in", "clipping", "present = largest > 0", "present = largest >= 0", NON_FINITE),
    Mutation("non-finite multiplied by zero", "clipping", "if len(rows) and not float(largest.min()) > 0:", "if False:",
             NON_FINITE),
)  # fmt: skip

NORMALS = "return torch.where((words & 1).bool(), size, -size)"
SEEDED_NORMALS = 'key_for(self._seed, "normal", *purpose)'
NOISE = (
    Mutation("normals 3 % short", "noise", NORMALS, NORMALS.replace("return ", "return 0.97 * "), LAW),
    Mutation("normals 3 % long", "noise", NORMALS, NORMALS.replace("return ", "return 1.03 * "), LAW),
    Mutation("one sign only", "noise", NORMALS, "return -size", LAW),
    Mutation("a bit of the size read as the sign", "noise", "(words & 1)", "(words < 0)", LAW),
    Mutation("the wrong half of the law", "noise", "+ 0.5) * 2.0**-64", "+ 0.5) * 2.0**-65", LAW),
    Mutation("a triangle in place of a bell", "noise", NORMALS,
             "return _uniforms(words) * 2.44948974278 + _uniforms(words.roll(1)) * 2.44948974278 - 2.44948974278",
             LAW),
    Mutation("a short stream repeated", "noise", "bytearray(cipher.encryptor().update(bytes(8 * words)))",
             "bytearray((cipher.encryptor().update(bytes(8 * 4096)) * (words // 4096 + 1))[: 8 * words])",
             LAW),
    Mutation("the sign bit shifted in", "noise", "& ((1 << (64 - bits)) - 1)", "", UNIFORM),
    Mutation("uniforms up to two", "noise", "2.0**-53", "2.0**-52", UNIFORM),
    Mutation("a public key for deployed noise", "noise",
             "_normals(_keystream(torch.Size(shape).numel(), os.urandom(32)))",
             "_normals(_keystream(torch.Size(shape).numel(), bytes(32)))", UNREPEATED),
    Mutation("a public key for deployed draws", "noise", "_uniforms(_keystream(count, os.urandom(32)))",
             "_uniforms(_keystream(count, bytes(32)))", UNREPEATED),
    Mutation("torch's global generator for deployed noise", "noise",
             "_normals(_keystream(torch.Size(shape).numel(), os.urandom(32)))", "torch.randn(shape)",
             UNREPEATED),
    Mutation("an unseeded torch.Generator for deployed noise", "noise",
             "_normals(_keystream(torch.Size(shape).numel(), os.urandom(32)))",
             "torch.randn(shape, generator=torch.Generator(), dtype=torch.float64)", UNREPEATED),
    Mutation("a key of the process, kept over a fork", "noise",
             "_uniforms(_keystream(count, os.urandom(32)))",
             "_uniforms(_keystream(count + _kept(), _KEY)[-count:])\n\n\n_KEY, _COUNT = os.urandom(32), [0]\n\n\n"
             "def _kept() -> int:\n    _COUNT[0] += 1000\n    return _COUNT[0]",
             "a_forked_child_draws_its_own_noise"),
    Mutation("the key not used", "noise", "algorithms.AES(key)", "algorithms.AES(bytes(32))", STREAMS),
    Mutation("a stream for the seed alone", "noise", SEEDED_NORMALS, 'key_for(self._seed, "normal")',
             INDEPENDENT),
    Mutation("one draw of records for all steps", "noise", 'key_for(self._seed, "uniform", *purpose)',
             'key_for(self._seed, "uniform")', STREAMS),
    Mutation("a stream that forgets the seed", "noise", 'key_for(self._seed, "uniform", *purpose)',
             'key_for(0, "uniform", *purpose)', STREAMS),
)  # fmt: skip

DRAW = "_rounded(deviation * draw, step)"
GAUSSIAN = (
    Mutation("no noise", "gaussian", DRAW, "_rounded(0.0 * draw, step)", EMPTY),
    Mutation("noise 3 % short", "gaussian", "deviation * draw", "0.97 * deviation * draw", EMPTY),
    Mutation("noise 3 % long", "gaussian", "deviation * draw", "1.03 * deviation * draw", EMPTY),
    Mutation("noise without the bound", "gaussian", "= noise_multiplier * sensitivity(",
             "= noise_multiplier + 0 * sensitivity(", EMPTY),
    Mutation("noise without the multiplier", "gaussian", "= noise_multiplier * sensitivity(",
             "= sensitivity(", EMPTY),
    Mutation("the rounding of the sum not paid for", "gaussian",
             " + grid(bound, noise_multiplier) * math.sqrt(numbers)", "", PAID),
    Mutation("the margin for coupled rounding not paid for", "gaussian", "bound * (1 + MARGIN)", "bound", PAID),
    Mutation("rounding paid for one coordinate", "gaussian", "* math.sqrt(numbers)", "* 1", PAID),
    Mutation("rounding paid tensor by tensor", "gaussian", "sum(total.numel() for total in sums.values())",
             "max(total.numel() for total in sums.values())", PAID),
    Mutation("the sum not rounded", "gaussian", "_rounded(total, step) +", "total +", GRID),
    Mutation("the noise not rounded", "gaussian", DRAW, "(deviation * draw)", GRID),
    Mutation("rounded in float32", "gaussian", "value.to(torch.float64) / step", "value.float() / step",
             GRID),
    Mutation("a grid that is no power of two", "gaussian",
             "2.0 ** (math.floor(math.log2(noise_multiplier * bound)) - GRID_BITS)",
             "noise_multiplier * bound * 2.0**-GRID_BITS", GRID),
    Mutation("a grid of the multiplier alone", "gaussian", "math.log2(noise_multiplier * bound)",
             "math.log2(noise_multiplier)", GRID),
    Mutation("a coarse grid, not paid for", "gaussian", "GRID_BITS = 20", "GRID_BITS = 12", PAID),
    Mutation("noise forgets one tensor", "gaussian", "for name, total in sums.items()\n    }",
             "for name, total in sums.items()\n    } | dict(list(sums.items())[-1:])", EMPTY),
    Mutation("the same noise each step", "gaussian", "(*purpose, name)", "(name,)", INDEPENDENT),
    Mutation("the same noise in each tensor", "gaussian", "(*purpose, name)", "purpose", INDEPENDENT),
)  # fmt: skip

STEP = (
    Mutation("the bound of the noise is not the clip's", "step", "bound=release.mechanism.max_grad_norm",
             "bound=0.9 * release.mechanism.max_grad_norm", EMPTY),
    Mutation("the noise is not the mechanism's", "step",
             "noise_multiplier=release.mechanism.noise_multiplier",
             "noise_multiplier=0.9 * release.mechanism.noise_multiplier", EMPTY),
    Mutation("the clip is not the mechanism's", "step", "else self.mechanism.max_grad_norm\n",
             "else 2 * self.mechanism.max_grad_norm\n", NEIGHBOURS),
    Mutation("empty draw skipped", "step", SUM,
             "    losses = list(losses)\n    if not losses:\n"
             "        return {k: torch.zeros_like(p) for k, p in trained.items()}\n" + SUM, EMPTY),
    Mutation("noise only on an empty draw", "step", SUM,
             "    losses = list(losses)\n" + SUM
             + f"    if losses:\n        release = {REPLACED}(release, mechanism=None)\n", FULL),
    Mutation("realised batch size as divisor", "step", SUM,
             "    losses = list(losses)\n"
             f"    drawn = max(1, sum(len(f()) for f in losses))\n"
             f"    release = {REPLACED}(release, expected_batch=drawn)\n" + SUM,
             DIVISOR),
    Mutation("noise added after the division", "step", "(total / release.expected_batch)", "total", EMPTY),
    Mutation("the same noise each step", "step", "purpose=release.purpose", 'purpose=("noise",)', INDEPENDENT),
    Mutation("a tensor the engine forgot", "step", "if set(sums) != set(trained)", "if False",
             "what_the_engine_forgets_is_refused"),
    Mutation("a smaller noise is debited than used", "step",
             "noise_multiplier=mechanism.noise_multiplier,\n        sample_rate",
             "noise_multiplier=1.1 * mechanism.noise_multiplier,\n        sample_rate", SPENT),
    Mutation("a smaller rate is debited", "step", "sample_rate=sampling.rate",
             "sample_rate=0.9 * sampling.rate", SPENT),
    Mutation("a rounded rate is debited", "step", "sample_rate=sampling.rate",
             "sample_rate=round(sampling.rate, 4)", SPENT),
    Mutation("one step is not debited", "step", "steps=steps,", "steps=steps - 1,", SPENT),
    Mutation("the cap is not told", "step", "max_draw=sampling.max_draw", "max_draw=None", SPENT),
    Mutation("the cap is told wrong", "step", "max_draw=sampling.max_draw",
             "max_draw=2 * sampling.max_draw", SPENT),
    Mutation("the mean of a draw is told wrong", "step", "expected_batch=sampling.expected_batch",
             "expected_batch=1.0", SPENT),
)  # fmt: skip

JOINED = "rows.unflatten(0, (-1, self._each)).flatten(1, -2)"
PAIRS = "the_sequences_of_a_record_are_clipped_as_one"
ENGINES = (
    Mutation("the last microbatch only", "direct_engine", "sums = _plus(sums, clipped_sum(self",
             "sums = _plus(None, clipped_sum(self", MICRO),
    Mutation("the clip on the microbatch", "direct_engine", "clipped_sum(self.ops, rows, max_grad_norm)",
             "clipped_sum(self.ops, rows.sum(dim=0, keepdim=True), max_grad_norm)",
             MICRO),
    Mutation("a layer's second use forgotten", "rows", "again.add_(place)", "pass", ALONE),
    Mutation("a layer's first use forgotten", "rows", "if name not in self._written:", "if True:", ALONE),
    Mutation("sequences not joined to records", "rows", JOINED, "rows", PAIRS),
    Mutation("sequences of different records joined", "rows", JOINED,
             "rows.unflatten(0, (self._each, -1)).transpose(0, 1).flatten(1, -2)", PAIRS),
    Mutation("the first sequence of a record only", "rows", JOINED,
             "rows.unflatten(0, (-1, self._each))[:, 0]", PAIRS),
    Mutation("sequences of a record not told to the engine", "step", "release.bound, sequences_per_record)",
             "release.bound)", PAIRS),
    Mutation("Opacus: sequences not joined to records", "opacus_engine", "    if sequences_per_record > 1:",
             "    if False:", PAIRS),
    Mutation("Opacus: the first sequence of a record only", "opacus_engine", ".sum(dim=1)  # pyright",
             "[:, 0]  # pyright", PAIRS),
    Mutation("rows not counted", "rows", "if len(self.rows) != examples:", "if False:", COUPLED),
    Mutation("a tensor that no gradient reached", "rows", "if missing or self.rows is None:",
             "if self.rows is None:", UNREACHED),
    Mutation("two tensors in one place", "rows", "slice(stop, stop + shape.numel())",
             "slice(0, shape.numel())", ALONE),
    Mutation("unlisted parameters pass", "engine", "    _require_same_set(modules, trained)\n", "",
             "what_is_trainable_but_not_noised_is_refused"),
    Mutation("batch normalisation passes", "engine", "        _refuse_batch_norm(path, module)\n", "",
             COUPLED),
    Mutation("any kind of linear layer passes", "engine", "type(module) is not layer",
             "not isinstance(module, layer)", COUPLED),
    Mutation("Opacus: the last microbatch only", "opacus_engine", "sums[name] += part", "sums[name] = part",
             MICRO),
    Mutation("Opacus: no clip", "opacus_engine", "max_grad_norm=bound", 'max_grad_norm=float("inf")',
             NEIGHBOURS),
    Mutation("Opacus: clip to twice the bound", "opacus_engine", "max_grad_norm=bound",
             "max_grad_norm=2 * bound", NEIGHBOURS),
    Mutation("Opacus: non-finite counted", "opacus_engine", "        parameter.grad_sample[~finite] = 0",
             "        pass", NON_FINITE),
    Mutation("Opacus: rows not counted", "opacus_engine", "if g is None or len(g) != records", "if False",
             COUPLED),
)  # fmt: skip

SAMPLING = (
    Mutation("batches of fixed size", "sampling", "    return taken[: sampling.max_draw]",
             "    return source.uniform(records, purpose=purpose).argsort()[: round(records * sampling.rate)]",
             POISSON),
    Mutation("rate 10 % too high", "sampling", "< sampling.rate", "< 1.1 * sampling.rate", POISSON),
    Mutation("rate from the records held", "sampling", "< sampling.rate",
             "< sampling.expected_batch / (0.9 * records)", POISSON),
    Mutation("no cap", "sampling", "taken[: sampling.max_draw]", "taken", "a_draw_ends_at_its_cap"),
    Mutation("cap at the mean", "sampling", "cap = batch_size + math.ceil(14 * math.sqrt(batch_size)) + 40",
             "cap = batch_size", CONSTANTS),
    Mutation("cap that moves with the records", "sampling", "math.ceil(14 * math.sqrt(batch_size)) + 40",
             "math.ceil(14 * math.sqrt(min(batch_size, records)))", CONSTANTS),
    Mutation("rate of whole batches, as Opacus takes it", "sampling", "batch_size / records)",
             "1 / max(1, records // batch_size))", CONSTANTS),
    Mutation("divisor rounded down from the records, as Opacus takes it", "sampling",
             "expected_batch=float(batch_size)",
             "expected_batch=float(int(records * (1 / math.ceil(records / batch_size))))", CONSTANTS),
)  # fmt: skip

MUTATIONS = (*CLIPPING, *NOISE, *GAUSSIAN, *STEP, *ENGINES, *SAMPLING)


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_the_real_room_passes(check):
    check(room())


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.module}: {mutation.name}")
def test_mutants_are_caught(mutation):
    mutant = room(mutation.module, mutation.old, mutation.new)
    with pytest.raises(AssertionError):
        {check.__name__: check for check in checks.CHECKS}[mutation.caught_by](mutant)


def test_every_check_catches_a_mutant():
    assert {mutation.caught_by for mutation in MUTATIONS} == {check.__name__ for check in checks.CHECKS}
