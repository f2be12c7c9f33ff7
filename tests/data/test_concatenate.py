"""Records of several clients side by side are those records, in order, with all that each had."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.data.records import Examples, concatenate
from fedlora.errors import ShapeError


def examples(lengths, seed, labels=True, types=True):
    draw = np.random.Generator(np.random.Philox(seed))
    tokens = int(sum(lengths))
    return Examples(
        input_ids=draw.integers(0, 99, tokens).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=draw.integers(0, 3, len(lengths)) if labels else None,
        token_type_ids=draw.integers(0, 2, tokens).astype(np.int8) if types else None,
    )


@given(
    parts=st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=4),
    labels=st.booleans(),
    types=st.booleans(),
)
def test_each_record_keeps_its_place_and_its_columns(parts, labels, types):
    held = [examples(lengths, seed, labels, types) for seed, lengths in enumerate(parts)]
    whole = concatenate(held)
    first = 0
    for part in held:
        back = whole.select(np.arange(first, first + len(part)))
        for name in ("input_ids", "offsets", "labels", "token_type_ids"):
            mine, theirs = getattr(back, name), getattr(part, name)
            assert (mine is None) == (theirs is None)
            assert theirs is None or (mine.dtype == theirs.dtype and np.array_equal(mine, theirs))
        first += len(part)
    assert len(whole) == first


@pytest.mark.parametrize("missing", ["labels", "types"])
def test_parts_of_different_kinds_are_refused(missing):
    with pytest.raises(ShapeError, match="1 of 2 parts"):
        concatenate([examples([2], 0), examples([3], 1, **{missing: False})])


def test_no_part_at_all_is_refused():
    with pytest.raises(ShapeError, match="no parts"):
        concatenate([])
