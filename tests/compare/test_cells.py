"""Which runs a comparison consists of: config, arm, epsilon and seed, and nothing else."""

from pathlib import Path
from typing import get_args

import pytest

from fedlora.compare.arms import METHODS, Arm
from fedlora.compare.candidates import UNCLIPPED, arms_of, chosen, control_of, parse_arm, references
from fedlora.compare.cells import Setting, Source, cells_of, longest_first, require_unchanged
from fedlora.compare.finish import shared_by
from fedlora.config import schema
from fedlora.config.data import Iid
from fedlora.config.load import config_digest, dump_config
from fedlora.errors import ConfigError


@pytest.fixture
def source(tiny_config, tmp_path) -> Source:
    path = tmp_path / "given.yaml"
    path.write_text(dump_config(tiny_config()))
    return Source(path=path, overrides=("federation.rounds=2",))


def cells(source: Source, arm: Arm, **changes):
    given = {"epsilons": [1.0, 8.0], "seeds": [7, 8], "setting": lambda _: None, "private_runs": None}
    return cells_of(source, arm, **{**given, **changes}, directory=Path("d"))


def test_every_method_of_the_schema_is_an_arm():
    methods = get_args(get_args(schema.Method)[0])
    assert {method.model_fields["name"].annotation.__args__[0] for method in methods} == {
        arm.name for arm in METHODS
    }


def test_every_arm_fits_every_kind_of_config(tiny_config, tmp_path):
    for number, changes in enumerate(
        [
            {},
            {"privacy": "none"},
            {"method": {"name": "fedsb"}, "lora__trains": "core"},
            {"federation__cohort": {"probability": 0.5}},
            {
                "task": {"kind": "causal-lm"},
                "data__label": None,
                "data__partition": {"kind": "iid", "clients": 3},
            },
        ]
    ):
        path = tmp_path / f"{number}.yaml"
        path.write_text(dump_config(tiny_config(**changes)))
        source = Source(path=path)
        known = arms_of(source.config(), ["own: lora.r=1 lora.lora_alpha=1"])
        assert set(known) >= {"fedsvd", "ffa", "fedsb", "fedavg", "fedsvd-paper", "config", "central", "own"}
        assert set(known) >= {"lora-pro", "allora", "mifa"}
        assert all(cells(source, arm) for arm in known.values())  # each loads, or this raises


def test_a_cell_is_the_config_with_its_arm_epsilon_and_seed(source):
    ffa = next(arm for arm in METHODS if arm.name == "ffa")
    found = cells(source, ffa)
    assert [(cell.epsilon, cell.seed) for cell in found] == [(1.0, 7), (1.0, 8), (8.0, 7), (8.0, 8)]
    assert [cell.run_dir.name for cell in found][:2] == ["ffa-eps1-seed7", "ffa-eps1-seed8"]
    given, cell = source.config(), found[1].config
    assert (cell.method.name, cell.seed, cell.privacy.target_epsilon) == ("ffa", 8, 1.0)
    assert cell.federation.rounds == 2 and cell.runtime.kind == "local" and cell.runtime.threads == 1
    assert cell.output == "d/ffa-eps1-seed8"
    same = {"method": given.method, "seed": given.seed, "privacy": given.privacy, "runtime": given.runtime}
    assert cell.model_copy(update={**same, "output": given.output}) == given


def test_tuning_and_its_cost_become_part_of_a_cell(source):
    setting = Setting(lr=0.25, max_grad_norm=0.5)
    (cell, *_) = cells(source, METHODS[0], setting=lambda _: setting, private_runs=7)
    assert Setting.of(cell.config) == setting
    assert cell.config.privacy.tuned_on == schema.PrivateRuns(private_runs=7)


def test_an_arm_without_privacy_has_one_cell_a_seed(source):
    bare, central = references(source.config())
    found = cells(source, bare)
    assert [(cell.epsilon, cell.seed, cell.config.privacy) for cell in found] == [
        (None, 7, "none"),
        (None, 8, "none"),
    ]
    assert {cell.config.federation.optimizer.lr for cell in found} == {
        source.config().federation.optimizer.lr * source.config().privacy.max_grad_norm / UNCLIPPED
    }
    assert bare.name == "not-private" and central.name == "central"
    assert len(cells(source, central)) == 4


def test_the_central_reference_goes_through_as_many_records(source):
    central = references(source.config())[1]
    cell = cells(source, central)[0]
    config = cell.config
    assert config.data.partition == Iid(kind="iid", clients=1) and config.federation.cohort == 1
    assert config.federation.batch_size == 2 * 16
    assert config.privacy.max_participations == config.federation.rounds == 2
    assert config.privacy.target_epsilon == 1.0
    assert cell.work == cells(source, METHODS[0])[0].work


def test_a_control_is_the_same_run_under_another_name(source):
    twin = control_of(METHODS[0], source.config())
    (first, *_), (again, *_) = cells(source, METHODS[0]), cells(source, twin)
    assert config_digest(first.config) != config_digest(again.config)
    federation = again.config.federation.model_copy(
        update={"keep_gauges": first.config.federation.keep_gauges}
    )
    same = again.config.model_copy(update={"federation": federation, "output": first.config.output})
    assert same == first.config


def test_long_runs_come_first(source):
    short = cells(source, parse_arm("short: federation.rounds=1"))
    assert [c.arm for c in longest_first([*short, *cells(source, METHODS[0])])] == ["fedsvd"] * 4 + [
        "short"
    ] * 4


def test_an_own_arm_may_hold_blanks_and_is_tuned_unless_it_says_how_it_learns():
    arm = parse_arm("half: method={name: ffa, stale: {beta: 0.5}} lora.r=2")
    assert arm.overrides == ("method={name: ffa, stale: {beta: 0.5}}", "lora.r=2") and arm.tuned
    assert not parse_arm("slow: federation.optimizer.lr=0.1").tuned


@pytest.mark.parametrize("text", ["", "name", "name:", "name: r", "Na me: lora.r=2", "../up: lora.r=2"])
def test_an_own_arm_that_cannot_be_read_says_how_to_write_one(text):
    with pytest.raises(ConfigError, match="write for example --arm"):
        parse_arm(text)


def test_an_own_arm_takes_no_other_arms_name(source):
    with pytest.raises(ConfigError, match="'ffa' already"):
        arms_of(source.config(), ["ffa: lora.r=2"])


def test_an_unknown_arm_is_told_with_the_nearest(source):
    known = arms_of(source.config(), [])
    with pytest.raises(ConfigError, match="'fedsvt' is not known; write fedsvd"):
        chosen(known, ["ffa", "fedsvt"])
    with pytest.raises(ConfigError, match="there twice; --control"):
        chosen(known, ["ffa", "ffa"])


def test_a_directory_of_another_run_or_of_cheaper_tuning_is_refused(source, tmp_path):
    here = {"epsilons": [1.0], "seeds": [7], "setting": lambda _: None, "directory": tmp_path}
    (cell,) = cells_of(source, METHODS[0], private_runs=None, **here)
    cell.run_dir.mkdir()
    (cell.run_dir / "config.yaml").write_text(dump_config(cell.config))
    require_unchanged([cell])
    (other,) = cells_of(source, parse_arm("fedsvd: lora.r=1"), private_runs=None, **here)
    with pytest.raises(ConfigError, match=r"lora\.r is 2 there, 1 here"):
        require_unchanged([other])
    (dearer,) = cells_of(source, METHODS[0], private_runs=7, **here)
    with pytest.raises(ConfigError, match="undeclared, now it is 7 private runs"):
        require_unchanged([dearer])


def test_cells_share_what_frozen_layers_make_of_records_unless_that_is_switched_off(source):
    arms = arms_of(source.config(), ["deep: model.gradient_checkpointing=true lora.r=1"])
    of_two = [*cells(source, arms["ffa"]), *cells(source, arms["fedsvd"])]
    shared = shared_by(of_two, Path("d"))
    assert shared is not None and shared.directory == Path("d").absolute() / ".states"
    # 8 cells of 2 rounds, 2 steps, 2 clients and 16 records a step
    assert shared.draws == 8 * 2 * 2 * 2 * 16
    off = Source(path=source.path, overrides=(*source.overrides, "runtime.cache_prefix=false"))
    assert shared_by(cells(off, arms["ffa"]), Path("d")) is None
    assert shared_by([*of_two, *cells(source, arms["deep"])], Path("d")) is None


def test_methods_as_published_draw_their_clients_afresh_and_calibrate_for_it(tiny_config, tmp_path):
    for reshuffle, most in ((True, 6), (False, 3)):
        path = tmp_path / f"{reshuffle}.yaml"
        changes = {
            "data__partition": {"kind": "iid", "clients": 8},
            "federation__rounds": 6,
            "federation__cohort": 4,
            "federation__reshuffle": reshuffle,
            "privacy__max_participations": 3,
        }
        path.write_text(dump_config(tiny_config(**changes)))
        source = Source(path=path)
        known = arms_of(source.config(), [])
        for name in ("fedsvd-paper", "ffa-paper", "ffa-head"):
            (cell, *_) = cells(source, known[name])
            assert not cell.config.federation.reshuffle
            # 6 rounds by half: 3 and two standard deviations of 1.22
            assert cell.config.privacy.max_participations == most
        (cell, *_) = cells(source, known["periodic"])
        assert cell.config.method.restart_every == 1 and cell.config.federation.reshuffle is reshuffle
