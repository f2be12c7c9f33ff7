"""Records of many clients in a few arrays are the same records as each client's own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.data.holdings import Holdings, open_holdings
from fedlora.data.records import Examples


def examples_of(lengths: list[int], pairs: bool = False) -> Examples:
    tokens = sum(lengths)
    return Examples(
        input_ids=np.arange(tokens, dtype=np.int32),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        labels=np.arange(len(lengths)) % 3,
        token_type_ids=(np.arange(tokens) % 2).astype(np.int8) if pairs else None,
    )


def same(one: Examples, other: Examples) -> bool:
    arrays = [(getattr(one, name), getattr(other, name)) for name in Examples.__dataclass_fields__]
    return all((a is None and b is None) or np.array_equal(a, b) for a, b in arrays)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.data())
def test_each_client_finds_the_records_that_were_dealt_to_it(lengths, data):
    examples = examples_of(lengths, pairs=data.draw(st.booleans()))
    owner = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    parts = {f"c{n}": np.flatnonzero(np.array(owner) == n) for n in set(owner)}
    holdings = Holdings.of(examples, parts)
    assert list(holdings) == sorted(parts)
    assert all(same(holdings[client], examples.select(parts[client])) for client in parts)


def test_what_was_saved_is_read_from_the_disk_by_its_owner_only(tmp_path):
    holdings = Holdings.of(examples_of([3, 1, 2, 4]), {"b": np.array([0, 3]), "a": np.array([1, 2])})
    holdings.save(tmp_path / "held")
    found = open_holdings(tmp_path / "held")
    assert (tmp_path / "held").stat().st_mode & 0o077 == 0
    assert list(found) == ["a", "b"] and all(same(found[c], holdings[c]) for c in holdings)
    assert not found["a"].input_ids.flags.owndata and not found["a"].input_ids.flags.writeable


def test_what_a_run_that_was_killed_left_there_is_gone_and_so_are_the_rights_to_it(tmp_path):
    place = tmp_path / "held"
    Holdings.of(examples_of([2, 5, 1], pairs=True), {"a": np.arange(3)}).save(place)
    place.chmod(0o755)
    holdings = Holdings.of(examples_of([2, 4]), {"b": np.arange(2)})
    holdings.save(place)
    assert place.stat().st_mode & 0o077 == 0
    assert list(open_holdings(place)) == ["b"] and same(open_holdings(place)["b"], holdings["b"])


def test_the_records_of_some_are_those_and_nobody_elses():
    holdings = Holdings.of(
        examples_of([3, 1, 2]), {"a": np.array([1]), "b": np.array([0]), "c": np.array([2])}
    )
    some = holdings.only({"a", "c"})
    assert list(some) == ["a", "c"] and all(same(some[client], holdings[client]) for client in some)
    assert len(some.examples.input_ids) == 3


def test_nobody_holds_the_records_of_a_stranger():
    holdings = Holdings.of(examples_of([1, 1]), {"a": np.array([0]), "c": np.array([1])})
    for stranger in ("_", "b", "d"):
        with pytest.raises(KeyError, match=stranger):
            holdings[stranger]
