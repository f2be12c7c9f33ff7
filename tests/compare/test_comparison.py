"""What finished cells amount to, and how it is told: intervals only where there are any, costs and doubts in words."""

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from fedlora.compare.arms import METHODS, Arm
from fedlora.compare.candidates import control_of, references
from fedlora.compare.cells import Setting, Source, cells_of
from fedlora.compare.comparison import comparison
from fedlora.compare.table import MARK, heading, markdown, notes, rows_of
from fedlora.compare.tuning import Choice
from fedlora.config.load import dump_config
from fedlora.export.intervals import Series, interval_chart, standalone
from fedlora.export.shapes import NARROW

FEDSVD, FFA = METHODS[0], METHODS[1]


@pytest.fixture
def told(tiny_config, tmp_path):
    """The comparison of arms whose scores are given by name: by epsilon, one a seed; None is not finished."""
    path = tmp_path / "given.yaml"
    path.write_text(dump_config(tiny_config()))
    source = Source(path=path)

    def build(scores: dict[str, dict[float | None, list[float | None]]], **given):
        config = source.config()
        known: list[Arm] = [FEDSVD, FFA, control_of(FEDSVD, config), *references(config)]
        arms = [arm for arm in known if arm.name in scores]
        seeds = range(7, 7 + max(len(row) for by in scores.values() for row in by.values()))
        budgets = sorted({e for by in scores.values() for e in by if e is not None})
        cells = [
            cell
            for arm in arms
            for cell in cells_of(
                source, arm,
                epsilons=budgets, seeds=seeds, setting=lambda _: None, private_runs=None, directory=tmp_path,
            )
        ]  # fmt: skip
        values = [(cell, scores[cell.arm][cell.epsilon][cell.seed - 7]) for cell in cells]
        finished = [(cell, summary(cell, score)) for cell, score in values if score is not None]
        rest = {"against": "fedsvd", "tuning": None, "choices": {}, "control": None}
        return comparison(arms, cells, finished, **{**rest, **given})

    return build


def summary(cell, score: float) -> dict:
    private = cell.epsilon is not None
    return {
        "metric": "accuracy",
        "score": score,
        "score_before": 0.3,
        "state_sha256": "0" * 64,
        "private": private,
        "epsilon_max": 0.9 * cell.epsilon if private else None,
        "delta": 1e-5 if private else None,
        "noise_source": "seeded" if private else None,
        "tuning": {"epsilon_max": None},
    }


def test_a_paired_difference_cancels_what_seeds_are_worth(told):
    """Seeds differ by forty points, the arms by two, each time: unpaired, nobody could tell."""
    found = told(
        {"fedsvd": {1.0: [0.40, 0.60, 0.80]}, "ffa": {1.0: [0.42, 0.621, 0.819]}, "central": {1.0: [0.9] * 3}}
    )
    arms = found["results"][0]["arms"]
    pair = arms["ffa"]["paired"]
    assert pair["mean"] == pytest.approx(0.02) and pair["excludes_zero"] and pair["seeds"] == 3
    assert arms["ffa"]["interval"][0] < arms["fedsvd"]["mean"]
    (_, ffa, _) = rows_of(found["results"][0], found)
    assert ffa[0] == "ffa" and ffa[3] == "+2.0" and ffa[5] == MARK
    assert found["results"][0]["arms"]["fedsvd"]["paired"] is None


def test_an_arm_without_privacy_stands_at_every_budget_and_says_so(told):
    two = {1.0: [0.5, 0.6], 8.0: [0.7, 0.8]}
    found = told({"fedsvd": two, "not-private": {None: [0.9, 0.7]}})
    for result in found["results"]:
        assert result["arms"]["not-private"]["mean"] == pytest.approx(0.8)
        assert rows_of(result, found)[1][6] == "NOT PRIVATE"
    assert [rows_of(result, found)[0][6] for result in found["results"]] == ["0.9", "7.2"]
    assert heading(found["results"][0], found) == "epsilon 1 at delta 1e-05, test accuracy, 2 seeds"


def test_one_seed_has_no_interval(told):
    found = told({"fedsvd": {1.0: [0.5]}, "ffa": {1.0: [0.6]}})
    (fedsvd, ffa) = rows_of(found["results"][0], found)
    assert fedsvd[1:6] == ("50.0 %", "-", "-", "-", "") and ffa[1:6] == ("60.0 %", "-", "+10.0", "-", "")
    assert any("one seed tells no interval" in note for note in notes(found))


def test_what_is_not_finished_is_missing_and_is_said(told):
    found = told({"fedsvd": {1.0: [0.5, 0.6, None]}, "ffa": {1.0: [None, 0.7, 0.7]}})
    pair = found["results"][0]["arms"]["ffa"]["paired"]
    assert pair["seeds"] == 1 and pair["mean"] == pytest.approx(0.1) and pair["interval"] is None
    assert not found["finished"] and notes(found)[-1].startswith("NOT FINISHED")
    assert [cell["score"] for cell in found["cells"]] == [0.5, 0.6, None, None, 0.7, 0.7]


@pytest.mark.parametrize(
    ("again", "holds", "says"),
    [
        ([0.50, 0.62, 0.69], True, "every interval contains 0, as it must"),
        ([0.60, 0.701, 0.799], False, "EXCLUDES 0"),
        ([None, 0.62, None], None, "two seeds are needed"),
    ],
)
def test_a_control_says_whether_an_arm_differs_from_itself(told, again, holds, says):
    given = {"fedsvd": {1.0: [0.5, 0.6, 0.7]}, "ffa": {1.0: [0.1] * 3}, "fedsvd-again": {1.0: again}}
    found = told(given, control=("fedsvd-again", "fedsvd"), against="ffa")
    assert found["control"]["contains_zero"] is holds
    assert any(says in note for note in notes(found))


def test_the_budget_of_tuning_and_its_cost_are_told(told):
    setting = Setting(lr=0.5, max_grad_norm=2.0)
    choice = Choice(tried=((setting, 0.6),), best=setting)
    other = Choice(tried=((setting, 0.6),), best=Setting(lr=4.0, max_grad_norm=1.0))
    shared = {"trials": 6, "seeds": 1, "epsilons": [3.0], "seed": 1_000_007}
    two = {"fedsvd": {1.0: [0.5, 0.6], 8.0: [0.5, 0.6]}, "ffa": {1.0: [0.5, 0.6], 8.0: [0.5, 0.6]}}
    free = told(
        two,
        choices={"ffa": {1.0: choice, 8.0: other}},
        tuning={**shared, "epsilons": [1.0, 8.0], "proxy": "p.yaml", "private_runs": None},
    )
    assert "6 trials each of ffa, at each of epsilon 1, 8, seed" in "\n".join(notes(free))
    assert [row[7] for row in rows_of(free["results"][1], free)] == ["-", "4, 1"]
    assert "on p.yaml; no privacy cost" in "\n".join(notes(free))
    assert [row[7] for row in rows_of(free["results"][0], free)] == ["-", "0.5, 2"]
    paid = told(two, choices={"ffa": {3.0: choice}}, tuning={**shared, "proxy": None, "private_runs": 7})
    assert "at epsilon 3, seed" in "\n".join(notes(paid))
    assert [row[7] for row in rows_of(paid["results"][1], paid)] == ["-", "0.5, 2"]
    assert "what 7 runs like the cell spent on the same records" in "\n".join(notes(paid))


def test_markdown_has_a_table_a_budget(told):
    page = markdown(told({"fedsvd": {1.0: [0.5, 0.6], 8.0: [0.7, 0.8]}}))
    assert page.count("| arm | mean |") == 2 and "**epsilon 8 at delta 1e-05" in page
    widths = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_the_chart_draws_each_interval_where_it_is():
    series = [
        Series(name="one", values=[(0.2, 0.4, 0.6), None]),
        Series(name="a<b", values=[(0.5, 0.5, 0.5), (0.0, 0.8, 1.0)]),
    ]
    chart = standalone(interval_chart(["1", "8"], series, title="t", across="epsilon", show=str))
    root = ElementTree.fromstring(chart)
    space = "{http://www.w3.org/2000/svg}"
    groups = [group for group in root.iter(f"{space}g") if group.find(f"{space}polyline") is not None]
    bars = [[(float(b.get("y1")), float(b.get("y2"))) for b in g.findall(f"{space}line")] for g in groups]
    assert [len(found) for found in bars] == [1, 2]
    (low, high), ((flat, same), (zero, whole)) = bars[0][0], bars[1]
    assert flat == same and zero > low > flat > high > whole  # upwards is less in SVG
    assert math.isclose(flat - whole, (zero - whole) / 2, abs_tol=0.11)
    assert [text.text for text in root.iter(f"{space}text")][-2:] == ["one", "a<b"]


def test_a_phone_has_the_names_below_the_chart_and_nothing_outside_it():
    series = [Series(name=f"arm {n}", values=[(0.2, 0.4, 0.6), (0.3, 0.4, 0.5)]) for n in range(9)]
    drawn = interval_chart(["1", "8"], series, title="t", across="epsilon", show=str, width=NARROW)
    root = ElementTree.fromstring(drawn)
    told = list(root.iter("text"))
    _, _, wide, high = map(float, root.get("viewBox").split())
    assert wide == NARROW and all(0 < float(text.get("x")) < wide for text in told)
    names = {text.text: float(text.get("y")) for text in told}
    assert names["epsilon"] < names["arm 0"] < names["arm 8"] < high


def test_the_tables_file_names_are_plain(tmp_path: Path, told):
    found = told({"not-private": {None: [0.5]}}, against="not-private")
    assert [cell["run_dir"] for cell in found["cells"]] == ["not-private-epsnone-seed7"]
    assert found["results"][0]["epsilon"] is None and found["delta"] is None
