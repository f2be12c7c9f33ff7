"""The report says what the adapter is and how much of the updates was signal, where that is known."""

import json
import re

import pytest
import torch

from fedlora.algebra.diagnostics import decomposed, effective_rank, intruder_dimensions, singular_values
from fedlora.cli.app import main
from fedlora.config.load import dump_config
from fedlora.errors import ConfigError
from fedlora.export import diagnose
from fedlora.export.charts import line_chart, panels_chart
from fedlora.export.diagnose import diagnostics
from fedlora.export.grids import size_chart
from fedlora.export.report import report_html
from fedlora.export.report_adapter import site_labels
from fedlora.export.report_signal import signal_by_client
from fedlora.runs.rundir import run_diagnostics
from fedlora.runs.trained import trained_adapters
from fedlora.training.load import load_model
from fedlora.training.public import frozen_weight
from fedlora.values import Adapters, Factors

HOSTILE = "<script>alert('x')</script>"
QUERY = "encoder.layer.{}.attention.self.query"


@pytest.fixture
def found():
    """diagnostics.json of two layers, one of them not measured beside its weight."""
    beside = {
        "relative_norm": 0.25,
        "explained": {"left": 0.5, "right": 0.125, "both": 0.0625},
        "by_chance": {"left": 0.04, "right": 0.04, "both": 0.0016},
        "intruders": 2,
    }
    site = {"shape": [32, 8], "singular_values": [4.0, 1.0], "energy_shares": [16 / 17, 1 / 17]}
    return {
        "directions": 2,
        "intruders_among": 10,
        "intruder_below": 0.5,
        "sites": {
            QUERY.format(0): {**site, "effective_rank": 1.65, "beside": beside},
            QUERY.format(1): {**site, "effective_rank": 1.25, "beside": None},
        },
    }


@pytest.fixture
def heard(rounds):
    """The rounds with lengths: 5 and 3 beside noise of 3, a client that fell short of its noise, one unknown."""
    names = rounds[1]["answered"]
    lengths = {
        1: ({names[0]: 5.0, names[1]: 2.0, HOSTILE: 9.0}, {names[0]: 3.0, names[1]: 3.0}),
        2: ({names[0]: 3.0}, {names[0]: 3.0}),
    }
    return [
        line
        if line["round"] not in lengths
        else {**line, "update_norm": lengths[line["round"]][0], "noise_norm": lengths[line["round"]][1]}
        for line in rounds
    ]


def text_of(html):
    return re.sub(r"<[^>]+>", " ", html)


def test_the_report_tells_spectrum_rank_shares_and_intruders_by_layer(summary, rounds, tiny_config, found):
    html = report_html(summary, rounds, tiny_config(), diagnostics=found)
    part = html.split("What the adapter is")[1].split("Privacy statement")[0]
    for said in (
        "0 query", "1 query", "effective rank 1.65", "1.45 of 2 on average, from 1.25 to 1.65",
        "25 % of the weights (measured at 1 of 2 layers)", "50 % of the update's energy, by chance 4.0 %",
        "12 % of the update's energy", "6.2 % of the update's energy, by chance 0.16 %", "2 of 8 looked at",
    ):  # fmt: skip
        assert said in part.replace("&#x27;", "'"), said
    assert part.count('class="bar"') == 2 * 4  # drawn for a desk and for a phone


def test_a_report_of_a_run_that_was_never_measured_goes_without_the_section(summary, rounds, tiny_config):
    html = report_html(summary, rounds, tiny_config(), diagnostics=None)
    assert "What the adapter is" not in html and "Signal to noise" not in html


def test_layers_of_one_name_are_still_told_apart():
    sites = ["h.0.attn.dense", "h.0.mlp.dense", "h.10.mlp.dense"]
    assert list(site_labels(sites).values()) == ["0 attn.dense", "0 mlp.dense", "10 mlp.dense"]
    assert site_labels(["pooler"]) == {"pooler": "pooler"}


def test_signal_to_noise_is_that_of_energies_by_round_and_by_client(heard):
    """Round 1: (25 + 4 - 18) / 18. client-0 over both: (25 + 9 - 18) / 18; client-1: below its noise, so 0."""
    html = signal_by_client(heard)
    cells = re.findall(r"<td>([^<]*)</td>", html)
    assert cells == ["client-0", "2", f"{16 / 18:.2g}", "client-1", "1", "0"]
    curve = html.split("</svg>")[0]
    assert "in 2 rounds; the largest is 1.8" in html  # 16 / 9
    assert text_of(curve).split()[-1] == "0" and len(re.findall(r"<circle", curve)) == 2
    assert HOSTILE not in html and "alert" not in html


def test_lengths_alone_tell_no_ratio(rounds):
    told = [{**line, "update_norm": dict.fromkeys(line["answered"], 1.0)} for line in rounds]
    assert signal_by_client(told) == "" and signal_by_client(rounds) == ""


def test_a_disc_has_the_area_of_its_ratio_and_nothing_is_a_ring():
    svg = size_chart(["a", "b", "c"], [1], {("a", 1): 4.0, ("b", 1): 1.0, ("c", 1): 0.0}, title="t")
    radii = {kind: [] for kind in ("answered", "none")}
    for kind, radius in re.findall(r'<circle class="([a-z]+)"[^>]* r="([0-9.]+)"', svg):
        radii[kind].append(float(radius))
    assert (
        radii["answered"][0] == pytest.approx(2 * radii["answered"][1], rel=0.02) and len(radii["none"]) == 1
    )


def test_panels_share_one_scale():
    svg = panels_chart([("x", "", [8.0, 4.0]), ("y", "", [2.0])], title="t", show="{:g} big".format)
    assert [told for told in ("8 big", "4 big", "2 big") if told in svg] == ["8 big", "2 big"]
    heights = [float(high) for high in re.findall(r'class="bar"[^>]* height="([0-9.]+)"', svg)]
    assert heights[1] == pytest.approx(heights[0] / 2, abs=0.1)
    assert heights[2] == pytest.approx(heights[0] / 4, abs=0.1)


@pytest.mark.parametrize("points", [[(1, 0.0)], [(1, 0.4), (2, 0.1)], [(1, 0.1), (2, 0.4)]])
def test_a_curve_from_zero_has_no_tick_below_it_and_its_last_label_inside(points):
    svg = line_chart(points, before=None, title="t", show=lambda value: f"v{value:g}", floor=0.0)
    shown = re.findall(r'y="([0-9.]+)" text-anchor="end">v([-0-9.]+)<', svg)
    assert min(float(value) for _, value in shown) == 0.0
    assert all(0 < float(y) < 300 - 44 + 5 for y, _ in shown)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("diagnosed") / "run"


@pytest.fixture
def delivered(run_dir, tiny_config, tmp_path):
    """A finished run, made by the first test that asks; its seconds are spent once."""
    if not (run_dir / "report.html").exists():
        path = tmp_path / "given.yaml"
        path.write_text(dump_config(tiny_config(output=str(run_dir), federation__rounds=1)))
        assert main(["simulate", str(path)]) == 0
    return run_dir


def test_a_delivered_run_was_measured_and_the_numbers_are_those_of_its_adapter(delivered, tiny_config):
    told = run_diagnostics(delivered)
    assert told is not None and told["directions"] == 2
    (adapters, classes), config = trained_adapters(delivered), tiny_config()
    model = load_model(config.model, config.task, config.lora, classes, config.seed)
    layers = model.layers()
    assert sorted(told["sites"]) == sorted(layers) and len(layers) == 4
    for site, of in told["sites"].items():
        factors, weight = adapters.sites[site], frozen_weight(layers[site]).double()
        values = singular_values(factors, adapters.scale)
        assert of["singular_values"] == pytest.approx(values.tolist(), rel=1e-5)
        assert of["effective_rank"] == pytest.approx(effective_rank(values), abs=1e-6)
        assert of["beside"]["intruders"] == intruder_dimensions(weight, factors, adapters.scale)
        relative = float(values.norm() / decomposed(weight).values.norm())
        assert of["beside"]["relative_norm"] == pytest.approx(relative, rel=1e-6)
    html = (delivered / "report.html").read_text()
    assert "What the adapter is" in html and "Signal to noise of the updates" in html


def test_the_report_reads_what_was_measured_and_an_old_runs_has_no_such_section(
    delivered, tmp_path, monkeypatch
):
    monkeypatch.setattr(diagnose, "load_base", lambda *given: pytest.fail("a report loads no weights"))
    path, aside, html = delivered / "diagnostics.json", delivered / "aside", tmp_path / "report.html"
    assert main(["report", str(delivered), "--to", str(html)]) == 0
    assert "What the adapter is" in html.read_text()
    path.rename(aside)
    try:
        assert main(["report", str(delivered), "--to", str(html)]) == 0
        assert "What the adapter is" not in html.read_text()
        assert main(["resume", str(delivered)]) == 0 and not path.exists()  # a delivered run is left alone
        path.write_text("{}")
        with pytest.raises(ConfigError, match=r"diagnostics\.json is damaged"):
            run_diagnostics(delivered)
    finally:
        aside.replace(path)


def test_a_core_is_measured_as_the_product_it_stands_for(tiny_config, delivered, monkeypatch):
    """And weights beyond what is cheap are left alone: their sites have a spectrum only."""
    (adapters, classes), config = trained_adapters(delivered), tiny_config()
    cores = {}
    for site, factors in adapters.sites.items():
        left, core = torch.linalg.qr(factors.b)
        cores[site] = Factors(a=factors.a, b=core, left=left)
    of_cores = diagnostics(config, Adapters(basis=0, scale=adapters.scale, sites=cores), classes)
    told = json.loads((delivered / "diagnostics.json").read_text())
    for site, of in of_cores["sites"].items():
        assert of["singular_values"] == pytest.approx(told["sites"][site]["singular_values"], rel=1e-4)
        assert of["beside"]["intruders"] == told["sites"][site]["beside"]["intruders"]
    for most, measured in ((32.0**3 - 1, 0), (32.0**3, 1), (2 * 32.0**3, 2), (4 * 32.0**3, 4)):
        monkeypatch.setattr(diagnose, "MOST_WORK", most)
        few = diagnostics(config, adapters, classes)["sites"].values()
        assert [of["beside"] is None for of in few].count(False) == measured and len(few) == 4
