"""The head in two or three launches: global average pool, 1x1 convolution, bias, activation; then the classifier.

A head without that convolution takes one launch less.

Small batches take two launches: each program pools one image for itself and multiplies the mean with some rows of the
weights. With large batches every program would read the map again, so a launch of its own pools first, and the products
run on tensor cores.

Legend: N batch; P pixels of an image; C input channels; F features; L classes.
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
from kernels.device_functions import activate, dot, round_to
from kernels.packing import padded_bias, padded_matrix
from kernels.problem import ACTIVATIONS, WIDE_ELEMENTS, first_unsupported_field

# Weights are padded to this many rows and columns: the largest steps in which a tiling reads them.
MULTIPLE = 128
POOL_PIXELS = 32
POOL_CHANNELS = 64


@dataclass(frozen=True, slots=True)
class HeadProblem:
    """One head on one input: everything that decides what is computed.

    Args:
        batch, pixels, in_channels: the input's sizes; `pixels` are those of one image.
        features, classes: outputs of the 1x1 convolution (0 if there is none) and of the classifier.
        activation: name of the activation between the 1x1 convolution and the classifier.
        dtype: data type of input, weights and output.
    """

    batch: int
    pixels: int
    in_channels: int
    features: int
    classes: int
    activation: str
    dtype: str


@dataclass(frozen=True, slots=True)
class HeadTiling:
    """The division of the head's work.

    Args:
        pools: whether the first product's programs pool for themselves, one image each.
        block_m, block_n, block_k: images, outputs and inputs of one step of a product.
        num_warps: warps of a program.
        num_stages: stages of a product's pipeline.
    """

    pools: bool
    block_m: int = 16
    block_n: int = 32
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 3


def unsupported(problem: HeadProblem) -> str | None:
    """The reason why the fused head does not compute this problem, with name and value; None if it does."""
    channels = ("in_channels", "features") if problem.features else ("in_channels",)
    return first_unsupported_field(problem, ("batch", "pixels", "classes"), channels, (*ACTIVATIONS, "none"))


def tilings(problem: HeadProblem, gpu: GpuSpec = H200) -> list[HeadTiling]:
    """The tilings that are worth trying, the likeliest first."""
    if problem.batch <= 4:
        return [HeadTiling(True, block_n=16), HeadTiling(True, block_n=32), HeadTiling(False, block_n=16)]
    if problem.dtype == "float32":
        return [HeadTiling(False, block_m=16, block_k=32)]
    return [
        HeadTiling(False, block_m=64 if problem.batch > 32 else 16, block_n=32, block_k=64),
        HeadTiling(False, block_m=32, block_n=64, block_k=64),
    ]


def pack(layers: Sequence[Tensor], problem: HeadProblem) -> list[Tensor]:
    """Pack both products' weights, (padded outputs, padded inputs), and float32 biases, in turns.

    Args:
        layers: weight (F, C) or (F, C, 1, 1) and bias (F,) of the 1x1 convolution, if there is one, (L, F) and (L,) of
            the classifier.
    """
    packed = []
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        outputs, inputs = (ceil(channels / MULTIPLE) * MULTIPLE for channels in weight.shape[:2])
        packed += [padded_matrix(weight.flatten(1), outputs, inputs, getattr(torch, problem.dtype))]
        packed += [padded_bias(bias, outputs)]
    return packed


@triton.jit
def image_mean(
    x, image, channel, pixels,
    IN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, PIXEL_STEPS: tl.constexpr,
):  # fmt: skip
    """Average an image's channels: [BLOCK_K] in the input's dtype, added up in float32."""
    total = tl.zeros([BLOCK_K], tl.float32)
    for step in range(PIXEL_STEPS):
        pixel = step * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (pixel < pixels)[:, None] & (channel < IN)[None, :]
        tile = tl.load(x + (image * pixels + pixel)[:, None] * IN + channel[None, :], mask=mask, other=0.0)
        total += tl.sum(tile.to(tl.float32), axis=0)
    return round_to(total / pixels, x.dtype.element_ty)


@triton.jit
def _store_row(out, total, bias, image, columns, OUT: tl.constexpr, ACTIVATION: tl.constexpr):
    total = activate(total + tl.load(bias + columns), ACTIVATION, out.dtype.element_ty == tl.float32)
    tl.store(out + image * OUT + columns, round_to(total, out.dtype.element_ty), mask=columns < OUT)


@triton.jit(do_not_specialize=["pixels"])
def pool_linear_kernel(
    x, weight, bias, out, pixels,
    IN: tl.constexpr, PADDED_IN: tl.constexpr, OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, PIXEL_STEPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_N features (axis 1) of one image (axis 0), whose pixels are averaged first."""
    image, columns = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if WIDE:
        image = image.to(tl.int64)
    total = tl.zeros([BLOCK_N], tl.float32)
    for k in range(0, IN, BLOCK_K):
        channel = k + tl.arange(0, BLOCK_K)
        # The weights come before the mean, which waits for its own loads and for all warps.
        rows = tl.load(weight + columns[:, None] * PADDED_IN + channel[None, :])
        mean = image_mean(x, image, channel, pixels, IN, BLOCK_K, BLOCK_P, PIXEL_STEPS).to(tl.float32)
        total += tl.sum(rows.to(tl.float32) * mean[None, :], axis=1)
    _store_row(out, total, bias, image, columns, OUT, ACTIVATION)


@triton.jit(do_not_specialize=["pixels"])
def pool_kernel(
    x, out, pixels,
    IN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, PIXEL_STEPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Average BLOCK_K channels (axis 1) over the pixels of one image (axis 0)."""
    image, channel = tl.program_id(0), tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    if WIDE:
        image = image.to(tl.int64)
    mean = image_mean(x, image, channel, pixels, IN, BLOCK_K, BLOCK_P, PIXEL_STEPS)
    tl.store(out + image * IN + channel, mean, mask=channel < IN)


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x, weight, bias, out, rows,
    IN: tl.constexpr, PADDED_IN: tl.constexpr, OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute act(x @ weight^T + bias): BLOCK_M rows (axis 0) and BLOCK_N outputs (axis 1)."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = row < rows
    if WIDE:
        row = row.to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + tl.load(bias + columns)[None, :]
    for k in tl.range(0, IN, BLOCK_K, num_stages=STAGES):
        channel = k + tl.arange(0, BLOCK_K)
        mask = valid[:, None] & (channel < IN)[None, :]
        tile = tl.load(x + row[:, None] * IN + channel[None, :], mask=mask, other=0.0)
        total = dot(tile, tl.trans(tl.load(weight + columns[:, None] * PADDED_IN + channel[None, :])), total)
    total = activate(total, ACTIVATION, x.dtype.element_ty == tl.float32)
    mask = valid[:, None] & (columns < OUT)[None, :]
    tl.store(out + row[:, None] * OUT + columns[None, :], round_to(total, out.dtype.element_ty), mask=mask)


def linear(x: Tensor, weight: Tensor, bias: Tensor, outputs: int, activation: str, tiling: HeadTiling) -> Tensor:
    """Compute act(x @ weight^T + bias), (rows, outputs), with weights as `pack` makes them."""
    rows, inputs = x.shape
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    linear_kernel[(ceil(rows / tiling.block_m), ceil(outputs / tiling.block_n))](
        x, weight, bias, out, rows,
        inputs, weight.shape[1], outputs, activation,
        tiling.block_m, tiling.block_n, tiling.block_k, tiling.num_stages,
        rows * max(inputs, outputs) >= WIDE_ELEMENTS, num_warps=tiling.num_warps,
    )  # fmt: skip
    return out


def launch(x: Tensor, weights: Sequence[Tensor], problem: HeadProblem, tiling: HeadTiling) -> Tensor:
    """Run the head; x (N, C, H, W) is channels_last, the output (N, L)."""
    # The product of the pooled pixel: with the convolution, or with the classifier where there is none.
    expand, expand_bias, *classify = weights
    outputs, activation = (problem.features, problem.activation) if classify else (problem.classes, "none")
    wide = x.numel() >= WIDE_ELEMENTS
    # A compile-time constant, as the interpreter takes no other loop bounds.
    pixel_steps = ceil(problem.pixels / POOL_PIXELS)
    if tiling.pools:
        features = torch.empty((problem.batch, outputs), dtype=x.dtype, device=x.device)
        pool_linear_kernel[(problem.batch, ceil(outputs / tiling.block_n))](
            x, expand, expand_bias, features, problem.pixels,
            problem.in_channels, expand.shape[1], outputs, activation,
            tiling.block_n, POOL_CHANNELS, POOL_PIXELS, pixel_steps, wide, num_warps=tiling.num_warps,
        )  # fmt: skip
    else:
        pooled = torch.empty((problem.batch, problem.in_channels), dtype=x.dtype, device=x.device)
        pool_kernel[(problem.batch, ceil(problem.in_channels / POOL_CHANNELS))](
            x, pooled, problem.pixels, problem.in_channels, POOL_CHANNELS, POOL_PIXELS, pixel_steps, wide, num_warps=4
        )
        features = linear(pooled, expand, expand_bias, outputs, activation, tiling)
    if not classify:
        return features
    return linear(features, classify[0], classify[1], problem.classes, "none", tiling)
