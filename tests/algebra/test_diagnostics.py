"""Spectrum, rank, shares, intruders and signal: each equals what was planted, or what the dense product says."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fedlora.algebra.diagnostics import (
    Shares,
    decomposed,
    effective_rank,
    energy_shares,
    explained_share,
    intruder_dimensions,
    share_by_chance,
    signal_to_noise,
    singular_values,
)
from fedlora.algebra.factors import orthonormalise
from fedlora.errors import ShapeError
from fedlora.values import Factors

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def normal(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def columns(rows, count, seed=3):
    """Orthonormal columns (rows, count)."""
    return orthonormalise(normal(count, rows, seed=seed)).q.T


def weight_of(values, d_out, d_in):
    """A weight (d_out, d_in) of these singular values, and its left and right vectors as columns."""
    left, right = columns(d_out, len(values), seed=4), columns(d_in, len(values), seed=5)
    return left * torch.tensor(values, dtype=torch.float64) @ right.T, left, right


@st.composite
def factors(draw):
    """Sides 1..20, r from 1 to 6 and so at times above a side, with or without a core's frame."""
    r, n, m = draw(st.integers(1, 6)), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if draw(st.booleans()):
        k = draw(st.integers(1, m))
        return Factors(a=drawn(r, n), b=drawn(k, r), left=orthonormalise(drawn(k, m)).q.T)
    return Factors(a=drawn(r, n), b=drawn(m, r))


def product(f):
    return (f.b if f.left is None else f.left @ f.b) @ f.a


@given(factors(), st.floats(-4, 4))
def test_singular_values_are_those_of_the_product_that_is_never_formed(f, scale):
    values, dense = singular_values(f, scale), torch.linalg.svdvals(scale * product(f))
    assert values.shape == (f.a.shape[0],)
    kept = min(len(values), len(dense))
    assert_close(values[:kept], dense[:kept], **EXACT)
    assert float(values[kept:].abs().sum()) <= 1e-9 and float(dense[kept:].sum()) <= 1e-9


def test_k_equal_directions_have_effective_rank_k_whatever_their_size():
    for k in (1, 3, 8):
        values = torch.cat([torch.full((k,), 1e-5, dtype=torch.float64), torch.zeros(8 - k)])
        assert effective_rank(values) == pytest.approx(k, rel=1e-12)
    assert effective_rank(torch.zeros(4)) == 0.0


def test_effective_rank_is_the_entropy_of_values_not_of_energies():
    """By hand: shares 3/4 and 1/4 of the sum, 9/10 and 1/10 of the energy."""
    values = torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert effective_rank(values) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert_close(energy_shares(values), torch.tensor([0.9, 0.1], dtype=torch.float64))
    assert energy_shares(torch.zeros(2)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("d_out", "d_in"), [(14, 9), (9, 14)])
def test_a_frozen_weight_has_no_intruders(d_out, d_in):
    still = Factors(a=normal(2, d_in), b=torch.zeros(d_out, 2, dtype=torch.float64))
    assert intruder_dimensions(normal(d_out, d_in), still, 2.0, k=9) == 0


@pytest.mark.parametrize(("cosine", "found"), [(0.1, 1), (0.49, 1), (0.51, 0), (0.9, 0)])
def test_a_planted_intruder_is_found_by_its_cosine(cosine, found):
    """The last left vector u of a tall weight turns towards a direction that the weight never reaches: by c, exactly.

    s u v' + t w v' = (s u + t w) v' is one singular triple, of length sqrt(s^2 + t^2) and cosine s / length with u.
    """
    weight, left, right = weight_of([5.0, 4.0, 3.0, 2.0], 12, 4)
    new = torch.nn.functional.normalize((lambda x: x - left @ (left.T @ x))(normal(12, seed=9)), dim=0)
    for sign in (1.0, -1.0):
        t = sign * 2.0 * math.sqrt(1 / cosine**2 - 1)
        planted = Factors(a=right[:, 3:].T, b=(t / 0.5 * new)[:, None])
        assert intruder_dimensions(weight, planted, 0.5) == found
        assert intruder_dimensions(weight, planted, 0.5, epsilon=cosine - 0.01) == 0
        assert intruder_dimensions(weight, planted, 0.5, epsilon=cosine + 0.01) == 1


def test_only_the_first_k_directions_are_looked_at():
    """The same, of length sqrt(4 + 9) = 3.6 behind 5 and 4: third."""
    weight, left, right = weight_of([5.0, 4.0, 3.0, 2.0], 12, 4)
    new = torch.nn.functional.normalize((lambda x: x - left @ (left.T @ x))(normal(12, seed=9)), dim=0)
    planted = Factors(a=right[:, 3:].T, b=(3.0 * new)[:, None])
    found = [intruder_dimensions(weight, planted, 1.0, k=k, epsilon=0.6) for k in (1, 2, 3, 4)]
    assert found == [0, 0, 1, 1]


def test_stretching_the_weights_own_directions_plants_no_intruder():
    weight, left, right = weight_of([5.0, 4.0, 3.0, 2.0], 12, 7)
    stretched = Factors(a=right[:, 2:].T, b=10.0 * left[:, 2:])
    assert intruder_dimensions(weight, stretched, 3.0, base=decomposed(weight)) == 0


def test_an_update_is_explained_by_the_directions_it_was_made_of():
    """0.8 of the length, 0.64 of the energy, along first outputs; all of it along the last inputs."""
    weight, left, right = weight_of([5.0, 4.0, 3.0, 2.0], 12, 9)
    outputs = 0.8 * left[:, :1] + 0.6 * left[:, 3:]
    found = explained_share(decomposed(weight), Factors(a=2.0 * right[:, 3:].T, b=outputs), 2)
    assert_close(torch.tensor([found.left, found.right, found.both]), torch.tensor([0.64, 0.0, 0.0]), **EXACT)
    inside = explained_share(decomposed(weight), Factors(a=right[:, :2].T, b=left[:, :2]), 2)
    assert_close(torch.tensor([inside.left, inside.right, inside.both]), torch.ones(3), **EXACT)


@given(factors(), st.integers(1, 20))
def test_explained_shares_are_those_of_the_dense_product(f, k):
    dense = product(f)
    base = decomposed(normal(*dense.shape, seed=8))
    u, v = base.left[:, :k], base.right[:k]
    total = dense.square().sum()
    wanted = [x.square().sum() / total for x in (u.T @ dense, dense @ v.T, u.T @ dense @ v.T)]
    found = explained_share(base, f, k)
    assert_close(
        torch.tensor([found.left, found.right, found.both]), torch.stack(wanted).float(), rtol=1e-5, atol=1e-6
    )


def test_random_subspaces_explain_what_chance_says():
    """Mean over 2,000 random weights; the share's spread is below 0.1, so the mean's is below 0.0025."""
    update, shares = Factors(a=normal(2, 8), b=normal(10, 2)), []
    for seed in range(2000):
        base = decomposed(normal(10, 8, seed=seed + 100))
        found = explained_share(base, update, 3)
        shares.append([found.left, found.right, found.both])
    chance = share_by_chance((10, 8), 3)
    assert chance == Shares(left=0.3, right=0.375, both=0.3 * 0.375)
    wanted = torch.tensor([chance.left, chance.right, chance.both])
    assert_close(torch.tensor(shares).mean(dim=0), wanted, rtol=0, atol=0.01)
    assert share_by_chance((2, 50), 5) == Shares(left=1.0, right=0.1, both=0.1)


def test_a_zero_update_is_explained_by_nothing():
    nothing = Factors(a=normal(2, 8), b=torch.zeros(10, 2, dtype=torch.float64))
    assert explained_share(decomposed(normal(10, 8)), nothing, 3) == Shares(left=0.0, right=0.0, both=0.0)


def test_factors_of_another_layer_are_refused():
    other = Factors(a=normal(2, 8), b=normal(10, 2))
    with pytest.raises(ShapeError, match="another layer"):
        explained_share(decomposed(normal(8, 10)), other, 3)
    with pytest.raises(ShapeError, match="another layer"):
        intruder_dimensions(normal(8, 10), other, 1.0)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 2.0])
def test_the_estimate_of_signal_to_noise_is_unbiased_before_the_max(ratio):
    """20,000 updates of 50 numbers: the mean of |signal + noise|^2 is right to five of its standard errors."""
    numbers, updates, std = 50, 20_000, 0.3
    v = numbers * std**2
    signal = torch.nn.functional.normalize(normal(numbers), dim=0) * math.sqrt(ratio * v)
    noisy = signal + std * normal(updates, numbers, seed=6)
    energies = noisy.square().sum(dim=1)
    error = math.sqrt((2 / numbers + 4 * ratio / numbers) / updates)
    assert abs(float((energies.mean() - v) / v) - ratio) < 5 * error
    if ratio:  # of the mean of many, the max does nothing
        assert signal_to_noise(float(energies.mean()), v) == pytest.approx(ratio, abs=5 * error)


def test_less_than_the_noise_is_no_signal_and_no_noise_no_ratio():
    assert signal_to_noise(3.0, 4.0) == 0.0 and signal_to_noise(12.0, 4.0) == 2.0
    with pytest.raises(ValueError, match="must be positive"):
        signal_to_noise(1.0, 0.0)
