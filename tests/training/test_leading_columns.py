"""A client of rank k trains the first k columns of every B: those are clipped and noised, and nothing else moves."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fedlora.config.schema import AdamW, Classification, Lora, Model, Sgd
from fedlora.data.records import Examples
from fedlora.errors import PrivacyError, ShapeError
from fedlora.privacy.budget import Budget
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.ledger import open_ledger
from fedlora.privacy.noise import SeededNoise
from fedlora.privacy.opacus_engine import OpacusEngine
from fedlora.training.client import Node, train
from fedlora.training.leading import leading_columns
from fedlora.training.load import load_model
from fedlora.training.tasks import losses
from fedlora.training.together import train_together
from fedlora.values import Adapters, Factors, LocalWork, Mechanism, Sampling, TrainRequest

RANK, RECORDS, BOUND = 4, 9, 0.02
FEWER = [1, 3]
EXACT = {"rtol": 1e-9, "atol": 1e-13}
SGD = Sgd(name="sgd", lr=1.0)


def examples(seed):
    draw = np.random.Generator(np.random.Philox(seed))
    return Examples(
        input_ids=draw.integers(5, 60, 6 * RECORDS).astype(np.int32),
        offsets=np.arange(0, 6 * RECORDS + 1, 6),
        labels=draw.integers(0, 3, RECORDS),
    )


def model_of(place, trains="b", **more):
    lora = Lora(r=RANK, lora_alpha=6.0, target_modules=["query", "value"], trains=trains)
    task = Classification(kind="sequence-classification")
    return load_model(Model(name=place, dtype="float64", **more), task, lora, ("a", "b", "c"), seed=1)


def adapters_of(model):
    """No column of B is zero, nor the head, so that whatever is left out would show."""
    draw = torch.Generator().manual_seed(4)

    def drawn(*shape):
        return 0.5 * torch.randn(*shape, generator=draw, dtype=torch.float64)

    shapes = model.shapes().items()
    sites = {site: Factors(a=drawn(RANK, d_in), b=drawn(d_out, RANK)) for site, (d_out, d_in) in shapes}
    head = {name: drawn(*value.shape) for name, value in model.head().items()}
    return Adapters(basis=0, scale=model.scale, sites=sites, head=head)


@pytest.fixture(scope="module")
def bert(tiny):
    return model_of(tiny["bert"])


@pytest.fixture
def model(bert):
    bert.load(adapters_of(bert))
    return bert


def runs(model, indices):
    return losses(model, examples(1), np.asarray(indices), 10**6)


def whole_gradient(model, index, k):
    """Of one record, by autograd through the model as it was loaded, cut to k columns of every B."""
    (run,) = runs(model, [index])
    found = torch.autograd.grad(run().sum(), list(model.trained.values()))
    pairs = zip(model.trained, found, strict=True)
    return {name: g[:, :k] if ".lora_B" in name else g for name, g in pairs}


@pytest.mark.parametrize("engine", [DirectEngine(), OpacusEngine()], ids=["direct", "opacus"])
@pytest.mark.parametrize("k", FEWER)
def test_a_records_gradient_is_autograds_of_the_first_columns_alone(model, engine, k):
    for index in range(RECORDS):
        wanted = whole_gradient(model, index, k)
        with leading_columns(model, k) as narrow:
            found = engine.clipped_sum(narrow.peft_model, narrow.trained, runs(narrow, [index]), None)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert found[name].shape == gradient.shape
            assert_close(found[name], gradient, **EXACT)
            assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_the_clip_sees_k_columns_of_a_site_and_no_more(tiny, recomputed):
    model, k = model_of(tiny["bert"], gradient_checkpointing=recomputed), 2
    model.load(adapters_of(model))
    wanted, masked = dict.fromkeys(model.trained, 0.0), dict.fromkeys(model.trained, 0.0)
    for index in range(RECORDS):
        own, every = whole_gradient(model, index, k), whole_gradient(model, index, RANK)
        seen, all_seen = (
            float(torch.cat([g.flatten() for g in one.values()]).norm()) for one in (own, every)
        )
        assert seen > BOUND
        for name, gradient in own.items():
            wanted[name] = wanted[name] + gradient * min(1.0, BOUND / seen)
            masked[name] = masked[name] + gradient * min(1.0, BOUND / all_seen)
    with leading_columns(model, k) as narrow:
        found = DirectEngine().clipped_sum(
            narrow.peft_model, narrow.trained, runs(narrow, range(RECORDS)), BOUND
        )
    for name, total in wanted.items():
        assert_close(found[name], total, rtol=1e-7, atol=1e-12)
        assert not torch.allclose(
            found[name], masked[name], rtol=1e-3, atol=0
        )  # what a mask would have given


class WatchedNoise(SeededNoise):
    """Remembers how much it was asked for, of what."""

    def __init__(self):
        super().__init__(1)
        self.drawn = []

    def normal(self, shape, *, dtype, purpose):
        self.drawn.append((purpose[-1], tuple(shape)))
        return super().normal(shape, dtype=dtype, purpose=purpose)


def node_of(model, rank, client="c", noise=None, optimizer=SGD, evaluation_noise=None):
    return Node(
        client=client, model=model, examples=examples(1), declared_records=RECORDS,
        sampling=Sampling(rate=0.6, expected_batch=5.0, max_draw=100), optimizer=optimizer,
        mechanism=Mechanism(max_grad_norm=BOUND, noise_multiplier=0.8), alone=False,
        evaluation_noise=evaluation_noise,
        budget=Budget(target_epsilon=1e6, target_delta=1e-5, max_participations=2, accountant="rdp"),
        engine=DirectEngine(), noise=noise or SeededNoise(1), rank=rank,
    )  # fmt: skip


def request_of(model):
    work = LocalWork(steps=2, learning_rate=0.5)
    return TrainRequest(run="run", base_model="m", code="c", round=1, adapters=adapters_of(model), work=work)


def ledger_in(folder, node):
    return open_ledger(
        folder / f"{node.client}.jsonl", client=node.client, dataset_fingerprint="d", noise_kind="seeded"
    )


OPTIMIZERS = [SGD, Sgd(name="sgd", lr=1.0, proximal=0.5), AdamW(name="adamw", lr=1.0, weight_decay=0.1)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "proximal", "adamw"])
@pytest.mark.parametrize("k", FEWER)
def test_noise_covers_the_first_columns_and_nothing_else_changes(model, tmp_path, k, optimizer):
    noise = WatchedNoise()
    node = node_of(model, k, noise=noise, optimizer=optimizer)
    request = request_of(model)
    reply = train(node, request, ledger_in(tmp_path, node))
    wanted = [(f"{site}.lora_B", (d_out, k)) for site, (d_out, _) in model.shapes().items()]
    wanted += [(name, tuple(value.shape)) for name, value in model.head().items()]
    assert sorted(noise.drawn) == sorted(wanted * 2)  # two steps
    for site, change in reply.delta.sites.items():
        assert change.shape == (model.shapes()[site][0], RANK)
        assert bool((change[:, :k] != 0).all()) and not bool(change[:, k:].any())
        a, b = model.live[site]
        assert torch.equal(a, request.adapters.sites[site].a)
        assert torch.equal(b[:, k:], request.adapters.sites[site].b[:, k:])


def test_a_participation_costs_the_same_whatever_the_rank(model, tmp_path):
    spent, debits = [], []
    for rank in (1, 3, None):
        node = node_of(model, rank, client=f"c{rank}", evaluation_noise=2.0)
        ledger = ledger_in(tmp_path, node)
        reply = train(node, request_of(model), ledger)
        spent.append(reply.spent)
        debits.append([(debit.events, debit.max_grad_norm) for debit in ledger.debits])
    assert spent[0] == spent[1] == spent[2]
    assert debits[0] == debits[1] == debits[2] and len(debits[0]) == 1


def test_all_columns_are_what_a_client_without_a_rank_trains_bit_for_bit(model, tmp_path):
    replies = []
    for place, rank in (("none", None), ("all", RANK)):
        node = node_of(model, rank)
        replies.append(train(node, request_of(model), ledger_in(tmp_path / place, node)))
    none, every = replies
    for site, change in none.delta.sites.items():
        assert torch.equal(change, every.delta.sites[site])
    assert all(torch.equal(value, every.delta.head[name]) for name, value in none.delta.head.items())


def test_a_client_of_full_rank_is_not_touched_by_one_of_lower_rank_before_it(model, tmp_path):
    alone = train(
        node_of(model, None), request_of(model), ledger_in(tmp_path / "alone", node_of(model, None))
    )
    train(node_of(model, 1), request_of(model), ledger_in(tmp_path / "low", node_of(model, 1)))
    after = train(
        node_of(model, None), request_of(model), ledger_in(tmp_path / "after", node_of(model, None))
    )
    for site, change in alone.delta.sites.items():
        assert torch.equal(change, after.delta.sites[site])


def test_whatever_ends_the_work_of_a_client_the_model_is_whole_again(model):
    before = dict(model.peft_model.named_parameters())
    with pytest.raises(RuntimeError, match="in the middle"), leading_columns(model, 2):
        assert dict(model.peft_model.named_parameters()).keys() != before.keys()
        raise RuntimeError("in the middle")
    after = dict(model.peft_model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())


def test_columns_that_are_not_there_are_refused(model, tiny):
    for adapted, k in ((model, 0), (model, RANK + 1), (model_of(tiny["bert"], "core"), 2)):
        wrong = f"the first {k} columns of B .* write 1 to {RANK}"
        with pytest.raises(ShapeError, match=wrong), leading_columns(adapted, k):
            pass


def test_clients_of_lower_rank_share_no_forward_pass(model, tmp_path):
    nodes = [node_of(model, rank, client=f"c{rank}") for rank in (None, 2)]
    with pytest.raises(PrivacyError, match="some columns only; train them one by one"):
        train_together(nodes, request_of(model), [ledger_in(tmp_path, node) for node in nodes])
    same = [dataclasses.replace(node, rank=None) for node in nodes]
    assert len(train_together(same, request_of(model), [ledger_in(tmp_path, node) for node in same])) == 2
