"""The fused kernels as torch operators, which `torch.compile` and `torch.export` accept.

Each operator takes the packed weights and the plain layers, and the tuner chooses which of the two runs the problem at
hand (`kernels.tune`). Blocks also borrow float32 scratch, whose size says how often their tiles may be split. The
operators are `torch.library.custom_op`s, as `triton_op` raises under Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from math import ceil
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import convfirst, cost_model, head, mbconv, stem, tune
from kernels.compiling import Kernel
from kernels.convfirst import ACTIVATE
from kernels.device_functions import run_on_cpu
from kernels.head import HeadProblem, HeadTiling
from kernels.mbconv import MBConvProblem
from kernels.packing import BlockWeights
from kernels.problem import COUNTERS, MAX_SPLITS, BlockProblem, Tiling
from kernels.stem import StemProblem, StemTiling


def _launch_block(x: Tensor, weights: Sequence[Tensor], problem: BlockProblem, tiling: Tiling) -> Tensor:
    *packed, scratch = weights
    return convfirst.launch(x, BlockWeights(*packed), problem, tiling, scratch)


def _stem_layers(x: Tensor, layers: Sequence[Tensor], problem: StemProblem) -> Tensor:
    weight, bias = layers
    return ACTIVATE[problem.activation](F.conv2d(x, weight, bias, problem.stride, problem.kernel_size // 2))


def _head_layers(x: Tensor, layers: Sequence[Tensor], problem: HeadProblem) -> Tensor:
    classify, classify_bias = layers[-2:]
    features = F.adaptive_avg_pool2d(x, 1)
    if problem.features:
        features = ACTIVATE[problem.activation](F.conv2d(features, layers[0], layers[1]))
    return F.linear(features.flatten(1), classify, classify_bias)


def _mbconv_layers(x: Tensor, layers: Sequence[Tensor], problem: MBConvProblem) -> Tensor:
    act = ACTIVATE[problem.activation]
    conv, conv_bias, project, project_bias = layers[-4:]
    h = act(F.conv2d(x, layers[0], layers[1])) if problem.expands else x
    groups = problem.hidden_channels // problem.group_width
    h = act(F.conv2d(h, conv, conv_bias, problem.stride, problem.kernel_size // 2, groups=groups))
    out = F.conv2d(h, project, project_bias)
    return out + x if problem.residual else out


BLOCK = Kernel("convfirst", Tiling, cost_model.ranked, _launch_block, convfirst.layer_by_layer)
MBCONV = Kernel("mbconv", Tiling, mbconv.tilings, mbconv.launch, _mbconv_layers)
STEM = Kernel("stem", StemTiling, stem.tilings, stem.launch, _stem_layers)
HEAD = Kernel("head", HeadTiling, head.tilings, head.launch, _head_layers)


SplitProblem = TypeVar("SplitProblem", BlockProblem, MBConvProblem)


# -- Problems of tensors ---------------------------------------------------------------------------------------------


def dtype_name(dtype: torch.dtype) -> str:
    """The name that problems use, such as "float16"."""
    return str(dtype).removeprefix("torch.")


def max_splits(out_pixels: int, padded_out: int, scratch_bytes: int) -> int:
    """The most splits, a power of two, whose float32 partial sums take no more than `scratch_bytes`."""
    fitting = scratch_bytes // (4 * out_pixels * padded_out)
    return 1 if fitting < 2 else min(MAX_SPLITS, 1 << (fitting.bit_length() - 1))


def with_splits(problem: SplitProblem, most: int) -> SplitProblem:
    """The problem of a block with scratch for `most` splits, or for fewer if more are of no use.

    Large batches give every multiprocessor enough tiles: their problem is the same whatever the scratch, and is tuned
    once.
    """
    useful = COUNTERS // ceil(problem.out_pixels / max(cost_model.BLOCKS_M))
    return replace(problem, max_splits=max(1, min(most, 1 << max(0, useful.bit_length() - 1))))


def block_problem(
    shape: Sequence[int], dtype: torch.dtype, layers: Sequence[Tensor], stride: int, activation: str, residual: bool
) -> BlockProblem:  # fmt: skip
    """The problem of a ConvFirst block's layers on an input of shape (N, C, H, W)."""
    batch, channels, height, width = map(int, shape)
    return BlockProblem(
        batch, height, width, channels, layers[2].shape[0], layers[4].shape[0], layers[0].shape[2], layers[0].shape[1],
        stride, activation, residual, dtype_name(dtype),
    )  # fmt: skip


def mbconv_problem(
    shape: Sequence[int], dtype: torch.dtype, layers: Sequence[Tensor], stride: int, activation: str, residual: bool
) -> MBConvProblem:  # fmt: skip
    """The problem of an MBConv's layers, or of a depthwise-separable block's four."""
    batch, channels, height, width = map(int, shape)
    conv, project = layers[-4], layers[-2]
    return MBConvProblem(
        batch, height, width, channels, conv.shape[0], project.shape[0], conv.shape[2], conv.shape[1],
        stride, activation, len(layers) == 6, residual, dtype_name(dtype),
    )  # fmt: skip


def stem_problem(
    shape: Sequence[int], dtype: torch.dtype, layers: Sequence[Tensor], stride: int, activation: str
) -> StemProblem:
    batch, channels, height, width = map(int, shape)
    weight = layers[0]
    return StemProblem(
        batch, height, width, channels, weight.shape[0], weight.shape[2], stride, activation, dtype_name(dtype)
    )


def head_problem(shape: Sequence[int], dtype: torch.dtype, layers: Sequence[Tensor], activation: str) -> HeadProblem:
    batch, channels, height, width = map(int, shape)
    features = layers[0].shape[0] if len(layers) > 2 else 0
    return HeadProblem(batch, height * width, channels, features, layers[-2].shape[0], activation, dtype_name(dtype))


# -- Operators -------------------------------------------------------------------------------------------------------


def require(x: Tensor, channels: int, dtype: torch.dtype, device: torch.device) -> None:
    """Check that a layer's kernel reads what the caller means.

    Args:
        x: input (N, C, H, W), channels_last.
        channels, dtype, device: the layer's input channels, data type and device.

    Raises:
        ValueError: the input has another shape, dtype, device or layout than the layer takes.
    """
    if x.ndim != 4:
        raise ValueError(f"input has shape {tuple(x.shape)}, not (N, C, H, W)")
    if x.shape[1] != channels:
        raise ValueError(f"input has {x.shape[1]} channels, the layer takes {channels}")
    if min(x.shape) < 1:
        raise ValueError(f"input has shape {tuple(x.shape)}: nothing in it")
    if x.dtype != dtype:
        raise ValueError(f"input is {dtype_name(x.dtype)}, the layer {dtype_name(dtype)}")
    if x.device != device:
        raise ValueError(f"input is on {x.device}, the layer on {device}")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"input with strides {x.stride()} is not channels_last")
    if x.device.type != "cuda" and not run_on_cpu():
        raise ValueError(f"input is on {x.device}: fused kernels run on CUDA, or with TRITON_INTERPRET=1")


def run(
    kernel: Kernel, problem: Any, x: Tensor, weights: Sequence[Tensor], layers: Sequence[Tensor]
) -> Tensor:  # fmt: skip
    """Run what the tuner chose for the problem: the fused kernel, or torch layer by layer."""
    tiling = tune.choose(kernel, problem, x.device).tiling
    if tiling is None:
        return kernel.layer_by_layer(x, layers, problem)
    with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
        return kernel.launch(x, weights, problem, tiling)


def _like(x: Tensor, channels: int, stride: int) -> Tensor:
    """An empty output (N, channels, H', W') of a convolution of x."""
    height, width = ((size - 1) // stride + 1 for size in x.shape[2:])
    shape = (x.shape[0], channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _lent(problem: Any, scratch: Tensor) -> Any:
    """The problem with as many splits as the scratch has room for."""
    return with_splits(problem, max_splits(problem.out_pixels, problem.padded_out, scratch.nbytes))


@torch.library.custom_op("convfirst::block", mutates_args=("scratch",))
def block(
    x: Tensor, weights: Sequence[Tensor], layers: Sequence[Tensor], scratch: Tensor, stride: int, activation: str,
    residual: bool,
) -> Tensor:  # fmt: skip
    require(x, layers[0].shape[0], layers[0].dtype, layers[0].device)
    problem = _lent(block_problem(x.shape, x.dtype, layers, stride, activation, residual), scratch)
    return run(BLOCK, problem, x, [*weights, scratch], layers)


@block.register_fake
def _(x, weights, layers, scratch, stride, activation, residual):  # type: ignore[no-untyped-def]
    return _like(x, layers[4].shape[0], stride)


@torch.library.custom_op("convfirst::mbconv", mutates_args=("scratch",))
def mbconv_block(
    x: Tensor, weights: Sequence[Tensor], layers: Sequence[Tensor], scratch: Tensor, stride: int, activation: str,
    residual: bool,
) -> Tensor:  # fmt: skip
    require(x, layers[0].shape[1] if len(layers) == 6 else layers[0].shape[0], layers[0].dtype, layers[0].device)
    problem = _lent(mbconv_problem(x.shape, x.dtype, layers, stride, activation, residual), scratch)
    return run(MBCONV, problem, x, [*weights, scratch], layers)


@mbconv_block.register_fake
def _(x, weights, layers, scratch, stride, activation, residual):  # type: ignore[no-untyped-def]
    return _like(x, layers[-2].shape[0], stride)


@torch.library.custom_op("convfirst::stem", mutates_args=())
def stem_layer(x: Tensor, weights: Sequence[Tensor], layers: Sequence[Tensor], stride: int, activation: str) -> Tensor:
    require(x, layers[0].shape[1], layers[0].dtype, layers[0].device)
    return run(STEM, stem_problem(x.shape, x.dtype, layers, stride, activation), x, weights, layers)


@stem_layer.register_fake
def _(x, weights, layers, stride, activation):  # type: ignore[no-untyped-def]
    return _like(x, layers[0].shape[0], stride)


@torch.library.custom_op("convfirst::head", mutates_args=())
def head_layers(x: Tensor, weights: Sequence[Tensor], layers: Sequence[Tensor], activation: str) -> Tensor:
    require(x, layers[0].shape[1], layers[0].dtype, layers[0].device)
    return run(HEAD, head_problem(x.shape, x.dtype, layers, activation), x, weights, layers)


@head_layers.register_fake
def _(x, weights, layers, activation):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], layers[-2].shape[0]))
