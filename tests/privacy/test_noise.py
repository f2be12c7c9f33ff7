"""Noise of the right law; secret and unrepeatable on a node, repeatable by purpose in simulation."""

import math
import os
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fedlora
from fedlora.privacy.noise import OsEntropyNoise, SeededNoise, _normals

SOURCES = [SeededNoise(3), OsEntropyNoise()]
sources = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.kind)
DRAWS = 1_000_000


def variance_is_right(x: torch.Tensor, variance: float) -> bool:
    """Within 1 %: seven standard deviations of the estimate at 1e6 draws."""
    return abs(float(x.double().square().mean()) / variance - 1) < 0.01


@sources
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normals_are_standard_normal(source, dtype):
    x = source.normal((1000, DRAWS // 1000), dtype=dtype, purpose=("test", 1))
    assert x.dtype == dtype and x.shape == (1000, 1000)
    x = x.flatten().double()
    assert (
        variance_is_right(x, 1.0)
        and not variance_is_right(1.03 * x, 1.0)
        and not variance_is_right(0.97 * x, 1.0)
    )
    assert abs(float(x.mean())) < 5 / math.sqrt(DRAWS)
    assert abs(float((x[1:] * x[:-1]).mean())) < 5 / math.sqrt(DRAWS)
    empirical = torch.arange(1, DRAWS + 1) / DRAWS
    distance = float((torch.special.ndtr(x.sort().values) - empirical).abs().max())
    assert distance < 2.8 / math.sqrt(DRAWS)  # Kolmogorov-Smirnov at p = 3e-7


@sources
def test_uniforms_are_uniform(source):
    u = source.uniform(DRAWS, purpose=("test", 2))
    assert u.dtype == torch.float64 and float(u.min()) >= 0 and float(u.max()) < 1
    counts = torch.histc(u, bins=100, min=0, max=1)
    chi_square = float(((counts - DRAWS / 100) ** 2 / (DRAWS / 100)).sum())
    assert 99 - 5 * math.sqrt(198) < chi_square < 99 + 5 * math.sqrt(198)


@sources
def test_nothing_asked_gives_nothing(source):
    assert source.normal((0, 4), dtype=torch.float32, purpose=("x",)).shape == (0, 4)
    assert source.normal((), dtype=torch.float32, purpose=("x",)).shape == ()
    assert source.uniform(0, purpose=("x",)).shape == (0,)


def test_the_extreme_words_give_finite_symmetric_normals():
    words = torch.tensor([0, 1, -1, -2, 2**63 - 1, -(2**63)], dtype=torch.int64)
    x = _normals(words)
    assert torch.isfinite(x).all() and 9 < float(x.abs().max()) < 10
    assert float(x[0]) == -float(x[1])


def _reseed():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def test_no_seed_moves_the_entropy_source_and_no_copy_repeats_it():
    draws = []
    source = OsEntropyNoise()
    for one in (source, source, OsEntropyNoise(), pickle.loads(pickle.dumps(source))):
        _reseed()
        draws.append(one.normal((1000,), dtype=torch.float64, purpose=("same",)))
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert float(correlation.abs().max()) < 5 / math.sqrt(1000)


def test_a_forked_child_draws_its_own_noise():
    source = OsEntropyNoise()
    source.normal((4,), dtype=torch.float64, purpose=("warm",))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, bytes(source.uniform(8, purpose=("x",)).numpy().tobytes()))
        os._exit(0)
    os.waitpid(child, 0)
    theirs = torch.frombuffer(bytearray(os.read(read, 64)), dtype=torch.float64)
    assert not torch.isin(source.uniform(8, purpose=("x",)), theirs).any()


def test_seeded_noise_depends_on_seed_law_and_every_part_of_the_purpose():
    def draw(seed, *purpose):
        return SeededNoise(seed).normal((2000,), dtype=torch.float64, purpose=purpose)

    assert torch.equal(draw(1, "noise", 2), draw(1, "noise", 2))
    others = [
        draw(2, "noise", 2),
        draw(1, "noise", 3),
        draw(1, "noise", "2"),
        draw(1, 2, "noise"),
        draw(1, "noise", 2, "b"),
    ]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([draw(1, "noise", 2), other]))[0, 1])) < 5 / math.sqrt(
            2000
        )


def test_global_seeds_neither_move_seeded_noise_nor_are_moved_by_it():
    _reseed()
    first = SeededNoise(1).normal((8,), dtype=torch.float64, purpose=("x",))
    after = torch.rand(3)
    _reseed()
    assert torch.equal(after, torch.rand(3))
    assert torch.equal(first, SeededNoise(1).normal((8,), dtype=torch.float64, purpose=("x",)))


def test_no_generator_of_ours_starts_from_its_public_constant():
    """An unseeded torch.Generator() repeats itself in every process; and the CLT accountant is nowhere."""
    for path in Path(fedlora.__file__).parent.rglob("*.py"):
        text = path.read_text()
        made = re.findall(r"torch\.Generator\([^)]*\)(\.manual_seed\()?", text)
        assert all(made), path
        assert not re.search(r"GaussianAccountant|accountants\.gdp|analysis.*gdp", text), path
