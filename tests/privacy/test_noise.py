"""Noise of the right law; secret and unrepeatable on a node, repeatable by purpose in simulation.

The laws themselves are in `checks`, where each is shown to fail for a broken source; here is what only the real
room can be asked: more shapes, two processes, two clients.
"""

import math
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.noise import OsEntropyNoise, SeededNoise, _normals
from fedlora.privacy.step import private_gradient
from fedlora.values import Mechanism

from .checks import is_standard_normal
from .models import perceptron

SOURCES = [SeededNoise(3), OsEntropyNoise()]
sources = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.kind)
DRAWS = 1_000_000


@sources
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_million_draws_in_each_tensor_are_standard_normal_and_3_percent_more_or_less_is_seen(source, dtype):
    farthest = 1.95 if source.kind == "seeded" else 2.8
    tensors = [
        source.normal((1000, DRAWS // 1000), dtype=dtype, purpose=("noise", n)) for n in ("a", "b", "c")
    ]
    flat = [x.flatten().double() for x in tensors]
    for x in flat:
        assert is_standard_normal(x, farthest)
        assert not is_standard_normal(1.03 * x, farthest) and not is_standard_normal(0.97 * x, farthest)
        assert not is_standard_normal(x + 0.01, farthest)
        assert not is_standard_normal((x + 0.01 * x.roll(1)) / math.sqrt(1.0001), farthest)
    assert abs(float(torch.cat(flat).square().mean()) - 1) < 0.01  # overall, beside each tensor
    correlation = torch.corrcoef(torch.stack(flat)) - torch.eye(3)
    assert float(correlation.abs().max()) < 5 / math.sqrt(DRAWS)
    assert tensors[0].dtype == dtype and tensors[0].shape == (1000, 1000)


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


def test_a_second_process_with_the_same_seeds_draws_other_noise():
    code = (
        "import torch; torch.manual_seed(0); from fedlora.privacy.noise import OsEntropyNoise; "
        "print(OsEntropyNoise().uniform(4, purpose=('x',)).tolist())"
    )
    told = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert told[0] != told[1] and len(told[0]) > 20


def test_two_clients_of_one_configuration_and_data_set_release_unrelated_noise():
    """Same model, records, round and step: |r| < 5 / sqrt d between clients, rounds, steps and a restart."""
    case = perceptron(records=4)
    mechanism = Mechanism(max_grad_norm=1.0, noise_multiplier=1.0)

    def release(round_, step):
        got = [
            private_gradient(
                DirectEngine(), case.model, case.trained, case.micro_batches(), mechanism=mechanism,
                expected_batch=4.0, noise=OsEntropyNoise(), purpose=("run", "client", round_, step, repeat),
            )
            for repeat in range(300)
        ]  # fmt: skip
        rows = torch.stack([torch.cat([value.flatten() for value in one.values()]).double() for one in got])
        return (rows - rows.mean(dim=0)).flatten()

    releases = torch.stack([release(1, 1), release(1, 1), release(1, 2), release(2, 1)])
    correlation = torch.corrcoef(releases) - torch.eye(4)
    assert float(correlation.abs().max()) < 5 / math.sqrt(releases.shape[1])


def test_simulated_clients_of_one_seed_release_unrelated_noise():
    streams = torch.stack(
        [
            SeededNoise(7).normal(
                (100_000,), dtype=torch.float64, purpose=("noise", client, round_, step, "b")
            )
            for client, round_, step in (("a", 1, 1), ("b", 1, 1), ("a", 2, 1), ("a", 1, 2))
        ]
    )
    correlation = torch.corrcoef(streams) - torch.eye(len(streams))
    assert float(correlation.abs().max()) < 5 / math.sqrt(100_000)


def test_global_seeds_neither_move_seeded_noise_nor_are_moved_by_it():
    _reseed()
    first = SeededNoise(1).normal((8,), dtype=torch.float64, purpose=("x",))
    after = torch.rand(3)
    _reseed()
    assert torch.equal(after, torch.rand(3))
    assert torch.equal(first, SeededNoise(1).normal((8,), dtype=torch.float64, purpose=("x",)))
