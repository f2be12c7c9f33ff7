import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config.data import Column, Dirichlet, Iid, Pathological, Quantity, Shards
from fedlora.data import Records
from fedlora.data.partition import partition
from fedlora.errors import DataError


def records(labels, groups=None):
    return Records(texts=[f"text {i}" for i in range(len(labels))], labels=np.asarray(labels), groups=groups)


def balanced(count, classes):
    return records(np.arange(count) % classes)


def require_cover(parts, count):
    together = np.concatenate(list(parts.values()))
    assert np.array_equal(np.sort(together), np.arange(count))  # each exactly once
    assert all(len(indices) and np.all(np.diff(indices) > 0) for indices in parts.values())


def kinds(clients, alpha, each):
    return [
        Iid(kind="iid", clients=clients),
        Dirichlet(kind="dirichlet", clients=clients, alpha=alpha),
        Pathological(kind="pathological", clients=clients, classes_per_client=each),
        Shards(kind="shards", clients=clients, shards_per_client=each),
        Quantity(kind="quantity", clients=clients, alpha=alpha),
    ]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 200),
    classes=st.integers(1, 8),
    clients=st.integers(1, 12),
    alpha=st.sampled_from([0.05, 0.5, 5.0]),
    each=st.integers(1, 8),
    seed=st.integers(0, 2**40),
)
def test_every_record_goes_to_exactly_one_client_or_nobody_gets_any(
    count, classes, clients, alpha, each, seed
):
    held = balanced(count, classes)
    for kind in kinds(clients, alpha, each):
        try:
            parts = partition(held, kind, seed)
        except DataError:
            continue
        assert len(parts) == clients
        require_cover(parts, count)


@pytest.mark.parametrize("kind", kinds(7, 0.5, 2), ids=lambda kind: kind.kind)
def test_the_seed_decides(kind):
    one, same, other = (partition(balanced(700, 5), kind, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert any(not np.array_equal(one[name], other[name]) for name in one)


def test_iid_sizes_are_equal_within_one():
    sizes = {len(indices) for indices in partition(balanced(103, 3), Iid(kind="iid", clients=8), 0).values()}
    assert sizes == {12, 13}


def label_shares(parts, labels, classes):
    """(clients, classes): which share of its records each client has of each label."""
    counts = np.array([np.bincount(labels[indices], minlength=classes) for indices in parts.values()])
    return counts / counts.sum(axis=1, keepdims=True)


def test_dirichlet_skews_for_small_alpha_and_approaches_iid_for_large():
    held = balanced(20_000, 4)

    def skew(alpha):
        kind = Dirichlet(kind="dirichlet", clients=10, alpha=alpha)
        return np.mean(
            [label_shares(partition(held, kind, s), held.labels, 4).max(axis=1).mean() for s in range(5)]
        )

    skews = [skew(alpha) for alpha in (0.1, 1.0, 10.0, 1000.0)]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.7
    assert skews[-1] < 0.27  # a quarter each


def test_dirichlet_gives_each_client_its_least_or_says_why_not():
    least = Dirichlet(kind="dirichlet", clients=5, alpha=0.3, min_examples=30)
    parts = partition(balanced(1000, 4), least, 0)
    assert min(map(len, parts.values())) >= 30
    with pytest.raises(DataError, match=r"min_examples=30 \(at best \d+\); raise alpha"):
        partition(balanced(100, 4), least, 0)


def test_pathological_clients_hold_few_labels_and_share_them_evenly():
    held = balanced(1200, 6)
    parts = partition(held, Pathological(kind="pathological", clients=9, classes_per_client=2), 0)
    assert all(len(np.unique(held.labels[indices])) == 2 for indices in parts.values())
    shares = [len(indices) for indices in parts.values()]
    assert max(shares) <= 2 * min(shares)


def test_shards_are_equal_runs_of_the_records_sorted_by_label():
    held = balanced(1000, 10)
    parts = partition(held, Shards(kind="shards", clients=20, shards_per_client=2), 0)
    assert {len(indices) for indices in parts.values()} == {50}
    labels = [len(np.unique(held.labels[indices])) for indices in parts.values()]
    assert max(labels) <= 2 and labels.count(2) > 10  # 25 divides 100, so no shard has two labels
    many = partition(held, Shards(kind="shards", clients=5, shards_per_client=40), 0)
    assert label_shares(many, held.labels, 10).max() < 0.35
    sizes = {len(i) for i in partition(balanced(103, 3), Shards(kind="shards", clients=5), 0).values()}
    assert max(sizes) - min(sizes) <= 2  # one a shard
    with pytest.raises(DataError, match=r"shards_per_client=2 are 10 shards, but there are 9 records"):
        partition(balanced(9, 3), Shards(kind="shards", clients=5), 0)


def test_quantity_skews_sizes_and_leaves_labels_alike():
    held = balanced(40_000, 4)

    def spread(alpha):
        kind = Quantity(kind="quantity", clients=10, alpha=alpha, min_examples=200)
        parts = partition(held, kind, 1)
        assert min(map(len, parts.values())) >= 200
        # A client's share of a label is that of a draw of 200 records or more: six standard deviations.
        assert np.abs(label_shares(parts, held.labels, 4) - 0.25).max() < 6 * np.sqrt(0.25 * 0.75 / 200)
        return max(map(len, parts.values()))

    most = [spread(alpha) for alpha in (0.5, 5.0, 5000.0)]
    assert most == sorted(most, reverse=True) and most[0] > 8000 and most[-1] < 4500


def test_quantity_needs_no_labels_and_says_when_nobody_can_hold_so_many():
    plain = Records(texts=["x"] * 100)
    require_cover(partition(plain, Quantity(kind="quantity", clients=4, alpha=1.0), 0), 100)
    with pytest.raises(DataError, match=r"min_examples=30 \(at best \d+\); raise alpha"):
        partition(plain, Quantity(kind="quantity", clients=4, alpha=1.0, min_examples=30), 0)


def test_labels_that_too_few_clients_could_hold_are_refused():
    with pytest.raises(DataError, match=r"cannot hold 6 labels"):
        partition(balanced(60, 6), Pathological(kind="pathological", clients=2, classes_per_client=2), 0)


def test_a_column_makes_one_client_of_each_value_and_no_two_share_a_name():
    values = ["Anna", "anna", "a/b", "a b", "../..", "", "bob", "bob"]
    parts = partition(records(np.zeros(8, int), values), Column(kind="column", column="who"), 0)
    require_cover(parts, 8)
    assert len(parts) == 7
    assert parts["bob"].tolist() == [6, 7]
    assert len({name.casefold() for name in parts}) == 7
    assert all(name.strip(".") and "/" not in name and " " not in name for name in parts)


@pytest.mark.parametrize(
    ("clients", "last"), [(8, "client-7"), (10, "client-9"), (11, "client-10"), (100, "client-99")]
)
def test_client_names_sort_like_their_numbers(clients, last):
    names = list(partition(balanced(200, 2), Iid(kind="iid", clients=clients), 0))
    assert names == sorted(names)
    assert names[-1] == last


def test_an_empty_client_is_named():
    with pytest.raises(DataError, match=r"'client-3' would hold none of the 3 records; lower"):
        partition(balanced(3, 1), Iid(kind="iid", clients=5), 0)


def test_without_labels_or_column_the_kind_is_refused():
    plain = Records(texts=["a", "b"])
    with pytest.raises(DataError, match=r"set data.label or use iid"):
        partition(plain, Dirichlet(kind="dirichlet", clients=1, alpha=1.0), 0)
    with pytest.raises(DataError, match=r"kind shards deals records out by label"):
        partition(plain, Shards(kind="shards", clients=1), 0)
    with pytest.raises(DataError, match="'who' was not read"):
        partition(plain, Column(kind="column", column="who"), 0)
