import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedlora.data import Examples, Records
from fedlora.data.tokenise import fingerprint, tokenise
from fedlora.errors import ShapeError

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


def word_tokenizer(template=True):
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def rows(examples):
    cuts = examples.offsets[1:-1]
    return [row.tolist() for row in np.split(examples.input_ids, cuts)] if len(examples) else []


texts = st.lists(st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None)
@given(texts=texts, data=st.data())
def test_records_are_tokenised_each_for_itself(texts, data):
    tokenizer = word_tokenizer()
    together = tokenise(Records(texts=texts, labels=np.arange(len(texts))), tokenizer, 7)
    assert rows(together) == [tokenizer(text, truncation=True, max_length=7)["input_ids"] for text in texts]
    assert together.token_type_ids is None
    chosen = np.array(data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=20)), dtype=np.int64)
    selected = together.select(chosen)
    assert rows(selected) == [rows(together)[i] for i in chosen]
    assert selected.labels.tolist() == chosen.tolist()


def test_more_records_than_a_batch_keep_their_order():
    many = [" ".join(WORDS[: i % 9]) for i in range(2345)]
    examples = tokenise(Records(texts=many), word_tokenizer(), 64)
    assert examples.lengths.tolist() == [i % 9 + 2 for i in range(2345)]


def test_pairs_carry_token_types_through_a_selection():
    pairs = [("the fox", "a dog"), ("quick", "lazy dog jumps")]
    examples = tokenise(Records(texts=pairs), word_tokenizer(), 64)
    assert examples.token_type_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1]
    assert examples.select(np.array([1])).token_type_ids.tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_an_empty_text_still_has_a_token():
    examples = tokenise(Records(texts=["", "fox"]), word_tokenizer(template=False), 8)
    assert examples.lengths.tolist() == [1, 1]


def test_shipping_costs_arrays_not_lists():
    examples = tokenise(Records(texts=["the quick brown fox"] * 5000), word_tokenizer(), 64)
    shipped = pickle.dumps(examples.select(np.arange(1000)), protocol=5)
    assert len(shipped) < 1000 * (6 * 4 + 8) + 2000  # four bytes a token, eight an offset, and names
    assert rows(pickle.loads(shipped)) == rows(examples)[:1000]


def test_a_fingerprint_tells_any_two_sets_apart_and_equal_ones_not():
    records = Records(texts=["the fox", "a dog"], labels=np.array([0, 1]))
    examples = tokenise(records, word_tokenizer(), 8)
    assert fingerprint(examples) == fingerprint(examples.select(np.array([0, 1])))
    others = [
        examples.select(np.array([1, 0])),
        examples.select(np.array([0])),
        dataclasses.replace(examples, labels=None),
        dataclasses.replace(examples, labels=np.array([1, 0])),
        dataclasses.replace(examples, token_type_ids=np.zeros(8, np.int8)),
        dataclasses.replace(examples, offsets=np.array([0, 3, 8])),
        dataclasses.replace(examples, input_ids=examples.input_ids + 1),
    ]
    assert len({fingerprint(each) for each in [examples, *others]}) == 1 + len(others)


def test_arrays_that_do_not_fit_together_are_refused():
    with pytest.raises(ShapeError, match="span 3 tokens"):
        Examples(input_ids=np.zeros(3, np.int32), offsets=np.array([0, 2]))
    with pytest.raises(ShapeError, match="1 records but 2 labels"):
        Examples(input_ids=np.zeros(3, np.int32), offsets=np.array([0, 3]), labels=np.array([0, 1]))
