import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from fedlora.config.schema import CausalLm, Classification, Lora, Model
from fedlora.data import Examples
from fedlora.errors import DataError
from fedlora.training.load import load_model
from fedlora.training.tasks import evaluate, losses, micro_batches


def examples_of(lengths, classes=3, seed=0):
    draw = np.random.Generator(np.random.Philox(seed))
    return Examples(
        input_ids=draw.integers(5, 60, size=sum(lengths)).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=draw.integers(0, classes, size=len(lengths)),
    )


def row(examples, index):
    return examples.input_ids[examples.offsets[index] : examples.offsets[index + 1]]


def model(place, targets, causal=False):
    task = CausalLm(kind="causal-lm") if causal else Classification(kind="sequence-classification")
    lora = Lora(r=2, lora_alpha=2.0, target_modules=targets)
    adapted = load_model(Model(name=place, dtype="float64"), task, lora, () if causal else ("a", "b", "c"), 0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from zero, where every loss and most gradients would be equal
        for parameter in adapted.trained.values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.3)
    return adapted


@pytest.fixture(scope="module", params=["bert", "roberta", "llama", "gpt2"])
def adapted(request, tiny):
    targets = {
        "bert": ["query", "value"],
        "roberta": ["query"],
        "llama": ["q_proj", "v_proj"],
        "gpt2": ["c_attn"],
    }
    return model(tiny[request.param], targets[request.param], causal=request.param in ("llama", "gpt2"))


def by_record(adapted, examples, indices, budget):
    """Loss and gradient of every record, by its index, out of micro-batches of the given size."""
    groups = micro_batches(examples, indices, budget)
    found = {}
    for group, run in zip(groups, losses(adapted, examples, indices, budget), strict=True):
        each = run()
        assert each.shape == (len(group),)
        for index, loss in zip(group.tolist(), each, strict=True):
            gradients = torch.autograd.grad(loss, list(adapted.trained.values()), retain_graph=True)
            found[index] = (loss.detach(), torch.cat([g.flatten() for g in gradients]))
    return found


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    budget=st.integers(1, 200),
    seed=st.integers(0, 99),
)
def test_micro_batches_hold_each_index_once_within_the_budget(lengths, budget, seed):
    examples = examples_of(lengths)
    indices = np.random.Generator(np.random.Philox(seed)).permutation(len(lengths))[: 1 + len(lengths) // 2]
    groups = micro_batches(examples, indices, budget)
    assert sorted(np.concatenate(groups).tolist()) == sorted(indices.tolist())
    assert all(len(group) == 1 or len(group) * examples.lengths[group].max() <= budget for group in groups)
    flat = examples.lengths[np.concatenate(groups)]
    assert np.all(np.diff(flat) >= 0)
    again = micro_batches(examples, np.sort(indices), budget)
    assert [group.tolist() for group in groups] == [group.tolist() for group in again]


def test_an_empty_draw_gives_no_batches(adapted):
    empty = np.zeros(0, dtype=np.int64)
    assert micro_batches(examples_of([3, 4]), empty) == []
    assert losses(adapted, examples_of([3, 4]), torch.zeros(0, dtype=torch.int64)) == []


def test_a_record_s_loss_and_gradient_do_not_know_its_neighbours(adapted):
    examples = examples_of([2, 3, 5, 8, 13, 21])
    alone = by_record(adapted, examples, np.arange(6), budget=1)
    together = by_record(adapted, examples, np.arange(6), budget=10_000)
    longer = examples_of([2, 3, 5, 8, 13, 34], seed=9)
    shared = int(examples.offsets[5])
    changed = Examples(  # the same first five records beside a longer one with another label
        input_ids=np.concatenate([examples.input_ids[:shared], longer.input_ids[shared:]]),
        offsets=longer.offsets,
        labels=np.append(examples.labels[:5], 1 - min(examples.labels[5], 1)),
    )
    beside = by_record(adapted, changed, np.arange(6), budget=10_000)
    fewer = by_record(adapted, examples, np.array([4, 1]), budget=10_000)
    for index in range(6):
        loss, gradient = alone[index]
        assert gradient.norm() > 1e-6
        for other in (together, beside, fewer):
            if index in other and not (other is beside and index == 5):
                # float64, a few hundred terms of order 1
                assert_close(other[index][0], loss, rtol=1e-10, atol=1e-10)
                assert_close(other[index][1], gradient, rtol=1e-9, atol=1e-10)


def test_a_language_model_s_loss_is_the_mean_over_the_record_s_own_tokens(tiny):
    llama = model(tiny["llama"], ["q_proj"], causal=True)
    examples = examples_of([3, 17])
    found = by_record(llama, examples, np.arange(2), budget=10_000)
    for index in range(2):
        tokens = torch.from_numpy(row(examples, index).astype(np.int64))
        logits = llama.peft_model(input_ids=tokens[None]).logits[0]
        assert_close(found[index][0], cross_entropy(logits[:-1], tokens[1:]).detach())


def test_a_record_of_one_token_has_loss_zero_and_a_graph(tiny):
    llama = model(tiny["llama"], ["q_proj"], causal=True)
    for lengths in ([1], [1, 6]):
        loss, gradient = by_record(llama, examples_of(lengths), np.arange(len(lengths)), 10_000)[0]
        assert loss == 0
        assert torch.all(gradient == 0)


def test_a_pair_s_token_types_reach_the_model(tiny):
    bert = model(tiny["bert"], ["query"])
    plain = examples_of([6, 4])
    typed = Examples(
        input_ids=plain.input_ids,
        offsets=plain.offsets,
        labels=plain.labels,
        token_type_ids=np.array([0, 0, 0, 1, 1, 1, 0, 0, 0, 0], dtype=np.int8),
    )
    first, second = (by_record(bert, e, np.arange(2), 10_000) for e in (plain, typed))
    assert abs(first[0][0] - second[0][0]) > 1e-6
    assert_close(first[1][0], second[1][0])


def test_accuracy_and_loss_are_those_of_single_records_whatever_the_batches(tiny):
    bert = model(tiny["bert"], ["query"])
    examples = examples_of([3, 9, 4, 4, 7, 12, 5])
    hits, total = 0, 0.0
    with torch.no_grad():
        for index in range(7):
            tokens = torch.from_numpy(row(examples, index).astype(np.int64))[None]
            logits = bert.peft_model(input_ids=tokens).logits
            label = torch.tensor([examples.labels[index]])
            hits += int(logits.argmax() == label)
            total += float(cross_entropy(logits, label))
    for budget in (1, 20, 10_000):
        score = evaluate(bert, examples, budget)
        assert score.metric == "accuracy"
        assert score.value == pytest.approx(hits / 7)
        assert score.loss == pytest.approx(total / 7, rel=1e-10)


def test_perplexity_counts_tokens_and_loss_counts_records(tiny):
    llama = model(tiny["llama"], ["q_proj"], causal=True)
    examples = examples_of([1, 4, 11])
    single = by_record(llama, examples, np.arange(3), 1)
    score = evaluate(llama, examples)
    assert score.metric == "perplexity"
    assert score.loss == pytest.approx(sum(float(single[i][0]) for i in range(3)) / 3)
    assert score.value == pytest.approx(math.exp((3 * float(single[1][0]) + 10 * float(single[2][0])) / 13))


def test_nothing_to_score_on_is_an_error(tiny):
    bert = model(tiny["bert"], ["query"])
    with pytest.raises(DataError, match="0 test records"):
        evaluate(bert, examples_of([]))
    unlabelled = Examples(input_ids=np.array([5, 6], np.int32), offsets=np.array([0, 2]))
    with pytest.raises(DataError, match="no label"):
        evaluate(bert, unlabelled)
