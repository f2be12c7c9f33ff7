"""Who holds which record: every record goes to exactly one client."""

import hashlib
import re
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from fedlora.config.data import Column, Dirichlet, Iid, Partition, Pathological, Quantity, Shards
from fedlora.data.records import Records
from fedlora.errors import DataError
from fedlora.seeds import seed_for

DIRICHLET_DRAWS = 1000
MAX_NAME = 80

Indices = NDArray[np.int64]


def partition(records: Records, partition_cfg: Partition, seed: int) -> dict[str, Indices]:
    """Sorted record indices of each client, by name: disjoint, none empty, all records together.

    Raises:
        DataError: a client would hold nothing, or the records lack the labels or the column that the kind
        needs.
    """
    draw = np.random.Generator(np.random.Philox(seed_for(seed, "partition")))
    match partition_cfg:
        case Iid(clients=clients):
            shares = np.array_split(draw.permutation(len(records)), clients)
            parts = dict(zip(client_names(clients), shares, strict=True))
        case Dirichlet():
            by_class = _shuffled_classes(_labels(records, "dirichlet"), draw)
            parts = _dirichlet(by_class, partition_cfg, draw)
        case Quantity():
            parts = _dirichlet([draw.permutation(len(records))], partition_cfg, draw)
        case Pathological():
            parts = _pathological(_labels(records, "pathological"), partition_cfg, draw)
        case Shards():
            parts = _shards(_labels(records, "shards"), partition_cfg, draw)
        case Column(column=column):
            parts = _by_column(records, column)
        case _:
            assert_never(partition_cfg)
    for client, indices in parts.items():
        if len(indices) == 0:
            raise DataError(
                f"data.partition: {client!r} would hold none of the {len(records)} records; "
                f"lower data.partition.clients (now {len(parts)}), or take another partition or seed"
            )
    return {client: np.sort(indices).astype(np.int64, copy=False) for client, indices in parts.items()}


def client_names(clients: int) -> list[str]:
    """`client-0`, ... zero-padded to one width, so that sorting by name is sorting by number."""
    width = len(str(clients - 1))
    return [f"client-{number:0{width}d}" for number in range(clients)]


def _labels(records: Records, kind: str) -> Indices:
    if records.labels is None:
        raise DataError(
            f"data.partition.kind {kind} deals records out by label, but there are none; set data.label or "
            f"use iid"
        )
    return records.labels


def _shuffled_classes(labels: Indices, draw: np.random.Generator) -> list[Indices]:
    return [draw.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]


def _dirichlet(
    by_class: list[Indices], cfg: Dirichlet | Quantity, draw: np.random.Generator
) -> dict[str, Indices]:
    """Each group of records cut by a Dirichlet draw, all of it repeated until nobody holds too few."""
    counts = np.array([len(indices) for indices in by_class])
    best = -1
    for _ in range(DIRICHLET_DRAWS):
        shares = draw.dirichlet(np.full(cfg.clients, cfg.alpha), size=len(by_class))
        # (classes, clients - 1) places to cut at; rounding the cumulated share keeps every record
        cuts = np.rint(np.cumsum(shares, axis=1)[:, :-1] * counts[:, None]).astype(np.int64)
        sizes = np.diff(cuts, axis=1, prepend=0, append=counts[:, None]).sum(axis=0)
        best = max(best, int(sizes.min()))
        if sizes.min() >= cfg.min_examples:
            pieces = [np.split(indices, cut) for indices, cut in zip(by_class, cuts, strict=True)]
            joined = [np.concatenate(held) for held in zip(*pieces, strict=True)]
            return dict(zip(client_names(cfg.clients), joined, strict=True))
    raise DataError(
        f"data.partition: in {DIRICHLET_DRAWS} draws of Dirichlet(alpha={cfg.alpha}) over {counts.sum()} "
        f"records some one of {cfg.clients} clients always held fewer than min_examples={cfg.min_examples} "
        f"(at best {best}); raise alpha, or lower clients or min_examples"
    )


def _pathological(labels: Indices, cfg: Pathological, draw: np.random.Generator) -> dict[str, Indices]:
    """Labels are dealt round and round, `classes_per_client` a client; its holders share a label evenly."""
    by_class = _shuffled_classes(labels, draw)
    classes, each = len(by_class), cfg.classes_per_client
    if each > classes or cfg.clients * each < classes:
        raise DataError(
            f"data.partition: {cfg.clients} clients with classes_per_client={each} cannot hold {classes} "
            f"labels; need classes_per_client <= {classes} and clients * classes_per_client >= {classes}"
        )
    dealt = draw.permutation(classes)[np.arange(cfg.clients * each) % classes].reshape(cfg.clients, each)
    held: list[list[Indices]] = [[] for _ in range(cfg.clients)]
    for label, indices in enumerate(by_class):
        holders = np.flatnonzero((dealt == label).any(axis=1))
        for holder, share in zip(holders, np.array_split(indices, len(holders)), strict=True):
            held[holder].append(share)
    return {
        name: np.concatenate(shares) for name, shares in zip(client_names(cfg.clients), held, strict=True)
    }


def _shards(labels: Indices, cfg: Shards, draw: np.random.Generator) -> dict[str, Indices]:
    """Records in the order of their labels, cut into shards of equal size within one, each client's by lot."""
    shards = cfg.clients * cfg.shards_per_client
    if shards > len(labels):
        raise DataError(
            f"data.partition: {cfg.clients} clients with shards_per_client={cfg.shards_per_client} are {shards} "
            f"shards, but there are {len(labels)} records; lower one of the two"
        )
    pieces = np.array_split(np.concatenate(_shuffled_classes(labels, draw)), shards)
    lots = draw.permutation(shards).reshape(cfg.clients, cfg.shards_per_client)
    return {
        name: np.concatenate([pieces[shard] for shard in own])
        for name, own in zip(client_names(cfg.clients), lots, strict=True)
    }


def _by_column(records: Records, column: str) -> dict[str, Indices]:
    if records.groups is None:
        raise DataError(
            f"data.partition.column {column!r} was not read from the training data; name a column that it has"
        )
    values = np.array(records.groups, dtype=object)
    distinct = sorted(set(records.groups))
    return {
        name: np.flatnonzero(values == value)
        for value, name in zip(distinct, _safe_names(distinct), strict=True)
    }


def _safe_names(values: list[str]) -> list[str]:
    """File names: the value itself where it is one, else with a digest, so that no two values share a name.

    Names that differ in case only would share a file on some systems, so they count as the same.
    """
    safe = [re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip(".-") for value in values]
    folded = [name.casefold() for name in safe]
    return [
        name
        if name and len(name) <= MAX_NAME and folded.count(name.casefold()) == 1
        else f"{name[:MAX_NAME]}~{_digest(value)}"
        for name, value in zip(safe, values, strict=True)
    ]


def _digest(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()[:8]
