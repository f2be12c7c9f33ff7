"""From text to token arrays."""

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.data.records import Examples, Records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Enough to keep the tokenizer's own threads busy, little enough to keep its Python lists small.
BATCH = 1000


def tokenise(records: Records, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Examples:
    """Token arrays of all records in their order, cut at `max_length` tokens, not padded.

    A record without any token gets the tokenizer's end-of-text token, so that it can pass through a model.
    """
    pairs = len(records) > 0 and isinstance(records.texts[0], tuple)
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    for start in range(0, len(records), BATCH):
        batch: Any = list(records.texts[start : start + BATCH])  # texts or pairs, never both
        encoded = tokenizer(batch, truncation=True, max_length=max_length, return_attention_mask=False)
        ids += [np.array(row or [_end_of_text(tokenizer)], dtype=np.int32) for row in encoded["input_ids"]]
        if pairs and "token_type_ids" in encoded:
            types += [np.array(row or [0], dtype=np.int8) for row in encoded["token_type_ids"]]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    return Examples(
        input_ids=np.concatenate(ids) if ids else np.zeros(0, dtype=np.int32),
        offsets=offsets,
        labels=records.labels,
        token_type_ids=np.concatenate(types) if types else None,
    )


def _end_of_text(tokenizer: "PreTrainedTokenizerBase") -> int:
    for token in (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id):
        if isinstance(token, int):
            return token
    return 0


def fingerprint(examples: Examples) -> str:
    """SHA-256 over every array with its name, dtype and length: the same for the same data anywhere."""
    digest = hashlib.sha256()
    for name in ("input_ids", "offsets", "labels", "token_type_ids"):
        array = getattr(examples, name)
        if array is None:
            continue
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        digest.update(f"{name} {little.dtype.str} {len(little)}\n".encode())
        digest.update(little.tobytes())
    return digest.hexdigest()
