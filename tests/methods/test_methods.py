"""Methods: published names, one set of parts."""

import math

import pytest
import torch
from torch.testing import assert_close

from fedlora.algebra.factors import orthonormalise
from fedlora.config import schema
from fedlora.config.method import FedAvg, FedSb, FedSvd, Ffa, Stale, SvFit
from fedlora.errors import ShapeError
from fedlora.methods import build
from fedlora.methods.mixing import Mixing
from fedlora.methods.subspace import Public, Subspace
from fedlora.values import Adapters, Factors, RoundPlan


def lora(init="orthonormal"):
    return schema.Lora(r=4, lora_alpha=4.0, target_modules=["query"], init=init)


def adapters(init="kaiming"):
    """Two sites after some training: B is not zero."""
    generator = torch.Generator().manual_seed(0)
    subspace = Subspace(init=init, refactor_every=None, seed=7)
    sites = {
        site: Factors(
            a=subspace.first(site, (9, 16), 4, torch.float64).a,
            b=torch.randn(9, 4, generator=generator, dtype=torch.float64),
        )
        for site in ("x", "y")
    }
    return Adapters(basis=3, scale=1.0, sites=sites, head={"bias": torch.ones(2)})


@pytest.mark.parametrize("beta", [0.0, 0.4])
@pytest.mark.parametrize("init", ["orthonormal", "kaiming"])
def test_a_method_is_what_its_paper_says(init, beta):
    stale = Stale(beta=beta)
    svd = build(FedSvd(name="fedsvd", refactor_every=3, stale=stale), lora(init), 0)
    ffa = build(Ffa(name="ffa", stale=stale), lora(init), 0)
    avg = build(FedAvg(name="fedavg", stale=stale), lora(init), 0)
    assert [method.name for method in (svd, ffa, avg)] == ["fedsvd", "ffa", "fedavg"]
    assert {method.trains for method in (svd, ffa, avg)} == {"b"}
    assert {method.mixing for method in (svd, ffa, avg)} == {Mixing(beta=beta)}
    assert svd.subspace == Subspace(init=init, refactor_every=3)
    assert ffa.subspace == Subspace(init=init, refactor_every=None)
    assert avg.subspace == Subspace(init="kaiming", refactor_every=None)  # whatever lora.init says


def test_fedavg_is_ffa_with_pefts_a():
    avg = build(FedAvg(name="fedavg"), lora("orthonormal"), 0)
    ffa = build(Ffa(name="ffa"), lora("kaiming"), 0)
    assert (avg.trains, avg.subspace, avg.mixing) == (ffa.trains, ffa.subspace, ffa.mixing)


@pytest.mark.parametrize("init", ["orthonormal", "kaiming"])
def test_the_first_a_depends_on_seed_and_site_alone(init):
    subspace, other = (Subspace(init=init, refactor_every=1, seed=seed) for seed in (7, 8))
    first = subspace.first("x", (16, 16), 4, torch.float64).a
    torch.rand(5)  # the ambient generator plays no part
    assert torch.equal(subspace.first("x", (16, 16), 4, torch.float64).a, first)
    assert not torch.equal(subspace.first("y", (16, 16), 4, torch.float64).a, first)
    assert not torch.equal(other.first("x", (16, 16), 4, torch.float64).a, first)
    assert torch.equal(subspace.first("x", (16, 16), 4, torch.float32).a, first.float())


def test_the_first_a_has_the_law_it_is_named_after():
    n = 1024
    orthonormal, kaiming = (
        Subspace(init=init, refactor_every=None, seed=1).first("x", (n, n), 64, torch.float64).a
        for init in ("orthonormal", "kaiming")
    )
    assert_close(orthonormal @ orthonormal.T, torch.eye(64, dtype=torch.float64))
    # kaiming_uniform_(a=sqrt(5)) is U(-1/sqrt(n), 1/sqrt(n)), of variance 1 / 3n; the mean is within 5 sigma
    assert float(kaiming.abs().max()) <= 1 / math.sqrt(n)
    assert abs(float(kaiming.mean())) < 5 * math.sqrt(1 / (3 * n) / kaiming.numel())
    assert math.isclose(float(kaiming.square().mean()) * 3 * n, 1.0, rel_tol=0.02)


def test_the_first_a_is_bounded_as_peft_draws_it():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.empty(8, 100)
    torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    ours = Subspace(init="kaiming", refactor_every=None).first("x", (100, 100), 8, torch.float32).a
    assert_close(ours.std(), drawn.std(), rtol=0.1, atol=0)
    assert_close(ours.abs().max(), drawn.abs().max(), rtol=0.05, atol=0)


def public(d_out, d_in, r):
    draw = torch.Generator().manual_seed(3)
    rows = {name: orthonormalise(torch.randn(r, d, generator=draw, dtype=torch.float64)).q
            for name, d in (("input_rows", d_in), ("weight_rows", d_in), ("weight_columns", d_out),
                            ("gradient_rows", d_in), ("gradient_columns", d_out))}  # fmt: skip
    return Public(mean_input=torch.ones(d_in, dtype=torch.float64), **rows)


def test_public_rows_are_taken_as_they_are():
    known = public(9, 16, 4)
    chosen = (
        ("principal", known.weight_rows),
        ("activations", known.input_rows),
        ("gradients", known.gradient_rows),
    )
    for init, rows in chosen:
        first = Subspace(init=init, refactor_every=None).first("x", (9, 16), 4, torch.float64, known)
        assert torch.equal(first.a, rows)
        assert torch.equal(first.b, torch.zeros(9, 4, dtype=torch.float64))
        assert first.left is None


@pytest.mark.parametrize("init", ["centred", "principal", "activations", "gradients"])
def test_what_is_not_known_of_a_site_is_an_error(init):
    with pytest.raises(ShapeError, match=r"lower lora\.r"):
        Subspace(init=init, refactor_every=None).first("x", (9, 16), 4, torch.float64)
    with pytest.raises(ShapeError, match=r"lower lora\.r"):
        Subspace(init=init, refactor_every=None).first("x", (9, 20), 4, torch.float64, public(9, 16, 3))


@pytest.mark.parametrize("left", ["orthonormal", "principal", "gradients"])
def test_a_core_begins_at_zero_between_two_orthonormal_frames(left):
    known = public(9, 16, 4)
    subspace = Subspace(init="orthonormal", left=left, refactor_every=None, seed=7)
    first = subspace.first("x", (9, 16), 4, torch.float64, known)
    assert torch.equal(first.b, torch.zeros(4, 4, dtype=torch.float64))
    assert_close(first.left.T @ first.left, torch.eye(4, dtype=torch.float64))
    whole_b = Subspace(init="orthonormal", refactor_every=None, seed=7).first("x", (9, 16), 4, torch.float64)
    assert torch.equal(first.a, whole_b.a)
    if left != "orthonormal":
        columns = known.weight_columns if left == "principal" else known.gradient_columns
        assert torch.equal(first.left, columns.T)
    else:
        assert not torch.equal(subspace.first("y", (9, 16), 4, torch.float64, known).left, first.left)


def test_fed_sb_trains_the_core_and_turns_nothing():
    method = build(FedSb(name="fedsb", left="orthonormal"), lora("principal"), 0)
    assert (method.name, method.trains, method.mixing) == ("fedsb", "core", Mixing(beta=0.0))
    assert method.subspace == Subspace(init="principal", left="orthonormal", refactor_every=None)


def test_svfit_trains_the_diagonal_between_the_weights_own_directions():
    method = build(SvFit(name="svfit"), lora("principal"), 7)
    assert (method.name, method.trains, method.mixing) == ("svfit", "singular-values", Mixing(beta=0.0))
    known = public(9, 16, 4)
    first = method.subspace.first("x", (9, 16), 4, torch.float64, known)
    assert torch.equal(first.a, known.weight_rows) and torch.equal(first.left, known.weight_columns.T)
    assert torch.equal(first.b, torch.zeros(1, 4, dtype=torch.float64))
    assert method.subspace.refactor_every is None


def test_a_fixed_subspace_is_the_very_same_object():
    before = adapters()
    assert Subspace(init="kaiming", refactor_every=None).move(before, 12) is before
    assert Subspace(init="kaiming", refactor_every=5).move(before, 12) is before


def test_a_moved_subspace_is_the_same_model_in_the_next_basis():
    before = adapters()
    after = Subspace(init="kaiming", refactor_every=5).move(before, 10)
    assert after.basis == before.basis + 1
    assert torch.equal(after.head["bias"], before.head["bias"])
    for site in before.sites:
        old, new = before.sites[site], after.sites[site]
        assert_close(new.b @ new.a, old.b @ old.a)
        assert_close(new.a @ new.a.T, torch.eye(4, dtype=torch.float64))


def test_a_threshold_shortens_every_singular_value_and_drops_the_small_ones():
    before = adapters()
    values = torch.linalg.svdvals(before.sites["x"].b @ before.sites["x"].a)[:4]
    threshold = float(values[2] + values[3]) / 2
    moved = Subspace(init="kaiming", refactor_every=1, soft_threshold=threshold).move(before, 1)
    after = moved.sites["x"]
    assert_close(torch.linalg.svdvals(after.b @ after.a)[:4], (values - threshold).clamp_min(0))
    u, s, v = torch.linalg.svd(before.sites["x"].b @ before.sites["x"].a, full_matrices=False)
    assert_close(after.b @ after.a, u @ torch.diag((s - threshold).clamp_min(0)) @ v)  # the closed form
    assert_close(
        after.a @ after.a.T, torch.eye(4, dtype=torch.float64)
    )  # directions that are dropped stay open


def test_the_config_says_the_threshold():
    method = build(FedSvd(name="fedsvd", soft_threshold=0.25), lora(), 0)
    assert method.subspace == Subspace(init="orthonormal", refactor_every=1, soft_threshold=0.25)
    assert build(FedSvd(name="fedsvd"), lora(), 0).subspace.soft_threshold == 0


PLAN = RoundPlan(
    run="run",
    round=1,
    cohort=("a", "b", "c"),
    probability={"a": 0.5, "b": 0.25, "c": 1.0, "late": 0.5},
    weight={"a": 0.2, "b": 0.3, "c": 0.4, "late": 0.1},
)


def shares(participants, plan, participation):
    mixing = Mixing(beta=0.0)
    factors = {client: mixing.factor(client, plan, participation) for client in participants}
    divisor = mixing.divisor(sum(factors.values()), participation)
    return {client: factor / divisor for client, factor in factors.items()}


def test_normalised_shares_sum_to_one_over_whoever_answered():
    assert shares(("a", "late"), PLAN, "normalised") == pytest.approx({"a": 2 / 3, "late": 1 / 3})
    assert shares(("b",), PLAN, "normalised") == {"b": 1.0}


def test_importance_shares_do_not_depend_on_who_else_answered():
    assert shares(("a", "b"), PLAN, "importance") == pytest.approx({"a": 0.4, "b": 1.2})
    assert shares(("b", "late"), PLAN, "importance") == pytest.approx({"b": 1.2, "late": 0.2})


@pytest.mark.parametrize("participation", ["normalised", "importance"])
def test_a_round_without_answers_divides_by_one(participation):
    assert Mixing(beta=0.5).divisor(0.0, participation) == 1.0


def test_the_two_corrections_agree_for_equal_weights_and_a_fixed_cohort():
    clients = [f"client-{index}" for index in range(8)]
    plan = RoundPlan(
        run="run",
        round=1,
        cohort=tuple(clients[:4]),
        probability=dict.fromkeys(clients, 4 / 8),
        weight=dict.fromkeys(clients, 1 / 8),
    )
    assert shares(clients[:4], plan, "normalised") == pytest.approx(shares(clients[:4], plan, "importance"))


def test_only_a_positive_beta_remembers():
    assert not Mixing(beta=0.0).remembers
    assert Mixing(beta=0.01).remembers


def test_the_dense_route_keeps_the_product_and_loses_the_rows_that_b_does_not_use():
    dense = build(FedSvd(name="fedsvd", route="dense"), lora("orthonormal"), 0).subspace
    lq = build(FedSvd(name="fedsvd"), lora("orthonormal"), 0).subspace
    draw = torch.Generator().manual_seed(2)
    a = dense.first("x", (9, 16), 4, torch.float64).a
    b = torch.randn(9, 4, generator=draw, dtype=torch.float64)
    thin = b.clone()
    thin[:, 2:] = 0.0
    for columns, kept in ((b, 4), (thin, 2)):
        before = Adapters(basis=0, scale=1.0, sites={"x": Factors(a=a, b=columns)})
        x, y = dense.move(before, 1).sites["x"], lq.move(before, 1).sites["x"]
        assert torch.allclose(x.b @ x.a, columns @ a, rtol=0, atol=1e-12)
        assert torch.allclose(x.a @ x.a.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
        if kept == 4:  # up to signs, the same singular vectors
            assert torch.allclose((x.a @ y.a.T).abs(), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)
        assert float((x.a @ a.T).square().sum()) == pytest.approx(4) if kept == 4 else True
        assert float((y.a @ a.T).square().sum()) == pytest.approx(4)
        if kept == 2:
            assert float((x.a @ a.T).square().sum()) < 3.9
    assert dense.leaves(1) and not lq.leaves(1)
