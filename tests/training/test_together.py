"""Clients that share a forward pass answer as each would alone: the same refusals, debits and draws, equal numbers."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from fedlora.algebra.deltas import trainable
from fedlora.algebra.flat import Layout
from fedlora.config.schema import AdamW, CausalLm, Classification, Lora, Model, Sgd
from fedlora.data.records import Examples
from fedlora.errors import PrivacyError
from fedlora.privacy.budget import Budget
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.gaussian import MARGIN
from fedlora.privacy.ledger import open_ledger
from fedlora.privacy.noise import OsEntropyNoise, SeededNoise
from fedlora.privacy.opacus_engine import OpacusEngine
from fedlora.training import classification
from fedlora.training.client import Node, train
from fedlora.training.load import load_model
from fedlora.training.model import LORA_A, LORA_B
from fedlora.training.together import clients_together, train_together
from fedlora.values import (
    Adapters,
    Factors,
    LocalWork,
    Mechanism,
    Refusal,
    RefusalReason,
    Sampling,
    TrainRequest,
)

STEPS, RECORDS = 3, 24
TARGETS = {"bert": ["query", "value"], "roberta": ["query"], "llama": ["q_proj", "v_proj"]}
SGD, ADAMW = Sgd(name="sgd", lr=1.0), AdamW(name="adamw", lr=1.0, weight_decay=0.1)
FEDPROX = Sgd(name="sgd", lr=1.0, proximal=0.4)
PRO, ALLORA = (Sgd(name="sgd", lr=1.0, precondition=kind) for kind in ("lora-pro", "allora"))

OPTIMIZERS = ["sgd", "adamw", "fedprox", "lora-pro", "allora"]


class WatchedNoise(SeededNoise):
    """Remembers what it was asked for, and how long every ledger was then."""

    def __init__(self) -> None:
        super().__init__(1)
        self.asked: list[tuple] = []
        self.lines_then: list[list[int]] = []
        self.ledgers: list = []

    def normal(self, shape, *, dtype, purpose):
        self.asked.append(purpose)
        return super().normal(shape, dtype=dtype, purpose=purpose)

    def uniform(self, count, *, purpose):
        self.asked.append(purpose)
        self.lines_then.append([len(ledger.path.read_text().splitlines()) for ledger in self.ledgers])
        return super().uniform(count, purpose=purpose)


@dataclasses.dataclass
class Scene:
    nodes: list[Node]
    request: TrainRequest
    ledgers: dict[str, list]

    def one_by_one(self, **changes):
        request = dataclasses.replace(self.request, **changes)
        pairs = zip(self.nodes, self.ledgers["one"], strict=True)
        return [train(node, request, ledger) for node, ledger in pairs]

    def together(self, **changes):
        return train_together(
            self.nodes, dataclasses.replace(self.request, **changes), self.ledgers["together"]
        )

    def texts(self, arm):
        return [ledger.path.read_text() for ledger in self.ledgers[arm]]


def _examples(seed, records=RECORDS, length=None):
    draw = np.random.Generator(np.random.Philox(seed))
    lengths = draw.integers(2, 20, size=records) if length is None else np.full(records, length)
    return Examples(
        input_ids=draw.integers(5, 60, size=int(lengths.sum())).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=draw.integers(0, 3, size=records),
    )


def _node(model, client, examples, rate=0.3, sigma=0.7, **changes):
    node = Node(
        client=client, model=model, examples=examples, declared_records=RECORDS,
        sampling=Sampling(rate=rate, expected_batch=8.0, max_draw=1000), optimizer=SGD,
        mechanism=Mechanism(max_grad_norm=0.5, noise_multiplier=sigma), alone=False, evaluation_noise=None,
        budget=Budget(target_epsilon=1e6, target_delta=1e-5, max_participations=2, accountant="rdp"),
        engine=DirectEngine(), noise=SeededNoise(1),
    )  # fmt: skip
    return dataclasses.replace(node, **changes)


def _model(place, name, dtype="float64", **lora):
    task = CausalLm(kind="causal-lm") if name == "llama" else Classification(kind="sequence-classification")
    classes = () if name == "llama" else ("a", "b", "c")
    adapter = Lora(r=2, lora_alpha=2.0, target_modules=TARGETS[name], **lora)
    return load_model(Model(name=place, dtype=dtype), task, adapter, classes, seed=1)


@pytest.fixture
def scene(tiny, tmp_path):
    def build(name="bert", nodes=None, lora=None, dtype="float64", **changes):
        model = _model(tiny[name], name, dtype, **(lora or {}))
        if nodes is None:  # unequal draws and noise; the third hardly ever draws anything
            terms = [(0.3, 0.7), (0.6, 1.1), (1e-9, 0.9), (0.1, 2.0)]
            nodes = [
                _node(model, f"c{n}", _examples(n), rate, sigma, **changes)
                for n, (rate, sigma) in enumerate(terms)
            ]
        else:
            nodes = nodes(model)
        draw = torch.Generator().manual_seed(4)

        def away_from_zero(value):
            return (0.3 * torch.randn(value.shape, generator=draw, dtype=torch.float64)).to(value.dtype)

        sites = {
            site: Factors(a=a.detach().clone(), b=away_from_zero(b)) for site, (a, b) in model.live.items()
        }
        head = {name: away_from_zero(value) for name, value in model.head().items()}
        request = TrainRequest(
            run="run", base_model="m", code="c", round=1, work=LocalWork(steps=STEPS, learning_rate=0.3),
            adapters=Adapters(basis=0, scale=model.scale, sites=sites, head=head),
        )  # fmt: skip
        ledgers = {
            arm: [
                None
                if node.mechanism is None
                else open_ledger(
                    tmp_path / arm / f"{node.client}.jsonl", client=node.client, dataset_fingerprint="d",
                    noise_kind=node.noise.kind,
                )
                for node in nodes
            ]
            for arm in ("one", "together")
        }  # fmt: skip
        return Scene(nodes, request, ledgers)

    return build


def assert_same(found, wanted):
    """Everything but the numbers of the change is equal; those are to 1e-9, float64."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert type(one) is type(other)
        if isinstance(one, Refusal):
            assert one == other
            continue
        assert dataclasses.replace(one, delta=other.delta) == other
        for part in ("sites", "head"):
            mine, theirs = getattr(one.delta, part), getattr(other.delta, part)
            assert list(mine) == list(theirs)
            for name, value in theirs.items():
                assert float(value.abs().max()) > 1e-6
                assert_close(mine[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("optimizer", [SGD, ADAMW, FEDPROX, PRO, ALLORA], ids=OPTIMIZERS)
def test_replies_are_those_of_clients_one_by_one(scene, name, optimizer):
    one = scene(name, optimizer=optimizer)
    assert_same(one.together(), one.one_by_one())
    assert one.texts("together") == one.texts("one")


def test_without_privacy_replies_are_those_of_clients_one_by_one(scene):
    one = scene(mechanism=None, budget=None)
    found = one.together()
    for mine, theirs in zip(found, one.one_by_one(), strict=True):
        assert mine.spent == () and mine.ledger is None
        for site, value in theirs.delta.sites.items():
            assert_close(mine.delta.sites[site], value, rtol=1e-9, atol=1e-9)


def test_told_accuracies_are_those_of_clients_one_by_one(scene):
    one = scene(evaluation_noise=5.0)
    found = one.together()
    assert_same(found, one.one_by_one())
    assert len({reply.accuracy for reply in found}) == 4


def test_refusals_are_those_of_clients_one_by_one_and_the_rest_go_on(scene):
    def nodes(model):
        return [
            _node(model, "none", _examples(0, records=0)),
            _node(model, "spent", _examples(1), budget=dataclasses.replace(_budget(), max_participations=1)),
            _node(model, "well", _examples(2)),
        ]

    one = scene(nodes=nodes)
    for changes in ({}, {"round": 2}, {"work": LocalWork(steps=STEPS, learning_rate=0.1)}):
        assert_same(one.together(**changes), one.one_by_one(**changes))
    reasons = [getattr(reply, "reason", None) for reply in one.together(round=2)]
    assert reasons == [RefusalReason.NO_DATA, RefusalReason.BUDGET, None]
    changed = one.together(work=LocalWork(steps=STEPS, learning_rate=0.1))
    assert [reply.reason for reply in changed][1:] == [RefusalReason.BAD_REQUEST] * 2
    assert one.texts("together") == one.texts("one")


def _budget():
    return Budget(target_epsilon=1e6, target_delta=1e-5, max_participations=2, accountant="rdp")


def test_every_debit_is_on_disk_before_any_record_is_drawn(scene):
    one = scene(noise=(noise := WatchedNoise()))
    noise.ledgers = one.ledgers["together"]
    one.together()
    assert len(noise.lines_then) == 4 * STEPS
    assert all(lines == [2, 2, 2, 2] for lines in noise.lines_then)  # the header and this round's debit


def test_draws_and_noise_have_the_purposes_that_clients_one_by_one_give_them(scene):
    one = scene(noise=(noise := WatchedNoise()), evaluation_noise=5.0)
    one.together()
    together = sorted(map(repr, noise.asked))
    noise.asked.clear()
    one.one_by_one()
    assert together == sorted(map(repr, noise.asked))
    assert len(set(together)) == len(together)


def test_the_same_request_is_answered_alike_and_paid_once(scene):
    one = scene()
    first, texts = one.together(), one.texts("together")
    for before, again in zip(first, one.together(), strict=True):
        assert all(torch.equal(again.delta.sites[site], value) for site, value in before.delta.sites.items())
    assert one.texts("together") == texts


def test_a_reply_does_not_depend_on_who_shares_the_pass(scene):
    one = scene()
    all_four = one.together()
    last = Scene(one.nodes[3:], one.request, {arm: kept[3:] for arm, kept in one.ledgers.items()})
    assert_same(last.together(), all_four[3:])


@pytest.mark.parametrize("breaks", [False, True])
def test_the_model_has_its_own_layers_back_whatever_happens(scene, monkeypatch, breaks):
    one = scene()
    model = one.nodes[0].model.peft_model
    before = {path: (type(module), id(module)) for path, module in model.named_modules()}
    if breaks:
        monkeypatch.setattr(classification, "cross_entropy", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one.together()
    else:
        one.together()
    assert {path: (type(module), id(module)) for path, module in model.named_modules()} == before
    assert not any(m._forward_hooks for m in model.modules())
    monkeypatch.undo()
    assert_same(one.together(), one.one_by_one())  # and what was paid is not paid again
    assert one.texts("together") == one.texts("one")


def test_what_cannot_share_a_pass_is_refused_before_anybody_pays(scene):
    one = scene()
    first, *others = one.nodes
    wrong = {
        "another engine": {"engine": OpacusEngine()},
        "records alone": {"alone": True},
        "real noise": {"noise": OsEntropyNoise()},
        "another optimizer": {"optimizer": ADAMW},
        "another bound": {"mechanism": Mechanism(max_grad_norm=1.0, noise_multiplier=1.0)},
        "no bound": {"mechanism": None},
        "another model": {"model": dataclasses.replace(first.model)},
        "a client twice": {"client": "c1"},
    }
    for changes in wrong.values():
        nodes = [dataclasses.replace(first, **changes), *others]
        with pytest.raises(PrivacyError, match="one by one"):
            train_together(nodes, one.request, one.ledgers["together"])
    name, trained = next(iter(first.model.trained.items()))
    moves_a = dataclasses.replace(
        first.model, trained={name.replace(LORA_B, LORA_A): trained, **first.model.trained}
    )
    with pytest.raises(PrivacyError, match="an A that is trained"):
        train_together(
            [dataclasses.replace(node, model=moves_a) for node in one.nodes],
            one.request,
            one.ledgers["together"],
        )
    handle = next(
        m for m in first.model.peft_model.modules() if type(m) is nn.Linear and m.weight.requires_grad
    )
    handle = handle.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(PrivacyError, match="hooks"):
        one.together()
    handle.remove()
    assert all(len(text.splitlines()) == 1 for text in one.texts("together"))


def test_sharing_a_pass_costs_no_product_more_but_the_sums_by_client(scene):
    """Equal lengths and full draws, so nothing is padded: all products are those of the clients one by one."""

    def nodes(model):
        return [_node(model, f"c{n}", _examples(n, records=6, length=8), rate=1.0) for n in range(3)]

    counts = {}
    for arm in ("one_by_one", "together"):
        one = scene(nodes=nodes)
        with FlopCounterMode(display=False) as counter:
            getattr(one, arm)()
        counts[arm] = counter.get_total_flops()
    numbers = sum(p.numel() for p in one.nodes[0].model.trained.values())
    # of each of 18 records a row times a number, for each of 3 clients in place of one
    assert counts["together"] == counts["one_by_one"] + STEPS * 2 * (3 - 1) * 18 * numbers


@pytest.mark.parametrize("arm", ["one_by_one", "together"])
def test_nothing_is_back_propagated_below_the_lowest_adapted_layer(scene, arm, monkeypatch):
    one = scene(lora={"layers_to_transform": [1]})
    base = one.nodes[0].model.peft_model.base_model.get_submodule("model")
    layers = [base.get_submodule(f"bert.encoder.layer.{number}") for number in range(2)]
    needs: dict[int, set[bool]] = {0: set(), 1: set()}
    leaves: set[int] = set()

    def watch(number):
        def keep(module, inputs, output):
            first = output[0] if isinstance(output, tuple) else output
            needs[number].add(first.requires_grad)

        return layers[number].register_forward_hook(keep)

    real = classification.cross_entropy

    def watched(*arguments, **named):
        losses = real(*arguments, **named)
        leaves.update(id(leaf) for leaf in _leaves(losses.grad_fn))
        return losses

    monkeypatch.setattr(classification, "cross_entropy", watched)
    handles = [watch(0), watch(1)]
    getattr(one, arm)()
    for handle in handles:
        handle.remove()
    assert needs == {0: {False}, 1: {True}}
    frozen = {id(p) for p in one.nodes[0].model.peft_model.parameters() if not p.requires_grad}
    assert leaves and not leaves & frozen


def _leaves(node, seen=None):
    """The tensors that a backward pass from here could give a gradient."""
    seen = set() if seen is None else seen
    if node is None or node in seen:
        return
    seen.add(node)
    if hasattr(node, "variable"):
        yield node.variable
    for below, _ in node.next_functions:
        yield from _leaves(below, seen)


def test_how_many_share_a_pass_is_the_configs_to_say(tiny_config):
    def auto(batch, length, numbers=10_000):
        config = tiny_config(
            federation__batch_size=batch, data__max_length=length, runtime__clients_together="auto"
        )
        return clients_together(config, numbers, length)

    assert clients_together(tiny_config(), 10_000, 32) == 1
    assert clients_together(tiny_config(runtime__clients_together=5), 10**12, 32) == 5
    assert [auto(1, 32), auto(2, 64), auto(8, 64), auto(64, 64)] == [64, 16, 4, 1]
    assert auto(1, 32, 2**25 // 3) == 3
    assert auto(1, 32, 10**12) == 1


def test_in_float32_a_record_of_one_client_moves_the_others_by_far_less_than_the_margin(scene):
    """Kernels round by who is beside a record, here also by other clients' records; `gaussian.MARGIN` covers it."""

    def nodes(keep):
        return lambda model: [
            _node(model, "leaver", _examples(1).select(np.arange(keep)), rate=1.0),
            _node(model, "other", _examples(2), rate=1.0),
        ]

    moved = []
    for keep in (RECORDS, RECORDS - 1, RECORDS - 5):
        one = scene(nodes=nodes(keep), dtype="float32")
        work = LocalWork(steps=1, learning_rate=1.0)
        moved.append(Layout.of(trainable(one.request.adapters)).flat(one.together(work=work)[1].delta))
    bound, batch = one.nodes[1].mechanism.max_grad_norm, one.nodes[1].sampling.expected_batch
    for other in moved[1:]:
        assert float((other.double() - moved[0].double()).norm()) * batch < MARGIN / 10 * bound
