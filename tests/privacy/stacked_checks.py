"""The promises of the private step of several clients at once, as functions of an implementation; see `checks`."""

import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedlora.errors import PrivacyError
from fedlora.values import Mechanism

from .models import Case, perceptron, trainable

BOUND, CLIENTS = 0.5, 3
QUIET = Mechanism(max_grad_norm=BOUND, noise_multiplier=1e-12)
OWNERS = torch.tensor([0, 2, 0, 2, 2, 0, 0])
"""Seven records, whose owners are mixed; client 1 has drawn none."""


def _case(scale: float = 1.0, seed: int = 0) -> Case:
    return perceptron(seed=seed, records=len(OWNERS), dtype=torch.float64, scale=scale)


def _weights(case: Case) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {
        name: 0.5 * torch.randn(CLIENTS, *p.shape, generator=draw, dtype=torch.float64)
        for name, p in case.trained.items()
    }


@contextmanager
def _stack(room: Any, case: Case) -> Any:
    layers = room.stackable(case.model, case.trained)
    with room.stacked(case.model, case.trained, layers, CLIENTS) as stack, torch.no_grad():
        for name, value in _weights(case).items():
            stack.trained[name].copy_(value)
        with torch.enable_grad():
            yield stack


def _release(room: Any, client: int, sigma: float | None = None, **changes: Any) -> Any:
    """Noise, divisor and purpose of its own for each client."""
    quiet = Mechanism(max_grad_norm=BOUND, noise_multiplier=sigma or 0.4 + client)
    given = {"mechanism": quiet, "expected_batch": 4.0 + client, "noise": room.SeededNoise(7)}
    return room.Release(**{**given, "purpose": ("noise", client), **changes})


def _together(
    room: Any, case: Case, of: Any = None, *, size: int = 3, releases: Any = None, owners: Any = OWNERS
) -> Any:
    drawn = torch.arange(len(OWNERS)) if of is None else of
    parts = drawn.split(size) if len(drawn) else ()
    packed = [(owners[part], lambda part=part: case.losses(part)) for part in parts]
    with _stack(room, case) as stack:
        releases = releases or [_release(room, client) for client in range(CLIENTS)]
        return room.private_gradients(room.DirectEngine(), stack, packed, releases)


def _alone(room: Any, case: Case, client: int) -> Any:
    with torch.no_grad():
        for name, value in _weights(case).items():
            case.trained[name].copy_(value[client])
    release, own = _release(room, client), torch.nonzero(client == OWNERS).flatten()
    return room.private_gradient(
        room.DirectEngine(), case.model, case.trained, case.micro_batches(of=own),
        mechanism=release.mechanism, expected_batch=release.expected_batch, noise=release.noise,
        purpose=release.purpose,
    )  # fmt: skip


def each_client_releases_what_it_would_alone(room: Any) -> None:
    """Weights, records, clip, noise, purpose and divisor of its own, to the noise's grid; an empty draw too."""
    for scale in (1.0, 30.0):  # some records clipped, all clipped
        case = _case(scale)
        together = _together(room, case)
        for client in range(CLIENTS):
            for name, value in _alone(room, case, client).items():
                grid = 2.0**-20  # rounding to it may fall either way where sums differ in their last bits
                assert float((together[name][client] - value).abs().max()) <= grid, (scale, client, name)


def a_record_moves_its_owners_sum_alone_and_by_at_most_the_bound(room: Any) -> None:
    for seed in range(12):
        case = _case(100.0 if seed % 2 else 1.0, seed)
        releases = [_release(room, client, mechanism=QUIET, expected_batch=1.0) for client in range(CLIENTS)]
        whole = _together(room, case, releases=releases)
        for gone in range(len(OWNERS)):
            rest = torch.tensor([i for i in range(len(OWNERS)) if i != gone])
            without = _together(room, case, rest, releases=releases)
            moved = torch.stack(
                [(whole[name] - without[name]).flatten(1).square().sum(1) for name in whole]
            ).sum(0)
            owner = int(OWNERS[gone])
            assert float(moved[owner].sqrt()) <= BOUND * (1 + 1e-9), (seed, gone)
            moved[owner] = 0
            assert float(moved.max().sqrt()) < 1e-12, (seed, gone)


def an_empty_draw_is_noised_as_any_other(room: Any) -> None:
    """Nobody drew anything: three rows of noise, each of its own mechanism, none like another."""
    model = nn.Sequential(nn.Linear(200, 200, bias=False), nn.Linear(200, 200, bias=False)).double()
    case = Case(model, trainable(model), 0, lambda drawn: torch.zeros(0))
    released = _together(room, case, torch.zeros(0, dtype=torch.int64))
    for name, value in released.items():
        rows = value.flatten(1)
        for client in range(CLIENTS):
            owed = BOUND * (0.4 + client) / (4.0 + client)
            assert abs(float(rows[client].std()) / owed - 1) < 0.03, (
                name,
                client,
            )  # eight deviations of 40,000
        correlation = torch.corrcoef(rows) - torch.eye(CLIENTS)
        assert float(correlation.abs().max()) < 5 / math.sqrt(rows.shape[1]), name


def a_non_finite_record_is_as_good_as_absent(room: Any) -> None:
    case, rest = _case(), torch.arange(1, len(OWNERS))
    releases = [_release(room, client, sigma=1e-12) for client in range(CLIENTS)]
    wanted = _together(room, case, rest, releases=releases, size=10)
    for poison in (math.nan, math.inf):
        factor = torch.ones(len(OWNERS), dtype=torch.float64)
        factor[0] = poison
        bad = Case(case.model, case.trained, case.records, lambda d, f=factor: case.losses(d) * f[d])
        found = _together(room, bad, releases=releases, size=10)
        for name, value in wanted.items():
            assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-12), (poison, name)


def what_would_mix_clients_is_refused(room: Any) -> None:
    case = _case()
    three = [_release(room, client) for client in range(CLIENTS)]
    other = Mechanism(max_grad_norm=2 * BOUND, noise_multiplier=1.0)
    for releases in (
        [*three[:2], _release(room, 2, purpose=("noise", 0))],
        [*three[:2], _release(room, 2, mechanism=other)],
        three[:2],
        [*three, _release(room, 3)],
    ):
        _refused(lambda releases=releases: _together(room, case, releases=releases))
    for wrong in (OWNERS - 1, OWNERS + 1):
        _refused(lambda wrong=wrong: _together(room, case, owners=wrong))
    with _stack(room, case) as stack:
        _refused(lambda: case.losses(torch.arange(2)))  # nobody said whose they are
        room.DirectEngine().clipped_sums(stack, [(OWNERS[:2], lambda: case.losses(torch.arange(2)))], 1.0)
        _refused(lambda: case.losses(torch.arange(2)))  # somebody did, of another microbatch
        for owners in (OWNERS, OWNERS[:1]):
            with stack.owned(owners):
                _refused(lambda: case.losses(torch.arange(2)))
    _refused(lambda: room.clipped_sums(room.ops, torch.ones(2, 3), torch.tensor([0]), CLIENTS, 1.0))


def what_copies_would_lack_is_refused(room: Any) -> None:
    """Hooks of a layer, and a frozen half of it."""
    case = _case()
    handle = case.model[2].register_forward_pre_hook(lambda *_: None)
    _refused(lambda: room.stackable(case.model, case.trained))
    handle.remove()
    case.model[2].bias.requires_grad_(False)
    _refused(lambda: room.stackable(case.model, trainable(case.model)))


def _refused(call: Callable[[], Any]) -> None:
    try:
        call()
    except (PrivacyError, ValueError, IndexError):
        return
    raise AssertionError("went through")


CHECKS = (
    each_client_releases_what_it_would_alone,
    a_record_moves_its_owners_sum_alone_and_by_at_most_the_bound,
    an_empty_draw_is_noised_as_any_other,
    a_non_finite_record_is_as_good_as_absent,
    what_would_mix_clients_is_refused,
    what_copies_would_lack_is_refused,
)
