"""What a client does with a request, seen by who clips and who draws: each privacy-relevant line has its law."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.config.schema import Classification, Lora, Model, Sgd
from fedlora.data.records import Examples
from fedlora.privacy.budget import Budget
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.ledger import open_ledger
from fedlora.privacy.noise import SeededNoise
from fedlora.training import classification, tasks
from fedlora.training.client import Node, request_digest, train
from fedlora.training.load import load_model
from fedlora.values import (
    Adapters,
    ClientUpdate,
    Factors,
    LocalWork,
    Mechanism,
    Refusal,
    RefusalReason,
    Sampling,
    TrainRequest,
)

STEPS, BATCH, RECORDS, CAP = 3, 8, 40, 10_000


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
        self.groups: list[int] = []
        self.lines_then: list[int] = []

    def clipped_sum(self, model, trained, losses, max_grad_norm, sequences_per_record=1):
        self.clips.append(max_grad_norm)
        self.lines_then.append(len(self.ledger.read_text().splitlines()) if self.ledger.exists() else 0)
        sizes = []

        def counted(run):
            def call():
                found = run()
                sizes.append(len(found))
                return found

            return call

        runs = [counted(run) for run in losses]
        sums = DirectEngine().clipped_sum(model, trained, runs, max_grad_norm, sequences_per_record)
        self.drawn.append(sum(sizes))
        self.groups.append(len(sizes))
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
    def build(rate=BATCH / RECORDS, sigma=0.7, records=RECORDS, participations=2, told=None, alone=False):
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
            declared_records=RECORDS,
            sampling=Sampling(rate=rate, expected_batch=float(BATCH), max_draw=CAP),
            optimizer=Sgd(name="sgd", lr=1.0),
            mechanism=Mechanism(max_grad_norm=0.5, noise_multiplier=sigma),
            alone=alone,
            evaluation_noise=told,
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
            site: Factors(a=a.detach().clone(), b=torch.zeros_like(b)) for site, (a, b) in model.live.items()
        }
        adapters = Adapters(basis=0, scale=model.scale, sites=sites, head=model.head())
        work = LocalWork(steps=STEPS, learning_rate=1.0)
        asked = TrainRequest(run="run", base_model="m", code="c", round=1, adapters=adapters, work=work)
        return Scene(node, asked, path)

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
    assert reply.spent[0].sample_rate == 1.0
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
    (event,) = debit["events"]
    assert (event["steps"], event["noise_multiplier"], event["sample_rate"]) == (STEPS, 0.7, BATCH / RECORDS)
    assert (event["expected_batch"], event["max_draw"]) == (BATCH, CAP)


def test_the_same_request_is_answered_alike_and_paid_once(scene):
    one = scene()
    first, again = one.answer(), one.answer()
    for site, tensor in first.delta.sites.items():
        assert torch.equal(again.delta.sites[site], tensor)
    assert len(one.ledger().debits) == 1


def test_another_request_for_a_paid_round_is_refused_without_touching_a_record(scene):
    one = scene()
    one.answer()
    touched = len(one.node.engine.clips)
    reply = one.answer(work=LocalWork(steps=STEPS, learning_rate=0.5))
    assert reply == Refusal(client="c", run="run", round=1, reason=RefusalReason.BAD_REQUEST)
    assert len(one.node.engine.clips) == touched


@pytest.mark.parametrize("side", ["a", "both"])
def test_a_side_that_the_model_does_not_train_is_refused_before_anybody_pays(scene, side):
    one = scene()
    reply = one.answer(work=LocalWork(steps=STEPS, learning_rate=1.0, side=side))
    assert reply == Refusal(client="c", run="run", round=1, reason=RefusalReason.BAD_REQUEST)
    assert not one.node.engine.clips and not one.ledger().debits


def test_requests_for_other_work_are_other_requests(scene):
    """Else the debit of one would stand for the release of another."""
    asked = scene().request
    others = (
        {"steps": 1},
        {"learning_rate": 0.5},
        {"proximal": 0.5},
        {"precondition": "lora-pro"},
        {"precondition": "0.5"},
        {"precondition": "a"},
        {"side": "a"},
        {"side": "both"},
        {"side": "a", "precondition": "lora-pro"},
        {"own_b": True},
        {"side": "both", "own_b": True},
    )
    works = [asked.work, *(dataclasses.replace(asked.work, **changes) for changes in others)]
    digests = [request_digest(dataclasses.replace(asked, work=work)) for work in works]
    assert len(set(digests)) == len(works)


def test_past_its_limit_a_client_refuses_without_touching_a_record(scene):
    one = scene(participations=1)
    one.answer()
    touched = len(one.node.engine.clips)
    reply = one.answer(round=2)
    assert reply == Refusal(client="c", run="run", round=2, reason=RefusalReason.BUDGET)
    assert len(one.node.engine.clips) == touched
    assert len(one.ledger().debits) == 1


def test_without_records_there_is_nothing_to_pay(scene):
    one = scene(records=0)
    assert one.answer().reason is RefusalReason.NO_DATA
    assert len(one.ledger().debits) == 0


def test_an_accuracy_is_told_only_where_the_owner_allows_it_and_is_paid_for_in_the_same_debit(scene):
    assert scene().answer().accuracy is None
    one = scene(told=20.0)
    one.ledger_path.unlink()
    replies = [one.answer(round=number) for number in (1, 2)]
    training, told = replies[0].spent
    assert (told.noise_multiplier, told.sample_rate, told.steps) == (20.0, 1.0, 1)
    assert one.ledger().debits[0].events == (training, told)
    assert replies[0].accuracy != replies[1].accuracy  # of two models, under two draws of noise
    assert all(abs(reply.accuracy - 0.5) < 0.5 + 5 * 20 / RECORDS for reply in replies)


def test_an_update_names_the_line_of_the_ledger_that_paid_for_it(scene):
    one = scene()
    reply = one.answer()
    (debit,) = one.ledger().debits
    assert reply.ledger == one.ledger().witness(debit)
    assert one.answer().ledger == reply.ledger


@pytest.mark.parametrize("alone", [True, False])
def test_records_run_alone_where_kernels_could_couple_neighbours(scene, alone):
    one = scene(rate=0.5, alone=alone)
    one.answer()
    assert (one.node.engine.groups == one.node.engine.drawn) is alone


def test_an_accuracy_is_that_of_each_record_alone(scene, monkeypatch):
    sizes = []
    real = classification.logits_of
    monkeypatch.setattr(
        classification,
        "logits_of",
        lambda adapted, batch: sizes.append(len(batch["input_ids"])) or real(adapted, batch),
    )
    one = scene()
    right = tasks.record_accuracies(one.node.model, one.node.examples)
    assert sizes == [1] * RECORDS
    score = tasks.evaluate(one.node.model, one.node.examples)
    assert float(right.mean()) == pytest.approx(score.value)


def pulled(scene, strength, steps=STEPS, **changes):
    """The scene once its client has answered, with a ledger of its own; and the reply."""
    one = scene(**changes)
    one.node = dataclasses.replace(one.node, optimizer=Sgd(name="sgd", lr=1.0, proximal=strength))
    one.ledger_path = one.ledger_path.with_name(f"{strength}-{steps}.jsonl")
    return one, one.answer(work=LocalWork(steps=steps, learning_rate=1.0))


def test_a_proximal_term_changes_neither_clip_nor_draw_nor_noise_nor_price(scene):
    (plain, reply), (other, changed) = pulled(scene, 0.0), pulled(scene, 0.4)
    assert changed.spent == reply.spent
    assert other.node.engine.clips == plain.node.engine.clips == [0.5] * STEPS
    assert other.node.engine.drawn == plain.node.engine.drawn
    assert other.node.noise.normals == plain.node.noise.normals
    assert other.node.noise.uniforms == plain.node.noise.uniforms
    for site, moved in reply.delta.sites.items():
        assert float((changed.delta.sites[site] - moved).norm()) > 0.01 * float(moved.norm())


@pytest.mark.parametrize("kind", ["lora-pro", "allora"])
def test_a_preconditioner_changes_neither_clip_nor_draw_nor_noise_nor_price(scene, kind):
    plain, reply = pulled(scene, 0.0)
    other = scene()
    other.node = dataclasses.replace(other.node, optimizer=Sgd(name="sgd", lr=1.0, precondition=kind))
    other.ledger_path = other.ledger_path.with_name(f"{kind}.jsonl")
    changed = other.answer()
    assert changed.spent == reply.spent
    assert other.node.engine.clips == plain.node.engine.clips == [0.5] * STEPS
    assert other.node.engine.drawn == plain.node.engine.drawn
    assert other.node.noise.normals == plain.node.noise.normals
    assert other.node.noise.uniforms == plain.node.noise.uniforms
    for site, moved in reply.delta.sites.items():
        assert float((changed.delta.sites[site] - moved).norm()) > 0.01 * float(moved.norm())


def test_a_proximal_term_shrinks_what_was_stepped_not_what_is_released(scene):
    """Nothing drawn: each release is noise alone, known from a client without the term."""
    after = [pulled(scene, 0.0, steps, rate=1e-12)[1].delta.sites for steps in range(1, STEPS + 1)]
    _, reply = pulled(scene, 0.4, rate=1e-12)
    for site, moved in reply.delta.sites.items():
        wanted = after[0][site]
        for before, now in itertools.pairwise(after):
            wanted = 0.6 * wanted + (now[site] - before[site])
        torch.testing.assert_close(moved, wanted, rtol=1e-5, atol=1e-6)


def test_in_a_round_of_one_step_a_proximal_term_changes_no_bit(scene):
    (_, plain), (_, other) = pulled(scene, 0.0, 1), pulled(scene, 0.4, 1)
    for site, moved in plain.delta.sites.items():
        assert torch.equal(other.delta.sites[site], moved)
