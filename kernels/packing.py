"""A ConvFirst block's weights as the kernels read them; the legend is that of `convfirst`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.problem import (
    COUNTERS,
    DENSE_MULTIPLE,
    PAIR,
    PAIR_BLOCK,
    PAIR_SPAN,
    BlockProblem,
    pair_steps,
    takes_pairs,
)


@dataclass(frozen=True)
class BlockWeights:
    """A block's weights as the kernel reads them, zero where channels are padded.

    Args:
        conv: flat weights, see `pack_conv`; in the block's dtype, as `expand` and `project` are.
        conv_bias: float32 bias, (padded C,); the other biases are float32, too.
        expand: weights, (padded E, padded C).
        expand_bias: bias, (padded E,).
        project: weights, (padded E, padded C').
        project_bias: bias, (padded C',).
        counters: (`COUNTERS`,) int32 zeros, which tell the splits of a tile which of them ends last; zeros again after
            every launch. Launches with the same weights must therefore not overlap, as on two streams.
    """

    conv: Tensor
    conv_bias: Tensor
    expand: Tensor
    expand_bias: Tensor
    project: Tensor
    project_bias: Tensor
    counters: Tensor


def padded_matrix(matrix: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Pad a matrix with zeros to (rows, columns)."""
    return F.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])).to(dtype).contiguous()


def padded_bias(bias: Tensor, length: int) -> Tensor:
    """Pad a bias with zeros to (length,), in float32."""
    return F.pad(bias.float(), (0, length - len(bias))).contiguous()


def new_counters(device: torch.device) -> Tensor:
    """The `counters` of `BlockWeights`."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def grouped_weights(weight: Tensor, padded: int, block: int) -> Tensor:
    """Pack grouped weights as the kernels' convolutions read them, zero where channels are padded.

    Args:
        weight: (channels, group width, K, K), as `nn.Conv2d` has it.
        padded: number of channels to pad to.
        block: channels of a dense block, D: a multiple of the group width, or no less than all channels.

    Returns:
        Flat; of depthwise weights (K*K, padded), of others block-diagonal dense blocks (K*K, padded / D, D in, D out).
    """
    channels, group_width = weight.shape[:2]
    # (taps, out, in within the group)
    by_tap = weight.flatten(2).permute(2, 0, 1)
    if group_width == 1:
        return F.pad(by_tap[:, :, 0], (0, padded - channels)).flatten()
    out = torch.arange(channels, device=weight.device)
    first_in = out // group_width * group_width
    blocks = weight.new_zeros(len(by_tap), padded // block, block, block)
    for lane in range(group_width):
        blocks[:, out // block, (first_in + lane) % block, out % block] = by_tap[:, :, lane]
    return blocks.flatten()


def paired_weights(weight: Tensor, padded: int) -> Tensor:
    """Pack grouped weights for a convolution in pairs of columns, zero where channels are padded.

    Args:
        weight: (channels, group width, K, K), with a group width of at most `PAIR_BLOCK`.
        padded: number of channels to pad to.

    Returns:
        Flat: (K rows of taps, spans, padded / D, S columns * D in, 2 columns * D out) with D = `PAIR_BLOCK` and S =
        `PAIR_SPAN`. Column t of the input reaches column p of the output by tap t - p.
    """
    size = weight.shape[-1]
    # (K, K, padded / D, D in, D out)
    blocks = grouped_weights(weight, padded, PAIR_BLOCK).reshape(size, size, padded // PAIR_BLOCK, PAIR_BLOCK, -1)
    spans = pair_steps(size)
    packed = weight.new_zeros(size, spans * PAIR_SPAN, padded // PAIR_BLOCK, PAIR_BLOCK, PAIR, PAIR_BLOCK)
    for column in range(PAIR):
        packed[:, column : column + size, :, :, column] = blocks
    by_span = packed.reshape(size, spans, PAIR_SPAN, padded // PAIR_BLOCK, -1)
    return by_span.transpose(2, 3).flatten()


def pack_conv(weight: Tensor, problem: BlockProblem) -> Tensor:
    """Pack the weights of a block's convolution, flat.

    Args:
        weight: (C, group width, K, K), as `nn.Conv2d` has it.

    Returns:
        The result of `grouped_weights`, followed by that of `paired_weights` where columns can be computed in pairs; of
        a "dense" convolution (K*K, C padded to `DENSE_MULTIPLE`, padded C), flat.
    """
    if not problem.is_dense:
        packed = grouped_weights(weight, problem.padded_in, problem.conv_block)
        return torch.cat([packed, paired_weights(weight, problem.padded_in)]) if takes_pairs(problem) else packed
    channels = problem.in_channels
    rows = ceil(channels / DENSE_MULTIPLE) * DENSE_MULTIPLE
    dense = weight.new_zeros(problem.kernel_size**2, rows, problem.padded_in)
    # (taps, in, out)
    dense[:, :channels, :channels] = weight.flatten(2).permute(2, 1, 0)
    return dense.flatten()


def pack(layers: Sequence[Tensor], problem: BlockProblem) -> BlockWeights:
    """Pack a block's layers, given as `layer_by_layer` takes them, for the kernel."""
    conv, conv_bias, expand, expand_bias, project, project_bias = layers
    dtype = getattr(torch, problem.dtype)
    return BlockWeights(
        conv=pack_conv(conv.to(dtype), problem),
        conv_bias=padded_bias(conv_bias, problem.padded_in),
        expand=padded_matrix(expand.flatten(1), problem.padded_hidden, problem.padded_in, dtype),
        expand_bias=padded_bias(expand_bias, problem.padded_hidden),
        project=padded_matrix(project.flatten(1).T, problem.padded_hidden, problem.padded_out, dtype),
        project_bias=padded_bias(project_bias, problem.padded_out),
        counters=new_counters(conv.device),
    )
