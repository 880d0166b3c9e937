"""A ConvFirst architecture as one small frozen value; everything else about it is derived.

    stem 3x3 conv, stride 2 or 1
    stages of ConvFirst blocks: grouped k x k conv -> 1x1 expand -> activation -> 1x1 project (+ shortcut)
    head: global pool -> 1x1 conv -> activation -> classifier, or global pool -> classifier

An architecture may have a resolution of its own, to which the images that it is given are resized.

The block is timm's `UniversalInvertedResidual` with only its first convolution: timm's own builder makes the network
from arch strings (`ArchSpec.build`), and `search_spaces.timm_models` changes what it cannot make. As in timm, a block's
input is added to its output where both have the same shape. With pooled shortcuts it is added everywhere: averaged over
the pixels of a stride, and with zeros for additional channels, as in PyramidNet (Han et al. 2017,
https://arxiv.org/abs/1610.02915); of more channels than the output has, the first ones count.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# By timm's names, which `get_act_layer` takes.
ACTIVATIONS = ("silu", "relu", "hard_swish", "gelu")

# Around which blocks the input is added to the output: those that keep the shape, or all of them.
IDENTITY, POOLED = SHORTCUTS = ("identity", "pooled")

# timm rounds widths to multiples of 8; a width that it would change is refused instead.
CHANNEL_MULTIPLE = 8

IMAGE_CHANNELS, STEM_KERNEL_SIZE, STEM_STRIDE = 3, 3, 2

# timm's builder turns strides past this one into dilations, which would be another network.
MAX_TOTAL_STRIDE = 32

# Of images a network of its own resolution needs at least so many pixels.
MIN_RESOLUTION = 8

# The pieces of `str(arch)`, in which spaces are single, and how a message names what was expected.
_RESOLUTION = (re.compile(r"([0-9]+) px"), "a resolution, such as '64 px'")
_STEM = (re.compile(r"(\S+) stem ([0-9]+)(?:/([0-9]+))?"), "a stem, such as 'silu stem 16'")
_STAGE = (
    re.compile(r"([0-9]+)x([0-9]+)(?:/([0-9]+))? k([0-9]+) g([0-9]+) e([0-9]*\.?[0-9]+(?:e[-+]?[0-9]+)?)"),
    "a stage, such as '2x32/2 k3 g8 e4' (blocks x width / stride, kernel size, group width, expansion)",
)
_HEAD = (re.compile(r"head ([0-9]+)"), "a head, such as 'head 128'")
_POOLED_SHORTCUTS = "pooled shortcuts"
# A message quotes at most so many characters of a text.
_QUOTED_LENGTH = 200


def expanded_channels(channels: int, expansion: float) -> int:
    """Channels between the two 1x1 convolutions, as timm's `make_divisible` rounds them.

    Kept in step with timm by a test, rather than imported: an architecture costs no import of torch.
    """
    target = channels * expansion
    rounded = max(CHANNEL_MULTIPLE, int(target + CHANNEL_MULTIPLE / 2) // CHANNEL_MULTIPLE * CHANNEL_MULTIPLE)
    return rounded + CHANNEL_MULTIPLE if rounded < 0.9 * target else rounded


def _shortest(value: float) -> str:
    """The text "4" for 4.0, and all digits of other numbers, so that reading it gives the same number."""
    return repr(value).removesuffix(".0")


def _quoted(text: str) -> str:
    return repr(text[:_QUOTED_LENGTH])


def _parsed(piece: str, form: tuple[re.Pattern[str], str], left_out: int = 1) -> tuple[str, ...]:
    """The groups of the form's pattern; `left_out` for one that is left out, which only a stride can be."""
    pattern, expected = form
    piece = " ".join(piece.split())
    match = pattern.fullmatch(piece)
    if match is None:
        raise ValueError(f"{_quoted(piece)} is not {expected}")
    return match.groups(str(left_out))


def _require_whole(name: str, value: object, minimum: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name}={value!r} is not a whole number of at least {minimum}")


def _require_channels(name: str, value: object) -> None:
    _require_whole(name, value)
    if value % CHANNEL_MULTIPLE:  # type: ignore[operator]
        raise ValueError(f"{name}={value} is not a multiple of {CHANNEL_MULTIPLE}")


def _require_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} is not a positive number")


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage: `blocks` ConvFirst blocks of `width` output channels, the first of them with `stride`.

    Args:
        width: output channels, a multiple of 8.
        kernel_size: kernel size of the grouped convolution, odd.
        group_width: channels per group of the grouped convolution; 1 is depthwise.
        expansion: expanded channels over input channels of the block.
        blocks: number of blocks.
        stride: stride of the first block's grouped convolution, 1 or 2.

    Raises:
        ValueError: the message names the field and its value.
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
        # 2.0 would be equal, but give another arch_id.
        _require_whole("stride", self.stride)
        if self.stride not in (1, 2):
            raise ValueError(f"stride={self.stride!r} is neither 1 nor 2")
        _require_positive("expansion", self.expansion)
        # 4 and 4.0 are one architecture and must print, hash and serialise alike.
        object.__setattr__(self, "expansion", float(self.expansion))
        if self.blocks > 1 and self.width % self.group_width:
            raise ValueError(f"group_width={self.group_width} does not divide width={self.width}")

    @property
    def arch_string(self) -> str:
        """The stage as a timm arch string, such as `uir_r2_a3_k0_s2_e4_c64_gs8`."""
        return (
            f"uir_r{self.blocks}_a{self.kernel_size}_k0_s{self.stride}_e{_shortest(self.expansion)}"
            f"_c{self.width}_gs{self.group_width}"
        )

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return (
            f"{self.blocks}x{self.width}{stride} k{self.kernel_size} g{self.group_width} e{_shortest(self.expansion)}"
        )

    @classmethod
    def parse(cls, text: str) -> StageSpec:
        """The inverse of `str(stage)`; extra spaces do not matter.

        Raises:
            ValueError: one line, with the text or with the field that is impossible.
        """
        blocks, width, stride, kernel_size, group_width, expansion = _parsed(text, _STAGE)
        return cls(
            width=int(width), kernel_size=int(kernel_size), group_width=int(group_width), expansion=float(expansion),
            blocks=int(blocks), stride=int(stride),
        )  # fmt: skip


@dataclass(frozen=True)
class BlockSpec:
    """One ConvFirst block inside a network, with the channels that enter it; `ArchSpec.blocks` derives it.

    Args:
        shortcut: one of `SHORTCUTS`; "identity" where the block keeps the shape.
    """

    in_channels: int
    out_channels: int
    kernel_size: int
    group_width: int
    expansion: float
    stride: int
    shortcut: str = IDENTITY

    def __post_init__(self) -> None:
        # Blocks that keep the shape are the same in all networks.
        if self.keeps_shape:
            object.__setattr__(self, "shortcut", IDENTITY)

    @property
    def expanded_channels(self) -> int:
        return expanded_channels(self.in_channels, self.expansion)

    @property
    def keeps_shape(self) -> bool:
        return self.stride == 1 and self.in_channels == self.out_channels

    @property
    def residual(self) -> bool:
        """Whether the input, pooled if need be, is added to the output."""
        return self.keeps_shape or self.shortcut == POOLED


@dataclass(frozen=True)
class StemSpec:
    """The stem inside a network; `ArchSpec.walk` derives it."""

    in_channels: int
    out_channels: int
    stride: int = STEM_STRIDE


@dataclass(frozen=True)
class HeadSpec:
    """The head inside a network, without its classifier's size; `ArchSpec.walk` derives it. Width 0 is no 1x1 conv."""

    in_channels: int
    width: int


@dataclass(frozen=True)
class Step:
    """One part of a network on square images of one resolution.

    Args:
        name: "stem", "stage1.0", "stage1.1", ..., "head".
        spec: the stem, block or head.
        in_size, out_size: height or width in pixels of the tensors that enter and leave the part.
    """

    name: str
    spec: StemSpec | BlockSpec | HeadSpec
    in_size: int
    out_size: int


def strided(size: int, stride: int) -> int:
    """Output height or width of a convolution padded by half its (odd) kernel."""
    return (size + stride - 1) // stride


def stage_blocks(in_channels: int, stage: StageSpec, shortcut: str = IDENTITY) -> tuple[BlockSpec, ...]:
    """The blocks of a stage that `in_channels` channels enter: only the first changes width and resolution."""
    first = BlockSpec(
        in_channels, stage.width, stage.kernel_size, stage.group_width, stage.expansion, stage.stride, shortcut
    )
    rest = dataclasses.replace(first, in_channels=stage.width, stride=1)
    return (first,) + (rest,) * (stage.blocks - 1)


@dataclass(frozen=True)
class ArchSpec:
    """A whole network.

    Args:
        stem_width: channels of the 3x3 stem, a multiple of 8.
        stages: the stages, from the stem to the head.
        activation: name of the activation used throughout, one of `ACTIVATIONS`.
        head_width: channels of the 1x1 convolution after the pool, a multiple of 8; 0 for none, and no activation.
        resolution: width and height in pixels to which images are resized for this network; None leaves that to whoever
            trains or deploys it.
        stem_stride: stride of the stem, 1 or 2.
        shortcut: "identity" for a shortcut around the blocks that keep the shape, "pooled" for one around all.

    Raises:
        ValueError: the message names the field and its value. Also raised where a group width does not divide the width
            it is applied to (in a stage's first block the previous stage's), which timm would report as an empty
            AssertionError.
    """

    stem_width: int
    stages: tuple[StageSpec, ...]
    activation: str
    head_width: int
    resolution: int | None = None
    stem_stride: int = STEM_STRIDE
    shortcut: str = IDENTITY

    def __post_init__(self) -> None:
        if self.shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut={self.shortcut!r} is none of {', '.join(SHORTCUTS)}")
        _require_whole("stem_stride", self.stem_stride)
        if self.stem_stride not in (1, 2):
            raise ValueError(f"stem_stride={self.stem_stride} is neither 1 nor 2")
        if self.resolution is not None:
            _require_whole("resolution", self.resolution, MIN_RESOLUTION)
        _require_channels("stem_width", self.stem_width)
        # Not False, which would be equal to 0, but give another arch_id.
        if self.head_width or isinstance(self.head_width, bool):
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
        # timm's builder counts two for any stem.
        strides = STEM_STRIDE * math.prod(stage.stride for stage in self.stages)
        if strides > MAX_TOTAL_STRIDE:
            raise ValueError(f"total stride {strides} is above {MAX_TOTAL_STRIDE}")

    @property
    def total_stride(self) -> int:
        return self.stem_stride * math.prod(stage.stride for stage in self.stages)

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """All blocks in order, with the channels that enter each."""
        in_channels = self.stem_width
        blocks: tuple[BlockSpec, ...] = ()
        for stage in self.stages:
            blocks += stage_blocks(in_channels, stage, self.shortcut)
            in_channels = stage.width
        return blocks

    def shown(self, resolution: int) -> int:
        """Width and height of the images as the network sees them: its own resolution, or else the given one."""
        return self.resolution or resolution

    def walk(self, resolution: int) -> tuple[Step, ...]:
        """Stem, blocks and head in order, for images of a resolution, which the network sees at `shown(resolution)`."""
        resolution = self.shown(resolution)
        size = strided(resolution, self.stem_stride)
        steps = [Step("stem", StemSpec(IMAGE_CHANNELS, self.stem_width, self.stem_stride), resolution, size)]
        names = (f"stage{number}.{index}" for number, s in enumerate(self.stages, 1) for index in range(s.blocks))
        for name, block in zip(names, self.blocks, strict=True):
            in_size, size = size, strided(size, block.stride)
            steps.append(Step(name, block, in_size, size))
        return (*steps, Step("head", HeadSpec(self.stages[-1].width, self.head_width), size, 1))

    @cached_property
    def arch_id(self) -> str:
        """Twelve hex digits that equal architectures share, on every machine and in every version."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    @property
    def arch_def(self) -> list[list[str]]:
        """The stages as timm's `decode_arch_def` takes them."""
        return [[stage.arch_string] for stage in self.stages]

    def __str__(self) -> str:
        stages = " | ".join([*map(str, self.stages), *([_POOLED_SHORTCUTS] if self.shortcut == POOLED else [])])
        shown = "" if self.resolution is None else f"{self.resolution} px | "
        stride = "" if self.stem_stride == STEM_STRIDE else f"/{self.stem_stride}"
        return f"{shown}{self.activation} stem {self.stem_width}{stride} | {stages} | head {self.head_width}"

    @classmethod
    def parse(cls, text: str) -> ArchSpec:
        """The inverse of `str(arch)`: extra spaces do not matter, and the JSON of `to_json` is also read.

        Raises:
            ValueError: one line, with the piece that does not parse and what it should be, or with the field that is
                impossible.
        """
        if text.lstrip().startswith("{"):
            return cls.from_json(text)
        first, *pieces = text.split("|")
        resolution = None
        if " ".join(first.split()).endswith(" px"):
            resolution = int(_parsed(first, _RESOLUTION)[0])
        else:
            pieces.insert(0, first)
        if len(pieces) < 3:
            raise ValueError(
                f"{_quoted(text.strip())} is not an architecture, such as 'silu stem 16 | 2x32/2 k3 g8 e4 | head 128'"
            )
        activation, stem_width, stem_stride = _parsed(pieces[0], _STEM, STEM_STRIDE)
        pooled = " ".join(pieces[-2].split()) == _POOLED_SHORTCUTS
        stages = []
        for number, piece in enumerate(pieces[1 : -2 if pooled else -1], start=1):
            try:
                stages.append(StageSpec.parse(piece))
            except ValueError as error:
                raise ValueError(f"stage {number}: {error}") from error
        (head_width,) = _parsed(pieces[-1], _HEAD)
        return cls(
            int(stem_width), tuple(stages), activation, int(head_width), resolution, int(stem_stride),
            POOLED if pooled else IDENTITY,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        # As `dataclasses.asdict` does, which copies each value and so took a fifth of a proposal's time.
        fields = {name: getattr(self, name) for name in _ARCH_FIELDS}
        fields["stages"] = tuple({name: getattr(stage, name) for name in _STAGE_FIELDS} for stage in self.stages)
        # Without these, architectures keep the text and the arch_id that they had before there was a choice.
        if self.resolution is None:
            del fields["resolution"]
        if self.stem_stride == STEM_STRIDE:
            del fields["stem_stride"]
        if self.shortcut == IDENTITY:
            del fields["shortcut"]
        return fields

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
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not an architecture: {_quoted(text)} ({error})") from error

    def build(self, num_classes: int) -> nn.Module:
        """The network for images (N, 3, H, W), made by timm's own builder from its own classes, freshly initialised."""
        from search_spaces.timm_config import model_args
        from search_spaces.timm_models import network

        return network(num_classes=num_classes, **model_args(self))


_ARCH_FIELDS = tuple(field.name for field in dataclasses.fields(ArchSpec))
_STAGE_FIELDS = tuple(field.name for field in dataclasses.fields(StageSpec))
