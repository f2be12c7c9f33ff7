"""Data sets of the Hugging Face hub, or their cached copies; the library loads only for a run that asks."""

import importlib
from itertools import islice
from pathlib import Path
from typing import Any

from fedlora.config.data import HuggingFace
from fedlora.data.hub import hub_within_reach, offline_if
from fedlora.data.table import Table, require_columns
from fedlora.errors import DataError


def load_split(data: HuggingFace, split: str, wanted: list[str], most: int | None = None) -> Table:
    """The wanted columns of one split, in its order; class labels by name where it has names.

    Args:
        data: which data set, and whether it streams.
        split: of it.
        wanted: names of columns.
        most: the first so many rows, and of a set that streams no more are read; None: all.

    Raises:
        DataError: the `datasets` library, the data set, the split or a column is not there, or a stream broke.
    """
    dataset = _encoded_images(_dataset(data, split), wanted)
    origin = f"{data.path}{'' if data.name is None else '/' + data.name} ({split})"
    if data.streaming:
        columns = _streamed(dataset, origin, wanted, most)
    else:
        require_columns(origin, wanted, dataset.column_names)
        rows = dataset if most is None else dataset.select(range(min(most, len(dataset))))
        columns = {name: list(rows[name]) for name in wanted}
    features = dataset.features or {}
    named = {name: _named(values, features.get(name)) for name, values in columns.items()}
    return Table(origin=origin, columns=named, lines=range(1, len(named[wanted[0]]) + 1))


def _streamed(dataset: Any, origin: str, wanted: list[str], most: int | None) -> dict[str, list[object]]:
    """The columns of the first rows, read one by one; what comes after them is not asked for."""
    columns: dict[str, list[object]] = {name: [] for name in wanted}
    rows = iter(dataset)
    try:
        for row in islice(rows, most):
            require_columns(origin, wanted, row)
            for name, values in columns.items():
                values.append(row[name])
    except DataError:
        raise
    except Exception as error:
        # Of the library, the network or the file format: a dozen kinds, all of which end the reading.
        read = len(columns[wanted[0]])
        raise DataError(f"{origin}: the stream broke after {read} rows: {error}; try again") from error
    return columns


def _dataset(data: HuggingFace, split: str) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            "data.source huggingface needs the datasets library; pip install 'fedlora[huggingface]'"
        ) from None
    local = Path(data.path).is_dir()
    try:
        with offline_if(not local and not hub_within_reach()):
            return datasets.load_dataset(data.path, data.name, split=split, streaming=data.streaming)
    except Exception as error:
        # The library raises a dozen unrelated kinds; each means that there is no data to work on.
        raise DataError(
            f"data set {data.path!r} (name {data.name!r}, split {split!r}) could not be loaded: {error}; "
            "check data.path, data.name and the split, or download it once while the hub is within reach"
        ) from error


def _encoded_images(dataset: Any, wanted: list[str]) -> Any:
    """Columns of images as {bytes, path}: whoever reads them knows the size that is wanted."""
    for name in wanted:
        feature: Any = (dataset.features or {}).get(name)
        if type(feature).__name__ == "Image":
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    return dataset


def _named(values: list[object], feature: Any) -> list[object]:
    """ClassLabel indices by name. -1, the hub's word for unlabelled, becomes None and is refused, not a class."""
    names = getattr(feature, "names", None)
    if not isinstance(names, list):
        return values
    return [names[value] if isinstance(value, int) and 0 <= value < len(names) else None for value in values]
