"""Which values of a run cannot go together, though each is fine by itself."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.config.columns import column_conflicts
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.config.schema import Lora, Model, Optimizer, RunConfig

MOST_STEPS = 1_000_000
"""Of one client: composing so many takes an accountant some ten seconds each time, and then ever more."""


def conflicts(config: "RunConfig") -> list[str]:
    """Every impossible combination, as `key: what is wrong; what to write instead`."""
    return [
        *column_conflicts(config.data, config.task),
        *_labels(config),
        *_public(config),
        *_test(config),
        *_streaming(config),
        *_cohort(config),
        *_steps(config),
        *_method(config),
        *_own_b(config),
        *optimizer_conflicts(config.federation.optimizer, config.lora, "federation.optimizer"),
        *_ranks(config),
        *lora_conflicts(config.lora),
        *_runtime(config),
        *_kernels(config),
        *_images(config),
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
    if not config.task.causal:
        yield f"data.label: missing, but task.kind is {config.task.kind}; name the label column"
    if config.data.partition.kind in ("dirichlet", "pathological", "shards"):
        kind = config.data.partition.kind
        yield f"data.partition.kind: {kind} deals out labels, but data.label is null; write iid or column"


def _public(config: "RunConfig") -> Iterator[str]:
    """Public labelled records are there exactly where a subspace is made of them."""
    given = getattr(config.data, "public", None)
    chosen = {"lora.init": config.lora.init, "method.left": getattr(config.method, "left", None)}
    readers = [key for key, choice in chosen.items() if choice == "gradients"]
    if readers and config.data.source == "docstrings":
        yield f"{readers[0]}: gradients, but docstrings have no file of public records; write principal"
    elif readers and given is None:
        yield f"data.public: missing, but {readers[0]} is gradients; name a file of public labelled records"
    elif given is not None and _is_same_file(given, getattr(config.data, "train", None)):
        yield f"data.public: {given} is data.train itself, whose records are private; name a file of nobody's"
    elif given is not None and not readers:
        yield f"data.public: {given}, which lora.init: gradients alone would read; write null, or that"


def _test(config: "RunConfig") -> Iterator[str]:
    """What is told of test records is exact, and no epsilon covers it."""
    data = config.data
    if config.privacy == "none":
        return
    why = "whose records are private, and scores, losses and samples of test records are exact"
    if data.source == "files" and _is_same_file(data.test, data.train):
        yield f"data.test: {data.test} is data.train itself, {why}; name a file of public records"
    if data.source == "huggingface" and _share_records(data.test_split, data.train_split):
        split, train = data.test_split, data.train_split
        yield f"data.test_split: {split} holds records of data.train_split {train}, {why}; name a split of public ones"


def _share_records(one: str, other: str) -> bool:
    """Of two splits, sums and slices too, as `datasets` writes them; two different slices are taken to be apart."""
    halves = [[part.strip().partition("[") for part in split.split("+")] for split in (one, other)]
    return any(
        "all" in (a, b) or (a == b and (of_a == of_b or "" in (of_a, of_b)))
        for a, _, of_a in halves[0]
        for b, _, of_b in halves[1]
    )


def _is_same_file(one: str, other: str | None) -> bool:
    paths = [Path(name).expanduser().resolve() for name in (one, other) if name is not None]
    return len(paths) == 2 and paths[0] == paths[1]


def _streaming(config: "RunConfig") -> Iterator[str]:
    data = config.data
    if data.source == "huggingface" and data.streaming and data.max_train_examples is None:
        yield (
            "data.max_train_examples: missing, but data.streaming is true; write how many rows to read: sampling rates "
            "and noise follow from each client's number of records"
        )


def _cohort(config: "RunConfig") -> Iterator[str]:
    cohort, clients = config.federation.cohort, config.data.partition.clients
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
    if config.federation.reshuffle and not isinstance(cohort, int):
        yield "federation.reshuffle: true, but federation.cohort is a probability; write a number of clients, or false"
    if not isinstance(cohort, int) and clients is not None and least > clients:
        yield f"federation.min_clients: {least} answers needed of {clients} clients; write {clients} or less"


def _steps(config: "RunConfig") -> Iterator[str]:
    if config.privacy != "none":
        steps, times = config.federation.local_steps, config.privacy.max_participations
        yield from step_conflicts(steps, times, "federation.local_steps", "privacy.max_participations")


def step_conflicts(steps: int, times: int, key: str, times_key: str) -> Iterator[str]:
    """Of so many steps in each of so many participations, by the keys that say them."""
    if steps * times > MOST_STEPS:
        yield (
            f"{key}: {steps} steps in each of {times} participations; no budget is computed for more than "
            f"{MOST_STEPS:,} steps of one client; lower it, or {times_key}"
        )


def _method(config: "RunConfig") -> Iterator[str]:
    if config.method.name == "fedavg" and config.lora.init != "kaiming":
        yield f"lora.init: {config.lora.init}, but fedavg keeps the A that PEFT draws; write kaiming, or name: ffa"

    if config.method.stale.rule == "mifa" and config.method.stale.beta != 1:
        beta = config.method.stale.beta
        yield f"method.stale.beta: {beta}, but mifa counts what is remembered whole; write 1.0, or rule: fedstale"
    federation = config.federation
    alone = federation.participation == "importance" and not isinstance(federation.cohort, int)
    if config.method.stale.beta == "adaptive-by-client" and not alone:
        # Else what all updates have in common costs nothing under one beta, and does under several.
        yield (
            "method.stale.beta: adaptive-by-client needs clients who count one by one; write adaptive, or "
            "participation: importance and cohort: {probability: 0.5}"
        )

    if config.method.name == "svfit" and config.lora.init != "principal":
        yield f"lora.init: {config.lora.init}, but svfit scales the weight's own singular vectors; write principal"

    trained = config.method.trains
    if config.lora.trains != trained:
        yield f"lora.trains: {config.lora.trains}, but {config.method.name} trains {_TRAINED[trained]}; write {trained}"
    yield from _left(config)


_TRAINED = {"b": "B alone", "core": "a core", "singular-values": "singular values", "ab": "A and B"}


def _left(config: "RunConfig") -> Iterator[str]:
    """Where A leaves its row space, what was remembered in it means nothing."""
    method, server = config.method, config.federation.server.name
    if _stays(config):
        return
    if method.stale.beta != 0:
        yield f"method.stale.beta: {method.stale.beta}, but {method.name} moves A away from it; write 0"
    if server != "sgd":
        yield f"federation.server.name: {server} remembers steps, but {method.name} moves A away from them; write sgd"


def _stays(config: "RunConfig") -> bool:
    """Whether A never leaves its row space."""
    method = config.method
    lq = getattr(method, "route", "lq") == "lq"
    return method.trains != "ab" and lq and not hasattr(method, "restart_every")


def _own_b(config: "RunConfig") -> Iterator[str]:
    """Where each client goes on from its own B, the server's stays the mean of theirs only if all changes are added."""
    federation = config.federation
    if not config.method.own_b:
        return
    if federation.participation != "normalised":
        what = f"{federation.participation}, but fedsa keeps the mean of the clients' own B's, which nothing divides"
        yield f"federation.participation: {what}; write normalised"
    if federation.server.name == "sgd" and federation.server.lr != 1:
        what = f"{federation.server.lr:g}, but the clients' own B's have gone all the way in fedsa"
        yield f"federation.server.lr: {what}; write 1.0"
    if federation.enough is not None:
        what = f"{federation.enough}, but in fedsa late updates never count and have moved their clients' B's"
        yield f"federation.enough: {what}; write null"
    if config.lora.from_adapter is not None:
        what = f"{config.lora.from_adapter}, but in fedsa the clients' own B's begin at zero"
        yield f"lora.from_adapter: {what}; write null, or name: fedit"


def _ranks(config: "RunConfig") -> Iterator[str]:
    """Where some clients train fewer columns of B, a column's divisor is of those alone who trained it."""
    ranks, method, federation = config.federation.ranks, config.method, config.federation
    if ranks is None:
        return
    yield from rank_conflicts(ranks, config.lora, federation.optimizer, "federation.ranks")
    if method.trains == "b" and not _stays(config):
        yield (
            f"federation.ranks: {method.name} takes A out of its row space; write null, or a method that keeps it: "
            "fedsvd (route: lq), fedask, ffa, fedavg"
        )
    if method.stale.beta != 0:
        beta = f"method.stale.beta is {method.stale.beta}"
        yield f"federation.ranks: {beta}, but no column remembers who trained it; write beta 0, or ranks: null"
    if federation.server.name != "sgd":
        server = f"federation.server.name is {federation.server.name}"
        yield f"federation.ranks: {server}, which moves columns that nobody trained; write sgd, or ranks: null"


def rank_conflicts(ranks: Mapping[str, int], lora: "Lora", optimizer: "Optimizer", key: str) -> Iterator[str]:
    """What cannot be where the first columns of B alone are trained, a run's by client or a node's own."""
    beyond = {client: rank for client, rank in sorted(ranks.items()) if rank > lora.r}
    if beyond:
        named = ", ".join(f"{client} {rank}" for client, rank in list(beyond.items())[:4])
        yield f"{key}: {named}, but lora.r is {lora.r}; write {lora.r} or less"
    if lora.rank_pattern is not None:
        yield f"{key}: these are columns of equally many, but lora.rank_pattern is set; write null for one of them"
    if lora.trains != "b":
        yield f"{key}: these are columns of a whole B, but lora.trains is {lora.trains}; write null, or trains: b"
    rule = optimizer.precondition if optimizer.name == "sgd" else "none"
    if rule != "none":
        yield f"{key}: {rule} is of all columns at once; write precondition: none, or null here"


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
    if config.model.gradient_checkpointing and config.runtime.cache_prefix is True:
        yield (
            "model.gradient_checkpointing: cannot be combined with runtime.cache_prefix; write false for one of them"
        )
    if config.model.gradient_checkpointing and config.privacy != "none" and config.privacy.engine == "opacus":
        yield (
            "privacy.engine: opacus counts a layer that runs again as used twice, but model.gradient_checkpointing is "
            "true; write engine: direct, or gradient_checkpointing: false"
        )


def _images(config: "RunConfig") -> Iterator[str]:
    if config.task.kind == "image-classification" and config.runtime.cache_prefix is True:
        yield (
            "runtime.cache_prefix: true, but states are kept a token of text, and images have none; write false"
        )


def lora_conflicts(lora: "Lora") -> Iterator[str]:
    """What cannot be of an adapter alone, a run's or a node's."""
    for pattern in lora.rank_pattern or {}:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"lora.rank_pattern: {pattern!r} is no regular expression ({error}); write the end of a layer's path"
    if lora.from_adapter is not None and lora.trains == "singular-values":
        what = "the directions are the weight's own, in which no other adapter lies"
        yield f"lora.from_adapter: {lora.from_adapter}, but {what}; write null, or a method that trains B or a core"


def model_conflicts(model: "Model") -> Iterator[str]:
    """What cannot be of a base model alone, a run's or a node's."""
    if model.quantization != "none" and model.dtype == "float64":
        yield f"model.dtype: float64, but {model.quantization} keeps no such digits; write float32 or bfloat16"


def optimizer_conflicts(optimizer: "Optimizer", lora: "Lora", key: str) -> Iterator[str]:
    """What cannot be of a client's optimiser and what it trains, a run's or a node's."""
    rule = optimizer.precondition if optimizer.name == "sgd" else "none"
    if rule == "allora" and lora.trains != "b":
        what = f"rows of B have steps of their own, but lora.trains is {lora.trains}"
        yield f"{key}.precondition: allora, {what}; write none or lora-pro"
    if rule == "lora-pro" and lora.trains == "ab":
        yield f"{key}.precondition: lora-pro measures B by a frozen A, but lora.trains is ab; write none"
    back = optimizer.lr * optimizer.proximal if optimizer.name == "sgd" else 0.0
    if back > 1:
        yield (
            f"{key}.proximal: each step would go back {back:g} times its way from the start; "
            f"write {1 / optimizer.lr:g} or less"
        )


def _world(config: "RunConfig") -> Iterator[str]:
    if config.world is not None and config.runtime.kind == "flower":
        yield "world: runtime.kind is flower, whose seconds are real; write null, or kind: local or ray"
