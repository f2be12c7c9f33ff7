"""From text to token arrays."""

import hashlib
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.config.task import CausalLm, Dpo, Task
from fedlora.data.completions import tokenise_completions
from fedlora.data.records import Examples, Records
from fedlora.data.texts import Conversation, Instruction, Preference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Enough to keep the tokenizer's own threads busy, little enough to keep its Python lists small.
BATCH = 1000


def tokenise(
    records: Records, tokenizer: "PreTrainedTokenizerBase", max_length: int, task: Task | None = None
) -> Examples:
    """Token arrays of all records in their order, cut at `max_length` tokens, not padded.

    A text without any token gets the tokenizer's end-of-text token, so that it can pass through a model.

    Args:
        records: texts and pairs; or of a causal task, records with completions: see `tokenise_completions`.
        tokenizer: of the model.
        max_length: tokens of a sequence at most.
        task: None only for texts and pairs.
    """
    if isinstance(task, CausalLm | Dpo) and _have_completions(records):
        return tokenise_completions(records, tokenizer, max_length, task)
    pairs = len(records) > 0 and isinstance(records.texts[0], tuple)
    ids: list[np.ndarray] = [np.zeros(0, dtype=np.int32)]
    types: list[np.ndarray] = []
    lengths: list[np.ndarray] = [np.zeros(1, dtype=np.int64)]
    for start in range(0, len(records), BATCH):
        batch: Any = list(records.texts[start : start + BATCH])  # texts or pairs, never both
        encoded = tokenizer(batch, truncation=True, max_length=max_length, return_attention_mask=False)
        rows = [row or [_end_of_text(tokenizer)] for row in encoded["input_ids"]]
        ids.append(_flat(rows, np.int32))
        lengths.append(np.array([len(row) for row in rows], dtype=np.int64))
        if pairs and "token_type_ids" in encoded:
            types.append(_flat([row or [0] for row in encoded["token_type_ids"]], np.int8))
    return Examples(
        input_ids=np.concatenate(ids),
        offsets=np.cumsum(np.concatenate(lengths)),
        labels=records.labels,
        token_type_ids=np.concatenate(types) if types else None,
    )


def _have_completions(records: Records) -> bool:
    return len(records) > 0 and isinstance(records.texts[0], Instruction | Conversation | Preference)


def _flat(rows: list[list[int]], dtype: type[np.signedinteger]) -> np.ndarray:
    """One array of a batch: an array a record would cost more than the tokens of a short one."""
    return np.fromiter(chain.from_iterable(rows), dtype=dtype)


def _end_of_text(tokenizer: "PreTrainedTokenizerBase") -> int:
    for token in (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id):
        if isinstance(token, int):
            return token
    return 0


def fingerprint(examples: Examples) -> str:
    """SHA-256 over every array with its name, dtype and length: the same for the same data anywhere."""
    digest = hashlib.sha256()
    for name in ("input_ids", "offsets", "labels", "token_type_ids", "trained", "firsts"):
        array = getattr(examples, name)
        if array is None:
            continue
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        digest.update(f"{name} {little.dtype.str} {len(little)}\n".encode())
        digest.update(little.data)  # in place: of images, a copy would be as large as all of them
    return digest.hexdigest()
