"""Which values of a run cannot go together, though each is fine by itself."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.config.schema import Model, Optimizer, RunConfig


def conflicts(config: "RunConfig") -> list[str]:
    """Every impossible combination, as `key: what is wrong; what to write instead`."""
    return [
        *_labels(config),
        *_cohort(config),
        *_method(config),
        *optimizer_conflicts(config.federation.optimizer, "federation.optimizer"),
        *_runtime(config),
        *_kernels(config),
        *model_conflicts(config.model),
        *_world(config),
    ]


def require_servable(config: "RunConfig") -> None:
    """Passes only a run that real clients can take part in.

    Raises:
        ConfigError: the config describes a world of simulated ones.
    """
    if config.world is not None:
        raise ConfigError(
            "world: only simulated clients live in one; a server's nodes are there when they are, and its seconds are "
            "real: write null, or use fedlora simulate"
        )


def _labels(config: "RunConfig") -> Iterator[str]:
    if config.data.source == "docstrings" or config.data.label is not None:
        return
    if config.task.kind == "sequence-classification":
        yield "data.label: missing, but task.kind is sequence-classification; name the label column"
    if config.data.partition.kind in ("dirichlet", "pathological"):
        kind = config.data.partition.kind
        yield f"data.partition.kind: {kind} deals out labels, but data.label is null; write iid or column"


def _cohort(config: "RunConfig") -> Iterator[str]:
    cohort, clients = config.federation.cohort, getattr(config.data.partition, "clients", None)
    least = config.federation.min_clients
    if isinstance(cohort, int) and clients is not None and cohort > clients:
        there = f"data.partition.clients is {clients}"
        yield f"federation.cohort: {cohort} clients asked, but {there}; write {clients} or less"
    if isinstance(cohort, int) and least > cohort:
        yield f"federation.min_clients: {least} answers needed, but {cohort} asked; write {cohort} or less"
    if (enough := config.federation.enough) is not None:
        if enough < least:
            yield f"federation.enough: {enough} answers, but min_clients is {least}; write {least} or more"
        if isinstance(cohort, int) and enough > cohort:
            yield f"federation.enough: {enough} answers, but {cohort} are asked; write {cohort} or less, or null"
        if config.runtime.kind != "flower" and config.world is None:
            kind = config.runtime.kind
            waits = f"runtime.kind is {kind}, which waits for all"
            yield f"federation.enough: {waits}; write null, kind: flower, or a world with its own clock"
    if not isinstance(cohort, int) and clients is not None and least > clients:
        yield f"federation.min_clients: {least} answers needed of {clients} clients; write {clients} or less"


def _method(config: "RunConfig") -> Iterator[str]:
    if config.method.name == "fedavg" and config.lora.init != "kaiming":
        yield f"lora.init: {config.lora.init}, but fedavg keeps the A that PEFT draws; write kaiming, or name: ffa"

    federation = config.federation
    alone = federation.participation == "importance" and not isinstance(federation.cohort, int)
    if config.method.stale.beta == "adaptive-by-client" and not alone:
        # Else what all updates have in common costs nothing under one beta, and does under several.
        yield (
            "method.stale.beta: adaptive-by-client needs clients who count one by one; write adaptive, or "
            "participation: importance and cohort: {probability: 0.5}"
        )

    trained, what = ("core", "a core") if config.method.name == "fedsb" else ("b", "B (fedsb trains cores)")
    if config.lora.trains != trained:
        yield f"lora.trains: {config.lora.trains}, but {config.method.name} trains {what}; write {trained}"


def _runtime(config: "RunConfig") -> Iterator[str]:
    if config.runtime.address is not None and config.runtime.kind != "ray":
        kind = config.runtime.kind
        yield f"runtime.address: only Ray has one, but runtime.kind is {kind}; write null, or kind: ray"
    if config.runtime.device == "cuda" and config.runtime.kind == "flower":
        yield "runtime.device: cuda, but runtime.kind is flower, which deals out cores only; write kind: ray or local"


def _kernels(config: "RunConfig") -> Iterator[str]:
    kernels, device, dtype = config.model.kernels, config.runtime.device, config.model.dtype
    if kernels == "triton" and device != "cuda":
        yield f"model.kernels: triton, but runtime.device is {device}; write kernels: auto, or device: cuda"
    if kernels == "onednn" and (device != "cpu" or dtype != "float32"):
        yield f"model.kernels: onednn packs float32 weights on cores, not {dtype} on {device}; write kernels: auto"
    if config.model.gradient_checkpointing and config.runtime.cache_prefix:
        yield (
            "model.gradient_checkpointing: cannot be combined with runtime.cache_prefix; write false for one of them"
        )


def model_conflicts(model: "Model") -> Iterator[str]:
    """The same of a base model alone, a run's or a node's."""
    if model.quantization != "none" and model.dtype == "float64":
        yield f"model.dtype: float64, but {model.quantization} keeps no such digits; write float32 or bfloat16"


def optimizer_conflicts(optimizer: "Optimizer", key: str) -> Iterator[str]:
    """The same of a client's optimiser alone, a run's or a node's."""
    back = optimizer.lr * optimizer.proximal if optimizer.name == "sgd" else 0.0
    if back > 1:
        yield (
            f"{key}.proximal: each step would go back {back:g} times its way from the start; "
            f"write {1 / optimizer.lr:g} or less"
        )


def _world(config: "RunConfig") -> Iterator[str]:
    if config.world is not None and config.runtime.kind == "flower":
        yield "world: runtime.kind is flower, whose seconds are real; write null, or kind: local or ray"
