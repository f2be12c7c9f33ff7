"""The privacy statement says what the ledgers hold, in words that a person can follow, and nothing else."""

from typing import get_args

import pytest

from fedlora.cli.output import summary_text
from fedlora.config.method import Method, title_of
from fedlora.export.card import model_card
from fedlora.export.report import report_html
from fedlora.export.statement import privacy_statement, tuning_text
from fedlora.privacy.noise import BY_THE_NODES, OS_ENTROPY


def terms(summary) -> dict[str, str]:
    return dict(privacy_statement(summary).terms)


def test_every_term_that_a_reviewer_asks_for_is_stated(summary):
    """I-44: unit, adjacency, (epsilon, delta), accountant and versions, events, noise, metrics, tuning."""
    told = terms(summary)
    assert told["Unit"] == "one record of one client"
    assert told["Adjacency"].startswith("zero-out: ")
    assert told["epsilon"].startswith("3.201 ") and told["delta"] == "1e-05"
    assert told["Replace-one epsilon"].startswith("4.9 ")  # I-7
    for said in ("pld", "dp-accounting 0.4", "prv", "opacus 1.5", "agrees within 0.01 + 1 %"):
        assert said in told["Accountant"], said
    assert "30 noised steps" in told["Training"] and "noise multiplier of at least 1.1" in told["Training"]
    assert told["Noise"].startswith("seeded") and told["Private evaluation"].startswith("none")
    assert (
        "6 participations" in told["Evidence"] and "1 of them attempts that left no reply" in told["Evidence"]
    )
    assert told["Tuning"].startswith("not declared")


def test_what_is_not_protected_is_said(summary):
    told = " ".join(privacy_statement(summary).not_protected)
    for said in (
        "no secure aggregation",
        "the epsilons add up",
        "reply quantum",
        "evaluated in float64",
        "a node that lies",
        "tuned on private records",
        "test data",
    ):
        assert said in told, said


def test_the_statement_asks_no_config(summary, tiny_config):
    """I-44: whatever the config promises, the words and figures about privacy stay those of the ledgers."""
    boast = tiny_config(
        privacy={
            "target_epsilon": 0.123,
            "target_delta": 1e-9,
            "max_grad_norm": 9.0,
            "max_participations": 77,
        }
    )
    plain = model_card(tiny_config(), summary)
    assert model_card(boast, summary).split("## Privacy")[1] == plain.split("## Privacy")[1]
    part = report_html(summary, [], boast).split("Privacy statement")[1].split("<h2>Method")[0]
    assert (
        part == report_html(summary, [], tiny_config()).split("Privacy statement")[1].split("<h2>Method")[0]
    )
    assert "0.123" not in part and "1e-09" not in part


def test_a_private_evaluation_is_named_with_its_share(summary):
    """I-35, I-36: a count that was told is a release like any other, and the statement says what it cost."""
    told = {"releases_max": 5, "noise_min": 50.0, "epsilon_max_without": 3.1}
    said = terms({**summary, "evaluation": told})["Private evaluation"]
    for word in ("5 times", "noise of 50 records", "without it the largest epsilon would be 3.1"):
        assert word in said, word


@pytest.mark.parametrize(
    ("tuned_on", "runs", "cost", "says"),
    [
        ("undeclared", None, None, "whoever tuned on private records spent more than is said here"),
        ("nothing", None, None, "fixed in advance"),
        ("public-data", None, None, "on public data"),
        (
            "private runs",
            10,
            3.6999,
            "10 runs like this one on the same records; together they spent epsilon 3.7",
        ),
        ("private runs", 10, None, "computed when the run ends"),
    ],
)
def test_what_tuning_means_is_said_in_words_wherever_epsilon_stands(
    summary, tiny_config, tmp_path, tuned_on, runs, cost, says
):
    """I-40."""
    tuning = {"tuned_on": tuned_on, "private_runs": runs, "epsilon_max": cost}
    assert says in tuning_text(tuning)
    tuned = {**summary, "tuning": tuning}
    for text in (model_card(tiny_config(), tuned), report_html(tuned, []), summary_text(tuned, tmp_path)):
        assert says in text


def test_each_owner_has_a_row_with_rounds_debits_epsilon_and_replace_one(summary, rounds, tiny_config):
    assert "| `client-1` | 1 | 2 | 1.5 | 2.25 |" in model_card(tiny_config(), summary)
    html = report_html(summary, rounds)
    assert "<td>client-1</td><td>1</td><td>2</td><td>1.5</td><td>2.25</td>" in html


def test_what_is_not_computed_yet_is_not_made_up(summary, tiny_config):
    later = ("epsilon_replace_one_max", "epsilon_replace_one_by_client", "accountants_agree")
    unfinished = {**summary, **dict.fromkeys(later)}
    told = terms(unfinished)
    assert told["Replace-one epsilon"].startswith("computed when the run ends")
    assert "when the run ends" in told["Accountant"]
    assert "| `client-1` | 1 | 2 | 1.5 | - |" in model_card(tiny_config(), unfinished)


def test_an_accountant_that_did_not_agree_is_not_hidden(summary):
    reported = {**summary, "accountants_agree": False, "noise_source": BY_THE_NODES, "lost_attempts": None}
    told = terms(reported)
    assert "did NOT agree" in told["Accountant"] and "each node proves it" in told["Evidence"]
    assert "agree with each other" in terms({**summary, "accountant": "rdp"})["Accountant"]
    assert "pld (privacy loss" in terms({**summary, "accountant": "prv"})["Accountant"].split(";")[1]


def test_the_final_table_says_unit_replace_one_noise_and_tuning(summary, not_private, tmp_path):
    text = summary_text({**summary, "noise_source": OS_ENTROPY}, tmp_path)
    for said in (
        "one record of one client, zero-out; replace-one epsilon 4.9",
        "operating system",
        "not declared",
    ):
        assert said in text, said
    assert "replace-one" not in summary_text(not_private, tmp_path)


@pytest.mark.parametrize(
    ("metric", "before", "after", "learnt"),
    [
        ("accuracy", 0.25, 0.25, False),
        ("accuracy", 0.25, 0.26, True),
        ("perplexity", 9.0, 9.0, False),
        ("perplexity", 9.0, 8.9, True),
        ("accuracy", None, 0.3, True),
    ],
)
def test_the_final_table_says_what_to_try_where_nothing_was_learnt(
    summary, not_private, tmp_path, metric, before, after, learnt
):
    scores = {"metric": metric, "score_before": before, "score": after}
    told = summary_text({**summary, **scores}, tmp_path)
    assert ("nothing that shows: more records for each owner" in told) is not learnt
    assert (
        "nothing that shows: if the loss rose, lower" in summary_text({**not_private, **scores}, tmp_path)
    ) is not learnt
    assert ("Learnt: nothing that shows" in report_html({**summary, **scores}, ())) is not learnt


def test_who_never_took_part_is_told(summary, tmp_path):
    assert "never took part" not in summary_text(summary, tmp_path)
    absent = {**summary, "participations": {"client-0": 3, "north": 0, "south": 0}}
    assert "3 with 3 clients, of which 2 never took part: north, south" in summary_text(absent, tmp_path)
    many = {**summary, "participations": {f"client-{n}": 0 for n in range(4)}}
    assert "of which 4 never took part\n" in summary_text(many, tmp_path)


def test_the_time_that_is_told_says_that_it_is_of_the_rounds(summary, rounds, tmp_path):
    told = {**summary, "seconds": 75.2}
    assert "1 min 15 s in rounds, without loading, calibrating and writing" in summary_text(told, tmp_path)
    assert "<dt>Time of the rounds</dt><dd>1 min 15 s</dd>" in report_html(told, rounds)


def test_accuracy_that_clients_told_is_a_curve_with_its_caveat(summary, rounds):
    assert "as told with noise" not in report_html(summary, rounds)
    told = [
        {**line, "accuracy_told": {"client-0": 0.5, "client-1": 1.1} if line["round"] else {}}
        for line in rounds
    ]
    html = report_html(summary, told)
    assert "as told with noise" in html and "80.0 %" in html and "client-1 110.0 %" in html
    assert html.count('id="told-title"') == html.count('id="score-title"') == 1


def test_card_report_and_table_name_every_method_by_its_title(summary, tiny_config, tmp_path):
    sections = get_args(get_args(Method)[0])
    assert len({vars(section)["title"] for section in sections}) == len(sections)
    for section in sections:
        (name,) = get_args(section.model_fields["name"].annotation)
        assert title_of(name) == section.title != name
        named = {**summary, "method": name}
        for told in (model_card(tiny_config(), named), report_html(named, []), summary_text(named, tmp_path)):
            assert section.title in told
    assert title_of("of-a-later-version") == "of-a-later-version"
