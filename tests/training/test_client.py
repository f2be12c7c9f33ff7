"""What a client does with a request, seen by who clips and who draws: each privacy-relevant line has its law."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.config.schema import Classification, Lora, Model, Sgd
from fedlora.data.records import Examples
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.ledger import Budget, open_ledger
from fedlora.privacy.noise import SeededNoise
from fedlora.training.client import Node, train
from fedlora.training.model import load_model
from fedlora.values import (
    Adapters,
    ClientUpdate,
    Factors,
    LocalWork,
    Mechanism,
    Refusal,
    RefusalReason,
    TrainRequest,
)

STEPS, BATCH, RECORDS = 3, 8, 40


class WatchedNoise:
    """A real source that remembers what it was asked for."""

    kind = "seeded"

    def __init__(self) -> None:
        self.inner = SeededNoise(1)
        self.normals: list[tuple] = []
        self.uniforms: list[tuple] = []

    def normal(self, shape, *, dtype, purpose):
        self.normals.append(purpose)
        return self.inner.normal(shape, dtype=dtype, purpose=purpose)

    def uniform(self, count, *, purpose):
        self.uniforms.append((count, purpose))
        return self.inner.uniform(count, purpose=purpose)


class WatchedEngine:
    """The real engine; notes its clip, the sizes of the draws, and the ledger's lines when records are touched."""

    def __init__(self, ledger: Path) -> None:
        self.ledger = ledger
        self.clips: list[float | None] = []
        self.drawn: list[int] = []
        self.lines_then: list[int] = []

    def clipped_sum(self, model, trained, losses, max_grad_norm):
        self.clips.append(max_grad_norm)
        self.lines_then.append(len(self.ledger.read_text().splitlines()) if self.ledger.exists() else 0)
        sizes = []

        def counted(run):
            def call():
                found = run()
                sizes.append(len(found))
                return found

            return call

        sums = DirectEngine().clipped_sum(model, trained, [counted(run) for run in losses], max_grad_norm)
        self.drawn.append(sum(sizes))
        return sums


@dataclasses.dataclass
class Scene:
    node: Node
    request: TrainRequest
    ledger_path: Path

    def ledger(self):
        return open_ledger(self.ledger_path, client="c", dataset_fingerprint="d", noise_kind="seeded")

    def answer(self, **changes):
        return train(self.node, dataclasses.replace(self.request, **changes), self.ledger())


@pytest.fixture
def scene(tiny_encoder, tmp_path):
    def build(rate=BATCH / RECORDS, sigma=0.7, records=RECORDS, participations=2):
        task = Classification(kind="sequence-classification")
        lora = Lora(r=2, lora_alpha=2, target_modules=["query"])
        model = load_model(Model(name=str(tiny_encoder)), task, lora, ("a", "b", "c"), seed=1)
        draw = np.random.default_rng(2)
        examples = Examples(
            input_ids=draw.integers(5, 40, 6 * records).astype(np.int32),
            offsets=np.arange(0, 6 * records + 1, 6),
            labels=draw.integers(0, 3, records),
        )
        path = tmp_path / "ledger.jsonl"
        node = Node(
            client="c",
            model=model,
            examples=examples,
            batch_size=BATCH,
            sample_rate=0.123,  # of no use under privacy: the mechanism's own rate is drawn at and paid for
            optimizer=Sgd(name="sgd", lr=1.0),
            mechanism=Mechanism(max_grad_norm=0.5, noise_multiplier=sigma, sample_rate=rate),
            budget=Budget(
                target_epsilon=1e6,
                target_delta=1e-5,
                max_participations=participations,
                accountant="pld",
            ),
            engine=WatchedEngine(path),
            noise=WatchedNoise(),
        )
        sites = {
            site: Factors(a=a.detach().clone(), b=torch.zeros_like(b))
            for site, (a, b) in model.factors().items()
        }
        adapters = Adapters(basis=0, scale=model.scale, sites=sites, head=model.head())
        work = LocalWork(steps=STEPS, learning_rate=1.0)
        return Scene(node, TrainRequest(run="run", round=1, adapters=adapters, work=work), path)

    return build


def test_every_step_clips_at_the_mechanisms_bound_and_noises_every_tensor(scene):
    one = scene()
    assert isinstance(one.answer(), ClientUpdate)
    assert one.node.engine.clips == [0.5] * STEPS
    assert len(one.node.noise.normals) == STEPS * len(one.node.model.trained)


def test_draws_are_poisson_at_the_rate_that_is_paid_for(scene):
    one = scene(rate=1.0)
    reply = one.answer()
    assert one.node.engine.drawn == [RECORDS] * STEPS
    assert reply.spent.sample_rate == 1.0
    assert {count for count, _ in one.node.noise.uniforms} == {RECORDS}


def test_an_empty_draw_is_a_noised_step(scene):
    one = scene(rate=1e-12)
    reply = one.answer()
    assert one.node.engine.drawn == [0] * STEPS
    assert len(one.node.noise.normals) == STEPS * len(one.node.model.trained)
    for name, tensor in [*reply.delta.sites.items(), *reply.delta.head.items()]:
        assert bool((tensor != 0).any()), name


def test_the_divisor_is_the_constant_batch_size_whatever_was_drawn(scene):
    """Nothing drawn: the update is noise alone, of std sigma * C * sqrt(steps) / batch_size."""
    one = scene(rate=1e-12, sigma=30.0)
    reply = one.answer()
    noise = torch.cat([t.flatten() for t in [*reply.delta.sites.values(), *reply.delta.head.values()]])
    expected = 30.0 * 0.5 * STEPS**0.5 / BATCH
    assert float(noise.std()) == pytest.approx(expected, rel=5 / (2 * len(noise)) ** 0.5)


def test_no_two_draws_of_anything_share_a_purpose(scene):
    one = scene(participations=10)
    one.answer()
    one.answer(round=2)
    one.answer(run="another run")
    twin = dataclasses.replace(one.node, client="someone else")
    path = one.ledger_path.with_name("other.jsonl")
    train(twin, one.request, open_ledger(path, client="x", dataset_fingerprint="d", noise_kind="seeded"))
    for purposes in (one.node.noise.normals, [purpose for _, purpose in one.node.noise.uniforms]):
        assert len(purposes) == len(set(purposes))


def test_the_debit_is_on_disk_before_a_record_is_touched(scene):
    one = scene()
    one.answer()
    assert one.node.engine.lines_then == [2] * STEPS  # the header and this round's debit
    (_, debit) = [json.loads(line) for line in one.ledger_path.read_text().splitlines()]
    assert debit["event"]["steps"] == STEPS
    assert debit["event"]["noise_multiplier"] == 0.7


def test_the_same_request_is_answered_alike_and_paid_once(scene):
    one = scene()
    first, again = one.answer(), one.answer()
    for site, tensor in first.delta.sites.items():
        assert torch.equal(again.delta.sites[site], tensor)
    assert len(one.ledger().entries) == 1


def test_another_request_for_a_paid_round_is_refused_without_touching_a_record(scene):
    one = scene()
    one.answer()
    touched = len(one.node.engine.clips)
    reply = one.answer(work=LocalWork(steps=STEPS, learning_rate=0.5))
    assert reply == Refusal(client="c", run="run", round=1, reason=RefusalReason.BAD_REQUEST)
    assert len(one.node.engine.clips) == touched


def test_past_its_limit_a_client_refuses_without_touching_a_record(scene):
    one = scene(participations=1)
    one.answer()
    touched = len(one.node.engine.clips)
    reply = one.answer(round=2)
    assert reply == Refusal(client="c", run="run", round=2, reason=RefusalReason.BUDGET)
    assert len(one.node.engine.clips) == touched
    assert len(one.ledger().entries) == 1


def test_without_records_there_is_nothing_to_pay(scene):
    one = scene(records=0)
    assert one.answer().reason is RefusalReason.NO_DATA
    assert len(one.ledger().entries) == 0
