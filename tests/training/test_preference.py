"""A pair of completions is one record: one loss, one gradient, one clip, in every engine and however it is batched."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from fedlora.config.schema import Dpo, Lora, Model
from fedlora.data.records import Examples
from fedlora.errors import PrivacyError
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.opacus_engine import OpacusEngine
from fedlora.training.adapter import without_adapters
from fedlora.training.guards import public_clip_share
from fedlora.training.load import load_model
from fedlora.training.model import set_rest
from fedlora.training.prefix import frozen_prefix
from fedlora.training.states import with_states
from fedlora.training.tasks import ALONE, evaluate, losses, micro_batches, record_accuracies

BETA = 0.7
ENGINES = {"direct": DirectEngine(), "opacus": OpacusEngine()}
EXCESS = 1e-5
"""Over the bound, relative, in float32, as in tests/privacy/test_neighbours.py."""


def build(place, dtype="float32", *, moved=True, layers=None, trains="b"):
    lora = Lora(
        r=2, lora_alpha=4.0, target_modules=["q_proj", "v_proj"], layers_to_transform=layers, trains=trains
    )
    adapted = load_model(Model(name=place, dtype=dtype), Dpo(kind="dpo", beta=BETA), lora, (), 0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.trained.values():
            value = torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.3
            parameter.copy_(value if moved else torch.zeros_like(value))
    return adapted


def pairs_of(count=12, seed=3):
    """Records of two sequences of unequal length, of which everything but a first part is learned."""
    draw = np.random.Generator(np.random.Philox(seed))
    lengths = draw.integers(3, 14, size=2 * count)
    marks = [np.arange(length) >= min(2 + i % 3, length - 1) for i, length in enumerate(lengths)]
    return Examples(
        input_ids=draw.integers(5, 60, size=int(lengths.sum())).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths.reshape(-1, 2).sum(axis=1))]).astype(np.int64),
        trained=np.concatenate(marks),
        firsts=lengths[::2].astype(np.int64),
    )


def sequences(examples, index):
    """The token ids and marks of both sequences of a record."""
    begin, end = examples.offsets[index], examples.offsets[index + 1]
    middle = begin + examples.firsts[index]
    tokens, marks = torch.from_numpy(examples.input_ids.astype(np.int64)), torch.from_numpy(examples.trained)
    return [(tokens[begin:middle], marks[begin:middle]), (tokens[middle:end], marks[middle:end])]


def log_probability(model, tokens, marks):
    said = log_softmax(model(input_ids=tokens[None]).logits[0, :-1].double(), dim=-1)
    return said.gather(1, tokens[1:, None])[:, 0][marks[1:]].sum()


def by_autograd(adapted, examples, index):
    (run,) = losses(adapted, examples, np.array([index]))
    gradients = torch.autograd.grad(run()[0], list(adapted.trained.values()))
    return torch.cat([gradient.double().flatten() for gradient in gradients])


def summed(engine, adapted, examples, indices, bound, budget=64):
    sums = ENGINES[engine].clipped_sum(
        adapted.peft_model, adapted.trained, losses(adapted, examples, np.asarray(indices), budget), bound, 2
    )
    return torch.cat([value.double().flatten() for value in sums.values()])


def test_the_loss_is_equation_7_with_the_base_model_as_it_was_as_reference(tiny):
    adapted, examples = build(tiny["llama"], "float64"), pairs_of()
    base = AutoModelForCausalLM.from_pretrained(tiny["llama"], dtype=torch.float64)
    right, wanted = [], {}
    with torch.no_grad():
        for index in range(len(examples)):
            policy = [log_probability(adapted.peft_model, *each) for each in sequences(examples, index)]
            reference = [log_probability(base, *each) for each in sequences(examples, index)]
            margin = (policy[0] - reference[0]) - (policy[1] - reference[1])
            right.append(float(margin > 0))
            wanted[index] = -torch.log(torch.sigmoid(BETA * margin))
        for budget in (ALONE, 64, 10**6):
            groups = micro_batches(examples, np.arange(len(examples)), budget)
            for group, run in zip(
                groups, losses(adapted, examples, np.arange(len(examples)), budget), strict=True
            ):
                assert_close(run(), torch.stack([wanted[i] for i in group.tolist()]), rtol=1e-9, atol=1e-9)
    score = evaluate(adapted, examples)
    assert score.metric == "accuracy" and 0 < sum(right) < len(right)
    assert score.value == pytest.approx(sum(right) / len(right))
    assert score.loss == pytest.approx(float(sum(wanted.values())) / len(wanted), rel=1e-9)
    assert sorted(record_accuracies(adapted, examples).tolist()) == sorted(right)


def test_before_training_the_model_is_its_own_reference(tiny):
    adapted, examples = build(tiny["llama"], moved=False), pairs_of()
    score = evaluate(adapted, examples)
    assert score.loss == pytest.approx(math.log(2), rel=1e-6)
    assert score.value == 0.5
    assert by_autograd(adapted, examples, 0).norm() > 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_a_record_s_gradient_is_what_autograd_makes_of_the_record_alone(tiny, engine):
    adapted, examples = build(tiny["llama"], "float64" if engine == "direct" else "float32"), pairs_of()
    close = {"direct": 1e-9, "opacus": 2e-5}[engine]
    wanted = [by_autograd(adapted, examples, index) for index in range(len(examples))]
    for index, gradient in enumerate(wanted):
        alone = summed(engine, adapted, examples, [index], None)
        assert_close(alone, gradient, rtol=0, atol=close * float(gradient.norm()))
    bound = float(torch.stack([gradient.norm() for gradient in wanted]).median())
    clipped = sum(gradient * min(1.0, bound / float(gradient.norm())) for gradient in wanted)
    for budget in (ALONE, 64, 10**6):
        found = summed(engine, adapted, examples, range(len(examples)), bound, budget)
        assert_close(found, clipped, rtol=0, atol=close * len(wanted) * bound)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pair_moves_the_sum_by_at_most_the_bound(tiny, engine):
    adapted, examples = build(tiny["llama"]), pairs_of(40)
    bound = float(np.median([float(by_autograd(adapted, examples, i).norm()) for i in range(20)]))
    draw = np.random.Generator(np.random.Philox(9))
    for _ in range(8):
        batch = draw.choice(len(examples), size=8, replace=False)
        whole = summed(engine, adapted, examples, batch, bound)
        for gone in range(len(batch)):
            without = summed(engine, adapted, examples, np.delete(batch, gone), bound)
            assert float((whole - without).norm()) <= bound * (1 + EXCESS)


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_are_never_clipped_as_if_each_were_a_record(tiny, engine):
    adapted, examples = build(tiny["llama"]), pairs_of()
    runs = losses(adapted, examples, np.arange(4))
    with pytest.raises(PrivacyError, match="rows of gradients"):
        ENGINES[engine].clipped_sum(adapted.peft_model, adapted.trained, runs, 1.0)


def test_the_reference_leaves_what_is_trainable_and_what_is_computed_as_they_were(tiny):
    adapted, examples = build(tiny["llama"], trains="ab"), pairs_of()
    rest = torch.randn(adapted.shapes()[adapted.sites[0]], generator=torch.Generator().manual_seed(2))
    adapted.trained_on("b")
    set_rest(adapted.layers()[adapted.sites[0]], rest)
    trainable = [parameter.requires_grad for parameter in adapted.peft_model.parameters()]
    tokens, marks = sequences(examples, 0)[0]
    base = AutoModelForCausalLM.from_pretrained(tiny["llama"])
    with torch.no_grad():
        before = log_probability(adapted.peft_model, tokens, marks)
        with without_adapters(adapted):
            assert_close(
                log_probability(adapted.peft_model, tokens, marks), log_probability(base, tokens, marks)
            )
        assert (
            log_probability(adapted.peft_model, tokens, marks)
            == before
            != log_probability(base, tokens, marks)
        )
    evaluate(adapted, examples)
    assert [parameter.requires_grad for parameter in adapted.peft_model.parameters()] == trainable


def test_pairs_that_begin_at_the_lowest_adapted_layer_have_the_same_losses(tiny, tmp_path):
    adapted, examples = build(tiny["llama"], layers=[1]), pairs_of()
    prefix = frozen_prefix(adapted)
    assert prefix is not None
    kept = with_states(tmp_path / "states", adapted, prefix, examples, base_model="base", alone=False)
    for budget in (ALONE, 10**6):
        for whole, resumed in zip(
            losses(adapted, examples, np.arange(12), budget),
            losses(adapted, kept, np.arange(12), budget),
            strict=True,
        ):
            assert_close(resumed(), whole(), rtol=1e-5, atol=1e-6)


def test_the_share_of_clipped_public_pairs_is_that_of_whole_pairs(tiny):
    adapted, examples = build(tiny["llama"]), pairs_of(8)
    norms = np.array([float(by_autograd(adapted, examples, one).norm()) for one in range(8)])
    for clip in (0.5 * norms.min(), float(np.median(norms)), 2 * norms.max()):
        assert public_clip_share(adapted, examples, clip) == np.mean(norms > clip)
