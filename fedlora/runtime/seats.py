"""Where the workers of a run sit: on which node of a Ray cluster, with how many cores and how much of a GPU. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.config.schema import Runtime
from fedlora.errors import ConfigError

FILLED = 0.9
"""The part of a card's memory that is given away; the rest is for what allocators leave unused between pieces."""
GRAIN = 10_000
"""Ray counts parts of a GPU in ten-thousandths."""


def worker_count(runtime: Runtime, cores: int) -> int:
    """Worker processes of a run on so many cores."""
    return max(1, cores // runtime.threads) if runtime.workers == "auto" else runtime.workers


def side_by_side(runtime: Runtime, cores: int) -> int:
    """Clients that train at once: one a worker; in process, one."""
    return 1 if runtime.kind == "local" else worker_count(runtime, cores)


def model_holders(runtime: Runtime, cores: int) -> int:
    """Processes that hold a model: this one, and the workers that there are beside it."""
    return 1 if runtime.kind == "local" else 1 + worker_count(runtime, cores)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """What a worker asks of the cluster. gpus: of one card. node: where, unless it dies; None: anywhere."""

    cpus: int
    gpus: float = 0.0
    node: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """What one worker takes at most of a card, and what the card has, in bytes."""

    taken: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuNode:
    """A machine with cards. kind: equal for machines with equal cards."""

    node: str
    kind: str
    cards: int
    cores: int


def anywhere(runtime: Runtime, workers: int) -> list[Seat]:
    """So many seats on cores, wherever there is room."""
    return [Seat(cpus=runtime.threads)] * workers


def gpu_nodes(nodes: Sequence[Mapping[str, Any]]) -> list[GpuNode]:
    """The machines with cards among `ray.nodes()`. Cards of a kind that Ray does not know are a kind of their own."""
    found = []
    for node in nodes:
        resources = node["Resources"]
        if node["Alive"] and resources.get("GPU", 0) >= 1:
            kinds = [name for name in resources if name.startswith("accelerator_type:")]
            kind = kinds[0] if kinds else node["NodeID"]
            cards, cores = int(resources["GPU"]), int(resources.get("CPU", 0))
            found.append(GpuNode(node=node["NodeID"], kind=kind, cards=cards, cores=cores))
    return found


def on_cards(
    nodes: Sequence[GpuNode], peaks: Mapping[str, Peak], runtime: Runtime, clients: int
) -> list[Seat]:
    """The seats that memory and cores allow, those of a node spread evenly over its cards.

    Args:
        nodes: the machines with cards.
        peaks: by their kind.
        runtime: threads of a worker; `workers`, where it is a number, is the most.
        clients: of the run; no more workers than these.

    Raises:
        ConfigError: there is no card, or none that a single worker fits on.
    """
    room = {node.node: _workers(node, peaks[node.kind], runtime.threads) for node in nodes}
    most = clients if runtime.workers == "auto" else min(clients, runtime.workers)
    chosen: dict[str, int] = dict.fromkeys(room, 0)
    while sum(chosen.values()) < most and (free := [node for node in room if chosen[node] < room[node]]):
        least = min(free, key=lambda node: chosen[node] / room[node])
        chosen[least] += 1
    if not any(chosen.values()):
        needs = ", ".join(f"{peak.taken:,} of {peak.total:,} bytes" for peak in peaks.values())
        raise ConfigError(
            f"runtime.device: cuda, but no node has a GPU and {runtime.threads} cores that a worker fits on "
            f"({needs or 'no GPU'}); lower data.max_length or runtime.threads, or write device: cpu"
        )
    return [
        Seat(cpus=runtime.threads, gpus=_part(chosen[node.node], node.cards), node=node.node)
        for node in nodes
        for _ in range(chosen[node.node])
    ]


def slots(peak: Peak) -> int:
    """Workers that one card carries."""
    return int(FILLED * peak.total // peak.taken)


def _workers(node: GpuNode, peak: Peak, threads: int) -> int:
    return min(node.cards * slots(peak), node.cores // threads)


def _part(workers: int, cards: int) -> float:
    """Of a card, for each of so many workers: no card gets more than its even share of them."""
    on_one = -(-workers // cards)
    return GRAIN // on_one / GRAIN
