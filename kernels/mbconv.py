"""Blocks with the convolution in the middle (MBConv) in two launches, and depthwise-separable blocks in one.

    h   = act(x @ expand^T + expand_bias)                     [pixels, E]   launch 1, if there is an expansion
    out = sum over blocks of act(conv(h) + bias) @ project    [M, C']       launch 2, plus bias and residual

The hidden tensor goes through device memory: one launch would have to compute the hidden values around each tile again.

The legend is that of `convfirst`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cost_model import H200, GpuSpec
from kernels.device_functions import (
    activate,
    convolve_tile,
    dot,
    loaded,
    place,
    round_to,
    size,
    start,
    store_tile,
    total_size,
)
from kernels.head import HeadTiling, linear
from kernels.packing import grouped_weights, new_counters, padded_bias, padded_matrix
from kernels.problem import (
    ACTIVATIONS,
    GROUP_WIDTHS,
    HIDDEN_MULTIPLE,
    MAX_CHANNELS,
    MIN_DOT,
    WIDE_ELEMENTS,
    Splittable,
    Tiling,
    first_unsupported_field,
    parts,
    power_of_two,
)  # fmt: skip

# The most weights of a step's projection, per thread, that are loaded ahead of the convolution.
EARLY_WEIGHTS = tl.constexpr(32)


@dataclass(frozen=True, slots=True)
class MBConvProblem(Splittable):
    """One block on one input, with fields like `BlockProblem`'s.

    Args:
        expands: whether the block has a 1x1 expansion; without it in_channels equals hidden_channels.
    """

    batch: int
    height: int
    width: int
    in_channels: int
    hidden_channels: int
    out_channels: int
    kernel_size: int
    group_width: int
    stride: int
    activation: str
    expands: bool
    residual: bool
    dtype: str
    max_splits: int = 1

    @property
    def padded_hidden(self) -> int:
        return ceil(self.hidden_channels / HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE

    @property
    def conv_block(self) -> int:
        """Channels of one dense block of the grouped convolution's weights."""
        return max(MIN_DOT, power_of_two(self.group_width))


def unsupported(problem: MBConvProblem) -> str | None:
    """The reason why the two kernels do not compute this problem, with name and value; None if they do."""
    if why := first_unsupported_field(
        problem, ("batch", "height", "width"), ("in_channels", "hidden_channels", "out_channels"), ACTIVATIONS
    ):
        return why
    if problem.group_width not in GROUP_WIDTHS:
        return f"group_width={problem.group_width} is none of {', '.join(map(str, GROUP_WIDTHS))}"
    if problem.out_channels > MAX_CHANNELS:
        return f"out_channels={problem.out_channels} is above {MAX_CHANNELS}"
    return None


def tilings(problem: MBConvProblem, gpu: GpuSpec = H200) -> list[Tiling]:
    """The tilings of the second launch that are worth trying, the likeliest first."""
    forms = ("fma", "diagonal") if problem.group_width == 1 else ("mma",)
    wide = problem.padded_out > 128
    block_m = 64 if problem.out_pixels >= 64 * gpu.multiprocessors and problem.dtype != "float32" else 16
    wanted = 1
    most = min(problem.max_splits, problem.hidden_channels // 128)
    while problem.out_pixels // block_m * wanted < gpu.multiprocessors and wanted < most:
        wanted *= 2
    offered: list[Tiling] = []
    # With blocks of 32 channels the sums of several rows would spill.
    most_rows = 4 if problem.conv_block == MIN_DOT else 1
    shapes = (
        (block_m, 32, forms[0], most_rows), (block_m, 64, forms[0], most_rows), (2 * block_m, 32, forms[0], most_rows),
        (block_m, 32, forms[-1], 1),
    )  # fmt: skip
    for pixels, hidden, form, at_most in shapes:
        rows = min(at_most, pixels // MIN_DOT)
        # Not every number of splits divides the hidden channels well; one always does.
        for splits in (wanted, wanted // 2, wanted // 4, 1):
            tiling = Tiling(pixels, hidden, form, max(1, splits), 8 if wide else 4, rows=rows)
            if tiling.fits(problem) and tiling not in offered:
                offered.append(tiling)
                break
    return offered


def pack(layers: Sequence[Tensor], problem: MBConvProblem) -> list[Tensor]:
    """Pack a block's layers as the kernels read them, zero where channels are padded; biases in float32.

    Args:
        layers: weight and bias of the expansion, if there is one, of the convolution and of the projection.

    Returns:
        expand (padded E, C padded to `HIDDEN_MULTIPLE`) and its bias, both empty without an expansion; the
        convolution's weights, flat, as `packing.grouped_weights` has them, and bias; project (padded E, padded C')
        and bias; counters as `BlockWeights` has them.
    """
    dtype, hidden, out = getattr(torch, problem.dtype), problem.padded_hidden, problem.padded_out
    conv, conv_bias, project, project_bias = layers[-4:]
    expansion = [conv.new_zeros(0, dtype=dtype), conv_bias.new_zeros(0, dtype=torch.float32)]
    if problem.expands:
        columns = ceil(problem.in_channels / HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE
        expansion = [padded_matrix(layers[0].flatten(1), hidden, columns, dtype), padded_bias(layers[1], hidden)]
    return [
        *expansion, grouped_weights(conv.to(dtype), hidden, problem.conv_block), padded_bias(conv_bias, hidden),
        padded_matrix(project.flatten(1).T, hidden, out, dtype), padded_bias(project_bias, out),
        new_counters(conv.device),
    ]  # fmt: skip


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width", "taps"])
def conv_project_kernel(
    h, conv, conv_bias, project, project_bias, shortcut, out, partial, counters,
    pixels, height, width, out_height, out_width, taps,
    HIDDEN: tl.constexpr, PADDED: tl.constexpr, OUT: tl.constexpr, OUT_PARTS: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    FORM: tl.constexpr, CONV_BLOCK: tl.constexpr, CONV_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Compute one tile of BLOCK_M output pixels (axis 0) and one split of the hidden channels (axis 1)."""
    DTYPE: tl.constexpr = h.dtype.element_ty
    PADDED_OUT: tl.constexpr = total_size(OUT_PARTS)
    EARLY: tl.constexpr = BLOCK_E * PADDED_OUT <= EARLY_WEIGHTS * 32 * WARPS
    tile, split = tl.program_id(0), tl.program_id(1)
    row, valid, pixel, top, left, inside = place(
        tile, pixels, height, width, out_height, out_width, KERNEL, STRIDE, FORM, BLOCK_M, ROWS, WIDE
    )
    totals = ()
    for i in tl.static_range(len(OUT_PARTS)):
        totals = totals + (tl.zeros([BLOCK_M, size(OUT_PARTS, i)], tl.float32),)
    STEPS: tl.constexpr = (HIDDEN + BLOCK_E * SPLITS - 1) // (BLOCK_E * SPLITS)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        first = (split * STEPS + step) * BLOCK_E
        rows = (first + tl.arange(0, BLOCK_E))[:, None] * PADDED_OUT
        # If few registers hold the weights, they arrive during the convolution.
        weights = ()
        if EARLY:
            for i in tl.static_range(len(OUT_PARTS)):
                columns = start(OUT_PARTS, i) + tl.arange(0, size(OUT_PARTS, i))
                weights = weights + (tl.load(project + rows + columns[None, :]),)
        y = convolve_tile(
            h, conv, conv_bias, pixel, top, left, inside, height, width, taps, first, BLOCK_E, HIDDEN, PADDED,
            KERNEL, STRIDE, FORM, CONV_BLOCK, 0, BLOCK_M, ROWS, CONV_STAGES, tl.float32, WARPS,
        )  # fmt: skip
        y = round_to(activate(y, ACTIVATION, DTYPE == tl.float32), DTYPE)
        sums = ()
        for i in tl.static_range(len(OUT_PARTS)):
            columns = start(OUT_PARTS, i) + tl.arange(0, size(OUT_PARTS, i))
            if EARLY:
                sums = sums + (dot(y, loaded(weights[i], WARPS), totals[i]),)
            else:
                sums = sums + (dot(y, tl.load(project + rows + columns[None, :]), totals[i]),)
        totals = sums
    store_tile(
        out, totals, partial, counters, project_bias, shortcut, row, valid, pixels, tile, split, 0,
        OUT_PARTS, OUT, PADDED_OUT, RESIDUAL, OUT, BLOCK_M, SPLITS,
    )  # fmt: skip


def constants(problem: MBConvProblem, tiling: Tiling) -> dict[str, object]:
    """The second kernel's compile-time arguments."""
    elements = max(
        problem.batch * problem.height * problem.width * problem.hidden_channels,
        problem.out_pixels * problem.padded_out * tiling.splits,
    )
    return {
        "HIDDEN": problem.hidden_channels, "PADDED": problem.padded_hidden, "OUT": problem.out_channels,
        "OUT_PARTS": parts(problem.out_channels, MIN_DOT, tiling.part), "KERNEL": problem.kernel_size,
        "STRIDE": problem.stride, "ACTIVATION": problem.activation, "RESIDUAL": problem.residual,
        "FORM": tiling.conv, "CONV_BLOCK": problem.conv_block, "CONV_STAGES": tiling.conv_stages,
        "BLOCK_M": tiling.block_m, "BLOCK_E": tiling.block_e, "SPLITS": tiling.splits, "STAGES": tiling.num_stages,
        "WIDE": elements >= WIDE_ELEMENTS, "ROWS": tiling.rows, "WARPS": tiling.num_warps,
    }  # fmt: skip


def launch(x: Tensor, weights: Sequence[Tensor], problem: MBConvProblem, tiling: Tiling) -> Tensor:
    """Run the block; x (N, C, H, W) and the output (N, C', H', W') are channels_last.

    Args:
        weights: the packed weights, followed by float32 scratch of the problem's `scratch_elements`.
    """
    expand, expand_bias, conv, conv_bias, project, project_bias, counters, scratch = weights
    hidden = x
    if problem.expands:
        flat = x.permute(0, 2, 3, 1).reshape(-1, problem.in_channels)
        large = len(flat) >= 128 * H200.multiprocessors and problem.dtype != "float32"
        product = HeadTiling(False, 128 if large else 16, 64 if large else 32, 32)
        hidden = linear(flat, expand, expand_bias, problem.hidden_channels, problem.activation, product)
    out = torch.empty(
        (problem.batch, problem.out_channels, problem.out_height, problem.out_width),
        dtype=x.dtype, device=x.device, memory_format=torch.channels_last,
    )  # fmt: skip
    conv_project_kernel[(tiling.tiles(problem), tiling.splits)](
        hidden, conv, conv_bias, project, project_bias, x, out, scratch, counters,
        problem.out_pixels, problem.height, problem.width, problem.out_height, problem.out_width,
        tiling.tap_steps(problem.kernel_size),
        **constants(problem, tiling), num_warps=tiling.num_warps,
    )  # fmt: skip
    return out
