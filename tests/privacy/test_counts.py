"""What privacy costs beside the plain step, counted, not timed: products, kept bytes, calls."""

from collections import Counter

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from fedlora.config.schema import Classification, Lora, Model
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.training.load import load_model

RECORDS, TOKENS = 2, 24
MORE_CALLS = 8
"""A norm and a sum over all rows, and the clip factors between them, whatever the model."""


class Calls(TorchDispatchMode):
    """Every operation that computes; views are none."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        free = func.is_view or func.overloadpacket.__name__ in ("detach", "alias")
        self.count[str(func)] += not free
        return func(*args, **(kwargs or {}))


class Step:
    def __init__(self, path, layers, kernels, targets):
        sizes = {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_attention_heads": 4,
            "num_hidden_layers": layers,
        }
        with torch.random.fork_rng(devices=[]):
            BertModel(BertConfig(vocab_size=60, **sizes)).save_pretrained(path)
        self.model = load_model(
            Model(name=str(path), kernels=kernels),
            Classification(kind="sequence-classification"),
            Lora(target_modules=targets, r=8, lora_alpha=8),
            ("a", "b"),
            1,
        )
        draw = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(5, 60, (RECORDS, TOKENS), generator=draw)
        self.labels = torch.randint(0, 2, (RECORDS,), generator=draw)

    def losses(self):
        mask = torch.ones_like(self.tokens)
        logits = self.model.peft_model(input_ids=self.tokens, attention_mask=mask).logits
        return cross_entropy(logits, self.labels, reduction="none")

    def plain(self):
        self.losses().mean().backward()
        for parameter in self.model.trained.values():
            parameter.grad = None

    def private(self):
        DirectEngine().clipped_sum(self.model.peft_model, self.model.trained, [self.losses], 0.1)


@pytest.fixture(params=["torch", "auto"])
def step(request, tmp_path):
    return Step(tmp_path, 2, request.param, ["query", "value", "dense"])


def calls(run):
    run()
    with Calls() as counted:
        run()
    return sum(counted.count.values())


def kept(run):
    """Bytes of all storages that the forward pass keeps for the backward one."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


def test_products_are_those_of_the_plain_step_and_the_clipped_sum(tmp_path):
    step = Step(tmp_path, 2, "torch", ["query", "value", "dense"])
    found = []
    for run in (step.plain, step.private):
        with FlopCounterMode(display=False) as counted:
            run()
        found.append(counted.get_total_flops())
    clip = 2 * RECORDS * sum(parameter.numel() for parameter in step.model.trained.values())
    assert found[1] == found[0] + clip
    assert found[1] / found[0] <= 1.002


def test_nothing_more_is_kept_for_the_backward_pass(step):
    assert kept(step.private) <= 1.002 * kept(step.plain)


def test_calls_are_a_fixed_number_more_however_many_layers(step, tmp_path):
    deeper = Step(tmp_path / "deeper", 4, "auto", ["query", "value", "dense"])
    more = [calls(one.private) - calls(one.plain) for one in (step, deeper)]
    assert more == [MORE_CALLS, MORE_CALLS]
