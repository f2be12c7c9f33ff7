"""Prompts with completions, conversations and preferences as tokens, with a mark on each token that is learned.

A record is one text; its beginning, up to where a completion begins, is tokenised beside it, and the tokens that both
begin with are the prompt's. So a prompt has the tokens that it will have when the model is asked, by any tokenizer.
"""

from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.config.task import CausalLm, Dpo
from fedlora.data.records import Examples, Records
from fedlora.data.rendering import Rendered, Template
from fedlora.data.texts import Text
from fedlora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 500
"""Records that are tokenised at a time."""


@dataclass(frozen=True, slots=True)
class Marked:
    """One sequence: its tokens, which of them are learned, and how many stand before the last completion."""

    tokens: list[int]
    trained: list[bool]
    prompt: int


def tokenise_completions(
    records: Records, tokenizer: "PreTrainedTokenizerBase", max_length: int, task: CausalLm | Dpo
) -> Examples:
    """Token arrays of all records in their order, `trained` marks on completions and on the token that ends them.

    Of a record of more than max_length tokens, the prompt loses its beginning (a first token that begins every text
    stays), at most all but one token of it; a completion that is still too long loses its end.

    Args:
        records: instructions, conversations or preferences, of which each is two sequences.
        tokenizer: of the model.
        max_length: tokens of a sequence at most, 2 or more.
        task: says how prompts are written and what is learned.

    Raises:
        DataError: see `Template.rendered`; or the tokenizer has no token for the end. Names the record by number.
    """
    learn_all = isinstance(task, CausalLm) and task.loss_on == "all"
    rows: list[Marked] = []
    for start in range(0, len(records), BATCH):
        batch = islice(records.texts, start, start + BATCH)
        marked = _marked(list(batch), start, Template(tokenizer=tokenizer, template=task.template))
        rows += [_cut(row, max_length, tokenizer) for row in marked]
    lengths = np.array([len(row.tokens) for row in rows], dtype=np.int64)
    each = 2 if isinstance(task, Dpo) else 1
    size = int(lengths.sum())
    trained = np.fromiter(chain.from_iterable(row.trained for row in rows), dtype=np.bool_, count=size)
    return Examples(
        input_ids=np.fromiter(chain.from_iterable(row.tokens for row in rows), dtype=np.int32, count=size),
        offsets=np.concatenate([[0], np.cumsum(lengths.reshape(-1, each).sum(axis=1))]).astype(np.int64),
        labels=records.labels,
        trained=np.ones_like(trained) if learn_all else trained,
        firsts=lengths[::2] if each == 2 else None,
    )


def prompts(
    records: Records, tokenizer: "PreTrainedTokenizerBase", max_length: int, task: CausalLm
) -> list[list[int]]:
    """The tokens of each record before its last completion, the last max_length of them; never none."""
    marked = _marked(list(records.texts), 0, Template(tokenizer=tokenizer, template=task.template))
    cut = [_without_beginning(row, len(row.tokens) - row.prompt, tokenizer, max_length) for row in marked]
    return [row.tokens[: max(1, row.prompt)] for row in cut]


def _marked(texts: list[Text], first: int, template: Template) -> list[Marked]:
    """Every sequence of every record; nothing is cut."""
    rendered: list[Rendered] = []
    for number, text in enumerate(texts, first + 1):
        try:
            rendered += template.rendered(text)
        except DataError as error:
            raise DataError(f"record {number}: {error}") from error
    tokenizer: Any = template.tokenizer
    end = _end(tokenizer)
    chats = bool(texts) and template.chats(texts[0])  # a chat template writes the special tokens itself
    lines = [line for each in rendered for line in (each.whole, *each.heads)]
    encoded = tokenizer(lines, add_special_tokens=not chats, return_attention_mask=False) if lines else {}
    ids = iter(encoded.get("input_ids", []))
    return [_with_marks(next(ids), [next(ids) for _ in each.heads], end) for each in rendered]


def _with_marks(tokens: list[int], heads: list[list[int]], end: int) -> Marked:
    cuts = [_common(tokens, head) for head in heads]
    trained = [False] * len(tokens)
    for begin, stop in zip(cuts[::2], [*cuts[1::2], len(tokens)], strict=True):
        trained[begin:stop] = [True] * (stop - begin)
    if end not in tokens[cuts[-1] :]:
        tokens, trained = [*tokens, end], [*trained, True]
    return Marked(tokens, trained, cuts[-1])


def _common(tokens: list[int], head: list[int]) -> int:
    """How many tokens both begin with."""
    same = (a == b for a, b in zip(tokens, head, strict=False))
    return next((place for place, equal in enumerate(same) if not equal), min(len(tokens), len(head)))


def _cut(row: Marked, max_length: int, tokenizer: "PreTrainedTokenizerBase") -> Marked:
    cut = _without_beginning(row, 0, tokenizer, max_length)
    return Marked(cut.tokens[:max_length], cut.trained[:max_length], cut.prompt)


def _without_beginning(
    row: Marked, not_counted: int, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> Marked:
    """The row less what its prompt has to lose: at most all but one token of it."""
    surplus = len(row.tokens) - not_counted - max_length
    kept = int(bool(row.prompt) and row.tokens[0] == tokenizer.bos_token_id)
    gone = min(surplus, row.prompt - max(kept, 1))
    if gone <= 0:
        return row
    return Marked(
        row.tokens[:kept] + row.tokens[kept + gone :],
        row.trained[:kept] + row.trained[kept + gone :],
        row.prompt - gone,
    )


def _end(tokenizer: Any) -> int:
    token = tokenizer.eos_token_id
    if not isinstance(token, int):
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no eos_token, so no completion would ever end; name one "
            "in its tokenizer_config.json"
        )
    return token
