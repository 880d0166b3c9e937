"""A ConvFirst block in one launch: grouped convolution, expansion, activation, projection and residual, all on chip.

    y   = conv(x) + conv_bias                     [M, C]    float32, rounded to the input's dtype
    h   = act(y @ expand^T + expand_bias)         [M, BE]   one block of hidden channels after the other
    out = sum over blocks (h @ project) + bias    [M, C']   float32, plus x (pooled, if need be), stored once

A program computes a tile of M output pixels. They are consecutive pixels of the flattened batch, or, with `rows` > 1,
several rows of some columns, for which each row of the input is loaded once for a column of taps. With `tiles_each` > 1
a program computes several tiles, and keeps the weights of both 1x1 convolutions on chip. With `splits` > 1 several
programs share a tile, each with a part of the hidden channels; the one that ends last adds up their float32 sums,
always in the same order, from scratch memory that the caller lends. With `out_splits` > 1 several programs share the
output channels of a tile, and each computes y and h for itself.

Legend: N, H, W batch, height, width; P output pixels of the whole batch; C, E, C' input, hidden and output channels;
K kernel size; D channels of a dense block of grouped weights. Channels are innermost (channels_last). Channels are
computed in parts, each a power of two (`problem.parts`): the tuples below hold one tensor for each part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import layered
from kernels.device_functions import (
    INTERPRET,
    INTERPRETED,
    activate,
    add_pooled,
    convolve_tile,
    dot,
    place,
    round_to,
    size,
    start,
    store_tile,
    total_size,
)
from kernels.packing import BlockWeights
from kernels.problem import DENSE_MULTIPLE, MIN_DOT, WIDE_ELEMENTS, BlockProblem, Tiling, parts

ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "relu": F.relu, "gelu": F.gelu, "hard_swish": F.hardswish, "none": lambda x: x,
}  # fmt: skip


def layer_by_layer(x: Tensor, layers: Sequence[Tensor], problem: BlockProblem) -> Tensor:
    """The block as torch runs it, in the dtype of its operands.

    Args:
        x: input (N, C, H, W).
        layers: weight and bias of the grouped convolution, of expansion and of projection, as `nn.Conv2d` has them.

    Returns:
        (N, C', H', W').
    """
    conv, conv_bias, expand, expand_bias, project, project_bias = layers
    groups = problem.in_channels // problem.group_width
    y = F.conv2d(x, conv, conv_bias, problem.stride, problem.kernel_size // 2, groups=groups)
    h = ACTIVATE[problem.activation](F.conv2d(y, expand, expand_bias))
    out = F.conv2d(h, project, project_bias)
    return out + pooled(x, problem) if problem.residual else out


def pooled(x: Tensor, problem: BlockProblem) -> Tensor:
    """The input as it is added to the output: averaged over a stride's pixels, with the output's channels."""
    if problem.stride > 1:
        x = F.avg_pool2d(x, problem.stride, ceil_mode=True, count_include_pad=False)
    more = problem.out_channels - problem.in_channels
    # Negative padding cuts.
    return F.pad(x, (0, 0, 0, 0, 0, more)) if more else x


# -- Kernel ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width", "taps", "tiles"])
def convfirst_kernel(
    x, conv, conv_bias, expand, expand_bias, project, project_bias, out, partial, counters,
    pixels, height, width, out_height, out_width, taps, tiles,
    IN: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr, IN_PARTS: tl.constexpr, OUT_PARTS: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    FORM: tl.constexpr, CONV_BLOCK: tl.constexpr, DENSE_ROWS: tl.constexpr, CONV_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
    PADDED_OUT: tl.constexpr, OUT_SPLITS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Compute tiles of BLOCK_M output pixels (axis 0), one split of the hidden channels (1) and of the output's (2).

    With TILES 1 a program has one tile, otherwise `tiles`: an argument, as the compiler would unroll a constant.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    PADDED_IN: tl.constexpr = total_size(IN_PARTS)
    STEPS: tl.constexpr = (HIDDEN + BLOCK_E * SPLITS - 1) // (BLOCK_E * SPLITS)
    split, first_out = tl.program_id(1), 0
    if OUT_SPLITS > 1:
        first_out = tl.program_id(2) * total_size(OUT_PARTS)
    # For several tiles the weights stay in shared memory, where the compiler puts the operands of products in a loop.
    expands, projects = (), ()
    if TILES > 1:
        for step in tl.static_range(STEPS):
            for i in tl.static_range(len(IN_PARTS)):
                expands = expands + (expand_weights(expand, step * BLOCK_E, BLOCK_E, IN_PARTS, i),)
            for i in tl.static_range(len(OUT_PARTS)):
                projects = projects + (project_weights(project, step * BLOCK_E, BLOCK_E, 0, OUT_PARTS, i, PADDED_OUT),)

    for each in tl.range(0, TILES if INTERPRET or TILES == 1 else tiles, num_stages=1):
        tile = tl.program_id(0) * tiles + each
        counter = tile
        if OUT_SPLITS > 1:
            counter = tile * OUT_SPLITS + tl.program_id(2)
        row, valid, pixel, top, left, inside = place(
            tile, pixels, height, width, out_height, out_width, KERNEL, STRIDE, FORM, BLOCK_M, ROWS, WIDE
        )

        ys = ()
        for i in tl.static_range(len(IN_PARTS)):
            y = convolve_tile(
                x, conv, conv_bias, pixel, top, left, inside, height, width, taps,
                start(IN_PARTS, i), size(IN_PARTS, i), IN, PADDED_IN, KERNEL, STRIDE,
                FORM, CONV_BLOCK, DENSE_ROWS, BLOCK_M, ROWS, CONV_STAGES, DTYPE, WARPS,
            )  # fmt: skip
            ys = ys + (y,)

        totals = ()
        for i in tl.static_range(len(OUT_PARTS)):
            total = tl.zeros([BLOCK_M, size(OUT_PARTS, i)], tl.float32)
            if RESIDUAL and STRIDE > 1:
                # Now: at the end the compiler spilled. (With stride 1 it does not, and this order takes more memory.)
                columns = first_out + start(OUT_PARTS, i) + tl.arange(0, size(OUT_PARTS, i))
                there = valid & (split == 0)
                total = add_pooled(total, x, row, there, columns, height, width, out_height, out_width, IN, STRIDE)
            totals = totals + (total,)
        if TILES > 1:
            for step in tl.static_range(STEPS):
                h = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
                h += tl.load(expand_bias + step * BLOCK_E + tl.arange(0, BLOCK_E))[None, :]
                for i in tl.static_range(len(IN_PARTS)):
                    h = dot(ys[i], expands[step * len(IN_PARTS) + i], h)
                h = round_to(activate(h, ACTIVATION, DTYPE == tl.float32), DTYPE)
                sums = ()
                for i in tl.static_range(len(OUT_PARTS)):
                    sums = sums + (dot(h, projects[step * len(OUT_PARTS) + i], totals[i]),)
                totals = sums
        else:
            for chunk in tl.range(0, STEPS, num_stages=STAGES):
                # The weights are padded past the last hidden channel: see `Tiling.fits`.
                first = (split * STEPS + chunk) * BLOCK_E
                h = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
                h += tl.load(expand_bias + first + tl.arange(0, BLOCK_E))[None, :]
                for i in tl.static_range(len(IN_PARTS)):
                    h = dot(ys[i], expand_weights(expand, first, BLOCK_E, IN_PARTS, i), h)
                h = round_to(activate(h, ACTIVATION, DTYPE == tl.float32), DTYPE)
                sums = ()
                for i in tl.static_range(len(OUT_PARTS)):
                    weights = project_weights(project, first, BLOCK_E, first_out, OUT_PARTS, i, PADDED_OUT)
                    sums = sums + (dot(h, weights, totals[i]),)
                totals = sums

        store_tile(
            out, totals, partial, counters, project_bias, x, row, valid, pixels, counter, split, first_out,
            OUT_PARTS, OUT, PADDED_OUT, RESIDUAL and STRIDE == 1, IN, BLOCK_M, SPLITS,
        )  # fmt: skip


@triton.jit
def expand_weights(expand, first, BLOCK_E: tl.constexpr, PARTS: tl.constexpr, i: tl.constexpr):
    """Load weights: [part i of the input channels, BLOCK_E hidden ones from `first` on]."""
    hidden = first + tl.arange(0, BLOCK_E)
    columns = start(PARTS, i) + tl.arange(0, size(PARTS, i))
    return tl.trans(tl.load(expand + hidden[:, None] * total_size(PARTS) + columns[None, :]))


@triton.jit
def project_weights(
    project, first, BLOCK_E: tl.constexpr, first_out, PARTS: tl.constexpr, i: tl.constexpr, PADDED_OUT: tl.constexpr
):  # fmt: skip
    """Load weights: [BLOCK_E hidden channels from `first` on, part i of the output's after `first_out`]."""
    hidden = first + tl.arange(0, BLOCK_E)
    columns = first_out + start(PARTS, i) + tl.arange(0, size(PARTS, i))
    return tl.load(project + hidden[:, None] * PADDED_OUT + columns[None, :])


# -- Launch ----------------------------------------------------------------------------------------------------------


def constants(problem: BlockProblem, tiling: Tiling) -> dict[str, object]:
    """The kernel's compile-time arguments."""
    elements = max(
        problem.batch * problem.height * problem.width * problem.in_channels,
        problem.out_pixels * problem.padded_out * tiling.splits,
    )
    # Narrower products are slower; narrower parts are for the convolution.
    out_parts = parts(problem.out_channels, MIN_DOT, max(64, tiling.part))
    if tiling.out_splits > 1:
        out_parts = (problem.padded_out // tiling.out_splits,)
    # All numbers of tiles above one compile to the same kernel.
    tiles = tiling.tiles_each if INTERPRETED else min(tiling.tiles_each, 2)
    return {
        "IN": problem.in_channels, "HIDDEN": problem.hidden_channels, "OUT": problem.out_channels,
        "IN_PARTS": parts(problem.in_channels, problem.conv_block, tiling.part),
        "OUT_PARTS": out_parts, "PADDED_OUT": problem.padded_out, "OUT_SPLITS": tiling.out_splits,
        "KERNEL": problem.kernel_size, "STRIDE": problem.stride, "ACTIVATION": problem.activation,
        "RESIDUAL": problem.residual, "FORM": tiling.conv,
        "CONV_BLOCK": tiling.dense_block if problem.is_dense else problem.conv_block,
        "DENSE_ROWS": ceil(problem.in_channels / DENSE_MULTIPLE) * DENSE_MULTIPLE, "CONV_STAGES": tiling.conv_stages,
        "BLOCK_M": tiling.block_m, "BLOCK_E": tiling.block_e, "SPLITS": tiling.splits, "STAGES": tiling.num_stages,
        "WIDE": elements >= WIDE_ELEMENTS, "ROWS": tiling.rows, "TILES": tiles, "WARPS": tiling.num_warps,
    }  # fmt: skip


def launch(x: Tensor, weights: BlockWeights, problem: BlockProblem, tiling: Tiling, scratch: Tensor) -> Tensor:
    """Run the block. Nothing here checks that the operands match the problem.

    Only the output is allocated, and with three launches their intermediates.

    Args:
        x: input (N, C, H, W), channels_last.
        scratch: float32 memory of `tiling.partial_bytes`, which is overwritten. Without splits it may be any tensor.

    Returns:
        (N, C', H', W'), channels_last.
    """
    out = torch.empty(
        (problem.batch, problem.out_channels, problem.out_height, problem.out_width),
        dtype=x.dtype, device=x.device, memory_format=torch.channels_last,
    )  # fmt: skip
    if tiling.launches > 1:
        layered.launch(x, weights, problem, tiling, out)
        return out
    programs = ceil(tiling.tiles(problem) / tiling.tiles_each)
    convfirst_kernel[(programs, tiling.splits, tiling.out_splits)](
        x, weights.conv, weights.conv_bias, weights.expand, weights.expand_bias, weights.project, weights.project_bias,
        out, scratch, weights.counters,
        problem.out_pixels, problem.height, problem.width, problem.out_height, problem.out_width,
        tiling.tap_steps(problem.kernel_size), tiling.tiles_each,
        **constants(problem, tiling), num_warps=tiling.num_warps,
    )  # fmt: skip
    return out
