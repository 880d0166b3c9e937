"""The fused kernels as torch operators, which `torch.compile` and `torch.export` pass through.

Each takes the packed weights and the plain layers: which of the two runs is the tuner's choice for the problem at hand
(`kernels.tune`). Operators are `torch.library.custom_op`s, as `triton_op` raises under Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import convfirst, cost_model, head, mbconv, stem, tune
from kernels.convfirst import ACTIVATE
from kernels.device_functions import INTERPRETED
from kernels.head import HeadProblem, HeadTiling
from kernels.mbconv import MBConvProblem
from kernels.problem import MAX_SPLITS, BlockProblem, Tiling
from kernels.stem import StemProblem, StemTiling

# Unless a network knows better, partial sums may take so many times the block's own input and output.
PARTIAL_SHARE = 4


def _launch_block(x: Tensor, weights: Sequence[Tensor], problem: BlockProblem, tiling: Tiling) -> Tensor:
    return convfirst.launch(x, convfirst.BlockWeights(*weights), problem, tiling)


def _stem_layers(x: Tensor, layers: Sequence[Tensor], problem: StemProblem) -> Tensor:
    weight, bias = layers
    return ACTIVATE[problem.activation](F.conv2d(x, weight, bias, problem.stride, problem.kernel_size // 2))


def _head_layers(x: Tensor, layers: Sequence[Tensor], problem: HeadProblem) -> Tensor:
    weight, bias, classify, classify_bias = layers
    pooled = F.adaptive_avg_pool2d(x, 1)
    features = ACTIVATE[problem.activation](F.conv2d(pooled, weight, bias)).flatten(1)
    return F.linear(features, classify, classify_bias)


def _mbconv_layers(x: Tensor, layers: Sequence[Tensor], problem: MBConvProblem) -> Tensor:
    act = ACTIVATE[problem.activation]
    conv, conv_bias, project, project_bias = layers[-4:]
    h = act(F.conv2d(x, layers[0], layers[1])) if problem.expands else x
    groups = problem.hidden_channels // problem.group_width
    h = act(F.conv2d(h, conv, conv_bias, problem.stride, problem.kernel_size // 2, groups=groups))
    out = F.conv2d(h, project, project_bias)
    return out + x if problem.residual else out


BLOCK = tune.Kernel("convfirst", Tiling, cost_model.ranked, _launch_block, convfirst.layer_by_layer)
MBCONV = tune.Kernel("mbconv", Tiling, mbconv.tilings, mbconv.launch, _mbconv_layers)
STEM = tune.Kernel("stem", StemTiling, stem.tilings, stem.launch, _stem_layers)
HEAD = tune.Kernel("head", HeadTiling, head.tilings, head.launch, _head_layers)


# -- Problems of tensors ---------------------------------------------------------------------------------------------


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def max_splits(out_pixels: int, padded_out: int, partial_bytes: int) -> int:
    """The most splits, a power of two, whose float32 partial sums take no more than `partial_bytes`."""
    fitting = partial_bytes // (4 * out_pixels * padded_out)
    return 1 if fitting < 2 else min(MAX_SPLITS, 1 << (fitting.bit_length() - 1))


def _with_splits(found: Any, activation_bytes: int, partial_bytes: int) -> Any:
    allowed = PARTIAL_SHARE * activation_bytes if partial_bytes < 0 else partial_bytes
    return replace(found, max_splits=max_splits(found.out_pixels, found.padded_out, allowed))


def block_problem(
    shape: Sequence[int], dtype: torch.dtype, layers: Sequence[Tensor], stride: int, activation: str, residual: bool,
    partial_bytes: int = -1,
) -> BlockProblem:  # fmt: skip
    """The problem of a ConvFirst block's layers on an input (N, C, H, W); `partial_bytes` below 0 for the default."""
    batch, channels, height, width = map(int, shape)
    found = BlockProblem(
        batch, height, width, channels, layers[2].shape[0], layers[4].shape[0], layers[0].shape[2], layers[0].shape[1],
        stride, activation, residual, dtype_name(dtype),
    )  # fmt: skip
    return _with_splits(found, found.activation_bytes, partial_bytes)  # type: ignore[no-any-return]


def mbconv_problem(
    shape: Sequence[int], dtype: torch.dtype, layers: Sequence[Tensor], stride: int, activation: str, residual: bool,
    partial_bytes: int = -1,
) -> MBConvProblem:  # fmt: skip
    """The problem of an MBConv's layers, or of a depthwise-separable block's four."""
    batch, channels, height, width = map(int, shape)
    conv, project = layers[-4], layers[-2]
    found = MBConvProblem(
        batch, height, width, channels, conv.shape[0], project.shape[0], conv.shape[2], conv.shape[1],
        stride, activation, len(layers) == 6, residual, dtype_name(dtype),
    )  # fmt: skip
    moved = dtype.itemsize * (batch * height * width * channels + found.out_pixels * found.out_channels)
    return _with_splits(found, moved, partial_bytes)  # type: ignore[no-any-return]


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
    return HeadProblem(
        batch, height * width, channels, layers[0].shape[0], layers[2].shape[0], activation, dtype_name(dtype)
    )


# -- Operators -------------------------------------------------------------------------------------------------------


def _require(x: Tensor, channels: int, like: Tensor) -> None:
    """ValueError where the kernels would read something else than the caller means."""
    if x.ndim != 4:
        raise ValueError(f"input has shape {tuple(x.shape)}, not (N, C, H, W)")
    if x.shape[1] != channels:
        raise ValueError(f"input has {x.shape[1]} channels, the layer takes {channels}")
    if min(x.shape) < 1:
        raise ValueError(f"input has shape {tuple(x.shape)}: nothing in it")
    if x.dtype != like.dtype:
        raise ValueError(f"input is {dtype_name(x.dtype)}, the layer {dtype_name(like.dtype)}")
    if x.device != like.device:
        raise ValueError(f"input is on {x.device}, the layer on {like.device}")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"input with strides {x.stride()} is not channels_last")
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"input is on {x.device}: fused kernels run on CUDA, or with TRITON_INTERPRET=1")


def run(kernel: tune.Kernel, problem: Any, x: Tensor, weights: Sequence[Tensor], layers: Sequence[Tensor]) -> Tensor:
    """Whichever the tuner chose: the fused kernel, or layer by layer."""
    choice = tune.choose(kernel, problem, x.device)
    if not choice.fused:
        return kernel.layer_by_layer(x, layers, problem)
    if x.device.type == "cuda":
        with torch.cuda.device(x.device):
            return kernel.launch(x, weights, problem, choice.tiling)
    return kernel.launch(x, weights, problem, choice.tiling)


def _like(x: Tensor, channels: int, stride: int) -> Tensor:
    height, width = ((size - 1) // stride + 1 for size in x.shape[2:])
    shape = (x.shape[0], channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op("convfirst::block", mutates_args=())
def block(
    x: Tensor, weights: Sequence[Tensor], layers: Sequence[Tensor], stride: int, activation: str, residual: bool,
    partial_bytes: int,
) -> Tensor:  # fmt: skip
    _require(x, layers[0].shape[0], layers[0])
    problem = block_problem(x.shape, x.dtype, layers, stride, activation, residual, partial_bytes)
    return run(BLOCK, problem, x, weights, layers)


@block.register_fake
def _(x, weights, layers, stride, activation, residual, partial_bytes):  # type: ignore[no-untyped-def]
    return _like(x, layers[4].shape[0], stride)


@torch.library.custom_op("convfirst::mbconv", mutates_args=())
def mbconv_block(
    x: Tensor, weights: Sequence[Tensor], layers: Sequence[Tensor], stride: int, activation: str, residual: bool,
    partial_bytes: int,
) -> Tensor:  # fmt: skip
    _require(x, layers[0].shape[1] if len(layers) == 6 else layers[0].shape[0], layers[0])
    problem = mbconv_problem(x.shape, x.dtype, layers, stride, activation, residual, partial_bytes)
    return run(MBCONV, problem, x, weights, layers)


@mbconv_block.register_fake
def _(x, weights, layers, stride, activation, residual, partial_bytes):  # type: ignore[no-untyped-def]
    return _like(x, layers[-2].shape[0], stride)


@torch.library.custom_op("convfirst::stem", mutates_args=())
def stem_layer(x: Tensor, weights: Sequence[Tensor], layers: Sequence[Tensor], stride: int, activation: str) -> Tensor:
    _require(x, layers[0].shape[1], layers[0])
    return run(STEM, stem_problem(x.shape, x.dtype, layers, stride, activation), x, weights, layers)


@stem_layer.register_fake
def _(x, weights, layers, stride, activation):  # type: ignore[no-untyped-def]
    return _like(x, layers[0].shape[0], stride)


@torch.library.custom_op("convfirst::head", mutates_args=())
def head_layers(x: Tensor, weights: Sequence[Tensor], layers: Sequence[Tensor], activation: str) -> Tensor:
    _require(x, layers[0].shape[1], layers[0])
    return run(HEAD, head_problem(x.shape, x.dtype, layers, activation), x, weights, layers)


@head_layers.register_fake
def _(x, weights, layers, activation):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], layers[2].shape[0]))
