"""The roofline model: the least time that operations and bytes take, and how far a network is from a machine's limits.

    latency = F / (peak x efficiency)       of a kernel or a network
    t*      = max(F / peak, B / bandwidth)  ideal time of a kernel: the roofline's
    gap     = t - t*                        efficiency gap of a kernel measured at t
    bound   = sum(F) / (peak x sum(t*))     waterline: the roofline carried over a sequence of kernels

F are operations, B the bytes that must move to and from memory, peak and bandwidth the limits of the machine
(`Machine`). Operations are counted in MACs (1 MAC = 2 FLOPs); only intensities are in FLOPs, per byte. Terms and
formulas are those of A. Lavin, "On the Efficiency of Convolutional Neural Networks", arXiv 2404.03617.

Bytes are counted as if nothing stayed in a cache between kernels. What fits into the last-level cache may therefore run
faster than its ideal time, and then its gap is negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from search_spaces import ArchSpec
from search_spaces.arch import STEM_KERNEL_SIZE, STEM_STRIDE, BlockSpec, StemSpec, Step, strided


def _require_whole(minimum: int, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"{name}={value!r} is not a whole number of at least {minimum}")


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} is not a positive, finite number")


# -- What is run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured limits of a device in a dtype, which are lower than its datasheet's.

    Args:
        macs_per_s: MACs per second of a large matrix product.
        bytes_per_s: bytes per second of a large copy, read and written together.
    """

    macs_per_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        _require_positive(macs_per_s=self.macs_per_s, bytes_per_s=self.bytes_per_s)

    @property
    def ridge(self) -> float:
        """Intensity, in FLOP/byte, above which operations bound a kernel, and not bytes."""
        return 2 * self.macs_per_s / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer that runs as one kernel, with its bias and activation.

    Args:
        macs: MACs of the whole batch.
        input_bytes, weight_bytes, output_bytes: bytes of each tensor, which are moved once; biases are weights.
        shortcut_bytes: bytes of the tensor that is read besides the input and added to the output.
    """

    name: str
    macs: int
    input_bytes: int
    weight_bytes: int
    output_bytes: int
    shortcut_bytes: int = 0

    def __post_init__(self) -> None:
        _require_whole(
            0, macs=self.macs, input_bytes=self.input_bytes, weight_bytes=self.weight_bytes,
            output_bytes=self.output_bytes, shortcut_bytes=self.shortcut_bytes,
        )  # fmt: skip
        if self.macs and not self.moved_bytes:
            raise ValueError(f"{self.name}: macs={self.macs} and no bytes")

    @property
    def moved_bytes(self) -> int:
        return self.input_bytes + self.weight_bytes + self.output_bytes + self.shortcut_bytes


@dataclass(frozen=True, slots=True)
class Block:
    """Layers that run as one unit, either as one kernel (fused) or layer by layer.

    Args:
        kind: "stem", "convfirst", "mbconv" or "head", for example; "conv", "depthwise" or "linear" for single layers;
            "other" where there are no operations.
        fused_bytes: bytes that one kernel for all layers moves.
        fused_workspace_bytes, unfused_workspace_bytes: most bytes of tensors alive at once, weights not included.
    """

    name: str
    kind: str
    layers: tuple[Layer, ...]
    fused_bytes: int
    fused_workspace_bytes: int
    unfused_workspace_bytes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        _require_whole(
            0, fused_bytes=self.fused_bytes, fused_workspace_bytes=self.fused_workspace_bytes,
            unfused_workspace_bytes=self.unfused_workspace_bytes,
        )  # fmt: skip
        if self.macs and not self.fused_bytes:
            raise ValueError(f"{self.name}: fused_bytes=0 with macs={self.macs}")

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def unfused_bytes(self) -> int:
        return sum(layer.moved_bytes for layer in self.layers)

    def moved_bytes(self, fused: bool) -> int:
        return self.fused_bytes if fused else self.unfused_bytes

    def intensity(self, fused: bool) -> float:
        """Operational intensity, 2 MACs / bytes moved, in FLOP/byte; 0 where nothing is computed."""
        return 2 * self.macs / self.moved_bytes(fused) if self.macs else 0.0


# -- Layers and blocks in closed form --------------------------------------------------------------------------------


def conv_layer(
    name: str, batch: int, height: int, width: int, in_channels: int, out_channels: int, kernel_size: int,
    group_width: int, stride: int, itemsize: int, shortcut_bytes: int = 0,
) -> Layer:  # fmt: skip
    """The layer of a convolution of (batch, in_channels, height, width), padded by kernel_size // 2, with bias.

    Its MACs are batch x out pixels x out_channels x group_width x kernel_size^2. The whole input is read.

    Args:
        group_width: input channels that each output channel reads; 1 is depthwise.
        itemsize: bytes of an element of input, weights, biases and output alike.
        shortcut_bytes: bytes of what is added to the output.
    """
    _require_whole(
        1, batch=batch, height=height, width=width, in_channels=in_channels, out_channels=out_channels,
        kernel_size=kernel_size, group_width=group_width, stride=stride, itemsize=itemsize,
    )  # fmt: skip
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} is not odd")
    if in_channels % group_width:
        raise ValueError(f"group_width={group_width} does not divide in_channels={in_channels}")
    if out_channels % (in_channels // group_width):
        raise ValueError(f"{in_channels // group_width} groups do not divide out_channels={out_channels}")
    out_pixels = batch * strided(height, stride) * strided(width, stride)
    weights = out_channels * group_width * kernel_size**2
    output_bytes = itemsize * out_pixels * out_channels
    return Layer(
        name,
        macs=out_pixels * weights,
        input_bytes=itemsize * batch * height * width * in_channels,
        weight_bytes=itemsize * (weights + out_channels),
        output_bytes=output_bytes,
        shortcut_bytes=shortcut_bytes,
    )


def linear_layer(name: str, rows: int, in_features: int, out_features: int, itemsize: int) -> Layer:
    """The layer of a product of (rows, in_features) with (in_features, out_features) weights, with biases."""
    _require_whole(1, rows=rows, in_features=in_features, out_features=out_features, itemsize=itemsize)
    return Layer(
        name,
        macs=rows * in_features * out_features,
        input_bytes=itemsize * rows * in_features,
        weight_bytes=itemsize * (in_features + 1) * out_features,
        output_bytes=itemsize * rows * out_features,
    )


def chain(name: str, kind: str, layers: Sequence[Layer]) -> Block:
    """A block of layers each of which reads what the one before it wrote; a shortcut of the last is the block's input,
    or channels of it.

    As one kernel it moves its input, all weights and its output; the shortcut is not read a second time. Its workspace
    is then input and output. Layer by layer the workspace is the most of any layer's input and output, together with
    the block's input where a shortcut keeps it alive. So at stride 2, where the input is large, fusing may take more.

    Raises:
        ValueError: the layers do not follow each other.
    """
    layers = tuple(layers)
    if not layers:
        raise ValueError(f"layers of {name} is empty")
    first, last = layers[0], layers[-1]
    for layer, following in pairwise(layers):
        if layer.output_bytes != following.input_bytes:
            raise ValueError(
                f"{name}: {following.name} reads {following.input_bytes} bytes, {layer.name} before it writes "
                f"{layer.output_bytes}"
            )
        if layer.shortcut_bytes:
            raise ValueError(f"{name}: shortcut_bytes={layer.shortcut_bytes} of {layer.name}, which is not the last")
    if last.shortcut_bytes > first.input_bytes:
        raise ValueError(f"{name}: shortcut_bytes={last.shortcut_bytes} is more than its input's {first.input_bytes}")
    kept = first.input_bytes if last.shortcut_bytes else 0
    alive = [layer.input_bytes + layer.output_bytes for layer in layers]
    return Block(
        name,
        kind,
        layers,
        fused_bytes=first.input_bytes + sum(layer.weight_bytes for layer in layers) + last.output_bytes,
        fused_workspace_bytes=first.input_bytes + last.output_bytes,
        # The first layer's input is the block's input, which is not counted twice.
        unfused_workspace_bytes=max([alive[0], *(kept + each for each in alive[1:])]),
    )


def single(layer: Layer, kind: str) -> Block:
    """The block of one layer, which is the same fused or not. A shortcut is a tensor besides its input."""
    alive = layer.input_bytes + layer.shortcut_bytes + layer.output_bytes
    return Block(layer.name, kind, (layer,), layer.moved_bytes, alive, alive)


def everything_else(name: str = "everything else") -> Block:
    """The block of norms, activations and copies, whose time counts, but not their operations and bytes."""
    return Block(name, "other", (), 0, 0, 0)


def stem_block(
    name: str, batch: int, height: int, width: int, in_channels: int, out_channels: int, itemsize: int,
    stride: int = STEM_STRIDE,
) -> Block:  # fmt: skip
    """The block of the 3x3 stem of (batch, in_channels, height, width)."""
    return chain(
        name,
        "stem",
        [conv_layer(
            "conv", batch, height, width, in_channels, out_channels, STEM_KERNEL_SIZE, in_channels, stride,
            itemsize,
        )],
    )  # fmt: skip


def convfirst_block(
    name: str, batch: int, height: int, width: int, in_channels: int, hidden_channels: int, out_channels: int,
    kernel_size: int, group_width: int, stride: int, residual: bool, itemsize: int,
) -> Block:  # fmt: skip
    """The ConvFirst block of (batch, in_channels, height, width): grouped convolution, 1x1 expansion and projection.

    Args:
        residual: whether the input is added to the output, pooled if need be. The sums of pooling are not counted, nor
            is the 1x1 convolution by which ONNX graphs pad channels (2 % of a network's MACs, or so).
    """
    conv = conv_layer(
        "conv", batch, height, width, in_channels, in_channels, kernel_size, group_width, stride, itemsize
    )
    size = strided(height, stride), strided(width, stride)
    expand = conv_layer("expand", batch, *size, in_channels, hidden_channels, 1, in_channels, 1, itemsize)
    added = itemsize * batch * height * width * min(in_channels, out_channels) if residual else 0
    project = conv_layer("project", batch, *size, hidden_channels, out_channels, 1, hidden_channels, 1, itemsize, added)
    return chain(name, "convfirst", [conv, expand, project])


def head_block(
    name: str, batch: int, height: int, width: int, in_channels: int, head_width: int, num_classes: int, itemsize: int
) -> Block:
    """The head of (batch, in_channels, height, width): global pool, 1x1 convolution on the pooled pixel, classifier.

    A width of 0 stands for no convolution.

    The pool has no MACs: its additions are not counted.
    """
    _require_whole(1, batch=batch, height=height, width=width, in_channels=in_channels, itemsize=itemsize)
    pooled_bytes = itemsize * batch * in_channels
    pool = Layer("pool", 0, height * width * pooled_bytes, 0, pooled_bytes)
    if not head_width:
        return chain(name, "head", [pool, linear_layer("classifier", batch, in_channels, num_classes, itemsize)])
    conv = linear_layer("conv_head", batch, in_channels, head_width, itemsize)
    classifier = linear_layer("classifier", batch, head_width, num_classes, itemsize)
    return chain(name, "head", [pool, conv, classifier])


def arch_blocks(arch: ArchSpec, batch: int, resolution: int, num_classes: int, itemsize: int) -> tuple[Block, ...]:
    """A network's blocks on (batch, 3, resolution, resolution): "stem", "stage1.0", "stage1.1", ..., "head".

    Batch norms are folded into the convolutions as biases. MACs sum to `batch` times those of `search_spaces.cost`.
    """

    def block(step: Step) -> Block:
        spec, size = step.spec, step.in_size
        if isinstance(spec, StemSpec):
            return stem_block(step.name, batch, size, size, spec.in_channels, spec.out_channels, itemsize, spec.stride)
        if isinstance(spec, BlockSpec):
            return convfirst_block(
                step.name, batch, size, size, spec.in_channels, spec.expanded_channels, spec.out_channels,
                spec.kernel_size, spec.group_width, spec.stride, spec.residual, itemsize,
            )  # fmt: skip
        return head_block(step.name, batch, size, size, spec.in_channels, spec.width, num_classes, itemsize)

    return tuple(block(step) for step in arch.walk(resolution))


# -- Time ------------------------------------------------------------------------------------------------------------


def _kernel_seconds(macs: int, moved_bytes: int, machine: Machine) -> float:
    return max(macs / machine.macs_per_s, moved_bytes / machine.bytes_per_s)


def ideal_seconds(block: Block, machine: Machine, fused: bool) -> float:
    """t* = max(F / peak, B / bandwidth) of the block as one kernel; if not fused, the sum of its layers' t*."""
    if fused:
        return _kernel_seconds(block.macs, block.fused_bytes, machine)
    return sum(_kernel_seconds(layer.macs, layer.moved_bytes, machine) for layer in block.layers)


def computational_efficiency(macs: int, seconds: float, machine: Machine) -> float:
    """F / (peak x t): the share of the machine's peak that was computed at, in 0..1."""
    _require_whole(0, macs=macs)
    _require_positive(seconds=seconds)
    return macs / (machine.macs_per_s * seconds)


@dataclass(frozen=True, slots=True)
class Efficiency:
    """The efficiency of a block on a machine.

    Args:
        fused: whether the block runs, and is bounded, as one kernel.
        seconds: the block's measured time; None if it was not measured.
    """

    block: Block
    machine: Machine
    fused: bool
    seconds: float | None

    def __post_init__(self) -> None:
        if self.seconds is not None:
            _require_positive(seconds=self.seconds)

    @property
    def compute_seconds(self) -> float:
        """F / peak: the least time of the operations."""
        return self.block.macs / self.machine.macs_per_s

    @property
    def ideal_seconds(self) -> float:
        """t*, see the function `ideal_seconds`."""
        return ideal_seconds(self.block, self.machine, self.fused)

    @property
    def bound(self) -> float:
        """F / (peak x t*): the most efficient that it can be; 0 where nothing is computed."""
        return computational_efficiency(self.block.macs, self.ideal_seconds, self.machine) if self.block.macs else 0.0

    @property
    def efficiency(self) -> float | None:
        """F / (peak x t), None if the block was not measured."""
        if self.seconds is None:
            return None
        return computational_efficiency(self.block.macs, self.seconds, self.machine)

    @property
    def gap_seconds(self) -> float | None:
        """t - t*: what a better kernel could save."""
        return None if self.seconds is None else self.seconds - self.ideal_seconds

    @property
    def bound_by(self) -> Literal["compute", "memory"]:
        """The resource that takes longer: all operations at peak, or all bytes at full bandwidth."""
        memory_seconds = self.block.moved_bytes(self.fused) / self.machine.bytes_per_s
        return "compute" if self.compute_seconds >= memory_seconds else "memory"


def _macs(rows: Sequence[Efficiency]) -> int:
    return sum(row.block.macs for row in rows)


def waterline(rows: Sequence[Efficiency]) -> float:
    """sum(F) / (peak x sum(t*)): the most efficient that a sequence of kernels can be (arXiv 2404.03617), in 0..1.

    Raises:
        ValueError: there are no rows, none has MACs, or they are of several machines.
    """
    if not rows:
        raise ValueError("rows is empty")
    machine = rows[0].machine
    for row in rows:
        if row.machine != machine:
            raise ValueError(f"{row.block.name} has machine={row.machine}, {rows[0].block.name} has {machine}")
    if not _macs(rows):
        raise ValueError(f"macs=0 in all {len(rows)} rows")
    return computational_efficiency(_macs(rows), sum(row.ideal_seconds for row in rows), machine)


@dataclass(frozen=True, slots=True)
class NetworkEfficiency:
    """The efficiency of a network, with its blocks in order, on one machine.

    Args:
        title, subtitle: the names of the network and of its deployment.
        rows: the efficiencies of the blocks.
        seconds: time of the whole network, to which those of its blocks need not sum.
    """

    title: str
    subtitle: str
    rows: tuple[Efficiency, ...]
    seconds: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        waterline(self.rows)
        _require_positive(seconds=self.seconds)

    @property
    def machine(self) -> Machine:
        return self.rows[0].machine

    @property
    def waterline(self) -> float:
        """The waterline of the rows, see the function `waterline`."""
        return waterline(self.rows)

    @property
    def rows_seconds(self) -> float | None:
        """Sum of the rows' seconds, None if one is not measured."""
        seconds = [row.seconds for row in self.rows if row.seconds is not None]
        return sum(seconds) if len(seconds) == len(self.rows) else None

    @property
    def achieved(self) -> float:
        """F / (peak x t), t being the network's own seconds."""
        return computational_efficiency(_macs(self.rows), self.seconds, self.machine)
