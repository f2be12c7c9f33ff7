"""A round that did not do what it says stops the run, names what is wrong, and leaves the last good round as it was."""

import math
from dataclasses import replace

import pytest
import torch

from fedlora.errors import GuardError
from fedlora.federation import store as store_module
from fedlora.federation.absorb import absorb
from fedlora.federation.gather import gather
from fedlora.federation.guards import FALSE_ALARM, Guarded, noise_missing, require_sound
from fedlora.federation.loop import line_zero, rounds
from fedlora.federation.plan import plan
from fedlora.federation.remembered import Remembered
from fedlora.federation.store import Store
from fedlora.privacy.gaussian import released
from fedlora.privacy.noise import SeededNoise
from fedlora.values import ClientUpdate, Delta, DpEvent, Factors, Origin

EVENT = DpEvent(noise_multiplier=1.5, sample_rate=0.1, steps=1, expected_batch=8.0, max_draw=32)
CLIP, LR = 2.0, 0.1


def noised(state, client, round_=1, *, steps=1, part=1.0, number=0):
    """An update of nothing but the noise of so many steps, as a client makes it, times `part`."""
    zeros = {site: torch.zeros_like(f.b, dtype=torch.float64) for site, f in state.adapters.sites.items()}
    zeros |= {"weight": torch.zeros(2, 4, dtype=torch.float64)}
    sums = {name: torch.zeros_like(zero) for name, zero in zeros.items()}
    for step in range(steps):
        purpose = (client, str(number), str(step))
        drawn = released(zeros, bound=CLIP, noise_multiplier=1.5, noise=SeededNoise(3), purpose=purpose)
        sums = {name: sums[name] - part * LR / 8 * drawn[name] for name in sums}
    head = {"weight": sums.pop("weight")}
    spent = (replace(EVENT, steps=steps),)
    delta = Delta(basis=state.adapters.basis, sites=sums, head=head)
    return ClientUpdate(client=client, run="run", round=round_, delta=delta, spent=spent)


def with_part(update, name, tensor):
    delta = update.delta
    if name in delta.head:
        return replace(update, delta=replace(delta, head={**delta.head, name: tensor}))
    return replace(update, delta=replace(delta, sites={**delta.sites, name: tensor}))


class Sending:
    """A Cohort whose clients send what `make` makes of the round's state."""

    def __init__(self, make):
        self.make = make

    def ask(self, clients, request):
        for client in clients:
            yield self.make(request, client)

    def close(self):
        """Nothing is open."""


@pytest.mark.parametrize("steps", [1, 3])
def test_noise_as_it_should_be_is_never_missed(lab, steps):
    state, federation = lab.start(lab.method()), lab.federation(local_steps=steps)
    for number in range(60):
        update = noised(state, "a", steps=steps, number=number)
        assert noise_missing(update, federation, CLIP) is None


@pytest.mark.parametrize("name", ["x", "y", "weight"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_tensor_without_noise_is_named_whatever_the_optimizer(lab, name, optimizer):
    state = lab.start(lab.method())
    update = noised(state, "a")
    held = update.delta.head.get(name, update.delta.sites.get(name))
    federation = lab.federation(optimizer={"name": optimizer, "lr": LR})
    fault = noise_missing(with_part(update, name, torch.zeros_like(held)), federation, CLIP)
    assert fault is not None and repr(name) in fault


def test_noise_that_is_too_short_by_its_own_spread_is_found_in_one_tensor(lab):
    """Noise of 21 numbers is shorter than a tenth of its length with a probability far below one in 10^9."""
    state = lab.start(lab.method())
    update = noised(state, "a")
    short = with_part(update, "x", 0.05 * update.delta.sites["x"])
    assert "'x' is" in (noise_missing(short, lab.federation(), CLIP) or "")
    assert noise_missing(short, lab.federation(), CLIP, part=0.01) is None
    assert "no noise is accounted for" in (
        noise_missing(replace(update, spent=()), lab.federation(), CLIP) or ""
    )


def test_a_false_alarm_is_as_rare_as_it_says(lab, monkeypatch):
    """With the probability raised to 0.3, shared by three tensors, 400 updates give about 0.27 of alarms."""
    monkeypatch.setattr("fedlora.federation.guards.FALSE_ALARM", 0.3)
    state, federation = lab.start(lab.method()), lab.federation()
    alarms = sum(
        noise_missing(noised(state, "a", number=number), federation, CLIP) is not None
        for number in range(400)
    )
    assert FALSE_ALARM == 1e-9
    assert abs(alarms / 400 - (1 - 0.9**3)) < 5 * math.sqrt(0.27 * 0.73 / 400)


def test_columns_that_a_client_does_not_train_owe_no_noise(lab):
    state = lab.start(lab.method())
    update = noised(state, "a")
    for name, b in update.delta.sites.items():
        update = with_part(update, name, torch.cat([b[:, :1], torch.zeros_like(b[:, 1:])], dim=1))
    assert noise_missing(update, lab.federation(ranks={"a": 1}), CLIP) is None


@pytest.mark.parametrize("ranks", [None, {"a": 1}])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1, 1)])
def test_a_tensor_of_any_shape_is_looked_at_and_left_to_who_sifts(lab, shape, ranks):
    """What a stranger sends must not end the server."""
    update = with_part(noised(lab.start(lab.method()), "a"), "x", torch.full(shape, 1e3))
    assert noise_missing(update, lab.federation(ranks=ranks), CLIP) is None


def begun(lab, tmp_path, cohort, score=lambda adapters: {}, method=None, **federation):
    method = lab.method() if method is None else method
    state, store = lab.start(method), Store(tmp_path)
    if store.is_empty():
        store.begin(state, line_zero({}))
    state = store.recover()
    return rounds(
        state, origin=Origin(run="run", base_model="", code=""), seed=7, members=lab.members(4), method=method,
        federation=lab.federation(rounds=3, **federation), cohort=cohort, store=store, score=score,
        max_grad_norm=CLIP,
    )  # fmt: skip


def good(request, client):
    return noised(request, client, request.round)


def silent_from(round_):
    """Noise is lost from this round on."""
    return lambda request, client: noised(
        request, client, request.round, part=0.0 if request.round >= round_ else 1.0
    )


def test_a_simulation_whose_noise_gets_lost_stops_and_goes_on_once_it_is_mended(lab, tmp_path):
    federation = lab.federation()
    loop = begun(lab, tmp_path, Guarded(Sending(silent_from(2)), federation, CLIP))
    next(loop)
    with pytest.raises(
        GuardError, match=r"round 2: 'client-\d' sent an update in which 'weight' is all zero"
    ):
        next(loop)
    again = begun(lab, tmp_path, Guarded(Sending(good), federation, CLIP))
    assert [line["round"] for _, line in again] == [2, 3]


def test_without_privacy_no_noise_is_looked_for(lab, tmp_path):
    loop = begun(lab, tmp_path, Guarded(Sending(silent_from(2)), lab.federation(), None))
    next(loop)
    with pytest.raises(GuardError, match="round 2: 2 updates counted, but the model did not move at all"):
        next(loop)


def test_a_model_that_private_updates_do_not_move_stops_the_run(lab, tmp_path):
    """A mean that loses everything: the server's own rate is too small for any float."""
    loop = begun(lab, tmp_path, Sending(good), method=lab.method("ffa"), server={"name": "sgd", "lr": 5e-324})
    with pytest.raises(GuardError, match="did not move at all; the model of round 0 is kept"):
        next(loop)
    assert Store(tmp_path).load()[0].round == 0


def test_updates_that_are_all_zero_are_no_first_round_but_may_be_a_later_one_without_privacy(lab):
    method, federation = lab.method("ffa"), lab.federation(batch_size=16)
    state = lab.start(method)

    def round_of(before, part):
        planned = plan(before, lab.members(4), run="run", federation=federation, seed=7)
        replies = [replace(noised(before, c, planned.round, part=part), spent=()) for c in planned.cohort]
        heard = gather(before, planned, replies, memory=Remembered(), method=method, federation=federation)
        return heard, absorb(before, heard, method=method, federation=federation).state

    heard, after = round_of(state, 0.0)
    with pytest.raises(GuardError, match="did not move"):
        require_sound(state, heard, after, {}, federation)
    heard, moved = round_of(state, 1.0)
    require_sound(state, heard, moved, {}, federation)
    heard, rested = round_of(moved, 0.0)
    require_sound(moved, heard, rested, {}, federation)


@pytest.mark.parametrize("batch", [1, 8, 11])
def test_a_first_round_of_empty_draws_is_bad_luck_where_few_records_are_drawn(lab, batch):
    """Two clients: of 22 records expected none comes once in 3e9 rounds, of 16 once in 9e6."""
    method, federation = lab.method("ffa"), lab.federation(batch_size=batch)
    state = lab.start(method)
    planned = plan(state, lab.members(4), run="run", federation=federation, seed=7)
    replies = [replace(noised(state, client, part=0.0), spent=()) for client in planned.cohort]
    heard = gather(state, planned, replies, memory=Remembered(), method=method, federation=federation)
    after = absorb(state, heard, method=method, federation=federation).state
    if batch == 11:
        with pytest.raises(GuardError, match="did not move"):
            require_sound(state, heard, after, {}, federation)
    else:
        require_sound(state, heard, after, {}, federation)


def test_a_model_with_a_number_that_is_none_is_named_by_round_and_site(lab):
    method, federation = lab.method("ffa"), lab.federation()
    state = lab.start(method)
    planned = plan(state, lab.members(4), run="run", federation=federation, seed=7)
    heard = gather(
        state, planned, [noised(state, planned.cohort[0])],
        memory=Remembered(), method=method, federation=federation,
    )  # fmt: skip
    after = absorb(state, heard, method=method, federation=federation).state
    factors = after.adapters.sites["y"]
    broken = Factors(a=factors.a, b=torch.full_like(factors.b, math.inf))
    sites = {**after.adapters.sites, "y": broken}
    after = replace(after, adapters=replace(after.adapters, sites=sites))
    with pytest.raises(
        GuardError, match=r"round 1: 'b:y' has 15 entries that are not finite .* round 0 is kept"
    ):
        require_sound(state, heard, after, {}, federation)


@pytest.mark.parametrize("scored", [{"loss": math.nan, "score": 0.5}, {"loss": 1.0, "score": math.inf}])
def test_a_score_that_is_no_number_stops_the_run_before_it_is_written(lab, tmp_path, scored):
    with pytest.raises(GuardError, match="round 0: the"):
        line_zero(scored)
    loop = begun(lab, tmp_path, Sending(good), score=lambda adapters: scored)
    with pytest.raises(GuardError, match=r"round 1: the (loss|score) on the test data is (nan|inf)"):
        next(loop)
    assert Store(tmp_path).load()[0].round == 0


def test_a_checkpoint_that_is_not_what_was_saved_is_not_used(lab, tmp_path, monkeypatch):
    loop = begun(lab, tmp_path, Sending(good))
    next(loop)
    write = store_module.save_file

    def tired(tensors, path):
        write({name: tensor + 1e-7 if name == "b:x" else tensor for name, tensor in tensors.items()}, path)

    monkeypatch.setattr(store_module, "save_file", tired)
    with pytest.raises(GuardError, match="does not give back what was saved"):
        next(loop)
    monkeypatch.undo()
    assert Store(tmp_path).load()[0].round == 1
    assert [line["round"] for _, line in begun(lab, tmp_path, Sending(good))] == [2, 3]
