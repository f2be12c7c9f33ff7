"""The intake of a language model: rows of tokens, padded and masked."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fedlora.data.records import Examples
from fedlora.errors import ModelError
from fedlora.training.batches import collate
from fedlora.training.checkpoints import locate, quiet, vocabulary
from fedlora.training.public import public_rows

LENGTHS = (7, 5, 2)
"""Tokens of made-up records: unequal, so that some are padded; more tokens than records, so that axes differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIntake:
    """name: of the model, whose tokenizer it is. pad_token: what fills short rows up; masked, so never learned."""

    name: str
    pad_token: int
    keeps_states: ClassVar[bool] = True

    def most_tokens(self, max_length: int | None) -> int:
        """What the config keeps of a record."""
        assert max_length is not None, "config/columns.py asks for it"
        return max_length

    def footprints(self, examples: Examples) -> NDArray[np.int64]:
        """As the records have them."""
        return examples.footprints

    def collate(self, examples: Examples, device: torch.device) -> dict[str, Tensor]:
        """See `batches.collate`."""
        return collate(examples, self.pad_token, device)

    def inputs(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tokens, mask, and token types if the model knows any."""
        names = {"input_ids", "attention_mask"}
        if "token_type_ids" in inspect.signature(model.forward).parameters:
            names.add("token_type_ids")
        return {name: batch[name] for name in names & batch.keys()}

    def made_up(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Of unequal length over the vocabulary, padded on the right, with both token types if there are two."""
        mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
        tokens = (torch.arange(mask.numel()) * 7 + 3).view(mask.shape) % (vocabulary(model) - 1)
        tokens = tokens + (tokens >= self.pad_token)  # none of them the padding's
        inputs = {"input_ids": tokens.masked_fill(~mask, self.pad_token), "attention_mask": mask.long()}
        if (getattr(model.config, "type_vocab_size", None) or 0) > 1:
            inputs["token_type_ids"] = (torch.arange(max(LENGTHS)) % 2 * mask).long()
        return inputs

    def public(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Random words of the vocabulary."""
        return {"input_ids": public_rows(load_tokenizer(self.name))}

    def blank(self, count: int, numbers: int) -> Examples:
        """The vocabulary's first token, over and over."""
        offsets = np.arange(count + 1, dtype=np.int64) * numbers
        return Examples(input_ids=np.zeros(count * numbers, dtype=np.int32), offsets=offsets)

    def save(self, directory: Path) -> None:
        """The tokenizer."""
        load_tokenizer(self.name).save_pretrained(str(directory))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model of this name.

    Raises:
        ModelError: the model is not there, or comes without a tokenizer.
    """
    path = locate(name)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"model.name {name!r}: no tokenizer loads from {str(path)!r}: {error}; put its files there"
        ) from error


def token_intake(name: str, model: PreTrainedModel) -> TokenIntake:
    """Of a model that has a token to pad with.

    Raises:
        ModelError: the model minds padding.
    """
    pad = model.config.pad_token_id
    assert isinstance(pad, int), "load_base sets it"
    _require_isolation(name, model, pad)
    return TokenIntake(name=name, pad_token=pad)


@torch.no_grad()
def _require_isolation(name: str, model: PreTrainedModel, pad: int) -> None:
    """Refuses a model whose output for a record moves with the padding beside it.

    Padding is as long as the longest neighbour, and the bound on one record's influence, hence epsilon, holds
    only if no record can see another.
    """
    tokens = torch.arange(6) % (vocabulary(model) - 1)
    alone = (tokens + (tokens >= pad))[None]  # six tokens, none of them the padding's
    padded = torch.nn.functional.pad(alone, (0, 5), value=pad)
    expected = model(input_ids=alone, attention_mask=torch.ones_like(alone)).logits
    found = model(input_ids=padded, attention_mask=(torch.arange(11) < 6).long()[None]).logits
    found = found[:, :6] if found.ndim == 3 else found
    change = float((found - expected).norm() / expected.norm().clamp(min=1e-12))
    # a few roundings of the model's dtype, against changes of order 1 where padding is seen
    if not change <= (
        0.05 if model.dtype == torch.bfloat16 else 1e-4
    ):  # a number that is none is no proof either
        raise ModelError(
            f"model.name {name!r}: {type(model).__name__} gives a record other logits when it is padded "
            f"(relative change {change:.2g}), so records would not stay apart; take one that masks padding"
        )
