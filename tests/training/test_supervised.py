"""What is not marked as learned moves neither loss nor gradient; what is, counts as ever."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from fedlora.config.schema import CausalLm, Lora, Model
from fedlora.data.records import Examples
from fedlora.training.load import load_model
from fedlora.training.tasks import evaluate, losses, record_accuracies

LENGTHS = (3, 9, 6, 1, 12)
PROMPTS = (1, 4, 5, 1, 12)
"""Tokens that are read only; of the last record all are, of the fourth there is no other."""


@pytest.fixture(scope="module")
def adapted(tiny):
    lora = Lora(r=2, lora_alpha=4.0, target_modules=["q_proj", "v_proj"])
    model = load_model(Model(name=tiny["llama"], dtype="float64"), CausalLm(kind="causal-lm"), lora, (), 0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trained.values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.3)
    return model


def examples_of(trained=True):
    draw = np.random.Generator(np.random.Philox(0))
    marks = [np.arange(length) >= prompt for length, prompt in zip(LENGTHS, PROMPTS, strict=True)]
    return Examples(
        input_ids=draw.integers(5, 60, size=sum(LENGTHS)).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64),
        trained=np.concatenate(marks) if trained else None,
    )


def loss_and_gradient(adapted, examples, index):
    (run,) = losses(adapted, examples, np.array([index]))
    (loss,) = run()
    gradients = torch.autograd.grad(loss, list(adapted.trained.values()))
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def alone(adapted, examples, index):
    """Cross entropy of each learned token of a record, by plain means."""
    cut = slice(examples.offsets[index], examples.offsets[index + 1])
    tokens = torch.from_numpy(examples.input_ids[cut].astype(np.int64))
    logits = adapted.peft_model(input_ids=tokens[None]).logits[0]
    each = cross_entropy(logits[:-1], tokens[1:], reduction="none")
    right = logits[:-1].argmax(dim=-1) == tokens[1:]
    wanted = torch.from_numpy(examples.trained[cut])[1:]
    return each[wanted].detach(), right[wanted]


def test_a_record_s_loss_is_the_mean_over_its_learned_tokens_whoever_is_beside_it(adapted):
    examples = examples_of()
    (run,) = losses(adapted, examples, np.arange(3), 10**6)
    wanted = [alone(adapted, examples, index)[0].mean() for index in (0, 2, 1)]  # by length
    assert_close(run().detach(), torch.stack(wanted), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("index", [3, 4])
def test_a_record_that_learns_no_token_has_loss_zero_and_exactly_no_gradient(adapted, index):
    loss, gradient = loss_and_gradient(adapted, examples_of(), index)
    assert loss == 0
    assert torch.count_nonzero(gradient) == 0 and torch.isfinite(gradient).all()


def test_marks_on_every_token_change_no_bit(adapted):
    plain = examples_of(trained=False)
    marked = dataclasses.replace(plain, trained=np.ones(sum(LENGTHS), dtype=np.bool_))
    for index in range(5):
        for one, other in zip(
            loss_and_gradient(adapted, plain, index), loss_and_gradient(adapted, marked, index), strict=True
        ):
            assert torch.equal(one, other)
    assert evaluate(adapted, plain) == evaluate(adapted, marked)


def test_perplexity_is_over_learned_tokens_and_accuracy_a_share_of_these(adapted):
    examples = examples_of()
    each = [alone(adapted, examples, index) for index in range(5)]
    score = evaluate(adapted, examples)
    nats = torch.cat([costs for costs, _ in each])
    assert score.metric == "perplexity"
    assert score.value == pytest.approx(math.exp(float(nats.mean())), rel=1e-10)
    means = [float(costs.mean()) if len(costs) else 0.0 for costs, _ in each]
    assert score.loss == pytest.approx(sum(means) / 5, rel=1e-10)
    shares = [float(right.double().mean()) if len(right) else 0.0 for _, right in each]
    assert sorted(record_accuracies(adapted, examples).tolist()) == pytest.approx(sorted(shares))
