"""The records of every simulated client in a few flat arrays, so that a hundred thousand clients cost no object each.

holdings/input_ids.npy, offsets.npy, labels.npy, token_type_ids.npy   as in `Examples`, one client's after the other's
holdings/bounds.npy, clients.json                                     client i holds records bounds[i] to bounds[i + 1]
"""

import json
import shutil
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlora.data.records import Examples


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Holdings(Mapping[str, Examples]):
    """Client -> its records, cut out when asked for; views of the arrays, not copies.

    clients: sorted names. bounds: (clients + 1,) into `examples`, which holds everybody's records.
    """

    clients: tuple[str, ...]
    examples: Examples
    bounds: NDArray[np.int64]

    @classmethod
    def of(cls, examples: Examples, parts: Mapping[str, NDArray[np.int64]]) -> "Holdings":
        """What `partition` dealt out."""
        clients = tuple(sorted(parts))
        bounds = np.cumsum([0, *(len(parts[client]) for client in clients)], dtype=np.int64)
        order = np.empty(bounds[-1], dtype=np.int64)
        for client, start in zip(clients, bounds, strict=False):  # there is a bound more than clients
            order[start : start + len(parts[client])] = parts[client]
        return cls(clients=clients, examples=examples.select(order), bounds=bounds)

    def only(self, clients: Collection[str]) -> "Holdings":
        """What these clients hold, in arrays of its own."""
        places = [place for place, client in enumerate(self.clients) if client in clients]
        parts = {self.clients[n]: np.arange(self.bounds[n], self.bounds[n + 1]) for n in places}
        return Holdings.of(self.examples, parts)

    def place(self, client: str) -> int:
        """Which of `clients` it is; KeyError if none."""
        place = bisect_left(self.clients, client)
        if place == len(self.clients) or self.clients[place] != client:
            raise KeyError(client)
        return place

    def __getitem__(self, client: str) -> Examples:
        place = self.place(client)
        return self.examples.between(int(self.bounds[place]), int(self.bounds[place + 1]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.clients)

    def __len__(self) -> int:
        return len(self.clients)

    def save(self, directory: Path) -> None:
        """`directory`, readable by its owner only, holds them all; whatever was there is gone."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(mode=0o700, parents=True)
        for field in fields(Examples):
            array = getattr(self.examples, field.name)
            if array is not None:
                np.save(directory / f"{field.name}.npy", array)
        np.save(directory / "bounds.npy", self.bounds)
        (directory / "clients.json").write_text(json.dumps(self.clients))


def open_holdings(directory: Path) -> Holdings:
    """What was saved there; the arrays stay on disk, and processes share the pages that they read."""
    paths = {field.name: directory / f"{field.name}.npy" for field in fields(Examples)}
    arrays = {name: _mapped(path) for name, path in paths.items() if path.exists()}
    clients = tuple(json.loads((directory / "clients.json").read_text()))
    return Holdings(clients=clients, examples=Examples(**arrays), bounds=np.load(directory / "bounds.npy"))


def _mapped(path: Path) -> NDArray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return np.asarray(array)  # numpy's own class for mapped arrays makes every slice dear
