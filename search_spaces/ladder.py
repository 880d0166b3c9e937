"""A ladder of search spaces, made by one rule: a resolution and a rung give stages, widths, block counts and strides.

**Rungs.** The middle of the space on rung r, its anchor, costs about 10 GMACs / 2.5^(11 - r): 0.4 million on rung 0,
which suits a microcontroller, and 10 billion on rung 11. Three more lie between two whole numbers, so that a space can
be found for any latency.

**Strides.** The stem halves the image, as in all of timm's mobile networks. Each stage after the first halves the map
again as long as at least `LEAST_MAP` pixels are left at the end: 32 pixels get a total stride of 8, 64 get 16, and 128
and more get 32, which is timm's and the most that its builder takes. A last map of one pixel would leave a k x k
convolution nothing to see. Small images need the pixels that they have, so the first stage keeps the stem's map. At a
total stride of 32 it halves it, too: blocks on a map of 112 pixels cost much (MobileNetV3 has one there, RegNet none).

**Widths** double from stage to stage, as in ResNet, RegNet and ConvNeXt. They are multiples of 8, from 32 on of 16, and
from 128 on of 32, which fill the tiles of the kernels.

**Depth and width.** The number of blocks grows as the fourth root of the cost, and the widths take the rest.
EfficientNet (Tan and Le 2019, https://arxiv.org/abs/1905.11946) deepens somewhat faster, the best RegNets (Radosavovic
et al. 2020, https://arxiv.org/abs/2003.13678) above a GMAC hardly at all, and Dollar et al. (2021,
https://arxiv.org/abs/2103.06877) show that of equal costs the wider networks are the faster ones. Most blocks are in
the stage before the last, as in RegNet and ConvNeXt; with three stages as many in the last.

**Shortcuts** are pooled ones, around every block: for the same time they made networks more accurate on small photos
than those around the blocks that keep the shape ("What earned a place" in docs/measurements.md).
"""

from __future__ import annotations

import itertools
import math
from functools import cache

from search_spaces.arch import ACTIVATIONS, CHANNEL_MULTIPLE, MAX_TOTAL_STRIDE, POOLED, STEM_STRIDE
from search_spaces.cost import cost
from search_spaces.space import SearchSpace, StageChoices, middle

TOP_RUNG, TOP_MACS, GROWTH = 11, 10e9, 2.5
# Rungs are multiples of this.
RUNG_STEP = 0.25
RUNGS = tuple(step * RUNG_STEP for step in range(round(TOP_RUNG / RUNG_STEP) + 1))
# Resolutions that are a choice for images of any size. Small images are shown at their own size (or one that is nearly
# as large) and up to so many times as large, large ones at most at their own and down to so many times as small.
SIZES = (16, 24, 32, 48, 64, 96, 128, 160, 192, 224)
NEARLY, LARGE, FACTOR = 0.85, 160, 2
LEAST_RESOLUTION, MOST_RESOLUTION = 16, 256
# Width in pixels of the last map.
LEAST_MAP = 4
# Blocks of an anchor that costs so many MACs, and the power of the cost with which their number grows. These are the
# space `small` and its anchor; at the cost of the anchor of `imagenet` it gives as many blocks as that has.
BLOCKS, BLOCKS_MACS, DEPTH_EXPONENT = 6, 13e6, 0.25
# Shares of the blocks by stage, for each number of stages.
SHARES = {2: (1, 2), 3: (1, 2, 2), 4: (1, 2, 4, 2)}
WIDTH_FACTORS = (0.625, 0.8, 1.0, 1.25, 1.6)
# The head's width over the last stage's, and its limits: EfficientNet-B0 has 1280. The other choice is a head without
# its 1x1 convolution, as in ResNet and RegNet.
HEAD_EXPANSION, LEAST_HEAD, MOST_HEAD = 4, 128, 1280
KERNEL_SIZES = (3, 5, 7)
GROUP_WIDTHS = (1, 8, 16, 32)
EXPANSIONS = (2, 3, 4, 5, 6)
# A rung is missing where no anchor comes as near as this factor to its cost: the narrowest networks cost more.
TOLERANCE = 1.25
# How the middle widths are found: the fineness of the first stage's width, the factors of each stage's that are tried,
# and how much a stage that is off the doubling counts beside a cost that is off.
FINENESS = 1.01
NEAR = (0.8, 0.9, 1.0, 1.1, 1.25)
BENDING = 0.5
CLASSES = 10


def rung_macs(rung: float) -> float:
    """The multiply-accumulates that the anchor of a rung is meant to cost."""
    macs: float = TOP_MACS * GROWTH ** (rung - TOP_RUNG)
    return macs


def ladder_space(resolution: int | tuple[int, ...], rung: float) -> SearchSpace:
    """The space on a rung of the ladder.

    Args:
        resolution: width and height of the images in pixels; of several, each network has one of its own, and the rung
            is that of the middle one.
        rung: a multiple of a quarter, from 0 to 11.

    Raises:
        ValueError: there is no such rung, or none at this resolution.
    """
    sizes = tuple(sorted({resolution} if isinstance(resolution, int) else {*resolution}))
    shown = ",".join(map(str, sizes))
    for size in sizes:
        if not LEAST_RESOLUTION <= size <= MOST_RESOLUTION:
            raise ValueError(f"resolution={size} is not between {LEAST_RESOLUTION} and {MOST_RESOLUTION} pixels")
    if rung not in RUNGS:
        raise ValueError(f"rung={rung:g} is not a multiple of {RUNG_STEP} between 0 and {TOP_RUNG}")
    widths = _widths(middle(sizes), rung)
    if widths is None:
        least = nearest_rung(sizes, rung)
        raise ValueError(f"rung={rung:g} does not exist at {middle(sizes)} pixels, where {least:g} is the next")
    return _space(f"rung{rung:g}@{shown}", sizes, rung, widths)


def shown_resolutions(resolution: int) -> tuple[int, ...]:
    """The resolutions that are worth a choice for images of a size in pixels."""
    size = next((each for each in SIZES if each >= NEARLY * resolution), SIZES[-1])
    if size >= LARGE:
        return tuple(each for each in SIZES if size / FACTOR <= each <= size)
    return tuple(each for each in SIZES if size <= each <= FACTOR * size)


def nearest_rung(resolutions: tuple[int, ...], rung: float) -> float:
    """The rung at some resolutions that is nearest to a number; of low ones that do not exist, the next."""
    steps = round(min(max(rung, 0), TOP_RUNG) / RUNG_STEP)
    return next(each for each in RUNGS[steps:] if _widths(middle(resolutions), each) is not None)


def stage_strides(resolution: int) -> tuple[int, ...]:
    """The strides of the stages for images of a resolution in pixels."""
    total = STEM_STRIDE
    while total < MAX_TOTAL_STRIDE and resolution >= 2 * total * LEAST_MAP:
        total *= 2
    halvings = int(math.log2(total // STEM_STRIDE))
    return (2,) * halvings if total == MAX_TOTAL_STRIDE else (1,) + (2,) * halvings


@cache
def _widths(resolution: int, rung: float) -> tuple[int, ...] | None:
    """The middle widths of the stages whose anchor is nearest to the rung's cost; None where none is near."""
    target, stages = rung_macs(rung), len(stage_strides(resolution))

    def excess(widths: tuple[int, ...]) -> float:
        anchor = _space("rung", (resolution,), rung, widths).anchor()
        return math.log(cost(anchor, resolution, CLASSES).macs / target)

    def doubling(first: float) -> tuple[int, ...]:
        return tuple(_rounded(first * 2**number) for number in range(stages))

    low, high = 1.0, 4096.0
    while high / low > FINENESS:
        between = math.sqrt(low * high)
        low, high = (low, between) if excess(doubling(between)) > 0 else (between, high)
    # Rounded widths jump. To give single stages other widths comes nearer to the cost, at the price of the doubling.
    doubled = [low * 2**number for number in range(stages)]

    def badness(widths: tuple[int, ...]) -> float:
        bent = sum(abs(math.log(width / exact)) for width, exact in zip(widths, doubled, strict=True))
        return abs(excess(widths)) + BENDING * bent / stages

    near = itertools.product(*(sorted({_rounded(factor * width) for factor in NEAR}) for width in doubled))
    best = min(near, key=badness)
    return best if abs(excess(best)) < math.log(TOLERANCE) else None


def _space(name: str, resolutions: tuple[int, ...], rung: float, widths: tuple[int, ...]) -> SearchSpace:
    strides = stage_strides(middle(resolutions))
    total = BLOCKS * (rung_macs(rung) / BLOCKS_MACS) ** DEPTH_EXPONENT
    shares = SHARES[len(strides)]
    stages = [
        _stage(width, max(1, round(total * share / sum(shares))), stride)
        for width, share, stride in zip(widths, shares, strides, strict=True)
    ]
    head = min(max(HEAD_EXPANSION * widths[-1], LEAST_HEAD), MOST_HEAD)
    return SearchSpace(
        name=name,
        description=f"ConvFirst networks of about {_shortened(rung_macs(rung))} MACs; total stride "
        f"{STEM_STRIDE * math.prod(strides)}.",
        resolution=resolutions,
        # What has more pixels has fewer channels.
        stem_width=_around(_rounded(widths[0] / strides[0])),
        head_width=(0, _rounded(head)),
        activation=ACTIVATIONS,
        stages=tuple(stages),
        shortcut=(POOLED,),
    )


@cache
def _stage(width: int, blocks: int, stride: int) -> StageChoices:
    widths = _around(width)
    spread = blocks // 2
    return StageChoices(
        width=widths,
        kernel_size=KERNEL_SIZES,
        # A group of all channels is a full convolution.
        group_width=tuple(group for group in GROUP_WIDTHS if group == 1 or 2 * group <= widths[0]),
        expansion=EXPANSIONS,
        blocks=tuple(range(blocks - spread, blocks + spread + 1)),
        stride=(stride,),
    )


def _around(centre: int) -> tuple[int, ...]:
    """Widths on both sides of one, which stays the middle: there are never more above it than below."""
    found = sorted({_rounded(factor * centre) for factor in WIDTH_FACTORS})
    below = [width for width in found if width < centre]
    above = [width for width in found if width > centre]
    return (*below, centre, *above[: len(below)])


def _rounded(width: float) -> int:
    multiple = 8 if width < 28 else 16 if width < 120 else 32
    return max(CHANNEL_MULTIPLE, math.floor(width / multiple + 0.5) * multiple)


def _shortened(macs: float) -> str:
    return f"{macs / 1e9:.2g} G" if macs >= 1e9 else f"{macs / 1e6:.2g} M"
