"""Parameters and multiply-accumulates of an architecture in closed form. 1 MAC = 2 FLOPs.

The convolutions and the classifier are counted, and among the parameters the scale and shift of each batch norm. Tests
compare both numbers with what hooks count on the built network.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

from search_spaces.arch import (
    IMAGE_CHANNELS,
    STEM_KERNEL_SIZE,
    STEM_STRIDE,
    ArchSpec,
    BlockSpec,
    StageSpec,
    StemSpec,
    Step,
    stage_blocks,
    strided,
)


@dataclass(frozen=True, slots=True)
class Cost:
    """Learned parameters and the MACs of one image."""

    params: int
    macs: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.macs + other.macs)


def conv_norm_cost(in_channels: int, out_channels: int, kernel_size: int, group_width: int, out_size: int) -> Cost:
    """Cost of a bias-free convolution on to (out_size, out_size) pixels, followed by a batch norm.

    `group_width` is the number of input channels that each output channel reads.
    """
    weights = out_channels * group_width * kernel_size**2
    return Cost(params=weights + 2 * out_channels, macs=weights * out_size**2)


def block_cost(block: BlockSpec, size: int) -> Cost:
    """Cost of a ConvFirst block whose input is (size, size) pixels."""
    out_size = strided(size, block.stride)
    inner, expanded = block.in_channels, block.expanded_channels
    return (
        conv_norm_cost(inner, inner, block.kernel_size, block.group_width, out_size)
        + conv_norm_cost(inner, expanded, 1, inner, out_size)
        + conv_norm_cost(expanded, block.out_channels, 1, expanded, out_size)
    )


def stem_cost(stem_width: int, resolution: int, stride: int = STEM_STRIDE) -> Cost:
    """Cost of the 3x3 stem on (3, resolution, resolution) images."""
    out_size = strided(resolution, stride)
    return conv_norm_cost(IMAGE_CHANNELS, stem_width, STEM_KERNEL_SIZE, IMAGE_CHANNELS, out_size)


def stage_cost(in_channels: int, stage: StageSpec, size: int) -> Cost:
    """Cost of a stage that (size, size) pixels of `in_channels` channels enter."""
    first, *rest = stage_blocks(in_channels, stage)
    total = block_cost(first, size)
    if rest:
        # The blocks after the first are all alike.
        one = block_cost(rest[0], strided(size, stage.stride))
        total += Cost(one.params * len(rest), one.macs * len(rest))
    return total


def head_cost(in_channels: int, head_width: int, num_classes: int) -> Cost:
    """Cost of the 1x1 convolution with bias on the pooled pixel, if there is one, and of the classifier with bias."""
    if not head_width:
        return Cost(params=(in_channels + 1) * num_classes, macs=in_channels * num_classes)
    weights = in_channels * head_width + head_width * num_classes
    return Cost(params=weights + head_width + num_classes, macs=weights)


def steps_cost(steps: Iterable[Step], num_classes: int) -> Cost:
    """Parameters and MACs of some steps of `ArchSpec.walk` together."""

    def step_cost(step: Step) -> Cost:
        spec = step.spec
        if isinstance(spec, StemSpec):
            return stem_cost(spec.out_channels, step.in_size, spec.stride)
        if isinstance(spec, BlockSpec):
            return block_cost(spec, step.in_size)
        return head_cost(spec.in_channels, spec.width, num_classes)

    return reduce(Cost.__add__, map(step_cost, steps))


def cost(arch: ArchSpec, resolution: int, num_classes: int) -> Cost:
    """Parameters of the network, and MACs of one image of a resolution, which it sees at `arch.shown(resolution)`."""
    size = arch.shown(resolution)
    total = stem_cost(arch.stem_width, size, arch.stem_stride)
    size, in_channels = strided(size, arch.stem_stride), arch.stem_width
    for stage in arch.stages:
        total += stage_cost(in_channels, stage, size)
        size, in_channels = strided(size, stage.stride), stage.width
    return total + head_cost(in_channels, arch.head_width, num_classes)
