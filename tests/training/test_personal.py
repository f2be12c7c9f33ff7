"""A client's own B between rounds: which one a round goes on from, and that nothing stands in for one that is lost."""

import os
import re
import stat

import pytest
import torch

from fedlora.errors import ConfigError, GuardError
from fedlora.training.personal import KEPT_ROUNDS, OwnB, Personal
from fedlora.values import Adapters, Factors, LocalWork, TrainRequest
from tests.damage import flipped


def b(value: float) -> dict[str, torch.Tensor]:
    return {"x": torch.full((3, 2), value), "y": torch.full((4, 2), -value)}


def kept(directory, *rounds: int, run: str = "run") -> Personal:
    """Whose B of round n is n, each gone on from the one before."""
    personal = Personal(directory / "own")
    for began, number in zip((0, *rounds), rounds, strict=False):
        personal.keep(run, OwnB(round=number, began=began, sites=b(float(number))))
    return personal


def request(number: int, run: str = "run", **shapes: int) -> TrainRequest:
    sites = {
        site: Factors(a=torch.ones(2, 5), b=torch.full((rows, 2), 9.0))
        for site, rows in ({"x": 3, "y": 4} | shapes).items()
    }
    return TrainRequest(
        run=run, base_model="", code="", round=number, adapters=Adapters(basis=0, scale=1.0, sites=sites),
        work=LocalWork(steps=1, learning_rate=1.0, side="both", own_b=True),
    )  # fmt: skip


def test_a_round_goes_on_from_the_newest_b_of_an_earlier_one_however_often_it_is_done(tmp_path):
    personal = kept(tmp_path, 2, 5)
    assert personal.own("run", 2) is None and personal.own("run", 1) is None
    for before, found in ((3, 2.0), (5, 2.0), (6, 5.0), (99, 5.0)):
        own = Personal(tmp_path / "own").own("run", before)
        assert own.round == found and torch.equal(own.sites["x"], b(found)["x"])
    personal.keep("run", OwnB(round=5, began=2, sites=b(0.5)))  # another attempt at it
    assert personal.own("run", 5).round == 2 and torch.equal(personal.own("run", 6).sites["y"], b(0.5)["y"])


def test_what_is_worked_on_has_the_clients_b_at_first_zero_and_all_else_as_it_was_sent(tmp_path):
    personal = kept(tmp_path, 2)
    for number, value, began in ((1, 0.0, 0), (2, 0.0, 0), (3, 2.0, 2)):
        start = personal.start(request(number))
        assert start.round == began
        for site, factors in start.request.adapters.sites.items():
            assert torch.equal(factors.b, b(value)[site]) and torch.equal(factors.a, torch.ones(2, 5))
    assert personal.start(request(3, run="another")).round == 0


def test_the_bytes_of_equal_bs_are_equal(tmp_path):
    files = [sorted((kept(tmp_path / name, 1, 2).directory).iterdir()) for name in ("one", "two")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_the_newest_rounds_are_kept_and_an_older_one_cannot_be_done_again(tmp_path):
    rounds = tuple(range(1, KEPT_ROUNDS + 3))
    personal = kept(tmp_path, *rounds)
    assert len([*personal.directory.iterdir()]) == KEPT_ROUNDS
    oldest = rounds[-KEPT_ROUNDS]
    assert personal.own("run", oldest + 1).round == oldest
    with pytest.raises(ConfigError, match=f"the B of round {oldest - 1} is gone"):
        personal.own("run", oldest)


def test_a_b_that_lies_between_two_others_is_missed(tmp_path):
    personal = kept(tmp_path, 1, 2, 3)
    middle, _ = sorted(personal.directory.iterdir())[1:]
    middle.unlink()
    with pytest.raises(
        ConfigError, match=r"the B of round 2 is gone, from which round 3 of run 'run' went on"
    ):
        personal.own("run", 3)


def test_one_whose_reply_was_given_must_be_there(tmp_path):
    personal = kept(tmp_path, 1, 2)
    personal.require("run", 3, 2)
    personal.require("run", 2, 1)
    personal.require("run", 1, 0)
    for run, before, answered in (("run", 4, 3), ("another", 2, 1)):
        with pytest.raises(
            ConfigError, match=f"the B of round {answered} of run '{run}', which was answered, is gone"
        ):
            personal.require(run, before, answered)


DAMAGES = {
    "a bit": flipped,
    "cut short": lambda data: data[:-4],
    "empty": lambda data: b"",
    "no such words": lambda data: data.replace(b"began", b"begun"),
    "another start": lambda data: data.replace(rb"began\": 1", rb"began\": 0"),
    "a number that is none": lambda data: data.replace(rb"began\": 1", rb"began\": x"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named_and_never_zero(tmp_path, damage):
    personal = kept(tmp_path, 1, 2)
    path = max(personal.directory.iterdir())
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))} is damaged .*; restore it"):
        personal.own("run", 3)


def test_a_file_under_the_name_of_another_round_or_run_is_damaged(tmp_path):
    personal = kept(tmp_path, 1, 2)
    first, second = sorted(personal.directory.iterdir())
    second.write_bytes(first.read_bytes())
    with pytest.raises(ConfigError, match="is damaged"):
        personal.own("run", 3)
    other = kept(tmp_path, 1, run="another")
    theirs = next(path for path in other.directory.iterdir() if path not in (first, second))
    theirs.write_bytes(first.read_bytes())
    with pytest.raises(ConfigError, match="is damaged"):
        other.own("another", 2)


def test_a_b_of_another_adapter_is_refused(tmp_path):
    personal = kept(tmp_path, 1)
    for odd in (request(2, x=7), request(2, z=3)):
        with pytest.raises(ConfigError, match="kept of round 1 is of another adapter"):
            personal.start(odd)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_b_that_is_not_finite_is_not_kept_and_the_one_before_stays(tmp_path, value):
    personal = kept(tmp_path, 1)
    with pytest.raises(GuardError, match=r"B of 'y' is not finite after round 2"):
        personal.keep("run", OwnB(round=2, began=1, sites={**b(2.0), "y": torch.tensor([[1.0, value]])}))
    assert personal.newest("run", 3) == 1 and len([*personal.directory.iterdir()]) == 1


def test_only_the_owner_may_read_it_whatever_the_umask_is(tmp_path):
    before = os.umask(0)
    try:
        personal = kept(tmp_path, 1)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in personal.directory.iterdir()] == [0o600]


@pytest.mark.parametrize("run", ["../../victim", "a/b", "", ".", "ü" * 200, "a-000001"])
def test_a_runs_name_is_no_path(tmp_path, run):
    personal = kept(tmp_path, 1, run=run)
    assert personal.own(run, 2).round == 1
    assert [*tmp_path.rglob("*.safetensors")] == [*personal.directory.iterdir()]


def test_an_early_round_that_is_asked_for_late_is_kept_and_strange_names_are_passed_over(tmp_path):
    personal = kept(tmp_path, 8, 9, 10, 5)
    (path,) = personal.directory.glob("*-000005.safetensors")
    path.with_name(path.name.replace("-000005", "-000003 (copy)")).write_bytes(path.read_bytes())
    assert personal.newest("run", 6) == 5 and personal.newest("run", 5) == 0
