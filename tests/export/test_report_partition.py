"""The picture of the partition: what it counts, what it draws, and that only a simulation has one."""

import re

import numpy as np
import pytest

from fedlora.cli.app import main
from fedlora.data.holdings import Holdings
from fedlora.data.records import Examples
from fedlora.errors import ConfigError
from fedlora.export.report_partition import partition_picture, stacked_chart
from fedlora.runs.partition_picture import SHOWN, load_picture, picture
from fedlora.runtime.simulate import simulate

RECT = re.compile(r'<rect class="part-(\d)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"')


def holdings(sizes, labels):
    total = sum(sizes)
    examples = Examples(
        input_ids=np.zeros(total, dtype=np.int32), offsets=np.arange(total + 1), labels=labels
    )
    ends = np.cumsum([0, *sizes])
    parts = {f"c{n:03d}": np.arange(ends[n], ends[n + 1]) for n in range(len(sizes))}
    return Holdings.of(examples, parts)


def test_each_client_is_counted_by_label_the_largest_first():
    held = holdings([2, 5, 3], np.array([0, 1, 1, 1, 1, 0, 2, 2, 2, 0]))
    assert picture("iid", held, ["x", "y", "z"]) == {
        "kind": "iid",
        "of": 3,
        "labels": ["x", "y", "z"],
        "clients": ["c001", "c002", "c000"],
        "counts": [[1, 3, 1], [1, 0, 2], [1, 1, 0]],
    }
    plain = picture("quantity", holdings([2, 5, 3], None), [])
    assert plain["labels"] == [] and plain["counts"] == [[5], [3], [2]]


def test_of_many_clients_some_stand_for_all_from_the_largest_to_the_smallest():
    found = picture("iid", holdings(range(1, 501), None), [])
    sizes = [count for (count,) in found["counts"]]
    assert found["of"] == 500 and len(sizes) == SHOWN == len(set(found["clients"]))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 500 and sizes[-1] == 1


def test_parts_lie_one_after_the_other_and_are_as_long_as_what_they_count():
    chart = stacked_chart(["one", "two"], [[30, 0, 10], [5, 15, 0]], title="t")
    parts = [(int(n), float(x), float(y), float(wide)) for n, x, y, wide in RECT.findall(chart)]
    assert [part for part, *_ in parts] == [0, 2, 0, 1]  # what counts nothing is not drawn
    rows = [parts[:2], parts[2:]]
    for row, counts in zip(rows, ([30, 10], [5, 15]), strict=True):
        (_, x1, y1, wide1), (_, x2, y2, wide2) = row
        assert y1 == y2 and x1 + wide1 == pytest.approx(x2, abs=0.02)
        assert wide1 / wide2 == pytest.approx(counts[0] / counts[1], rel=1e-3)
    assert parts[0][3] / parts[2][3] == pytest.approx(6, rel=1e-3)


def test_more_labels_than_colours_end_in_others_and_nobody_is_lost():
    counts = [[10 - label for label in range(10)], [1] * 10]
    words = {"kind": "iid", "of": 2, "labels": [f"l{n}" for n in range(10)], "clients": ["a", "b"]}
    told = partition_picture({**words, "counts": counts})
    assert "3 others" in told and "l6" in told and "l7" not in told
    assert "<td>a</td><td>55</td>" in told and "<td>6</td></tr>" in told  # 3 + 2 + 1 of the rare


def test_names_are_text_and_a_run_without_a_picture_has_no_section():
    evil = {"kind": "column", "of": 1, "labels": ["<b>"], "clients": ["<i>"], "counts": [[2]]}
    told = partition_picture(evil)
    assert "<b>" not in told and "<i>" not in told and "&lt;b&gt;" in told
    assert partition_picture(None) == ""


def test_a_simulation_s_report_shows_who_holds_what_until_somebody_withdraws(tiny_config, tmp_path, capsys):
    run_dir = tmp_path / "run"
    config = tiny_config(privacy="none", federation__rounds=1, federation__local_steps=1)
    simulate(config, run_dir, lambda event: None)
    found = load_picture(run_dir)
    assert found is not None and found["labels"] == ["kitchen", "music", "weather"]
    assert sum(map(sum, found["counts"])) == 360 and len(found["clients"]) == 3
    assert main(["report", str(run_dir)]) == 0
    assert "Who holds what" in (run_dir / "report.html").read_text()
    assert main(["forget", str(run_dir), "client-1"]) == 0
    assert main(["report", str(run_dir)]) == 0
    assert "Who holds what" not in (run_dir / "report.html").read_text()
    capsys.readouterr()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"clients": ["a"], "counts": [], "labels": []}', '{"clients": []}']
)
def test_a_damaged_picture_is_named(tmp_path, text):
    (tmp_path / "partition.json").write_text(text)
    with pytest.raises(ConfigError, match=r"partition\.json is damaged; remove it"):
        load_picture(tmp_path)
