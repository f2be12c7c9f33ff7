"""Low-rank products as Triton kernels: what `torch_ops` defines, each in one pass over its largest operand.

n examples, ... token axes (any number, also none), m outputs, r inputs, P numbers an example over all sites, k sums.
Each op is a formula, a kernel and a launcher. Launchers check shapes, since a kernel would read past the end of
what is too short; lanes outside a ragged block are masked. What the kernels are not made for, float64 and r beyond
LARGEST_RANK, goes to `torch_ops`. Blocks follow from shapes alone and nothing is added atomically, so equal numbers
give equal bits. Tensors lie on a CUDA device, or on any under Triton's interpreter (TRITON_INTERPRET=1 before Triton
is imported).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from fedlora.errors import ShapeError
from fedlora.kernels import torch_ops

INTERPRETED = knobs.runtime.interpret
LARGEST_RANK = 64  # of these kernels: a whole row of r numbers lies in each tile
OPERANDS = (torch.float32, torch.bfloat16, torch.float16)  # of products; sums and norms are of float32 rows
NORM_SIZES = {"SPAN": 8192, "WIDTH": 1024}  # numbers that one program, and one pass of it, squares
OF_H = {"narrow": 4096, "single": 512}  # numbers of h in a tile: see tile_sizes
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
    out, dy, h, tokens, m, blocks, out_example, out_row, out_rank, dy_example, dy_token, h_example, h_token,
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
    # Turned, as most parts of out lie: addressed the other way round, some registers spill.
    out_tile = tl.trans(tile(out + example * out_example, ranks, out_rank, rows.to(tl.int64) * out_row))
    tl.store(out_tile, total, mask=(rows[:, None] < m) & (ranks[None, :] < R))


def per_example_gradient_into(out: Tensor, dy: Tensor, h: Tensor) -> None:
    """`out` holds each example's gradient with respect to the weight of y = h @ weight.T; see `torch_ops`.

    Args:
        out: (n, m, r), a view with any strides; float32, or torch_ops computes.
        dy: gradient at the output (n, ..., m), float32, bfloat16 or float16, or torch_ops computes.
        h: input (n, ..., r), the same leading shape; any of these types; r up to LARGEST_RANK, or torch_ops computes.

    Raises:
        ShapeError: the shapes do not fit.
    """
    fits = dy.ndim > 1 and dy.shape[:-1] == h.shape[:-1] and out.shape == (len(dy), dy.shape[-1], h.shape[-1])
    typed = out.dtype == torch.float32 and dy.dtype in OPERANDS and h.dtype in OPERANDS
    if not (fits and typed and h.shape[-1] <= LARGEST_RANK):
        torch_ops.per_example_gradient_into(out, dy, h)  # which refuses what does not fit
        return
    (n, m, r), tokens = out.shape, dy.shape[1:-1].numel()
    dy, h = _rows(dy, n, tokens), _rows(h, n, tokens)
    # The interpreter multiplies bfloat16 as if it were integers (triton issue 11584); float32 holds each product.
    widen = INTERPRETED or dy.dtype != h.dtype
    chosen = tile_sizes(tokens, m, r, OF_H["single" if widen or h.dtype == torch.float32 else "narrow"])
    blocks = triton.cdiv(m, chosen["ROWS"])
    arguments = (out, dy, h, tokens, m, blocks, *out.stride(), *dy.stride()[:2], *h.stride()[:2])
    _launch(gradient_kernel, n * blocks, arguments, {**chosen, "WIDEN": widen})


# out[i] = sum of dy[i] over tokens, float32. No kernel: of all that is trained, biases are the least.


per_example_bias_gradient_into = torch_ops.per_example_bias_gradient_into


# norms[i] = square root of the sum of rows[i]^2, float64: parts of 8192 numbers, then their sum in order.


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


def norms(rows: Tensor) -> Tensor:
    """(n,) float64: the L2 norm of each row of rows (n, P); not finite where the row is not.

    Raises:
        ShapeError: rows has not two axes.
    """
    if rows.ndim != 2:
        raise ShapeError(f"rows {tuple(rows.shape)} must be (n, P)")
    if rows.dtype != torch.float32:
        return torch_ops.norms(rows)
    n, numbers = rows.shape
    blocks = triton.cdiv(numbers, NORM_SIZES["SPAN"])
    rows = _rows(rows, n, 1)[:, 0]
    parts = torch.empty((n, blocks), dtype=torch.float64, device=rows.device)
    _launch(norm_kernel, n * blocks, (parts, rows, numbers, blocks, rows.stride(0)), NORM_SIZES)
    return parts.sum(dim=1).sqrt()


# sums[j] = sum over i of shares[j, i] rows[i], float64: one program a tile of sums, examples in order.


@triton.jit
def weighted_kernel(
    sums, rows, shares, n, k, numbers, sum_blocks, rows_example, SUMS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    which = (program % sum_blocks) * SUMS + tl.arange(0, SUMS)
    places = (program // sum_blocks) * NUMBERS + tl.arange(0, NUMBERS)
    row_tile = rows + places[None, :]
    share_tile = shares + which[:, None].to(tl.int64) * n
    total = tl.zeros((SUMS, NUMBERS), tl.float64)
    # Unrolled, so that four rows are on their way at once.
    for _ in tl.range(0, n, loop_unroll_factor=4):  # pyright: ignore[reportGeneralTypeIssues]
        row = tl.load(row_tile, mask=places[None, :] < numbers, other=0.0)
        total += tl.load(share_tile, mask=which[:, None] < k, other=0.0) * row.to(tl.float64)
        row_tile += rows_example
        share_tile += 1
    inside = (which[:, None] < k) & (places[None, :] < numbers)
    tl.store(tile(sums, which, numbers, places), total, mask=inside)


def weighted_sums(rows: Tensor, shares: Tensor) -> Tensor:
    """(k, P) float64: shares @ rows, zeros where n is 0; up to 32 sums take one reading of rows.

    Args:
        rows: (n, P), without examples of share 0: what is not finite would spoil every sum.
        shares: (k, n) float64.

    Raises:
        ShapeError: n differs.
    """
    if rows.ndim != 2 or shares.ndim != 2 or shares.shape[1] != len(rows):
        raise ShapeError(
            f"rows and shares are {tuple(rows.shape)} and {tuple(shares.shape)}; they must be (n, P) and (k, n)"
        )
    if rows.dtype != torch.float32:
        return torch_ops.weighted_sums(rows, shares)
    (n, numbers), k = rows.shape, len(shares)
    rows, shares = _rows(rows, n, 1)[:, 0], shares.contiguous()
    sums = torch.empty((k, numbers), dtype=torch.float64, device=rows.device)
    chosen = weighted_sizes(k)
    blocks = triton.cdiv(k, chosen["SUMS"])
    programs = blocks * triton.cdiv(numbers, chosen["NUMBERS"])
    arguments = (sums, rows, shares, n, k, numbers, blocks, rows.stride(0))
    _launch(weighted_kernel, programs, arguments, chosen)
    return sums


def weighted_sizes(k: int) -> dict[str, int]:
    """All sums up to 32 in one tile, and as many numbers of each as leave at most 16 of float64 a thread."""
    sums = min(triton.next_power_of_2(max(k, 1)), 32)
    return {"SUMS": sums, "NUMBERS": min(2048 // sums, 1024)}


def tile_sizes(tokens: int, m: int, r: int, of_h: int) -> dict[str, int]:
    """64 tokens by 64 outputs, the least that wgmma takes, or less where an axis is shorter or h has more than of_h.

    Products off the tensor cores are unrolled: more of h spills registers.
    """
    ranks = _padded(r, LARGEST_RANK)
    return {"R": r, "TOKENS": _padded(tokens, of_h // ranks), "ROWS": _padded(m, 64), "RANKS": ranks}


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
