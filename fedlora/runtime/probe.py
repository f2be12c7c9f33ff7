"""What one worker of a run takes of a GPU's memory, measured on the card itself before the first round."""

import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedlora.config.schema import RunConfig
from fedlora.data.records import Examples
from fedlora.errors import ConfigError, FedLoraError
from fedlora.privacy.step import private_gradient
from fedlora.runtime.host import Host, HostSetup, runs_alone
from fedlora.runtime.seats import GpuNode, Peak
from fedlora.training.batches import ALONE, TOKEN_BUDGET
from fedlora.training.intake import Intake
from fedlora.training.model import AdaptedModel
from fedlora.training.tasks import losses

NUMBER_BYTES = 24
"""Of a trained number of a client that shares passes: itself, its gradient, its float64 sum and AdamW's two moments."""


def peaks_of(nodes: Sequence[GpuNode], setup: HostSetup) -> dict[str, Peak]:
    """By kind of machine: a whole card of the first one works a worker's largest micro-batch. No ledger is touched.

    Raises:
        RayError: a worker died of it, or was never placed.
    """
    first = {node.kind: node for node in reversed(nodes)}
    asked = {kind: _measuring(node, setup) for kind, node in first.items()}
    return {kind: Peak(taken=taken, total=total) for kind, (taken, total) in _gathered(asked).items()}


def _gathered(asked: dict[str, Any]) -> dict[str, tuple[int, int]]:
    try:
        return dict(zip(asked, ray.get(list(asked.values())), strict=True))
    except RayTaskError as error:
        if isinstance(error.cause, FedLoraError):
            raise error.cause from None
        raise


def _measuring(node: GpuNode, setup: HostSetup) -> Any:
    where = NodeAffinitySchedulingStrategy(node.node, soft=False)
    cores = min(setup.config.runtime.threads, node.cores)
    options = {"num_cpus": cores, "num_gpus": 1, "max_calls": 1, "scheduling_strategy": where}
    task: Any = ray.remote(**options)(measured)
    return task.remote(setup)


def measured(setup: HostSetup) -> tuple[int, int]:
    """Bytes that a host takes of this process's card at most, with CUDA's own, and that the card has.

    Raises:
        ConfigError: torch finds no GPU here.
    """
    host = Host(setup)
    if not torch.cuda.is_available():
        raise ConfigError(f"torch finds no GPU on {socket.gethostname()}; write runtime.device: cpu")
    largest_step(host)
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    beside = total - free - torch.cuda.memory_reserved()  # CUDA's context, and whoever else is on the card
    return torch.cuda.max_memory_reserved() + beside + _stacked_bytes(setup, host.model), total


def largest_step(host: Host) -> None:
    """A forward and backward pass as a client makes it, of the largest micro-batch, of records that nobody owns."""
    config = host.setup.config
    alone = runs_alone(config, host.model)
    records = largest_batch(config, host.model.intake, alone)
    terms = next(iter(host.setup.terms.values()))
    private_gradient(
        host.engine,
        host.model.peft_model,
        host.model.trained,
        losses(host.model, records, np.arange(len(records)), ALONE if alone else TOKEN_BUDGET),
        mechanism=terms.mechanism,
        expected_batch=terms.sampling.expected_batch,
        noise=host.noise,
        purpose=("probe",),
        sequences_per_record=records.sequences_per_record,
    )


def largest_batch(config: RunConfig, intake: Intake, alone: bool) -> Examples:
    """As many records of the largest size, a pair twice as large, as a micro-batch holds at most."""
    pairs = config.task.kind == "dpo"
    length = intake.most_tokens(config.data.max_length) * (2 if pairs else 1)
    count = 1 if alone else max(1, TOKEN_BUDGET // length)
    return replace(
        intake.blank(count, length),
        labels=None if config.task.causal else np.zeros(count, dtype=np.int64),
        firsts=np.full(count, length // 2, dtype=np.int64) if pairs else None,
    )


def _stacked_bytes(setup: HostSetup, model: AdaptedModel) -> int:
    trained = sum(parameter.numel() for parameter in model.trained.values())
    return NUMBER_BYTES * trained * setup.together if setup.together > 1 else 0
