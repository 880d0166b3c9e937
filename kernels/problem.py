"""Problems (what a fused block computes), tilings (how its work is divided), and the rules of which are supported.

These are values without tensors and Triton, so that tilings can be counted, and support be asked for, on any machine.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil
from typing import Any, Protocol

KERNEL_SIZES = (3, 5, 7)
ACTIVATIONS = ("silu", "relu", "gelu", "hard_swish")
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
SUPPORTED: dict[str, Collection[object]] = {"kernel_size": KERNEL_SIZES, "stride": (1, 2), "dtype": tuple(DTYPE_BYTES)}
CHANNEL_MULTIPLE = 8
# With more channels one launch cannot win: a tile's accumulator and its input fill the registers and the shared memory
# of a multiprocessor, and every tile reads 2 MiB of weights or more.
MAX_CHANNELS = 512
# Group widths that fill a block of 16 or 32 channels evenly, so that grouped weights pack into dense blocks.
GROUP_WIDTHS = (1, 2, 4, 8, 16, 32)
# The smallest inner dimension of a tensor-core product in Triton.
MIN_DOT = 16
# Channels of the widest tensor in a program; wider ones leave the compiler short of registers.
LARGEST_PART = 128
# A convolution in "pairs" computes this many columns of the output at once, for blocks of PAIR_BLOCK channels, from
# PAIR_SPAN columns of the input a step: products with an inner dimension of PAIR_SPAN * PAIR_BLOCK.
PAIR, PAIR_BLOCK, PAIR_SPAN = 2, 8, 4
# Weights of the 1x1 convolutions are padded to a multiple of this many hidden channels, and those of a full convolution
# to one of this many input channels: the largest steps in which any tiling reads them.
HIDDEN_MULTIPLE = 128
DENSE_MULTIPLE = 64
# The most programs that may share the hidden channels of a tile.
MAX_SPLITS = 32
# The most tiles that may be split; with more tiles there is no need to.
COUNTERS = 1024
# Offsets into a tensor of this many elements or more need 64 bits.
WIDE_ELEMENTS = 2**31


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`."""
    return 1 << (value - 1).bit_length()


@lru_cache(maxsize=1024)
def parts(channels: int, minimum: int = MIN_DOT, largest: int = LARGEST_PART) -> tuple[int, ...]:
    """Divide channels into parts, each a power of two: 96 -> (64, 32), 320 -> (128, 128, 64), 24 -> (16, 16).

    The sizes of Triton's tensors are powers of two. In one tensor 96 channels would be computed as 128 and 320 as 512;
    in parts they take what they need, or a quarter more at most from 64 channels up. The sum does not depend on
    `largest`.

    Args:
        minimum: channels of the smallest part; a power of two.
        largest: channels of the largest part; a power of two that divides `LARGEST_PART`.
    """
    whole, rest = divmod(channels, LARGEST_PART)
    pieces = [LARGEST_PART] * whole
    if rest:
        padded = max(minimum, power_of_two(rest))
        first = padded // 2
        second = max(minimum, power_of_two(rest - first)) if rest > first >= minimum else padded
        pieces += [first, second] if first + second < padded else [padded]
    return tuple(piece for part in pieces for piece in [min(part, largest)] * max(1, part // largest))


def shares(columns: int, width: int, block: int, warps: int) -> int:
    """Number of shares into which the columns of a product of blocks are divided.

    Each share reads the blocks' weights once more. With as many blocks as warps there is one share; more warps each get
    columns of their own, as far as there are enough.

    Args:
        columns: number of pixels; each share has at least `MIN_DOT`.
        width, block: channels of the tensor and of one block.
        warps: number of warps of the program.
    """
    return max(1, min(columns // MIN_DOT, warps * block // width))


def pair_steps(kernel_size: int) -> int:
    """Spans of `PAIR_SPAN` columns of the input that a pair of output columns needs."""
    return (kernel_size + PAIR + PAIR_SPAN - 2) // PAIR_SPAN


class Convolved:
    """Sizes that follow from a convolution's fields; a base for dataclasses that have these fields."""

    __slots__ = ()
    batch: int
    height: int
    width: int
    stride: int

    @property
    def out_height(self) -> int:
        return (self.height - 1) // self.stride + 1

    @property
    def out_width(self) -> int:
        return (self.width - 1) // self.stride + 1

    @property
    def out_pixels(self) -> int:
        """Output pixels of the whole batch, which are divided into tiles."""
        return self.batch * self.out_height * self.out_width


class Splittable(Convolved):
    """Sizes of a block whose tiles may be split; a base for dataclasses that have these fields."""

    __slots__ = ()
    out_channels: int
    max_splits: int

    @property
    def padded_out(self) -> int:
        """Output channels as they are computed, zero past the real ones."""
        return sum(parts(self.out_channels))

    @property
    def scratch_elements(self) -> int:
        """Elements of the float32 scratch that the caller lends for partial sums."""
        return self.max_splits * self.out_pixels * self.padded_out if self.max_splits > 1 else 0


@dataclass(frozen=True)
class BlockProblem(Splittable):
    """One ConvFirst block on one input: everything that decides what is computed.

    Args:
        batch, height, width: the input's sizes.
        in_channels, hidden_channels, out_channels: numbers of channels that enter the block, lie within and leave it.
        kernel_size, group_width, stride: the grouped convolution's; it is padded by kernel_size // 2.
        activation: one of `ACTIVATIONS`.
        residual: whether the input is added to the output: averaged over the pixels of a stride, and with zeros for
            additional channels; of more channels than the output has, the first ones.
        dtype: data type of input, weights and output; one of `DTYPE_BYTES`.
        max_splits: most programs that may share a tile's hidden channels; for their float32 partial sums the caller
            lends scratch. With 1 no tile is split.
    """

    batch: int
    height: int
    width: int
    in_channels: int
    hidden_channels: int
    out_channels: int
    kernel_size: int
    group_width: int
    stride: int
    activation: str
    residual: bool
    dtype: str
    max_splits: int = 1

    @property
    def itemsize(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def conv_macs(self) -> int:
        return self.out_pixels * self.in_channels * self.kernel_size**2 * self.group_width

    @property
    def mlp_macs(self) -> int:
        return self.out_pixels * self.hidden_channels * (self.in_channels + self.out_channels)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the block (1 MAC = 2 FLOPs)."""
        return self.conv_macs + self.mlp_macs

    @property
    def activation_bytes(self) -> int:
        """Bytes of input and output, which a fused block has to move once, beside its weights."""
        in_pixels = self.batch * self.height * self.width
        return self.itemsize * (in_pixels * self.in_channels + self.out_pixels * self.out_channels)

    @property
    def shortcut_elements(self) -> int:
        """Elements of the input that are added to the output."""
        channels = min(self.in_channels, self.out_channels)
        return self.batch * self.height * self.width * channels if self.residual else 0

    @cached_property
    def conv_block(self) -> int:
        """Channels of one dense block of the grouped convolution's weights."""
        return MIN_DOT if self.is_dense else max(MIN_DOT, power_of_two(self.group_width))

    @property
    def is_dense(self) -> bool:
        """Whether the convolution is a full one, too wide for a single block."""
        return self.group_width > max(GROUP_WIDTHS)

    @property
    def padded_hidden(self) -> int:
        return ceil(self.hidden_channels / HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE

    @cached_property
    def padded_in(self) -> int:
        """Input channels as they are computed, zero past the real ones."""
        return sum(parts(self.in_channels, self.conv_block))


class Tiled(Protocol):
    """The sizes of a problem from which a tiling is counted."""

    @property
    def batch(self) -> int: ...
    @property
    def out_height(self) -> int: ...
    @property
    def out_width(self) -> int: ...
    @property
    def out_pixels(self) -> int: ...
    @property
    def hidden_channels(self) -> int: ...
    @property
    def padded_hidden(self) -> int: ...
    @property
    def padded_out(self) -> int: ...
    @property
    def max_splits(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Tiling:
    """The division of a fused block's work.

    Args:
        block_m: output pixels of a tile; a power of two, at least 16.
        block_e: hidden channels of one step of expansion and projection; a power of two, at least 16.
        conv: form of the convolution. "mma" multiplies block-diagonal blocks of channels on tensor cores. A depthwise
            convolution takes "diagonal", the same with its weights on diagonals, or "fma", channel by channel without
            tensor cores. A full one of more than 32 channels takes "dense", over chunks of input channels. With stride
            1, groups of at most 8 channels can also take "pairs": a product computes two neighbouring columns of the
            output from all columns of the input that either needs. That loads fewer pixels than "mma" and has fewer
            zeros (for k 3 a row of taps has 32 inputs instead of 48, where 24 are real). It needs tiles of rows, of 32
            columns or more.
        splits: programs that share a tile's hidden channels; more than one needs scratch, for float32 partial sums.
        num_warps: warps of a program.
        num_stages: stages of the pipeline over hidden channels.
        conv_stages: stages of the pipeline over the convolution's taps, or columns of taps; 1 loads through L1.
        dense_block: input channels of one step of a "dense" convolution.
        part: most channels of one tensor, 64 or 128; in pairs also 32, for the convolution's channels. With three
            launches the convolution's channels of each program.
        out_splits: programs that share a tile's output channels. Each computes the hidden ones for itself, which costs
            work but no memory.
        rows: rows of the output in a tile, a power of two. A tile then has block_m / rows columns, which continue from
            image to image, and each row of the input is loaded once for a column of taps. With 1 a tile is block_m
            consecutive pixels, loaded for each tap. A "dense" convolution has no rows.
        tiles_each: tiles that a program computes one after the other. With more than one it keeps the weights of the
            1x1 convolutions in shared memory, and nothing can be split.
        launches: 3 gives each layer a launch of its own (`kernels.layered`). The other fields then describe the launch
            of the convolution alone, whose programs have `part` channels each; nothing is split, and block_e and
            num_stages mean nothing.
    """

    block_m: int
    block_e: int
    conv: str
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 2
    conv_stages: int = 1
    dense_block: int = 32
    part: int = 128
    out_splits: int = 1
    rows: int = 1
    tiles_each: int = 1
    launches: int = 1

    def steps(self, problem: Tiled) -> int:
        """Steps of the loop over hidden channels."""
        return ceil(problem.hidden_channels / (self.block_e * self.splits))

    def tap_steps(self, kernel_size: int) -> int:
        """Steps of the loop over the convolution's taps: one for each tap, column of taps, or span of columns."""
        if self.conv == "pairs":
            return pair_steps(kernel_size)
        return kernel_size if self.rows > 1 else kernel_size**2

    def fits(self, problem: Tiled) -> bool:
        """Whether the kernel can run the tiling: no split lacks scratch or work, or reads past the padded weights."""
        steps = self.steps(problem)
        covered = steps * self.block_e * self.splits
        idle = steps * self.block_e * (self.splits - 1) >= problem.hidden_channels
        if self.splits > problem.max_splits:
            return False
        if self.rows > 1 and (self.conv == "dense" or self.columns < MIN_DOT):
            return False
        if self.conv == "pairs" and (self.rows == 1 or self.columns < PAIR * MIN_DOT or self.conv_stages > 1):
            return False
        if self.tiles_each > 1 and self.splits * self.out_splits > 1:
            return False
        if self.launches > 1:
            return self.splits * self.out_splits * self.tiles_each == 1
        if self.splits > 1 and (idle or self.tiles(problem) * self.out_splits > COUNTERS):
            return False
        if self.out_splits > 1:
            width, rest = divmod(problem.padded_out, self.out_splits)
            if rest or width != power_of_two(width) or not MIN_DOT <= width <= LARGEST_PART:
                return False
        return covered <= problem.padded_hidden

    @property
    def columns(self) -> int:
        """Columns of a tile: output pixels side by side."""
        return self.block_m // self.rows

    def tiles(self, problem: Tiled) -> int:
        """Tiles of the whole batch."""
        if self.rows == 1:
            return ceil(problem.out_pixels / self.block_m)
        columns = problem.batch * self.pitch(problem.out_width)
        return ceil(columns / self.columns) * ceil(problem.out_height / self.rows)

    def pitch(self, out_width: int) -> int:
        """Columns that an image takes in tiles of rows: in pairs an even number."""
        return ceil(out_width / PAIR) * PAIR if self.conv == "pairs" else out_width

    def programs(self, problem: Tiled) -> int:
        """Programs of the block, if it has a single launch."""
        return ceil(self.tiles(problem) / self.tiles_each) * self.splits * self.out_splits

    def partial_bytes(self, problem: Tiled) -> int:
        """Bytes of the float32 partial sums that split tiles exchange."""
        return 4 * self.splits * problem.out_pixels * problem.padded_out if self.splits > 1 else 0


@dataclass(frozen=True, slots=True)
class ProductTiling:
    """The division of a product of matrices.

    Args:
        block_m, block_n, block_k: pixels, outputs and inputs of one step.
        num_warps: warps of a program.
        num_stages: stages of the pipeline over inputs.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3

    def programs(self, pixels: int, outputs: int) -> int:
        return ceil(pixels / self.block_m) * ceil(outputs / self.block_n)


# The largest come first. Their pipelines fit the 99 KiB of shared memory of the smallest GPU in `cost_model.GPU_SPECS`,
# and are the longer the less work a step has to hide a load's latency.
PRODUCT_TILINGS = (
    ProductTiling(128, 128, 64, num_warps=8), ProductTiling(128, 64, 64, num_stages=4),
    ProductTiling(64, 64, 64, num_stages=4), ProductTiling(32, 32, 128, num_stages=5),
    ProductTiling(16, 32, 128, num_stages=6), ProductTiling(16, 16, 128, num_stages=8),
)  # fmt: skip
# Nearly one program for each multiprocessor of the GPUs in `cost_model.GPU_SPECS`.
ENOUGH_PROGRAMS = 108


def product_tilings(problem: BlockProblem) -> list[ProductTiling]:
    """Tilings of expansion and projection in launches of their own: the largest that keep a GPU busy."""
    if problem.itemsize == 4:
        return [ProductTiling(32, 32, 32)] * 2
    chosen = []
    for outputs in (problem.hidden_channels, problem.out_channels):
        enough = (each for each in PRODUCT_TILINGS if each.programs(problem.out_pixels, outputs) >= ENOUGH_PROGRAMS)
        chosen.append(next(enough, PRODUCT_TILINGS[-1]))
    return chosen


def conv_forms(problem: BlockProblem) -> tuple[str, ...]:
    """The values of `Tiling.conv` that can compute this problem."""
    if problem.is_dense:
        return ("dense",)
    if problem.group_width == 1:
        return ("fma", "diagonal")
    return ("mma", "pairs") if takes_pairs(problem) else ("mma",)


def takes_pairs(problem: BlockProblem) -> bool:
    """Whether the convolution can compute columns in pairs."""
    return problem.stride == 1 and 1 < problem.group_width <= PAIR_BLOCK


def first_unsupported_field(
    problem: Any, positive: Collection[str], channels: Collection[str], activations: Collection[str]
) -> str | None:
    """The first field of a problem whose value no kernel takes, with that value; None if there is none.

    Args:
        problem: the problem, of which kernel size, stride and dtype are checked, too, if it has them.
        positive: names of fields that must be 1 or more.
        channels: names of fields that must be a positive multiple of `CHANNEL_MULTIPLE`.
        activations: values that `activation` may have.
    """
    supported = {**SUPPORTED, "activation": activations}
    for name in (*positive, *channels, *(name for name in supported if hasattr(problem, name))):
        value = getattr(problem, name)
        if name in positive and value < 1:
            return f"{name}={value} is below 1"
        if name in channels and (value < 1 or value % CHANNEL_MULTIPLE):
            return f"{name}={value} is not a positive multiple of {CHANNEL_MULTIPLE}"
        if name in supported and value not in supported[name]:
            return f"{name}={value!r} is none of {', '.join(map(str, supported[name]))}"
    return None


def unsupported(problem: BlockProblem) -> str | None:
    """The reason why the fused block does not compute this problem, with name and value; None if it does."""
    into, hidden, out = problem.in_channels, problem.hidden_channels, problem.out_channels
    if why := first_unsupported_field(
        problem, ("batch", "height", "width"), ("in_channels", "hidden_channels", "out_channels"), ACTIVATIONS
    ):
        return why
    for name, channels in (("in_channels", into), ("out_channels", out)):
        if channels > MAX_CHANNELS:
            return f"{name}={channels} is above {MAX_CHANNELS}, past which one launch cannot win"
    if not into <= hidden <= 8 * into:
        return f"expansion={hidden / into:g} is not within 1 and 8"
    if problem.group_width not in GROUP_WIDTHS and problem.group_width != into:
        widths = ", ".join(map(str, GROUP_WIDTHS))
        return f"group_width={problem.group_width} is none of {widths} and not all {into} channels"
    if into % problem.group_width:
        return f"group_width={problem.group_width} does not divide in_channels={into}"
    return None
