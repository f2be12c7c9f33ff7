"""Low-rank products as Triton kernels: what `torch_ops` defines, each in one pass over its largest operand.

n examples, ... token axes (any number, also none), m outputs, r inputs, P numbers an example over all sites, k sums.
Each op is a formula, a kernel and a launcher. Launchers check shapes, since a kernel would read past the end of
what is too short; lanes outside a ragged block are masked. Blocks follow from shapes alone and nothing is added
atomically, so equal numbers give equal bits. Tensors lie on a CUDA device, or on any under Triton's interpreter
(TRITON_INTERPRET=1 before Triton is imported).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from fedlora.errors import ShapeError

INTERPRETED = knobs.runtime.interpret
LARGEST_RANK = 64  # of these kernels: a whole row of r numbers lies in each tile
RANK_BOUND = f"with r up to {LARGEST_RANK}: kernels in plain torch take any"
NORM_SIZES = {"SPAN": 8192, "WIDTH": 1024}  # numbers that one program, and one pass of it, squares
OF_H = {"narrow": 4096, "single": 512, "product": 1024}  # numbers of h in a tile: see tile_sizes
LAUNCH = {
    "num_warps": 4,
    "enable_fp_fusion": True,
}  # what one wgmma takes; stated, as versions differ in its default


@triton.jit
def tile(first, rows, row_stride, columns):
    """Addresses (rows, columns), in 64 bits: an offset within one example can pass 2^31."""
    return first + rows[:, None].to(tl.int64) * row_stride + columns[None, :]


# out[i] = dy[i]^T h[i], float32. One program an example and block of outputs; tokens in order.


@triton.jit
def gradient_kernel(
    out, dy, h, tokens, m, blocks, out_example, dy_example, dy_token, h_example, h_token,
    R: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    example = (program // blocks).to(tl.int64)
    rows = (program % blocks) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANKS)
    times = tl.arange(0, TOKENS)
    dy_tile = tile(dy + example * dy_example, times, dy_token, rows)
    h_tile = tile(h + example * h_example, times, h_token, ranks)
    step = tl.full((), TOKENS, tl.int64)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for first in range(0, tokens, TOKENS):
        inside = times[:, None] < tokens - first
        dy_part = tl.load(dy_tile, mask=inside & (rows[None, :] < m), other=0.0)
        h_part = tl.load(h_tile, mask=inside & (ranks[None, :] < R), other=0.0)
        if WIDEN:
            dy_part, h_part = dy_part.to(tl.float32), h_part.to(tl.float32)
        # "ieee": the default would round float32 to ten bits, and norms are taken of what is stored here.
        total = tl.dot(tl.trans(dy_part), h_part, total, input_precision="ieee")
        dy_tile += step * dy_token
        h_tile += step * h_token
    out_tile = tile(out + example * out_example, rows, R, ranks)
    tl.store(out_tile, total, mask=(rows[:, None] < m) & (ranks[None, :] < R))


def per_example_gradient_into(out: Tensor, dy: Tensor, h: Tensor) -> None:
    """Write into out each example's gradient with respect to the weight of y = h @ weight.T.

    Args:
        out: (n, m, r) float32, contiguous within each example.
        dy: gradient at the output (n, ..., m), float32, bfloat16 or float16.
        h: input (n, ..., r), the same leading shape; any of these types.

    Raises:
        ShapeError: shapes do not fit, or r is beyond LARGEST_RANK.
    """
    n, tokens, m = _examples(dy)
    r = h.shape[-1]
    if dy.shape[:-1] != h.shape[:-1] or out.shape != (n, m, r) or r > LARGEST_RANK:
        shapes = [tuple(x.shape) for x in (out, dy, h)]
        raise ShapeError(f"out, dy, h are {shapes}, not (n, m, r), (n, ..., m), (n, ..., r) {RANK_BOUND}")
    assert out[:1].is_contiguous(), "nothing is written to a copy"
    dy, h = _rows(dy, n, tokens), _rows(h, n, tokens)
    # The interpreter multiplies bfloat16 as if it were integers (triton issue 11584); float32 holds each product.
    widen = INTERPRETED or dy.dtype != h.dtype
    chosen = tile_sizes(tokens, m, r, OF_H["single" if widen or h.dtype == torch.float32 else "narrow"])
    blocks = triton.cdiv(m, chosen["ROWS"])
    arguments = (out, dy, h, tokens, m, blocks, out.stride(0), *dy.stride()[:2], *h.stride()[:2])
    _launch(gradient_kernel, n * blocks, arguments, {**chosen, "WIDEN": widen})


# out[i] = sum of dy[i] over tokens, float32. No kernel: torch's own sum reads dy once and widens on the way.


def per_example_bias_gradient_into(out: Tensor, dy: Tensor) -> None:
    """Write each example's sum of dy (n, ..., m) over tokens into out (n, m) float32; ShapeError if n or m differ."""
    n, tokens, m = _examples(dy)
    if out.shape != (n, m):
        raise ShapeError(f"out {tuple(out.shape)} must be (n, m) of dy {tuple(dy.shape)}")
    torch.sum(dy.reshape(n, tokens, m), dim=1, dtype=torch.float32, out=out)


# norms[i] = sum of rows[i]^2, float64: parts of 8192 numbers, then their sum in order.


@triton.jit
def norm_kernel(parts, rows, numbers, blocks, rows_example, SPAN: tl.constexpr, WIDTH: tl.constexpr):
    program = tl.program_id(0)
    example = (program // blocks).to(tl.int64)
    first = (program % blocks) * SPAN
    last = min(first + SPAN, numbers)
    total = tl.zeros((WIDTH,), tl.float64)
    for start in range(first, last, WIDTH):
        places = start + tl.arange(0, WIDTH)
        addresses = rows + example * rows_example + places
        # Widened before squaring: in float32, squares below 1e-38 vanish and those beyond 3e38 are infinite.
        values = tl.load(addresses, mask=places < last, other=0.0).to(tl.float64)
        total += values * values
    tl.store(parts + program, tl.sum(total, axis=0))


def squared_norms(rows: Tensor) -> Tensor:
    """(n,) float64: the sum of squares of each row of (n, P) float32; not finite where the row is not.

    Raises:
        ShapeError: rows has not two axes.
    """
    if rows.ndim != 2:
        raise ShapeError(f"rows {tuple(rows.shape)} must be (n, P)")
    n, numbers = rows.shape
    blocks = triton.cdiv(numbers, NORM_SIZES["SPAN"])
    rows = _rows(rows, n, 1)[:, 0]
    parts = torch.empty((n, blocks), dtype=torch.float64, device=rows.device)
    _launch(norm_kernel, n * blocks, (parts, rows, numbers, blocks, rows.stride(0)), NORM_SIZES)
    return parts.sum(dim=1)


# sums[j] += sum over i of shares[j, i] rows[i], float64: one program a tile of sums, examples in order.


@triton.jit
def weighted_kernel(
    sums, rows, shares, n, k, numbers, sum_blocks,
    sums_sum, rows_example, shares_sum, SUMS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    which = (program % sum_blocks) * SUMS + tl.arange(0, SUMS)
    places = (program // sum_blocks) * NUMBERS + tl.arange(0, NUMBERS)
    row_tile = rows + places[None, :]
    share_tile = shares + which[:, None].to(tl.int64) * shares_sum
    total = tl.zeros((SUMS, NUMBERS), tl.float64)
    # Unrolled, so that four rows are on their way at once.
    for _ in tl.range(0, n, loop_unroll_factor=4):  # pyright: ignore[reportGeneralTypeIssues]
        row = tl.load(row_tile, mask=places[None, :] < numbers, other=0.0)
        total += tl.load(share_tile, mask=which[:, None] < k, other=0.0) * row.to(tl.float64)
        row_tile += rows_example
        share_tile += 1
    sums_tile = tile(sums, which, sums_sum, places)
    inside = (which[:, None] < k) & (places[None, :] < numbers)
    tl.store(sums_tile, tl.load(sums_tile, mask=inside, other=0.0) + total, mask=inside)


def add_weighted(sums: Tensor, rows: Tensor, shares: Tensor) -> None:
    """Add shares @ rows to sums in place, in float64; up to 32 sums take one reading of rows.

    Args:
        sums: (k, P) float64.
        rows: (n, P) float32, without examples of share 0: what is not finite would spoil every sum.
        shares: (k, n) float64.

    Raises:
        ShapeError: k, n or P differ.
    """
    fits = sums.ndim == rows.ndim == 2 and shares.shape == (len(sums), len(rows))
    if not fits or sums.shape[1] != rows.shape[1]:
        shapes = [tuple(x.shape) for x in (sums, rows, shares)]
        raise ShapeError(f"sums, rows and shares are {shapes}; they must be (k, P), (n, P) and (k, n)")
    (k, numbers), n = sums.shape, len(rows)
    rows, shares = _rows(rows, n, 1)[:, 0], shares.contiguous()
    assert sums[:1].is_contiguous(), "nothing is added to a copy"
    chosen = weighted_sizes(k)
    blocks = triton.cdiv(k, chosen["SUMS"])
    programs = blocks * triton.cdiv(numbers, chosen["NUMBERS"]) if n else 0
    arguments = (sums, rows, shares, n, k, numbers, blocks, sums.stride(0), rows.stride(0), n)
    _launch(weighted_kernel, programs, arguments, chosen)


def weighted_sizes(k: int) -> dict[str, int]:
    """All sums up to 32 in one tile, and as many numbers of each as leave at most 16 of float64 a thread."""
    sums = min(triton.next_power_of_2(max(k, 1)), 32)
    return {"SUMS": sums, "NUMBERS": min(2048 // sums, 1024)}


# y[i] += h[i] @ weight[owner of i].T + bias[owner of i], summed in float32: one program a tile of y.


@triton.jit
def product_kernel(
    y, h, weight, bias, owners, tokens, m, clients, token_blocks, row_blocks,
    y_example, y_token, h_example, h_token,
    R: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    example = (program // (row_blocks * token_blocks)).to(tl.int64)
    times = (program // row_blocks % token_blocks) * TOKENS + tl.arange(0, TOKENS)
    rows = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANKS)
    client = tl.load(owners + example) if owners is not None else example * 0
    known = (client >= 0) & (client < clients)
    readable = tl.where(known, m, 0)
    h_tile = tile(h + example * h_example, times, h_token, ranks)
    h_part = tl.load(h_tile, mask=(times[:, None] < tokens) & (ranks[None, :] < R), other=0.0).to(tl.float32)
    weight_tile = tile(weight + client * m * R, rows, R, ranks)
    weight_part = tl.load(weight_tile, mask=(rows[:, None] < readable) & (ranks[None, :] < R), other=0.0)
    added = tl.dot(h_part, tl.trans(weight_part), input_precision=PRECISION)
    if bias is not None:
        added += tl.load(bias + client * m + rows, mask=rows < readable, other=0.0)[None, :]
    # An owner that is not there is read nowhere, and does not go unseen.
    added = tl.where(known, added, float("nan"))
    y_tile = tile(y + example * y_example, times, y_token, rows)
    inside = (times[:, None] < tokens) & (rows[None, :] < m)
    tl.store(y_tile, tl.load(y_tile, mask=inside, other=0.0).to(tl.float32) + added, mask=inside)


def add_product(
    y: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None = None, owners: Tensor | None = None
) -> None:
    """Add h @ weight.T, and bias, to y in place, summed in float32 and rounded once to the type of y.

    Args:
        y: (n, ..., m), float32, bfloat16 or float16.
        h: (n, ..., r), any of these types.
        weight: (m, r) float32; with owners (clients, m, r).
        bias: (m,) float32; with owners (clients, m).
        owners: (n,) int64, the client of each example. One that is none of the clients makes its example NaN.

    Raises:
        ShapeError: shapes do not fit, or r is beyond LARGEST_RANK.
    """
    n, tokens, m = _examples(y)
    r, lead = h.shape[-1], () if owners is None else weight.shape[:1]
    fits = h.shape[:-1] == y.shape[:-1] and weight.shape == (*lead, m, r) and r <= LARGEST_RANK
    fits = fits and (bias is None or bias.shape == (*lead, m)) and (owners is None or owners.shape == (n,))
    if not fits:
        shapes = [None if x is None else tuple(x.shape) for x in (y, h, weight, bias, owners)]
        raise ShapeError(
            f"y, h, weight, bias and owners are {shapes}; they must be (n, ..., m), (n, ..., r), (m, r), (m,) and "
            f"None, or (n, ..., m), (n, ..., r), (clients, m, r), (clients, m) and (n,) {RANK_BOUND}"
        )
    if owners is None and y.is_contiguous() and h.is_contiguous():
        n, tokens = 1, n * tokens  # all have one weight, and short examples would leave tiles half empty
    flat, rows, weight = _rows(y, n, tokens), _rows(h, n, tokens), weight.contiguous()
    bias, owners = (None if x is None else x.contiguous() for x in (bias, owners))
    # Three products of ten bits hold a narrow h exactly and 22 bits of the weight, and keep to the tensor cores.
    precision = "ieee" if h.dtype == torch.float32 else "tf32x3"
    chosen = tile_sizes(tokens, m, r, OF_H["product"])
    blocks = triton.cdiv(tokens, chosen["TOKENS"]), triton.cdiv(m, chosen["ROWS"])
    sizes = (tokens, m, *(lead or (1,)), *blocks)
    arguments = (flat, rows, weight, bias, owners, *sizes, *flat.stride()[:2], *rows.stride()[:2])
    _launch(product_kernel, n * blocks[0] * blocks[1], arguments, {**chosen, "PRECISION": precision})
    if flat.data_ptr() != y.data_ptr():  # axes that could not be merged
        y.copy_(flat.view(y.shape))
    torch.autograd.graph.increment_version(y)  # as torch does after its own in-place operations


def tile_sizes(tokens: int, m: int, r: int, of_h: int) -> dict[str, int]:
    """64 tokens by 64 outputs, the least that wgmma takes, or less where an axis is shorter or h has more than of_h.

    Products off the tensor cores are unrolled, and three for one are thrice as many: more of h spills registers.
    """
    ranks = _padded(r, LARGEST_RANK)
    return {"R": r, "TOKENS": _padded(tokens, of_h // ranks), "ROWS": _padded(m, 64), "RANKS": ranks}


def _examples(x: Tensor) -> tuple[int, int, int]:
    if x.ndim < 2:
        raise ShapeError(f"{tuple(x.shape)} needs an axis of examples and one of outputs")
    return len(x), x.shape[1:-1].numel(), x.shape[-1]


def _rows(x: Tensor, n: int, tokens: int) -> Tensor:
    """x as (n, tokens, last) with neighbours side by side in the last axis: a view where x allows."""
    flat = x.reshape(n, tokens, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _padded(size: int, at_most: int) -> int:
    """The next power of two, and at least 16: the least that a matrix product in Triton takes."""
    return max(16, min(triton.next_power_of_2(max(size, 1)), at_most, 64))


def _launch(kernel: Any, programs: int, arguments: tuple[Any, ...], blocks: dict[str, Any]) -> None:
    assert INTERPRETED or arguments[0].is_cuda, "whoever chooses kernels asks for the device first"
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **blocks, **LAUNCH)
