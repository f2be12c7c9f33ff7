"""Both engines compute the definition, and refuse what they cannot bound."""

import copy
import re

import pytest
import torch
from torch import nn

from fedlora.errors import PrivacyError
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.engine import trained_linears
from fedlora.privacy.opacus_engine import OpacusEngine

from .models import bert, llama, one_at_a_time, perceptron, trainable

ENGINES = [DirectEngine(), OpacusEngine()]
# Opacus clips by C / (norm + 1e-6) and sums in float32; the direct engine keeps float32's own rounding only.
TOLERANCE = {"DirectEngine": 2e-6, "OpacusEngine": 2e-5}
engines = pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
cases = pytest.mark.parametrize("build", [perceptron, bert, llama], ids=lambda build: build.__name__)


def run(engine, case, bound, size=None, of=None):
    return engine.clipped_sum(case.model, case.trained, case.micro_batches(size, of), bound)


def assert_same(got, wanted, tolerance):
    assert set(got) == set(wanted)
    norm = float(torch.stack([w.double().square().sum() for w in wanted.values()]).sum().sqrt())
    for name, value in wanted.items():
        assert torch.allclose(
            got[name].double(), value.double(), rtol=0, atol=tolerance * max(norm, 1e-12)
        ), name


@engines
@cases
@pytest.mark.parametrize("bound", [0.05, 1e6, None])
def test_engines_compute_the_definition(engine, build, bound):
    case = build()
    assert_same(run(engine, case, bound), one_at_a_time(case, bound), TOLERANCE[type(engine).__name__])


@engines
@cases
def test_the_size_of_microbatches_changes_nothing(engine, build):
    case = build()
    whole = run(engine, case, 0.05)
    for size in (1, 2, 5):
        assert_same(run(engine, case, 0.05, size), whole, 1e-5)


@engines
@cases
def test_the_model_is_left_as_it_was(engine, build):
    case = build()
    parameter = next(iter(case.trained.values()))
    kept = parameter.grad = torch.full_like(parameter, 3.0)
    before, attributes = (
        copy.deepcopy(case.model.state_dict()),
        [sorted(vars(m)) for m in case.model.modules()],
    )
    modes = [m.training for m in case.model.modules()]
    run(engine, case, 0.1, 2)
    with pytest.raises(ZeroDivisionError):
        engine.clipped_sum(case.model, case.trained, [lambda: 1 / 0], 0.1)
    assert all(torch.equal(before[name], value) for name, value in case.model.state_dict().items())
    assert [sorted(vars(m)) for m in case.model.modules()] == attributes
    assert [m.training for m in case.model.modules()] == modes
    assert not any(m._forward_hooks or m._backward_hooks for m in case.model.modules())
    assert parameter.grad is kept and bool((kept == 3.0).all())
    assert all(not vars(p) and (p is parameter or p.grad is None) for p in case.trained.values())


@engines
def test_no_draw_at_all_sums_to_zero(engine):
    case = perceptron()
    for losses in ([], [lambda: torch.zeros(0)]):
        sums = engine.clipped_sum(case.model, case.trained, losses, 1.0)
        assert set(sums) == set(case.trained) and not any(s.any() for s in sums.values())


@engines
@cases
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_record_without_finite_gradient_contributes_zero(engine, build, poison):
    case = build()
    others = torch.arange(1, case.records)

    def losses():
        factor = torch.ones(case.records)
        factor[0] = poison
        return case.losses(torch.arange(case.records)) * factor

    poisoned = engine.clipped_sum(case.model, case.trained, [losses], 0.05)
    assert_same(poisoned, run(engine, case, 0.05, of=others), 2e-5)
    # The same without a bound, which is the non-private path.
    assert_same(
        engine.clipped_sum(case.model, case.trained, [losses], None), run(engine, case, None, of=others), 2e-5
    )


@engines
@cases
def test_examples_are_not_coupled(engine, build):
    """The share of record 0 is the same alone and among any others, padded or not."""
    case = build()
    alone = run(engine, case, 0.05, of=torch.tensor([0]))
    for others in ([1], [3, 1, 2], [5, 4]):
        with_it = run(engine, case, 0.05, of=torch.tensor([0, *others]))
        without = run(engine, case, 0.05, of=torch.tensor(others))
        assert_same({name: with_it[name] - without[name] for name in alone}, alone, 5e-5)


@engines
def test_evaluation_mode_and_frozen_inputs_make_no_difference(engine):
    case = bert()
    wanted = run(engine, case, 0.05)
    case.model.eval()
    assert_same(run(engine, case, 0.05), wanted, 1e-6)


def test_direct_engine_widens_narrow_models():
    case = perceptron(dtype=torch.bfloat16)
    sums = run(DirectEngine(), case, 0.01, size=1)
    bounded = torch.stack([s.square().sum() for s in sums.values()]).sum().sqrt()
    assert all(s.dtype == torch.float64 for s in sums.values())
    assert float(bounded) <= case.records * 0.01 * (1 + 1e-6)
    one = run(DirectEngine(), case, 0.01, of=torch.tensor([2]))
    norm = float(torch.stack([s.square().sum() for s in one.values()]).sum().sqrt())
    assert norm == pytest.approx(0.01, rel=1e-6)  # a clip in bfloat16 would miss by 5e-3
    with pytest.raises(PrivacyError, match="float32"):
        run(OpacusEngine(), case, 0.01)


def test_direct_engine_computes_no_gradient_of_a_weight():
    """Counted: as many products as plain training needs, the per-example ones in place of the batch's."""
    from torch.utils.flop_counter import FlopCounterMode

    case = llama()
    with FlopCounterMode(display=False) as plain:
        case.losses(torch.arange(case.records)).sum().backward()
    with FlopCounterMode(display=False) as direct:
        run(DirectEngine(), case, 0.05)
    clip = 2 * case.records * sum(p.numel() for p in case.trained.values())
    assert direct.get_total_flops() == plain.get_total_flops() + clip


def _model_with(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), module, nn.Linear(4, 2))


@engines
def test_anything_trainable_but_unlisted_is_refused(engine):
    case = perceptron()
    partial = dict(list(case.trained.items())[:-1])
    with pytest.raises(PrivacyError, match="not listed"):
        engine.clipped_sum(case.model, partial, case.micro_batches(), 1.0)
    case.model[0].bias.requires_grad_(True)
    with pytest.raises(PrivacyError, match=r"0\.bias"):
        run(engine, case, 1.0)


@engines
def test_anything_listed_but_frozen_foreign_or_twice_is_refused(engine):
    case = perceptron()
    for extra in (case.model[0].weight, nn.Parameter(torch.zeros(2)), case.model[4].bias):
        with pytest.raises(PrivacyError, match="differ"):
            engine.clipped_sum(case.model, {**case.trained, "extra": extra}, case.micro_batches(), 1.0)
    with pytest.raises(PrivacyError):
        engine.clipped_sum(case.model, {}, case.micro_batches(), 1.0)


@engines
def test_only_linear_layers_are_covered(engine):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for module in (nn.LayerNorm(4), Scaled(4, 4), nn.Bilinear(4, 4, 4)):
        model = _model_with(module)
        with pytest.raises(PrivacyError, match=type(module).__name__):
            engine.clipped_sum(model, trainable(model), [], 1.0)


def test_each_trained_layer_is_found_once_under_the_first_name_that_torch_gives_it():
    shared = nn.Linear(3, 3)
    inner = nn.Sequential(nn.Linear(3, 3), shared, nn.ReLU())
    model = nn.ModuleDict(
        {"one": inner, "two": nn.Sequential(inner, shared, nn.Linear(3, 2)), "last": shared}
    )
    model["one"].register_module("none", None)
    found = [layer.path for layer in trained_linears(model, dict(model.named_parameters()))]
    assert found == [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@engines
def test_batch_normalisation_is_refused(engine):
    model = _model_with(nn.BatchNorm1d(4, affine=False))
    with pytest.raises(PrivacyError, match="normalises"):
        engine.clipped_sum(model, trainable(model), [], 1.0)
    model[1].eval()
    engine.clipped_sum(model, trainable(model), [lambda: model(torch.randn(3, 4)).sum(dim=1)], 1.0)


@engines
def test_losses_that_mix_records_are_refused(engine):
    case = perceptron()
    everyone = torch.arange(case.records)
    wrong = [
        lambda: case.losses(everyone).mean(),
        lambda: case.losses(everyone).mean()[None],
        lambda: case.losses(everyone)[:, None],
        lambda: case.losses(everyone).detach(),
        lambda: case.losses(everyone).reshape(-1, 2).sum(dim=1),
    ]
    for losses in wrong:
        with pytest.raises(PrivacyError):
            engine.clipped_sum(case.model, case.trained, [losses], 1.0)


@engines
def test_no_refusal_tells_how_many_records_were_drawn(engine):
    model = nn.ModuleDict({"one": nn.Linear(3, 2), "two": nn.Linear(2, 2)})
    drawn = torch.randn(74, 3)
    wrong = [
        (lambda: model["two"](model["one"](drawn)).reshape(37, -1).sum(dim=1), 1),
        (lambda: model["two"](model["one"](drawn).reshape(37, 2, 2)).sum(dim=(1, 2)), 1),
        (lambda: model["two"](model["one"](drawn)).sum(dim=1), 3),
        (lambda: model["two"](model["one"](drawn))[:, :1], 1),
    ]
    for losses, each in wrong:
        with pytest.raises(PrivacyError) as refusal:
            engine.clipped_sum(model, trainable(model), [losses], 1.0, each)
        assert not {"74", "37"} & set(re.findall(r"\d+", str(refusal.value)))


@engines
def test_a_layer_the_loss_does_not_call_is_refused(engine):
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    with pytest.raises(PrivacyError, match="idle"):
        engine.clipped_sum(
            model, trainable(model), [lambda: model["used"](torch.randn(4, 3)).sum(dim=1)], 1.0
        )
