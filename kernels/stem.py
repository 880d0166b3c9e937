"""The stem in one launch: a convolution of few input channels, bias and activation.

All taps of a pixel, 27 for 3x3 over RGB, form one row of a single product on tensor cores.

Legend: N, H, W batch, height, width; C, C' input and output channels; K kernel size.
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
from kernels.device_functions import activate, dot, round_to, size, start, tap_zero, total_size
from kernels.packing import padded_bias, padded_matrix
from kernels.problem import ACTIVATIONS, MIN_DOT, WIDE_ELEMENTS, Convolved, first_unsupported_field, parts, power_of_two

MAX_TAPS = 256
MAX_CHANNELS = 256


@dataclass(frozen=True, slots=True)
class StemProblem(Convolved):
    """One stem on one input, with fields like `BlockProblem`'s; its convolution is a full one."""

    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    activation: str
    dtype: str

    @property
    def taps(self) -> int:
        """Input values from which one output is computed."""
        return self.kernel_size**2 * self.in_channels

    @property
    def padded_taps(self) -> int:
        return max(MIN_DOT, power_of_two(self.taps))


@dataclass(frozen=True, slots=True)
class StemTiling:
    """The division of a stem's work: each program computes `block_m` output pixels of all channels."""

    block_m: int
    num_warps: int = 4


def unsupported(problem: StemProblem) -> str | None:
    """The reason why the fused stem does not compute this problem, with name and value; None if it does."""
    if why := first_unsupported_field(
        problem, ("batch", "height", "width", "in_channels"), ("out_channels",), (*ACTIVATIONS, "none")
    ):
        return why
    if problem.taps > MAX_TAPS:
        return f"in_channels={problem.in_channels} with kernel_size={problem.kernel_size} is above {MAX_TAPS} taps"
    if problem.out_channels > MAX_CHANNELS:
        return f"out_channels={problem.out_channels} is above {MAX_CHANNELS}"
    return None


def tilings(problem: StemProblem, gpu: GpuSpec = H200) -> list[StemTiling]:
    """The tilings that are worth trying, the likeliest first."""
    large = problem.out_pixels >= 128 * gpu.multiprocessors
    offered = [StemTiling(128), StemTiling(64), StemTiling(128, 8)] if large else [StemTiling(32), StemTiling(64)]
    # A tile of all taps and a tile of all outputs live in registers.
    most = 2**14 // max(problem.padded_taps, sum(parts(problem.out_channels)))
    return [each for each in offered if each.block_m <= most] or [StemTiling(MIN_DOT)]


def pack(layers: Sequence[Tensor], problem: StemProblem) -> list[Tensor]:
    """Pack weights as the kernel reads them, (padded taps, padded C'), and the bias, (padded C',) in float32.

    Args:
        layers: weight (C', C, K, K) and bias (C',).
    """
    weight, bias = layers
    columns = sum(parts(problem.out_channels))
    # A row is ordered (ky, kx, c), as the pixels are in memory.
    rows = weight.permute(2, 3, 1, 0).reshape(problem.taps, problem.out_channels)
    matrix = padded_matrix(rows, problem.padded_taps, columns, getattr(torch, problem.dtype))
    return [matrix, padded_bias(bias, columns)]


@triton.jit
def stem_part(
    out, tile, weight, bias, row, valid,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_M: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Store channels FIRST to FIRST + WIDTH of BLOCK_M output pixels."""
    columns = FIRST + tl.arange(0, WIDTH)
    total = tl.zeros([BLOCK_M, WIDTH], tl.float32) + tl.load(bias + columns)[None, :]
    total = dot(tile, tl.load(weight + tl.arange(0, TAPS)[:, None] * PADDED + columns[None, :]), total)
    total = activate(total, ACTIVATION, out.dtype.element_ty == tl.float32)
    mask = valid[:, None] & (columns < CHANNELS)[None, :]
    tl.store(out + row[:, None] * CHANNELS + columns[None, :], round_to(total, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width"])
def stem_kernel(
    x, weight, bias, out, pixels, height, width, out_height, out_width,
    IN: tl.constexpr, OUT: tl.constexpr, OUT_PARTS: tl.constexpr, TAPS: tl.constexpr, PADDED_TAPS: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_M output pixels (axis 0)."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < pixels
    if WIDE:
        row = row.to(tl.int64)
    pixel, top, left = tap_zero(row, height, width, out_height, out_width, KERNEL, STRIDE, WIDE)
    tap = tl.arange(0, PADDED_TAPS)
    dy, dx, channel = tap // (KERNEL * IN), tap // IN % KERNEL, tap % IN
    y, x_ = top[:, None] + dy[None, :], left[:, None] + dx[None, :]
    inside = valid[:, None] & (tap < TAPS)[None, :] & (y >= 0) & (y < height) & (x_ >= 0) & (x_ < width)
    address = x + (pixel[:, None] + (dy * width + dx)[None, :]) * IN + channel[None, :]
    tile = tl.load(address, mask=inside, other=0.0)
    for i in tl.static_range(len(OUT_PARTS)):
        stem_part(
            out, tile, weight, bias, row, valid,
            start(OUT_PARTS, i), size(OUT_PARTS, i), OUT, total_size(OUT_PARTS), PADDED_TAPS, BLOCK_M, ACTIVATION,
        )  # fmt: skip


def constants(problem: StemProblem, tiling: StemTiling) -> dict[str, object]:
    """The kernel's compile-time arguments."""
    elements = max(
        problem.batch * problem.height * problem.width * problem.in_channels, problem.out_pixels * problem.out_channels
    )
    return {
        "IN": problem.in_channels, "OUT": problem.out_channels, "OUT_PARTS": parts(problem.out_channels),
        "TAPS": problem.taps, "PADDED_TAPS": problem.padded_taps, "KERNEL": problem.kernel_size,
        "STRIDE": problem.stride, "ACTIVATION": problem.activation, "BLOCK_M": tiling.block_m,
        "WIDE": elements >= WIDE_ELEMENTS,
    }  # fmt: skip


def launch(x: Tensor, weights: Sequence[Tensor], problem: StemProblem, tiling: StemTiling) -> Tensor:
    """Run the stem; x (N, C, H, W) and the output (N, C', H', W') are channels_last."""
    out = torch.empty(
        (problem.batch, problem.out_channels, problem.out_height, problem.out_width),
        dtype=x.dtype, device=x.device, memory_format=torch.channels_last,
    )  # fmt: skip
    weight, bias = weights
    stem_kernel[(ceil(problem.out_pixels / tiling.block_m),)](
        x, weight, bias, out,
        problem.out_pixels, problem.height, problem.width, problem.out_height, problem.out_width,
        **constants(problem, tiling), num_warps=tiling.num_warps,
    )  # fmt: skip
    return out
