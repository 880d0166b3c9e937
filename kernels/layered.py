"""A ConvFirst block in three launches: convolution, expansion with its activation, projection with its residual.

This is for few pixels of many channels, where the programs of a fused block each convolve all channels for themselves
and wait for one another's partial sums. What passes between the launches goes through memory, and stays in the
second-level cache.

    y   = conv(x) + conv_bias                      [P, C]
    h   = act(y @ expand^T + expand_bias)          [P, E]
    out = h @ project + project_bias (+ x)         [P, C']

Legend and weights are those of `convfirst`.
"""

from __future__ import annotations

from math import ceil

import triton
import triton.language as tl
from torch import Tensor

from kernels.device_functions import activate, add_pooled, convolve_tile, dot, place, round_to
from kernels.packing import BlockWeights
from kernels.problem import DENSE_MULTIPLE, WIDE_ELEMENTS, BlockProblem, ProductTiling, Tiling, product_tilings


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width", "taps"])
def conv_kernel(
    x, conv, conv_bias, out,
    pixels, height, width, out_height, out_width, taps,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    FORM: tl.constexpr, CONV_BLOCK: tl.constexpr, DENSE_ROWS: tl.constexpr, CONV_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Compute a tile of BLOCK_M output pixels (axis 0), and WIDTH of its channels (axis 1)."""
    first = tl.program_id(1) * WIDTH
    row, valid, pixel, top, left, inside = place(
        tl.program_id(0), pixels, height, width, out_height, out_width, KERNEL, STRIDE, FORM, BLOCK_M, ROWS, WIDE
    )
    y = convolve_tile(
        x, conv, conv_bias, pixel, top, left, inside, height, width, taps, first, WIDTH, CHANNELS, PADDED,
        KERNEL, STRIDE, FORM, CONV_BLOCK, DENSE_ROWS, BLOCK_M, ROWS, CONV_STAGES, x.dtype.element_ty, WARPS,
    )  # fmt: skip
    columns = first + tl.arange(0, WIDTH)
    mask = valid[:, None] & (columns < CHANNELS)[None, :]
    tl.store(out + row[:, None] * CHANNELS + columns[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["rows", "height", "width", "out_height", "out_width"])
def product_kernel(
    a, matrix, bias, shortcut, out, rows, height, width, out_height, out_width,
    IN: tl.constexpr, OUT: tl.constexpr, PADDED: tl.constexpr, BY_OUTPUT: tl.constexpr, ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr, CHANNELS: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute act(a @ matrix + bias), plus the shortcut if RESIDUAL, without activation: BLOCK_M rows, BLOCK_N outputs.

    Neighbouring programs share rows.

    Args:
        a: input, (rows, IN).
        matrix: weights as rows of PADDED elements, one row for each output if BY_OUTPUT, else one for each input.
        shortcut: the block's input, of CHANNELS channels; a row stands for the pixels of a stride, at edges for fewer.
        out: tensor (rows, OUT).
    """
    ACROSS: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    row = tl.program_id(0) // ACROSS * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % ACROSS * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = row < rows
    if WIDE:
        row = row.to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if RESIDUAL and STRIDE > 1:
        tl.static_assert(ACTIVATION == "none", "the shortcut would be activated, too")
        total = add_pooled(total, shortcut, row, valid, columns, height, width, out_height, out_width, CHANNELS, STRIDE)
    for first in tl.range(0, IN, BLOCK_K, num_stages=STAGES):
        inner = first + tl.arange(0, BLOCK_K)
        tile = tl.load(a + row[:, None] * IN + inner[None, :], mask=valid[:, None] & (inner < IN)[None, :], other=0.0)
        if BY_OUTPUT:
            mask = (columns < OUT)[:, None] & (inner < IN)[None, :]
            weights = tl.trans(tl.load(matrix + columns[:, None] * PADDED + inner[None, :], mask=mask, other=0.0))
        else:
            mask = (inner < IN)[:, None] & (columns < OUT)[None, :]
            weights = tl.load(matrix + inner[:, None] * PADDED + columns[None, :], mask=mask, other=0.0)
        total = dot(tile, weights, total)
    total += tl.load(bias + columns, mask=columns < OUT, other=0.0)[None, :]
    total = activate(total, ACTIVATION, a.dtype.element_ty == tl.float32)
    offset = row[:, None] * OUT + columns[None, :]
    mask = valid[:, None] & (columns < OUT)[None, :]
    if RESIDUAL and STRIDE == 1:
        there = mask & (columns < CHANNELS)[None, :]
        total += tl.load(shortcut + row[:, None] * CHANNELS + columns[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(out + offset, round_to(total, out.dtype.element_ty), mask=mask)


def conv_constants(problem: BlockProblem, tiling: Tiling) -> dict[str, object]:
    """The compile-time arguments of the convolution's kernel."""
    pixels = max(problem.batch * problem.height * problem.width, problem.out_pixels)
    return {
        "CHANNELS": problem.in_channels, "PADDED": problem.padded_in, "KERNEL": problem.kernel_size,
        "STRIDE": problem.stride, "FORM": tiling.conv,
        "CONV_BLOCK": tiling.dense_block if problem.is_dense else problem.conv_block,
        "DENSE_ROWS": ceil(problem.in_channels / DENSE_MULTIPLE) * DENSE_MULTIPLE, "CONV_STAGES": tiling.conv_stages,
        "BLOCK_M": tiling.block_m, "WIDTH": tiling.part, "ROWS": tiling.rows,
        "WIDE": pixels * problem.in_channels >= WIDE_ELEMENTS, "WARPS": tiling.num_warps,
    }  # fmt: skip


def product_constants(problem: BlockProblem) -> list[tuple[dict[str, object], ProductTiling]]:
    """The compile-time arguments of expansion and projection, each with its tiling."""
    shapes = (
        (problem.in_channels, problem.hidden_channels, problem.padded_in, True, problem.activation, False),
        (problem.hidden_channels, problem.out_channels, problem.padded_out, False, "none", problem.residual),
    )
    products = []
    in_elements = problem.batch * problem.height * problem.width * problem.in_channels
    for (into, out, padded, by_output, act, residual), tiling in zip(shapes, product_tilings(problem), strict=True):
        elements = max(problem.out_pixels * max(into, out), in_elements if residual else 0)
        constants = {
            "IN": into, "OUT": out, "PADDED": padded, "BY_OUTPUT": by_output, "ACTIVATION": act, "RESIDUAL": residual,
            "CHANNELS": problem.in_channels, "STRIDE": problem.stride,
            "BLOCK_M": tiling.block_m, "BLOCK_N": tiling.block_n, "BLOCK_K": tiling.block_k,
            "STAGES": tiling.num_stages, "WIDE": elements >= WIDE_ELEMENTS,
        }  # fmt: skip
        products.append((constants, tiling))
    return products


def launch(x: Tensor, weights: BlockWeights, problem: BlockProblem, tiling: Tiling, out: Tensor) -> None:
    """Run the block into `out`, with operands as `convfirst.launch` takes them; y and h are allocated."""
    assert problem.padded_in % tiling.part == 0
    assert not problem.is_dense
    pixels = problem.out_pixels
    y, h = (x.new_empty((pixels, channels)) for channels in (problem.in_channels, problem.hidden_channels))
    conv_kernel[(tiling.tiles(problem), problem.padded_in // tiling.part)](
        x, weights.conv, weights.conv_bias, y,
        pixels, problem.height, problem.width, problem.out_height, problem.out_width,
        tiling.tap_steps(problem.kernel_size),
        **conv_constants(problem, tiling), num_warps=tiling.num_warps,
    )  # fmt: skip
    expansion, projection = product_constants(problem)
    for (constants, cut), a, matrix, bias, into, outputs in (
        (expansion, y, weights.expand, weights.expand_bias, h, problem.hidden_channels),
        (projection, h, weights.project, weights.project_bias, out, problem.out_channels),
    ):
        product_kernel[(cut.programs(pixels, outputs),)](
            a, matrix, bias, x, into, pixels, problem.height, problem.width, problem.out_height, problem.out_width,
            **constants, num_warps=cut.num_warps,
        )  # fmt: skip
