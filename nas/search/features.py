"""Figures of an architecture in closed form, from which a model guesses its accuracy and latency.

Counts like these predict accuracy about as well as measures of untrained networks do (GRAF: Kadlecova et al. 2024,
https://arxiv.org/abs/2406.03424). They do not depend on the number of stages, so that they suit any space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

import numpy as np

from search_spaces import ArchSpec, cost
from search_spaces.arch import ACTIVATIONS, POOLED, STEM_KERNEL_SIZE, StageSpec

# The first of the features: logarithms of parameters and MACs, which say most.
SIZES = 2
# The figures of a stage, which stand for the first, for the last, and for the mean of all stages.
OF_STAGE: tuple[Callable[[StageSpec], float], ...] = (
    lambda stage: math.log(stage.width),
    lambda stage: stage.kernel_size,
    lambda stage: math.log(stage.group_width),
    lambda stage: math.log(stage.expansion),
)


def features(arch: ArchSpec, resolution: int, classes: int) -> list[float]:
    """The features of an architecture.

    Args:
        resolution: width of the images of networks that have no resolution of their own, in pixels.
        classes: number of classes.
    """
    counted = cost(arch, resolution, classes)
    first, last = arch.stages[0], arch.stages[-1]
    found = [math.log(counted.params), math.log(max(1, counted.macs))]
    found += [math.log(arch.stem_width), arch.stem_stride, math.log(max(1, arch.head_width)), arch.head_width > 0]
    found += [float(arch.activation == name) for name in ACTIVATIONS]
    found += [arch.shortcut == POOLED, math.log(arch.shown(resolution))]
    found += [len(arch.stages), sum(stage.blocks for stage in arch.stages), first.blocks, last.blocks]
    found += [first.stride, last.stride]
    for figure in OF_STAGE:
        found += [figure(first), figure(last), fmean(figure(stage) for stage in arch.stages)]
    return [*found, *_reach(arch)]


def _reach(arch: ArchSpec) -> tuple[float, float]:
    """Logarithms of the receptive field of a last feature, and of the stride between two of them, in pixels."""
    field, stride = STEM_KERNEL_SIZE, arch.stem_stride
    for stage in arch.stages:
        for block in range(stage.blocks):
            field += (stage.kernel_size - 1) * stride
            stride *= stage.stride if block == 0 else 1
    return math.log(field), math.log(stride)


def matrix(archs: Sequence[ArchSpec], resolution: int, classes: int) -> np.ndarray:
    """The features of several architectures, (n, f)."""
    return np.array([features(arch, resolution, classes) for arch in archs], dtype=float)
