"""A ConvFirst architecture as one small frozen value; everything else about it is derived.

    stem 3x3 conv, stride 2
    stages of ConvFirst blocks: grouped k x k conv -> 1x1 expand -> activation -> 1x1 project (+ residual)
    head: global pool -> 1x1 conv -> activation -> classifier

The block is timm's `UniversalInvertedResidual` with only its first convolution, so every architecture here is also a
list of timm arch strings, and timm's own builder makes the network (`ArchSpec.build`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# The names timm's `get_act_layer` knows them by.
ACTIVATIONS = ("silu", "relu", "hard_swish", "gelu")

# timm rounds widths to multiples of 8; a width that it would change is refused instead.
CHANNEL_MULTIPLE = 8

STEM_STRIDE = 2

# timm's builder turns strides past this one into dilations, which would be another network.
MAX_TOTAL_STRIDE = 32


def expanded_channels(channels: int, expansion: float) -> int:
    """Channels between the two 1x1 convolutions, as timm's `make_divisible` rounds them.

    Kept in step with timm by a test, rather than imported: an architecture costs no import of torch.
    """
    target = channels * expansion
    rounded = max(CHANNEL_MULTIPLE, int(target + CHANNEL_MULTIPLE / 2) // CHANNEL_MULTIPLE * CHANNEL_MULTIPLE)
    return rounded + CHANNEL_MULTIPLE if rounded < 0.9 * target else rounded


def _require_whole(name: str, value: object, minimum: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name}={value!r} is not a whole number of at least {minimum}")


def _require_channels(name: str, value: object) -> None:
    _require_whole(name, value)
    if value % CHANNEL_MULTIPLE:  # type: ignore[operator]
        raise ValueError(f"{name}={value} is not a multiple of {CHANNEL_MULTIPLE}")


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage: `blocks` ConvFirst blocks of `width` output channels, the first of them with `stride`.

    Args:
        width: output channels, a multiple of 8.
        kernel_size: of the grouped convolution, odd.
        group_width: channels per group of the grouped convolution; 1 is depthwise.
        expansion: expanded channels over input channels of the block.
        blocks: how many blocks.
        stride: 1 or 2, of the first block's grouped convolution.

    Raises:
        ValueError: naming the field and its value.
    """

    width: int
    kernel_size: int
    group_width: int
    expansion: float
    blocks: int
    stride: int

    def __post_init__(self) -> None:
        _require_channels("width", self.width)
        _require_whole("kernel_size", self.kernel_size)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} is not odd")
        _require_whole("group_width", self.group_width)
        _require_whole("blocks", self.blocks)
        if self.stride not in (1, 2):
            raise ValueError(f"stride={self.stride!r} is neither 1 nor 2")
        if isinstance(self.expansion, bool) or not isinstance(self.expansion, int | float) or not self.expansion > 0:
            raise ValueError(f"expansion={self.expansion!r} is not a positive number")
        # 4 and 4.0 are one architecture and must print, hash and serialise alike.
        object.__setattr__(self, "expansion", float(self.expansion))
        if self.blocks > 1 and self.width % self.group_width:
            raise ValueError(f"group_width={self.group_width} does not divide width={self.width}")

    @property
    def arch_string(self) -> str:
        """The stage as a timm arch string, such as `uir_r2_a3_k0_s2_e4_c64_gs8`."""
        return (
            f"uir_r{self.blocks}_a{self.kernel_size}_k0_s{self.stride}_e{self.expansion:g}_c{self.width}"
            f"_gs{self.group_width}"
        )

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.blocks}x{self.width}{stride} k{self.kernel_size} g{self.group_width} e{self.expansion:g}"


@dataclass(frozen=True)
class BlockSpec:
    """One ConvFirst block inside a network, with the channels that enter it. Derived; see `ArchSpec.blocks`."""

    in_channels: int
    out_channels: int
    kernel_size: int
    group_width: int
    expansion: float
    stride: int

    @property
    def expanded_channels(self) -> int:
        return expanded_channels(self.in_channels, self.expansion)

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.in_channels == self.out_channels


def stage_blocks(in_channels: int, stage: StageSpec) -> tuple[BlockSpec, ...]:
    """The blocks of a stage that `in_channels` channels enter: only the first changes width and resolution."""
    first = BlockSpec(in_channels, stage.width, stage.kernel_size, stage.group_width, stage.expansion, stage.stride)
    rest = dataclasses.replace(first, in_channels=stage.width, stride=1)
    return (first,) + (rest,) * (stage.blocks - 1)


@dataclass(frozen=True)
class ArchSpec:
    """A whole network.

    Args:
        stem_width: channels of the 3x3 stride-2 stem, a multiple of 8.
        stages: from the stem to the head.
        activation: one of `ACTIVATIONS`, used throughout.
        head_width: channels of the 1x1 convolution after the pool, a multiple of 8.

    Raises:
        ValueError: naming the field and its value; so also where a group width does not divide the width it is
            applied to (in a stage's first block the previous stage's), which timm would report as an empty
            AssertionError.
    """

    stem_width: int
    stages: tuple[StageSpec, ...]
    activation: str
    head_width: int

    def __post_init__(self) -> None:
        _require_channels("stem_width", self.stem_width)
        _require_channels("head_width", self.head_width)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is none of {', '.join(ACTIVATIONS)}")
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise ValueError("stages=() is empty: a network has at least one stage")
        previous_width = self.stem_width
        for number, stage in enumerate(self.stages, start=1):
            if previous_width % stage.group_width:
                raise ValueError(
                    f"group_width={stage.group_width} of stage {number} does not divide the {previous_width} channels "
                    "that enter it"
                )
            previous_width = stage.width
        if self.total_stride > MAX_TOTAL_STRIDE:
            raise ValueError(f"total stride {self.total_stride} is above {MAX_TOTAL_STRIDE}")

    @property
    def total_stride(self) -> int:
        stride = STEM_STRIDE
        for stage in self.stages:
            stride *= stage.stride
        return stride

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """All blocks in order, with the channels that enter each."""
        in_channels = self.stem_width
        blocks: tuple[BlockSpec, ...] = ()
        for stage in self.stages:
            blocks += stage_blocks(in_channels, stage)
            in_channels = stage.width
        return blocks

    @cached_property
    def arch_id(self) -> str:
        """Twelve hex digits that equal architectures share, on every machine and in every version."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    @property
    def arch_def(self) -> list[list[str]]:
        """The stages as timm's `decode_arch_def` takes them."""
        return [[stage.arch_string] for stage in self.stages]

    def __str__(self) -> str:
        stages = " | ".join(str(stage) for stage in self.stages)
        return f"{self.activation} stem {self.stem_width} | {stages} | head {self.head_width}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Canonical JSON: equal architectures give equal text."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ArchSpec:
        """The inverse of `to_json`.

        Raises:
            ValueError: the text is not JSON, lacks a field, has one too many, or holds an impossible value.
        """
        try:
            fields = json.loads(text)
            stages = tuple(StageSpec(**stage) for stage in fields.pop("stages"))
            return cls(stages=stages, **fields)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not an architecture: {text[:200]!r} ({error})") from error

    def build(self, num_classes: int, in_chans: int = 3) -> nn.Module:
        """The network, made by timm's own builder from timm's own classes, freshly initialised.

        Args:
            num_classes: outputs of the classifier.
            in_chans: channels of the input images (N, in_chans, H, W).
        """
        from timm.layers import get_act_layer
        from timm.models._efficientnet_builder import decode_arch_def
        from timm.models.mobilenetv3 import MobileNetV3

        return MobileNetV3(
            decode_arch_def(self.arch_def),
            num_classes=num_classes,
            in_chans=in_chans,
            stem_size=self.stem_width,
            num_features=self.head_width,
            act_layer=get_act_layer(self.activation),
        )
