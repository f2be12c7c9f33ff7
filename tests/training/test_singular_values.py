"""r trained numbers a site: their gradients, clip and noise are of r numbers, which are those of a core's diagonal."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fedlora.algebra.factors import whole
from fedlora.config.schema import Classification, Lora, Model, Sgd
from fedlora.data.records import Examples
from fedlora.errors import ShapeError
from fedlora.privacy.budget import Budget
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.ledger import open_ledger
from fedlora.privacy.noise import SeededNoise
from fedlora.privacy.opacus_engine import OpacusEngine
from fedlora.training.client import Node, train
from fedlora.training.load import load_model
from fedlora.training.tasks import losses
from fedlora.training.together import train_together
from fedlora.values import Adapters, Factors, LocalWork, Mechanism, Sampling, TrainRequest

RANK, RECORDS, BOUND = 3, 9, 0.02
EXACT = {"rtol": 1e-9, "atol": 1e-13}


def examples(seed, records=RECORDS):
    draw = np.random.Generator(np.random.Philox(seed))
    return Examples(
        input_ids=draw.integers(5, 60, 6 * records).astype(np.int32),
        offsets=np.arange(0, 6 * records + 1, 6),
        labels=draw.integers(0, 3, records),
    )


def model_of(place, trains, dtype="float64"):
    lora = Lora(r=RANK, lora_alpha=6.0, target_modules=["query", "value"], trains=trains)
    task = Classification(kind="sequence-classification")
    return load_model(Model(name=place, dtype=dtype), task, lora, ("a", "b", "c"), seed=1)


def adapters_of(models):
    """Of each kind of model, the same change of the weights, the head away from zero."""
    draw = torch.Generator().manual_seed(4)

    def drawn(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    values, core = models
    sites = {}
    for site, (d_out, d_in) in values.shapes().items():
        a, left = torch.linalg.qr(drawn(d_in, RANK)).Q.T, torch.linalg.qr(drawn(d_out, RANK)).Q
        sites[site] = Factors(a=a, b=0.5 * drawn(1, RANK), left=left)
    head = {name: 0.5 * drawn(*value.shape) for name, value in values.head().items()}
    small = Adapters(basis=0, scale=values.scale, sites=sites, head=head)
    squares = {site: dataclasses.replace(f, b=torch.diag(f.b[0])) for site, f in sites.items()}
    return small, Adapters(basis=0, scale=core.scale, sites=squares, head=head)


@pytest.fixture(scope="module")
def pair(tiny):
    """A model that trains singular values and one that trains cores, loaded with the same weights."""
    models = model_of(tiny["bert"], "singular-values"), model_of(tiny["bert"], "core")
    for model, adapters in zip(models, adapters_of(models), strict=True):
        model.load(adapters)
    return models


def runs(model, indices, token_budget=10**6):
    return losses(model, examples(1), np.asarray(indices), token_budget)


def own_gradients(model, index):
    """Of one record, by autograd."""
    (run,) = runs(model, [index])
    trained = model.trained
    found = torch.autograd.grad(run().sum(), list(trained.values()))
    return dict(zip(trained, found, strict=True))


def sums(model, engine, indices, bound):
    return engine.clipped_sum(model.peft_model, model.trained, runs(model, indices), bound)


def test_what_is_computed_is_the_weight_and_its_change(pair):
    values, core = pair
    (mine,), (theirs,) = runs(values, range(RECORDS)), runs(core, range(RECORDS))
    assert_close(mine(), theirs(), **EXACT)
    for site, layer in values.layers().items():
        a, s = values.live[site]
        change = whole(Factors(a=a.detach(), b=s.detach(), left=values.left[site].detach()))
        x = torch.randn(2, 4, a.shape[1], dtype=torch.float64)
        wanted = layer.base_layer(x) + values.scale * x @ (change.b @ change.a).T
        assert_close(layer(x), wanted, **EXACT)


@pytest.mark.parametrize("engine", [DirectEngine(), OpacusEngine()], ids=["direct", "opacus"])
def test_a_records_gradient_is_autograds_and_the_diagonal_of_a_cores(pair, engine):
    values, core = pair
    for index in range(RECORDS):
        found, square = sums(values, engine, [index], None), sums(core, engine, [index], None)
        for name, wanted in own_gradients(values, index).items():
            assert_close(found[name], wanted, **EXACT)
            if ".lora_B" in name:
                assert found[name].shape == (1, RANK)
                assert_close(found[name][0], square[name].diagonal(), **EXACT)
                assert float(square[name].abs().max()) > 0


def test_the_clip_sees_r_numbers_of_a_site_and_no_more(pair):
    values, core = pair
    wanted = dict.fromkeys(values.trained, 0.0)
    lengths = []
    for index in range(RECORDS):
        own = own_gradients(values, index)
        lengths.append(float(torch.cat([gradient.flatten() for gradient in own.values()]).norm()))
        for name, gradient in own.items():
            wanted[name] = wanted[name] + gradient * min(1.0, BOUND / lengths[-1])
    assert max(lengths) > BOUND
    found = sums(values, DirectEngine(), range(RECORDS), BOUND)
    for name, total in wanted.items():
        assert_close(found[name], total, rtol=1e-7, atol=1e-12)
    squares = sums(core, DirectEngine(), range(RECORDS), BOUND)  # clipped by what lies off the diagonal, too
    site = next(name for name in squares if ".lora_B" in name)
    assert not torch.allclose(squares[site].diagonal(), found[site][0], rtol=1e-6, atol=0)


class WatchedNoise(SeededNoise):
    """Remembers how much it was asked for, of what."""

    def __init__(self):
        super().__init__(1)
        self.drawn = []

    def normal(self, shape, *, dtype, purpose):
        self.drawn.append((purpose[-1], tuple(shape)))
        return super().normal(shape, dtype=dtype, purpose=purpose)


def node_of(model, client, seed, noise):
    return Node(
        client=client, model=model, examples=examples(seed), declared_records=RECORDS,
        sampling=Sampling(rate=0.6, expected_batch=5.0, max_draw=100), optimizer=Sgd(name="sgd", lr=1.0),
        mechanism=Mechanism(max_grad_norm=BOUND, noise_multiplier=0.8), alone=False, evaluation_noise=None,
        budget=Budget(target_epsilon=1e6, target_delta=1e-5, max_participations=2, accountant="rdp"),
        engine=DirectEngine(), noise=noise,
    )  # fmt: skip


def request_of(model, adapters):
    work = LocalWork(steps=2, learning_rate=0.5)
    return TrainRequest(run="run", base_model="m", code="c", round=1, adapters=adapters, work=work)


def ledgers_in(folder, nodes):
    return [
        open_ledger(folder / f"{node.client}.jsonl", client=node.client, dataset_fingerprint="d", noise_kind="seeded")
        for node in nodes
    ]  # fmt: skip


def test_noise_covers_exactly_the_numbers_that_are_sent(pair, tmp_path):
    values, core = pair
    (small, _), noise = adapters_of((values, core)), WatchedNoise()
    node = node_of(values, "c", 1, noise)
    reply = train(node, request_of(values, small), ledgers_in(tmp_path, [node])[0])
    sent = {f"{site}.lora_B": tuple(value.shape) for site, value in reply.delta.sites.items()}
    assert set(sent.values()) == {(1, RANK)}
    sent |= {name: tuple(value.shape) for name, value in reply.delta.head.items()}
    assert sorted(noise.drawn) == sorted([*sent.items()] * 2)  # two steps
    assert all(bool((value != 0).all()) for value in reply.delta.sites.values())


def test_clients_that_share_a_pass_answer_as_each_would_alone(pair, tmp_path):
    values, core = pair
    small, _ = adapters_of((values, core))
    nodes = [node_of(values, f"c{n}", n, SeededNoise(1)) for n in range(3)]
    request = request_of(values, small)
    alone = [
        train(node, request, ledger)
        for node, ledger in zip(nodes, ledgers_in(tmp_path / "one", nodes), strict=True)
    ]
    together = train_together(nodes, request, ledgers_in(tmp_path / "together", nodes))
    for one, other in zip(alone, together, strict=True):
        assert one.spent == other.spent
        for site, value in one.delta.sites.items():
            assert_close(other.delta.sites[site], value, rtol=1e-9, atol=1e-9)


def test_of_a_frame_of_k_columns_the_core_has_k_rows_or_is_a_diagonal_of_k_numbers():
    a, left = torch.zeros(RANK, 7), torch.zeros(5, RANK)
    for rows in (1, RANK):
        assert Factors(a=a, b=torch.zeros(rows, RANK), left=left).left is left
    for b, frame in (
        (torch.zeros(2, RANK), left),
        (torch.zeros(1, RANK), left[:, :2]),
        (torch.zeros(1, RANK), a[0]),
    ):
        with pytest.raises(ShapeError, match="share no rank"):
            Factors(a=a, b=b, left=frame)


def test_a_diagonal_multiplied_out_is_plain_lora():
    draw = torch.Generator().manual_seed(2)
    a, s, left = (
        torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((3, 7), (1, 3), (5, 3))
    )
    found = whole(Factors(a=a, b=s, left=left))
    wanted = sum(float(s[0, i]) * torch.outer(left[:, i], a[i]) for i in range(3))
    assert found.left is None
    assert_close(found.b @ found.a, wanted, **EXACT)
