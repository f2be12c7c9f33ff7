"""The records of every simulated client in a few flat arrays, so that a hundred thousand clients cost no object each.

holdings/input_ids.npy, offsets.npy, labels.npy, ... (ARRAYS)           as in `Examples`, one client's after the other's
holdings/bounds.npy, clients.json                                     client i holds records bounds[i] to bounds[i + 1]
holdings/starts.npy, rows.json                                        where the records' states lie, if they have any
"""

import json
import shutil
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlora.data.records import Examples, States

ARRAYS = ("input_ids", "offsets", "labels", "token_type_ids", "trained", "firsts")
"""Of `Examples`, what is kept here."""


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
        return cls(clients=clients, examples=examples.select(dealt(parts)), bounds=bounds)

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

    def label_counts(self, clients: Sequence[str], labels: int) -> NDArray[np.int64] | None:
        """(clients, labels): how many records each of these holds of each label; None where records have none."""
        if self.examples.labels is None:
            return None
        held = [self[client].labels for client in clients]
        return np.array([np.bincount(own, minlength=labels) for own in held]).reshape(len(clients), labels)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def save(self, directory: Path) -> None:
        """`directory`, readable by its owner only, holds them all; whatever was there is gone.

        States, which have to be mapped, stay in their file.
        """
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(mode=0o700, parents=True)
        for name in ARRAYS:
            array = getattr(self.examples, name)
            if array is not None:
                np.save(directory / f"{name}.npy", array)
        if self.examples.states is not None:
            _save_place(self.examples.states, directory)
        np.save(directory / "bounds.npy", self.bounds)
        (directory / "clients.json").write_text(json.dumps(self.clients))


def open_holdings(directory: Path) -> Holdings:
    """What was saved there; the arrays stay on disk, and processes share the pages that they read."""
    paths = {name: directory / f"{name}.npy" for name in ARRAYS}
    arrays = {name: _mapped(path) for name, path in paths.items() if path.exists()}
    clients = tuple(json.loads((directory / "clients.json").read_text()))
    examples = Examples(**arrays, states=_states(directory))
    return Holdings(clients=clients, examples=examples, bounds=np.load(directory / "bounds.npy"))


def dealt(parts: Mapping[str, NDArray[np.int64]]) -> NDArray[np.int64]:
    """What `partition` dealt out, one client's after the other's, the clients by name."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *(parts[client] for client in sorted(parts))])


def _save_place(states: States, directory: Path) -> None:
    rows = states.rows
    assert isinstance(rows, np.memmap), "states that no file holds cannot be found again"
    place = {"file": str(rows.filename), "type": rows.dtype.str, "offset": rows.offset, "shape": rows.shape}
    (directory / "rows.json").write_text(json.dumps(place))
    np.save(directory / "starts.npy", states.starts)


def _states(directory: Path) -> States | None:
    path = directory / "rows.json"
    if not path.exists():
        return None
    place = json.loads(path.read_text())
    dtype, shape = np.dtype(place["type"]), tuple(place["shape"])
    rows: NDArray = np.memmap(place["file"], dtype=dtype, mode="r", offset=place["offset"], shape=shape)
    return States(rows=rows, starts=np.load(directory / "starts.npy"))


def _mapped(path: Path) -> NDArray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return np.asarray(array)  # numpy's own class for mapped arrays makes every slice dear
