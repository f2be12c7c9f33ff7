"""The same step in all its variants: on the same weights and records, each as its users would write it."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedlora.config.schema import Model
from fedlora.kernels.packed import available
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.noise import OsEntropyNoise
from fedlora.privacy.step import private_gradient
from fedlora.training.checkpoints import DTYPES, quiet
from fedlora.training.descent import descend
from fedlora.training.model import AdaptedModel
from fedlora.values import Mechanism
from steps.arms import FUNCTORCH, GHOST, HOOKS, MICRO, PEFT, ours, plain
from steps.opacus import ghost, hooks
from steps.problems import CLASSES, Problem

QUIET = 1e-9
"""A noise multiplier that is none to four digits; ours takes no zero."""

Step = Callable[[float, float], None]
"""One step of SGD at (noise multiplier, learning rate). Plain variants take no note of the noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A model with all that it trains, by our names, and its step on the problem's batch."""

    model: nn.Module
    trained: Mapping[str, nn.Parameter]
    step: Step


def kernels_for(problem: Problem) -> tuple[str, ...]:
    """Those of `model.kernels` that can be told apart here, the plainest first."""
    known = get_args(Model.model_fields["kernels"].annotation)
    if problem.device == "cuda":
        return tuple(kernels for kernels in ("torch", "triton") if kernels in known)
    return ("torch", "onednn") if available() else ("torch",)


def arms_for(problem: Problem) -> tuple[str, ...]:
    """Every variant; microbatches of one, which are the definition of right, last."""
    own = [arm(kernels) for kernels in kernels_for(problem) for arm in (plain, ours)]
    return (PEFT, *own, HOOKS, GHOST, FUNCTORCH, MICRO)


def build(arm: str, problem: Problem, directory: Path, bound: float, own: dict[str, AdaptedModel]) -> Variant:
    """The arm's model and step.

    Args:
        arm: one of `arms_for(problem)`.
        problem: saved in `directory`.
        directory: the checkpoint's.
        bound: C of the private arms.
        own: our models by their kernels, loaded where lacking. Arms of ours with equal kernels share one, hence B;
            PEFT's models have frozen weights in common with it, but a B each.
    """
    torch.manual_seed(0)
    kind, _, kernels = arm.partition(", ")
    if kernels:
        adapted = _own(problem, directory, kernels, own)
        model, trained = adapted.peft_model, dict(adapted.trained)
    else:
        model, trained = _peft(problem, directory, _own(problem, directory, "torch", own))
    reset(trained)
    if kind == "ours":
        return Variant(model=model, trained=trained, step=_ours(model, trained, problem, bound))
    make: dict[str, Callable[..., Step]] = {
        "plain": _plain, PEFT: _plain, MICRO: _one_by_one, FUNCTORCH: _functorch,
        HOOKS: partial(hooks, record_losses), GHOST: partial(ghost, record_losses),
    }  # fmt: skip
    return Variant(model=model, trained=trained, step=make[kind](model, trained, problem, bound))


@torch.no_grad()
def reset(trained: Mapping[str, nn.Parameter]) -> None:
    """Every B is what it was before any step, by name alike in all variants; zero would hide A's part."""
    for number, name in enumerate(sorted(trained)):
        draw = torch.randn(trained[name].shape, generator=torch.Generator().manual_seed(number))
        trained[name].copy_(0.02 * draw)


def record_losses(model: nn.Module, problem: Problem, words: Tensor, labels: Tensor) -> Tensor:
    """One loss a record (n,): of its class, or the mean over its next words."""
    logits = model(input_ids=words).logits.float()
    if not problem.causal:
        return cross_entropy(logits, labels, reduction="none")
    return cross_entropy(logits[:, :-1].transpose(1, 2), words[:, 1:], reduction="none").mean(dim=1)


def record_norms(variant: Variant, problem: Problem) -> Tensor:
    """The norm (n,) of each record's joint gradient, one backward pass a record."""
    words, labels = problem.batch()
    norms = []
    for one in range(problem.records):
        loss = record_losses(variant.model, problem, words[one : one + 1], labels[one : one + 1]).sum()
        parts = torch.autograd.grad(loss, list(variant.trained.values()))
        norms.append(torch.stack([part.double().norm() for part in parts]).norm())
    return torch.stack(norms)


def _own(problem: Problem, directory: Path, kernels: str, own: dict[str, AdaptedModel]) -> AdaptedModel:
    if kernels not in own:
        own[kernels] = problem.ours(directory, kernels)
        _share(own[kernels].peft_model, next(iter(own.values())).peft_model)
    return own[kernels]


@torch.no_grad()
def _share(model: nn.Module, like: nn.Module) -> None:
    """The frozen weights around the adapters are those of `like`, and lie in memory once."""
    held = dict(like.named_parameters())
    for name, parameter in model.named_parameters():
        if name in held and ".lora_" not in name:
            if held[name].dtype == parameter.dtype:
                parameter.data = held[name].data
            else:
                parameter.copy_(held[name])


def _peft(problem: Problem, directory: Path, like: AdaptedModel) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """As a tutorial has it, with our A and head; B alone requires a gradient."""
    classes: dict[str, Any] = {} if problem.causal else {"num_labels": len(CLASSES)}
    kind = AutoModelForCausalLM if problem.causal else AutoModelForSequenceClassification
    lora = LoraConfig(
        r=problem.lora.r, lora_alpha=int(problem.lora.lora_alpha), lora_dropout=0.0,
        target_modules=list(problem.lora.target_modules),
        task_type="CAUSAL_LM" if problem.causal else "SEQ_CLS",
    )  # fmt: skip
    with quiet():
        base = kind.from_pretrained(str(directory), dtype=DTYPES[problem.dtype], **classes)
        model = get_peft_model(base, lora)
    model.config.use_cache = False
    model.requires_grad_(False).to(problem.device)
    _share(model, like.peft_model)
    trained = {}
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.requires_grad_(True)
            trained[name.removeprefix("base_model.model.").removesuffix(".default.weight")] = parameter
    for site, (a, _) in like.live.items():
        model.base_model.model.get_submodule(site).lora_A["default"].weight.data.copy_(a.data)
    return model.eval(), trained


def _plain(model: nn.Module, trained: Mapping[str, nn.Parameter], problem: Problem, bound: float) -> Step:
    words, labels = problem.batch()
    optimizer = torch.optim.SGD(trained.values(), lr=0.0)

    def step(noise: float, lr: float) -> None:
        optimizer.param_groups[0]["lr"] = lr
        record_losses(model, problem, words, labels).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _ours(model: nn.Module, trained: Mapping[str, nn.Parameter], problem: Problem, bound: float) -> Step:
    words, labels = problem.batch()
    optimizer = torch.optim.SGD(trained.values(), lr=0.0)

    def step(noise: float, lr: float) -> None:
        optimizer.param_groups[0]["lr"] = lr
        gradient = private_gradient(
            DirectEngine(), model, trained, [partial(record_losses, model, problem, words, labels)],
            mechanism=Mechanism(max_grad_norm=bound, noise_multiplier=max(noise, QUIET)),
            expected_batch=problem.records, noise=OsEntropyNoise(), purpose=("benchmark",),
        )  # fmt: skip
        descend(optimizer, trained, gradient)

    return step


def _one_by_one(
    model: nn.Module, trained: Mapping[str, nn.Parameter], problem: Problem, bound: float
) -> Step:
    words, labels = problem.batch()
    optimizer = torch.optim.SGD(trained.values(), lr=0.0)

    def step(noise: float, lr: float) -> None:
        sums = [torch.zeros_like(parameter) for parameter in trained.values()]
        for one in range(problem.records):
            loss = record_losses(model, problem, words[one : one + 1], labels[one : one + 1]).sum()
            parts = torch.autograd.grad(loss, list(trained.values()))
            norm = torch.stack([part.norm() for part in parts]).norm()
            torch._foreach_add_(sums, torch._foreach_mul(parts, (bound / norm).clamp(max=1.0)))
        _descend(optimizer, sums, noise * bound, problem.records, lr)

    return step


def _functorch(model: nn.Module, trained: Mapping[str, nn.Parameter], problem: Problem, bound: float) -> Step:
    words, labels = problem.batch()
    optimizer = torch.optim.SGD(trained.values(), lr=0.0)
    ids = {id(parameter): name for name, parameter in model.named_parameters()}
    paths = [ids[id(parameter)] for parameter in trained.values()]

    def loss(values: list[Tensor], word: Tensor, label: Tensor) -> Tensor:
        called = partial(functional_call, model, dict(zip(paths, values, strict=True)), ())
        return record_losses(_Called(called), problem, word[None], label[None]).sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0))

    def step(noise: float, lr: float) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # attention has no batching rule on a CPU and is looped over
            parts = each([parameter.detach() for parameter in trained.values()], words, labels)
        norms = torch.stack([part.flatten(1).norm(dim=1) for part in parts]).norm(dim=0)
        factors = (bound / norms).clamp(max=1.0)
        sums = [torch.tensordot(factors, part, dims=1) for part in parts]
        _descend(optimizer, sums, noise * bound, problem.records, lr)

    return step


class _Called(nn.Module):
    """What calls `functional_call` where a model is expected."""

    def __init__(self, call: Callable[[dict[str, Tensor]], Any]) -> None:
        super().__init__()
        self._call = call

    def forward(self, **inputs: Tensor) -> Any:
        return self._call(inputs)


def _descend(
    optimizer: torch.optim.Optimizer, sums: list[Tensor], deviation: float, records: int, lr: float
) -> None:
    optimizer.param_groups[0]["lr"] = lr
    for parameter, total in zip(optimizer.param_groups[0]["params"], sums, strict=True):
        parameter.grad = (total + deviation * torch.randn_like(total)) / records
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
