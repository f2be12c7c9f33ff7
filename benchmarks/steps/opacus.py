"""Opacus' two ways to a step: hooks that form every record's gradient, and ghost clipping with its second backward."""

import warnings
from collections.abc import Callable, Mapping

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from steps.problems import Problem

RecordLosses = Callable[[nn.Module, Problem, Tensor, Tensor], Tensor]


def hooks(
    losses: RecordLosses,
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    problem: Problem,
    bound: float,
) -> Callable[[float, float], None]:
    """A step with `GradSampleModule` and `DPOptimizer`, as `PrivacyEngine.make_private` joins them."""
    words, labels = problem.batch()
    wrapped = GradSampleModule(model.train())  # in eval mode it sees nothing; there is no dropout
    sgd = torch.optim.SGD(trained.values(), lr=0.0)
    optimizer = DPOptimizer(
        sgd, noise_multiplier=1.0, max_grad_norm=bound, expected_batch_size=problem.records
    )

    def step(noise: float, lr: float) -> None:
        optimizer.noise_multiplier, sgd.param_groups[0]["lr"] = noise, lr
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # hooks of frozen layers
            losses(wrapped, problem, words, labels).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ghost(
    losses: RecordLosses,
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    problem: Problem,
    bound: float,
) -> Callable[[float, float], None]:
    """A step with `grad_sample_mode="ghost"`, as `PrivacyEngine.make_private` joins it."""
    words, labels = problem.batch()
    wrapped = GradSampleModuleFastGradientClipping(model.train(), max_grad_norm=bound)
    sgd = torch.optim.SGD(trained.values(), lr=0.0)
    optimizer = DPOptimizerFastGradientClipping(
        sgd, noise_multiplier=1.0, max_grad_norm=bound, expected_batch_size=problem.records
    )
    criterion = DPLossFastGradientClipping(wrapped, optimizer, _Losses(losses))

    def step(noise: float, lr: float) -> None:
        optimizer.noise_multiplier, sgd.param_groups[0]["lr"] = noise, lr
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            criterion(wrapped, problem, words, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class _Losses:
    """What Opacus asks for losses of records; it sets `reduction` itself."""

    reduction = "mean"

    def __init__(self, losses: RecordLosses) -> None:
        self._losses = losses

    def __call__(self, model: nn.Module, problem: Problem, words: Tensor, labels: Tensor) -> Tensor:
        return self._losses(model, problem, words, labels)
