"""Data sets of the Hugging Face hub, or their cached copies; the library loads only for a run that asks."""

import importlib
from pathlib import Path
from typing import Any

from fedlora.config.schema import HuggingFace
from fedlora.data.hub import hub_within_reach, offline_if
from fedlora.data.tables import Table, require_columns
from fedlora.errors import DataError


def load_split(data: HuggingFace, split: str, wanted: list[str]) -> Table:
    """The wanted columns of one split, in its order; class labels by name where it has names.

    Raises:
        DataError: the `datasets` library, the data set, the split or a column is not there.
    """
    dataset = _dataset(data, split)
    origin = f"{data.path}{'' if data.name is None else '/' + data.name} ({split})"
    require_columns(origin, wanted, dataset.column_names)
    columns = {name: _named(list(dataset[name]), dataset.features[name]) for name in wanted}
    return Table(origin=origin, columns=columns, lines=range(1, len(dataset) + 1))


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
            return datasets.load_dataset(data.path, data.name, split=split)
    except Exception as error:
        # The library raises a dozen unrelated kinds; each means that there is no data to work on.
        raise DataError(
            f"data set {data.path!r} (name {data.name!r}, split {split!r}) could not be loaded: {error}; "
            "check data.path, data.name and the split, or download it once while the hub is within reach"
        ) from error


def _named(values: list[object], feature: Any) -> list[object]:
    """ClassLabel indices by name. -1, the hub's word for unlabelled, becomes None and is refused, not a class."""
    names = getattr(feature, "names", None)
    if not isinstance(names, list):
        return values
    return [names[value] if isinstance(value, int) and 0 <= value < len(names) else None for value in values]
