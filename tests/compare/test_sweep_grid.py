"""Grids: what is written, which settings follow, and that nothing wrong is found only after the first run."""

import csv
import io
import re

import pytest

from fedlora.cli.app import main
from fedlora.compare.cells import Source
from fedlora.compare.grid import Axis, axes_of, checked, settings_of
from fedlora.compare.sweep_page import csv_text, html_page, notes, rows_of
from fedlora.config.load import config_digest, dump_config
from fedlora.errors import ConfigError


@pytest.fixture
def source(tiny_config, tmp_path) -> Source:
    path = tmp_path / "given.yaml"
    path.write_text(dump_config(tiny_config()))
    return Source(path=path)


def test_values_are_yaml_and_a_file_says_the_same(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("privacy.target_epsilon: [1, 3.5]\nlora.target_modules: [[query, value], [query]]\n")
    written = ["privacy.target_epsilon=1,3.5", "lora.target_modules=[query, value],[query]"]
    assert axes_of([str(path)]) == axes_of(written)
    assert axes_of(written)[1].values == (["query", "value"], ["query"])


def test_every_combination_is_there_once_the_last_key_fastest(source):
    settings = settings_of(axes_of(["lora.r=1,2", "federation.optimizer.lr=0.5,1,2"]))
    assert [tuple(dict(setting.values).values()) for setting in settings] == [
        (r, lr) for r in (1, 2) for lr in (0.5, 1, 2)
    ]
    configs = [checked(source, setting) for setting in settings]
    assert [(c.lora.r, c.federation.optimizer.lr) for c in configs] == [
        (r, lr) for r in (1, 2) for lr in (0.5, 1, 2)
    ]
    assert len({config_digest(config) for config in configs}) == 6


def test_a_setting_keeps_its_name_when_the_grid_grows_or_turns():
    few = {setting.name for setting in settings_of(axes_of(["lora.r=1", "seedless.x=a/b,c"]))}
    many = {setting.name for setting in settings_of(axes_of(["seedless.x=c,a/b,d", "lora.r=2,1"]))}
    digests = {name[-8:] for name in few}
    assert len(many) == 6 and digests < {name[-8:] for name in many}
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in few | many)
    long = settings_of([Axis(key="k", values=("x" * 300, "x" * 301))])
    assert len({setting.name for setting in long}) == 2 and all(len(setting.name) < 80 for setting in long)


@pytest.mark.parametrize(
    ("grids", "says"),
    [
        (
            ["privacy.target_epsilonn=1,3"],
            "--grid privacy.target_epsilonn: unknown key; write privacy.target_epsilon",
        ),
        (["federation.optimiser.lr=1"], "unknown key; write federation.optimizer.lr"),
        (["privacy.target_epsilon=1,none"], '--grid privacy.target_epsilon="none": privacy.target_epsilon'),
        (["lora.r=1,0"], "--grid lora.r=0: lora.r: 0 does not fit; write a whole number >= 1"),
        (["lora.r=1,2", "federation.cohort=1,9"], "9 clients asked, but data.partition.clients is 3"),
        (["lora.r="], "no values; write for example lora.r=1,2"),
        (["lora.r=1,1"], "1 is there twice; --seeds"),
        (["lora.r=1", "lora.r=2"], "lora.r is there 2 times"),
        (["seed=1,2"], "no sweep varies it; write --seeds N"),
        (["runtime.device=cpu,cuda"], "no sweep varies it"),
        (["nowhere.yaml"], "neither KEY=VALUE,VALUE,... nor a YAML file"),
        (["lora.r=[1"], "not readable as YAML"),
        ([f"federation.rounds={','.join(map(str, range(1, 10_002)))}"], "10,001 settings"),
    ],
)
def test_what_is_wrong_is_told_in_one_message_before_the_first_run(source, tmp_path, capsys, grids, says):
    to = tmp_path / "to"
    given = [word for grid in grids for word in ("--grid", grid)]
    assert main(["sweep", str(source.path), *given, "--to", str(to)]) == 2
    assert says in capsys.readouterr().err and not to.exists()


def test_a_file_that_is_no_grid_is_refused(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("lora: {r: [1, 2]}\n")
    with pytest.raises(
        ConfigError, match=r"is no grid; write lines like privacy\.target_epsilon: \[1, 3, 8\]"
    ):
        axes_of([str(path)])


def run(score, seed=1, spent=2.5):
    keys = {"score": score, "score_before": 0.3, "epsilon_max": spent, "delta": 1e-5, "state_sha256": "ab"}
    return {"seed": seed, "run_dir": f"d{seed}", **keys}


def found(**changes):
    row = {"mean": 0.5, "interval": [0.4, 0.6], "private": True, "epsilon_max": 2.5}
    settings = [
        {"set": {"lora.r": r, "lora.target_modules": m}, **row, "runs": [run(0.4), run(0.6, 2)]}
        for r in (1, 2)
        for m in (["<q>"], ["v", "q"])
    ]
    axes = [
        {"key": "lora.r", "values": [1, 2]},
        {"key": "lora.target_modules", "values": [["<q>"], ["v", "q"]]},
    ]
    base = {"finished": True, "metric": "accuracy", "high_is_good": True, "seeds": [1, 2], "axes": axes}
    return {**base, "noise_source": "seeded", "private_runs": 8, "settings": settings, **changes}


def test_the_table_says_what_choosing_by_it_costs():
    assert rows_of(found())[1] == ("1", '["v", "q"]', "50.0 %", "40.0 % to 60.0 %", "2.5", "2 of 2")
    told = "\n".join(notes(found()))
    assert "declare privacy.tuned_on: {private_runs: 9}" in told and "NOT FINISHED" not in told
    unfinished = "\n".join(notes(found(finished=False, private_runs=0, noise_source=None)))
    assert "NOT FINISHED" in unfinished and "tuned_on" not in unfinished


def test_the_csv_has_a_line_a_run_and_reads_back():
    lines = list(csv.DictReader(io.StringIO(csv_text(found()))))
    assert len(lines) == 8 and lines[3]["lora.target_modules"] == '["v", "q"]'
    assert (lines[3]["seed"], float(lines[3]["score"]), lines[3]["run_dir"]) == ("2", 0.6, "d2")


def test_the_page_needs_no_network_and_holds_names_as_text():
    told = html_page(found())
    assert told.startswith("<!DOCTYPE html>") and "<q>" not in told and "&lt;q&gt;" in told
    assert (
        not re.search(r'(src|href)="|@import|url\(', told) and told.count("<svg") == 2
    )  # for a desk and for a phone
    assert "<svg" not in html_page(found(metric=None))  # nothing finished, or scores of two kinds
