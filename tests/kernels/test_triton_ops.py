"""The Triton kernels equal float64 sums: in Triton's interpreter, or on a GPU when there is one (tests/conftest.py)."""

import math
import os
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fedlora.errors import ShapeError
from fedlora.kernels import torch_ops
from fedlora.kernels.triton_ops import (
    LARGEST_RANK,
    norms,
    per_example_bias_gradient_into,
    per_example_gradient_into,
    weighted_sums,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def among_nans(x: Tensor) -> Tensor:
    """x as a view that nothing may be read beside."""
    room = torch.full([size + 2 for size in x.shape], math.nan, dtype=x.dtype, device=x.device)
    view = room[tuple(slice(1, 1 + size) for size in x.shape)]
    view.copy_(x)
    return view


def over_nans(call: Callable[[], Tensor]) -> Tensor:
    """What the call returns, where whatever it makes empty holds nan at first."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return call()
    finally:
        torch.use_deterministic_algorithms(False)


def assert_within(got: Tensor, wanted: Tensor, allowed: Tensor) -> None:
    over = (got.double() - wanted).abs() - allowed
    assert not over.isnan().any() and not (over > 0).any(), f"off by {over.max()} more than allowed"


def check_gradient(
    n: int, tokens: tuple[int, ...], m: int, r: int, types: tuple[torch.dtype, ...], seed: int
):
    dy, h = (
        drawn(n, *tokens, m, seed=seed, dtype=types[0]),
        drawn(n, *tokens, r, seed=seed + 1, dtype=types[1]),
    )
    if n and tokens:
        dy[0, tokens[0] // 2 :] = 0  # padded tokens
    room = torch.full((2, n, m * r + 2), 7.0, device=DEVICE)
    weight, turned = (part[:, 1:-1] for part in room)
    weight, turned = weight.unflatten(1, (m, r)), turned.unflatten(1, (r, m)).transpose(1, 2)
    for place in (weight, turned):
        per_example_gradient_into(place, among_nans(dy), among_nans(h))
    # A float32 sum of T exact products, in any order, is off by at most T units of the sum of their sizes;
    # tensor cores cut off where float32 rounds, hence 2^-23 and not 2^-24.
    count = math.prod(tokens)
    flat_dy, flat_h, unit = (
        dy.double().view(n, count, m),
        h.double().view(n, count, r),
        (count + 4) * 2.0**-23,
    )
    sizes = torch.einsum("ntm,ntr->nmr", flat_dy.abs(), flat_h.abs())
    for got in (weight, turned):
        assert_within(got, torch.einsum("ntm,ntr->nmr", flat_dy, flat_h), unit * sizes)
    assert room[..., [0, -1]].eq(7.0).all()


def check_norms(n: int, numbers: int, seed: int) -> None:
    rows = drawn(n, numbers, seed=seed)
    wanted = rows.double().square().sum(1).sqrt()
    got = over_nans(lambda: norms(among_nans(rows)))
    assert got.dtype == torch.float64
    assert_within(got, wanted, 2 * (numbers + 2) * 2.0**-53 * wanted)


def check_weighted(k: int, n: int, numbers: int, seed: int) -> None:
    rows, shares = drawn(n, numbers, seed=seed), drawn(k, n, seed=seed + 1).double()
    wanted = torch.einsum("kn,np->kp", shares, rows.double())
    sizes = torch.einsum("kn,np->kp", shares.abs(), rows.double().abs())
    got = over_nans(lambda: weighted_sums(among_nans(rows), among_nans(shares)))
    assert got.dtype == torch.float64
    assert_within(got, wanted, 2 * (n + 2) * 2.0**-53 * sizes)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("m", "r"), [(1, 1), (67, 4), (64, 8), (130, 16), (33, 64), (5, 3)])
@pytest.mark.parametrize(("n", "tokens"), [(0, (3,)), (1, ()), (1, (65,)), (3, (2, 7)), (2, (0,))], ids=str)
def test_gradients_equal_the_oracle_for_odd_shapes(n, tokens, m, r, dtype):
    check_gradient(n, tokens, m, r, (dtype, dtype), seed=1)


@pytest.mark.parametrize("of_h", TYPES, ids=str)
@pytest.mark.parametrize("of_dy", TYPES, ids=str)
def test_types_may_differ(of_dy, of_h):
    check_gradient(2, (70,), 70, 8, (of_dy, of_h), seed=5)


@pytest.mark.parametrize("of_rest", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("r", [8, LARGEST_RANK + 1])
def test_what_the_kernels_are_not_made_for_is_what_plain_torch_gives(r, of_rest):
    dy, h = drawn(2, 9, 5, seed=2, dtype=of_rest), drawn(2, 9, r, seed=3, dtype=of_rest)
    for dtype in (torch.float32, torch.float64):
        got, wanted = (torch.empty(2, 5, r, dtype=dtype, device=DEVICE) for _ in range(2))
        per_example_gradient_into(got, dy, h)
        torch_ops.per_example_gradient_into(wanted, dy, h)
        if r > LARGEST_RANK or torch.float64 in (dtype, of_rest):
            assert torch.equal(got, wanted)
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_rows_of_float64_keep_their_digits():
    rows, shares = drawn(3, 500, seed=4, dtype=torch.float64), drawn(2, 3, seed=5).double()
    rows = rows + 1e-12
    assert torch.equal(norms(rows), torch_ops.norms(rows))
    assert torch.equal(weighted_sums(rows, shares), torch_ops.weighted_sums(rows, shares))


def test_bias_gradients_have_one_definition():
    assert per_example_bias_gradient_into is torch_ops.per_example_bias_gradient_into


@pytest.mark.parametrize("numbers", [0, 1, 1023, 1024, 8192, 8193, 20_001])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_norms_and_weighted_sums_equal_the_oracle_for_odd_lengths(n, numbers):
    check_norms(n, numbers, seed=7)
    for k in (0, 1, 3, 33):
        check_weighted(k, n, numbers if k < 2 else min(numbers, 1100), seed=8)


def check_drawn_case(seed: int) -> None:
    draw = random.Random(seed)
    n, m, r = draw.choice([0, 1, 2, 3]), draw.randint(1, 70), draw.randint(1, draw.choice([4, 16, 64]))
    tokens = tuple(draw.randint(0 if draw.random() < 0.1 else 1, 9) for _ in range(draw.randint(0, 2)))
    types = (draw.choice(TYPES), draw.choice(TYPES))
    kinds: tuple[Callable[[], object], ...] = (
        lambda: check_gradient(n, tokens, m, r, types, seed),
        lambda: check_norms(n, draw.randint(0, 3000), seed),
        lambda: check_weighted(draw.randint(1, 5), draw.randint(0, 9), draw.randint(0, 3000), seed),
    )
    draw.choice(kinds)()


def test_hundreds_of_drawn_cases_equal_the_oracle():
    for seed in range(300):
        check_drawn_case(seed)


@pytest.mark.slow  # ten thousand cases in the interpreter; each is the same in every run
def test_thousands_of_drawn_cases_equal_the_oracle():
    count = int(os.environ.get("FEDLORA_KERNEL_CASES", "1000" if DEVICE == "cuda" else "10000"))
    for seed in range(1000, 1000 + count):
        check_drawn_case(seed)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_norms_are_not_under_reported_where_gradients_cancel(dtype):
    half = drawn(4, 256, 128, seed=9, dtype=dtype)
    dy = torch.cat((half, -half), dim=1)[:, torch.randperm(512, generator=torch.Generator().manual_seed(1))]
    h = (1 + 0.01 * drawn(4, 512, 8, seed=10)).to(dtype)  # nearly constant, and dy sums to zero
    out = torch.empty(4, 128, 8, device=DEVICE)
    per_example_gradient_into(out, dy, h)
    true = torch.einsum("ntm,ntr->nmr", dy.double(), h.double()).flatten(1).norm(dim=1)
    assert (true < 0.1 * dy.double().abs().flatten(1).sum(1)).all()  # it does cancel
    got = norms(out.flatten(1))
    assert (got >= true * (1 - 1e-5)).all()
    # Of the very numbers that are summed.
    assert_within(got, out.double().flatten(1).norm(dim=1), 1e-12 * true)


@pytest.mark.filterwarnings("ignore:invalid value")  # of NumPy, which interprets
def test_what_is_not_finite_is_seen_in_its_own_example_only():
    dy, h = drawn(4, 20, 9, seed=11), drawn(4, 20, 3, seed=12)
    clean, spoilt = torch.empty(4, 9, 3, device=DEVICE), torch.empty(4, 9, 3, device=DEVICE)
    per_example_gradient_into(clean, dy, h)
    dy[1, 3, 8], dy[2, 19, 0] = math.nan, -math.inf
    per_example_gradient_into(spoilt, dy, h)
    assert norms(spoilt.flatten(1)).isfinite().tolist() == [True, False, False, True]
    assert torch.equal(clean[[0, 3]], spoilt[[0, 3]])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 8191, 8192, 8999])
def test_norms_of_what_is_not_finite_are_not_finite(value, place):
    rows = drawn(2, 9000, seed=13)
    rows[1, place] = value
    assert norms(rows).isfinite().tolist() == [True, False]


@pytest.mark.parametrize("scale", [3e38, 1e-30])
def test_norms_hold_where_float32_squares_do_not(scale):
    rows = torch.full((1, 100), scale, device=DEVICE)
    assert norms(rows).item() == pytest.approx(10 * scale, rel=1e-6, abs=0)


def test_the_same_numbers_give_the_same_bits_whoever_else_is_in_the_batch():
    dy, h = drawn(3, 200, 70, seed=14), drawn(3, 200, 8, seed=15)
    first, again, alone = (torch.empty(size, 70, 8, device=DEVICE) for size in (3, 3, 1))
    per_example_gradient_into(first, dy, h)
    per_example_gradient_into(again, dy, h)
    per_example_gradient_into(alone, dy[1:2], h[1:2])
    assert torch.equal(first, again) and torch.equal(first[1:2], alone)
    rows = drawn(3, 20_000, seed=16)
    assert torch.equal(norms(rows), norms(rows))
    shares = drawn(2, 3, seed=17).double()
    assert torch.equal(weighted_sums(rows, shares), weighted_sums(rows, shares))


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, device=DEVICE)


@pytest.mark.parametrize(
    "call",
    [
        lambda: per_example_gradient_into(zeros(2, 4, 3), zeros(2, 5, 4), zeros(2, 6, 3)),
        lambda: per_example_gradient_into(zeros(2, 4, 2), zeros(2, 5, 4), zeros(2, 5, 3)),
        lambda: per_example_gradient_into(zeros(2, 4, 4), zeros(2, 4), zeros(2, 5, 4)),
        lambda: per_example_gradient_into(zeros(4, 4, 4), zeros(4), zeros(4)),
        lambda: norms(zeros(2, 3, 4)),
        lambda: weighted_sums(zeros(3, 9), zeros(2, 4).double()),
        lambda: weighted_sums(zeros(3, 9), zeros(3).double()),
        lambda: weighted_sums(zeros(3), zeros(2, 3).double()),
    ],
)
def test_shapes_that_would_be_read_past_their_end_are_refused(call):
    with pytest.raises(ShapeError):
        call()
