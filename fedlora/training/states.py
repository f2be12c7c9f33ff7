"""The states that leave the frozen layers, computed once for a client's records and kept in a file.

A file holds a row a token, tokens x width x 4 bytes (bfloat16: 2, float64: 8); nothing of it is read but the rows of
the records drawn. It says as much about the records as their text: only its owner may read it.
"""

import hashlib
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from fedlora.data.records import Examples, States
from fedlora.data.tokenise import fingerprint
from fedlora.disk import fsync, make_directory, waiting_for
from fedlora.errors import ConfigError
from fedlora.kernels.packed import PackedLinear
from fedlora.training.batches import ALONE, TOKEN_BUDGET, micro_batches, model_inputs
from fedlora.training.model import AdaptedModel, transformer_of
from fedlora.training.prefix import Prefix, entering

NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.uint16}
"""How a row lies on disk, by the model's type; bfloat16 as its bits."""


def cached_bytes(adapted: AdaptedModel, examples: Examples) -> int:
    """The size of the file that `with_states` leaves, without its header of some hundred bytes."""
    return len(examples.input_ids) * _width(adapted) * adapted.peft_model.dtype.itemsize


def with_states(
    path: Path, adapted: AdaptedModel, prefix: Prefix, examples: Examples, *, base_model: str, alone: bool
) -> Examples:
    """The examples with their states, mapped from `path`, which is written first unless it holds just these.

    The states depend on this client's records only, and on no parameter that is trained: whichever process computes
    them, and whether the file was there, the same bits come out at equal library versions, processor and threads,
    which the file names with all else that decides it. A file of anything else, or of half, is written anew. What lies
    in a whole file is believed, like weights on the same disk.

    Args:
        path: one a client; its directory is made.
        adapted: the model; its trained parameters may have any value.
        prefix: from `frozen_prefix(adapted)`.
        examples: the client's, whole and in order.
        base_model: `base_digest`.
        alone: each record passes by itself, as in `Node`; otherwise in micro-batches, whose rounding lets a record
            feel its neighbours.

    Raises:
        ConfigError: the file can be neither read nor written; its own size is in the text.
    """
    if len(examples) == 0:  # there is no empty mapping
        return examples
    key = _key(adapted, prefix, examples, base_model, alone)
    shape = len(examples.input_ids), _width(adapted)
    dtype = np.dtype(NUMPY[adapted.peft_model.dtype])
    try:
        states = _mapped(path, key, shape, dtype)
        if states is None:
            _written(path, key, adapted, prefix, examples, alone)
            states = _mapped(path, key, shape, dtype)
    except OSError as error:
        raise ConfigError(
            f"the states of {len(examples)} records need {cached_bytes(adapted, examples):,} bytes at {path}: "
            f"{error.strerror}; mend that, or write runtime.cache_prefix: false"
        ) from error
    assert states is not None, f"{path} was replaced while it was written"
    return replace(examples, states=States(rows=states, starts=examples.offsets[:-1]))


def shared_states(
    directory: Path,
    adapted: AdaptedModel,
    prefix: Prefix,
    examples: Examples,
    *,
    base_model: str,
    alone: bool,
) -> Examples:
    """As `with_states`, in a file of `directory` that bears the name of what decides its bits.

    For runs side by side on the same records: who comes while another writes waits for it. They are computed before
    any ledger has a debit, which is right only where one holder of all records simulates everybody.

    Raises:
        ConfigError: the disk lacks the room, which is looked at before, or the file can be neither read nor written.
    """
    path = directory / _key(adapted, prefix, examples, base_model, alone).hex()
    make_directory(directory)
    directory.chmod(0o700)
    with waiting_for(path.with_suffix(".lock")):
        if not path.exists():
            _require_room(directory, cached_bytes(adapted, examples), len(examples))
        return with_states(path, adapted, prefix, examples, base_model=base_model, alone=alone)


def _require_room(directory: Path, needed: int, records: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ConfigError(
            f"the states of {records} records need {needed:,} bytes in {directory}, where {free:,} are free; make "
            "room, or write runtime.cache_prefix: false"
        )


def _key(adapted: AdaptedModel, prefix: Prefix, examples: Examples, base_model: str, alone: bool) -> bytes:
    """SHA-256 of all that decides the bits of the states."""
    model = transformer_of(adapted.peft_model)
    device = adapted.device
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    words = (
        "states 3", base_model, model.config.to_json_string(),
        type(model).__name__, prefix.stack, prefix.layer, model.dtype,
        sum(isinstance(module, PackedLinear) for module in model.modules()),
        getattr(model.config, "_attn_implementation", None), torch.__version__, transformers.__version__,
        device.type, where, torch.get_num_threads(), ALONE if alone else TOKEN_BUDGET, fingerprint(examples),
    )  # fmt: skip
    return hashlib.sha256(repr(tuple(str(word) for word in words)).encode()).digest()


def _mapped(path: Path, key: bytes, shape: tuple[int, int], dtype: np.dtype) -> NDArray[Any] | None:
    """The rows in the file, if it is a whole one for `key`: header, rows, key, and not a byte more."""
    header = _header(shape, dtype)
    rows = shape[0] * shape[1] * dtype.itemsize
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) != len(header) + rows + len(key):
                return None
            file.seek(0)
            found = file.read(len(header))
            file.seek(len(header) + rows)
            if found != header or file.read() != key:
                return None
            return np.memmap(file, dtype=dtype, mode="r", offset=len(header), shape=shape)
    except FileNotFoundError:
        return None


def _written(
    path: Path, key: bytes, adapted: AdaptedModel, prefix: Prefix, examples: Examples, alone: bool
) -> None:
    """`path` is a whole file, readable by its owner only: written aside under a name of its own, synced, renamed."""
    make_directory(path.parent)
    # mkstemp, below it, gives no right to anybody else
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        aside = Path(file.name)
        try:
            _write(file, key, adapted, prefix, examples, alone)
            aside.replace(path)
        except BaseException:
            aside.unlink()
            raise
    fsync(path.parent)


def _write(
    file: IO[bytes], key: bytes, adapted: AdaptedModel, prefix: Prefix, examples: Examples, alone: bool
) -> None:
    """Row by row to its place, not through a mapping: a full disk is then an error and no fatal signal."""
    dtype = np.dtype(NUMPY[adapted.peft_model.dtype])
    width = _width(adapted)
    header = _header((len(examples.input_ids), width), dtype)
    file.write(header)
    for group in micro_batches(examples, np.arange(len(examples)), ALONE if alone else TOKEN_BUDGET):
        for index, states in zip(group, _states(adapted, prefix, examples, group), strict=True):
            file.seek(len(header) + int(examples.offsets[index]) * width * dtype.itemsize)
            file.write(_as_numpy(states).tobytes())
    file.seek(0, os.SEEK_END)
    file.write(key)
    file.flush()
    os.fsync(file.fileno())


def _states(
    adapted: AdaptedModel, prefix: Prefix, examples: Examples, group: NDArray[np.int64]
) -> list[Tensor]:
    """(tokens of the record, width) of each record of the group; of a pair, those of both sequences."""
    records = examples.select(group)
    batch = adapted.intake.collate(records, adapted.device)
    rows = entering(adapted, prefix, model_inputs(adapted, batch)).cpu()
    each = records.sequences_per_record
    kept = [states[:length] for states, length in zip(rows, records.sequence_lengths, strict=True)]
    return kept if each == 1 else [torch.cat(kept[n : n + each]) for n in range(0, len(kept), each)]


def _as_numpy(states: Tensor) -> NDArray[Any]:
    narrow = states.dtype == torch.bfloat16
    return (states.contiguous().view(torch.uint16) if narrow else states).numpy()


def _header(shape: tuple[int, int], dtype: np.dtype) -> bytes:
    """What decides how the rows are read, in numpy's words, of a length that a page of memory divides evenly."""
    return f"{dtype.str} {shape[0]} {shape[1]}\n".encode().ljust(64, b" ")


def _width(adapted: AdaptedModel) -> int:
    return int(transformer_of(adapted.peft_model).config.hidden_size)
