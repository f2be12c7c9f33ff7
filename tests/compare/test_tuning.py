"""Trials: as many for each arm, around its own setting, on other data or paid for."""

import math
import shutil
from pathlib import Path

import pytest

from fedlora.compare.arms import METHODS
from fedlora.compare.candidates import arms_of
from fedlora.compare.cells import Setting, Source
from fedlora.compare.tuning import (
    APART,
    Choice,
    Tuning,
    choose,
    grid,
    private_runs,
    setting_of,
    trial_epsilons,
    trials_of,
)
from fedlora.config.load import dump_config, load_config
from fedlora.errors import ConfigError

CENTRE = Setting(lr=1.0, max_grad_norm=2.0)


@pytest.fixture
def source(tiny_config, tmp_path) -> Source:
    path = tmp_path / "given.yaml"
    path.write_text(dump_config(tiny_config()))
    return Source(path=path)


@pytest.fixture
def proxy(tiny_config, topic_files, tmp_path) -> Path:
    """A copy of the test records as training data, over four clients."""
    partition = {"kind": "iid", "clients": 4}
    path, train = tmp_path / "proxy.yaml", tmp_path / "proxy.tsv"
    shutil.copy(topic_files[1], train)
    config = tiny_config(data__train=str(train), data__partition=partition, federation__rounds=99)
    path.write_text(dump_config(config))
    return path


def test_the_grid_begins_at_the_arms_own_setting_and_grows_outwards_alike():
    assert grid(CENTRE, 1) == [CENTRE]
    many = grid(CENTRE, 49)
    assert many[:6] == grid(CENTRE, 6) and len(set(many)) == 49
    reach = [math.hypot(math.log2(s.lr), math.log2(s.max_grad_norm / 2)) for s in many]
    assert reach == sorted(reach)
    assert {(s.lr, s.max_grad_norm) for s in many[1:5]} == {(0.5, 2.0), (2.0, 2.0), (1.0, 1.0), (1.0, 4.0)}
    assert {s.lr * s.max_grad_norm for s in many[5:7]} == {2.0}  # of the corners, those of an equal step
    with pytest.raises(ConfigError, match="the grid has 49 points"):
        grid(CENTRE, 50)


def test_without_privacy_there_is_no_norm_to_choose():
    assert [s.lr for s in grid(Setting(lr=8.0, max_grad_norm=None), 5)] == [8.0, 4.0, 16.0, 2.0, 32.0]


def test_trials_on_a_proxy_are_the_arm_on_its_data_at_each_budget(source, proxy, tmp_path):
    tuning = Tuning(trials=3, proxy=proxy)
    assert trial_epsilons([8.0, 1.0, 3.0], tuning) == [1.0, 3.0, 8.0]
    found = trials_of(source, METHODS[1], tuning, 3.0, tmp_path / "trials")
    assert [trial.run_dir.name for trial in found] == [f"ffa-eps3-trial{n}" for n in (1, 2, 3)]
    assert [Setting.of(trial.config) for trial in found] == grid(Setting(lr=1.0, max_grad_norm=1.0), 3)
    for trial in found:
        assert trial.config.data == load_config(proxy).data
        assert trial.config.method.name == "ffa" and trial.config.federation.rounds == 3
        assert trial.config.privacy.target_epsilon == 3.0 and trial.config.seed == 7 + APART
    assert private_runs(tuning, source.config()) is None


def test_several_seeds_of_a_setting_are_runs_of_their_own_judged_by_their_mean(source, proxy, tiny_config):
    tuning = Tuning(trials=2, proxy=proxy, seeds=2)
    trials = trials_of(source, METHODS[0], tuning, 3.0, Path("d"))
    assert [t.run_dir.name for t in trials] == [
        "fedsvd-eps3-trial1",
        "fedsvd-eps3-trial1-again1",
        "fedsvd-eps3-trial2",
        "fedsvd-eps3-trial2-again1",
    ]
    assert [t.config.seed for t in trials] == [7 + APART, 8 + APART] * 2
    first, second = grid(Setting.of(trials[0].config), 2)
    scores = dict(zip([t.run_dir for t in trials], [0.9, 0.1, 0.6, 0.6], strict=True))  # one lucky seed
    assert choose(trials, scores, high_is_good=True) == Choice(
        tried=((first, 0.5), (second, 0.6)), best=second
    )
    assert private_runs(Tuning(trials=6, proxy=None, seeds=3), source.config()) == 19


def test_each_arm_has_as_many_trials_also_those_without_privacy(source, proxy):
    tuning = Tuning(trials=4, proxy=proxy)
    for arm in arms_of(source.config(), []).values():
        assert len(trials_of(source, arm, tuning, 3.0, Path("d"))) == 4


def test_trials_on_the_runs_own_data_are_paid_for_by_the_cells(source, tiny_config):
    """No trial may have spent more than a cell: the statement counts them as runs like it."""
    tuning = Tuning(trials=6, proxy=None)
    assert trial_epsilons([8.0, 1.0, 3.0], tuning) == [1.0]
    assert private_runs(tuning, source.config()) == 7
    assert private_runs(tuning, tiny_config(privacy__tuned_on={"private_runs": 5})) == 11
    assert private_runs(tuning, tiny_config(privacy="none")) is None
    assert trials_of(source, METHODS[0], tuning, 1.0, Path("d"))[0].config.data == source.config().data


def test_a_budget_without_trials_takes_what_was_chosen_for_the_one_that_had_them():
    one, two = Setting(lr=1.0, max_grad_norm=1.0), Setting(lr=2.0, max_grad_norm=0.5)
    choices = {
        "ffa": {1.0: Choice(tried=((one, 0.5),), best=one), 8.0: Choice(tried=((two, 0.5),), best=two)},
        "fedsvd": {1.0: Choice(tried=((two, 0.5),), best=two)},
        "not-private": {None: Choice(tried=((one, 0.5),), best=one)},
    }
    assert [setting_of(choices, "ffa", e) for e in (1.0, 8.0)] == [one, two]
    assert [setting_of(choices, "fedsvd", e) for e in (1.0, 8.0)] == [two, two]
    assert setting_of(choices, "not-private", None) == one and setting_of(choices, "config", 1.0) is None


def test_a_proxy_of_the_runs_own_data_is_refused(source, tiny_config, topic_files, tmp_path):
    """Also one that is only scored on it, or made of it what it begins with: neither is private."""
    with pytest.raises(ConfigError, match=r"its data is the run's own.*--tune-on-data"):
        trials_of(source, METHODS[0], Tuning(trials=2, proxy=source.path), 8.0, Path("d"))
    scored = tmp_path / "scored.yaml"
    train, test = map(str, topic_files)
    scored.write_text(dump_config(tiny_config(data__train=test, data__test=train)))
    with pytest.raises(ConfigError, match="its data is the run's own"):
        trials_of(source, METHODS[0], Tuning(trials=2, proxy=scored), 8.0, Path("d"))
    begun = {"lora__init": "gradients", "data__train": f"{tmp_path}/other.tsv"}
    own = tmp_path / "own.yaml"
    own.write_text(dump_config(tiny_config(lora__init="gradients", data__public=test)))
    scored.write_text(dump_config(tiny_config(**begun, data__public=train)))
    with pytest.raises(ConfigError, match="its data is the run's own"):
        trials_of(Source(path=own), METHODS[1], Tuning(trials=2, proxy=scored), 8.0, Path("d"))


def test_the_best_is_chosen_by_the_metrics_own_direction_and_a_diverged_run_never(source, proxy):
    trials = trials_of(source, METHODS[0], Tuning(trials=4, proxy=proxy), 3.0, Path("d"))
    scores = dict(zip([t.run_dir for t in trials], [math.nan, 0.5, 0.9, 0.9], strict=True))
    settings = [Setting.of(trial.config) for trial in trials]
    assert choose(trials, scores, high_is_good=True).best == settings[2]
    assert choose(trials, scores, high_is_good=False).best == settings[1]
