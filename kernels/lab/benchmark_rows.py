"""The rows of `python -m kernels.lab.benchmark`: blocks, and networks at 224 pixels, the most telling first.

Weights and norms are random, but as large as training leaves them: fresh ones let activations grow past float16 in a
deep residual network, and make whole branches zero (the last norms of a ResNet, the layer scales of a ConvNeXt).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, ClassVar

import timm
import torch
from timm.layers import get_act_layer
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse as fold_traced

from kernels.fold import fold_batch_norms

# Images from which the norms of a network take half of their statistics.
CALIBRATION_BATCH = 8


# -- Blocks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Block:
    """A ConvFirst block with stride 1 and a residual, whose input and output have the same shape.

    Args:
        channels, resolution: channels, and height or width, of input and output.
        batch: number of images.
        kernel_size, group_width: the grouped convolution's.
        expansion: hidden over input channels.
        activation: name of the activation after the expansion.
    """

    kind: ClassVar[str] = "block"
    channels: int
    resolution: int
    batch: int
    kernel_size: int = 3
    group_width: int = 8
    expansion: int = 4
    activation: str = "silu"

    @property
    def name(self) -> str:
        return (
            f"b{self.batch} {self.resolution}x{self.resolution} c{self.channels} k{self.kernel_size} "
            f"g{self.group_width} e{self.expansion} {self.activation}"
        )

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.channels, self.resolution, self.resolution)

    @property
    def hidden_channels(self) -> int:
        return self.channels * self.expansion

    def layers(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Random weights and biases of convolution, expansion and projection, which keep activations near 1."""
        rng = torch.Generator().manual_seed(0)
        shapes = (
            (self.channels, self.group_width, self.kernel_size, self.kernel_size),
            (self.hidden_channels, self.channels, 1, 1),
            (self.channels, self.hidden_channels, 1, 1),
        )
        layers = []
        for shape in shapes:
            weight = torch.randn(shape, generator=rng) / sqrt(prod(shape[1:]))
            layers += [weight.contiguous(memory_format=torch.channels_last), torch.randn(shape[0], generator=rng) / 4]
        return [tensor.to(device, dtype) for tensor in layers]


# First the author's own shape and its like at every size, then one change at a time, then the rest of the ranges.
BLOCKS = (
    Block(64, 56, 128),
    Block(128, 28, 128),
    Block(256, 14, 1),
    Block(256, 14, 128),
    Block(96, 56, 128),
    # The first two networks come here, and two more after another five blocks: see `interleaved`.
    Block(32, 112, 128),
    Block(64, 56, 1),
    Block(128, 28, 1),
    Block(64, 56, 128, activation="relu"),
    Block(128, 28, 128, kernel_size=5),
    Block(64, 56, 128, expansion=6),
    Block(128, 28, 128, group_width=16),
    Block(64, 56, 128, group_width=1),
    Block(512, 7, 128),
    Block(512, 7, 1),
    Block(256, 14, 128, expansion=2),
    Block(64, 56, 32),
    Block(128, 28, 32, activation="relu"),
    Block(256, 14, 32, kernel_size=5, group_width=16),
    Block(96, 28, 128, kernel_size=7),
    Block(32, 112, 1, expansion=6, activation="relu"),
    Block(128, 14, 1, kernel_size=5, group_width=1, expansion=6),
    Block(32, 56, 128, kernel_size=7, group_width=1, expansion=2, activation="relu"),
    Block(512, 7, 32, group_width=16, expansion=2),
)

CPU_BLOCKS = (Block(16, 14, 2), Block(32, 7, 1, kernel_size=5, group_width=1, expansion=2, activation="relu"))


# -- Networks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stages:
    """A ConvFirst network: a 3x3 stem with stride 2, then stages that begin with stride 2 (k 3, g 8, SiLU).

    Args:
        gmacs: billions of multiply-accumulates per image of 224 pixels; a test checks it.
        stem: channels after the stem.
        widths, blocks: channels and number of blocks of each stage.
        expansion: hidden over input channels of every block.
    """

    gmacs: float
    stem: int
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    expansion: int = 4

    def build(self, num_classes: int) -> nn.Module:
        arch = [
            [f"uir_r{blocks}_a3_k0_s2_e{self.expansion}_c{width}_gs8"]
            for width, blocks in zip(self.widths, self.blocks, strict=True)
        ]
        return MobileNetV3(
            decode_arch_def(arch), num_classes=num_classes, stem_size=self.stem, act_layer=get_act_layer("silu")
        )


# Most of their work is at 28 and 56 pixels, where the map is large and a single launch gains most.
CONVFIRST = {
    "convfirst_0.5g": Stages(0.5, 24, (48, 96, 160, 256), (2, 3, 5, 2)),
    "convfirst_2g": Stages(2.0, 32, (64, 128, 256, 384), (4, 6, 9, 3)),
    "convfirst_4.5g": Stages(4.5, 32, (96, 192, 256, 384), (4, 11, 9, 4)),
    # This one is for the small version, on 64 pixels.
    "convfirst_tiny": Stages(0.018, 8, (16,), (2,)),
}

PEERS = (
    "convnext_tiny", "resnet50", "efficientnetv2_s", "mobilenetv4_conv_medium", "convnext_nano", "regnety_040",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Network:
    """An image classifier: a reference network of `CONVFIRST`, or one of timm's by its name there."""

    kind: ClassVar[str] = "network"
    model: str
    batch: int
    resolution: int = 224
    num_classes: int = 1000

    @property
    def name(self) -> str:
        return f"b{self.batch} {self.model}"

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, 3, self.resolution, self.resolution)

    @property
    def is_convfirst(self) -> bool:
        return self.model in CONVFIRST

    def build(self) -> nn.Module:
        """Build the network in evaluation mode, with random weights."""
        torch.manual_seed(0)
        if self.is_convfirst:
            model = CONVFIRST[self.model].build(self.num_classes)
        else:
            model = timm.create_model(self.model, num_classes=self.num_classes)
        return model.eval().requires_grad_(False)


def _networks(batch: int) -> tuple[Network, ...]:
    # The widest reference beside the peer of its size first: one of the goals compares them.
    names = ("convfirst_4.5g", "convnext_tiny", "convfirst_2g", "convfirst_0.5g", *PEERS[1:])
    return tuple(Network(name, batch) for name in names)


NETWORKS = _networks(128) + _networks(1)
CPU_NETWORKS = (Network("convfirst_tiny", 2, resolution=64, num_classes=10),)

Row = Block | Network


def interleaved(blocks: Sequence[Block], networks: Sequence[Network]) -> list[Row]:
    """All rows, the most telling first: a few blocks, the networks of the goals, blocks again, and so on.

    Inductor takes minutes for a network, so a short run that measured all blocks first would reach no network.
    """
    return [*blocks[:5], *networks[:2], *blocks[5:10], *networks[2:4], *blocks[10:], *networks[4:]]


def rows(device: str, only: str) -> list[Row]:
    """The rows for a "cuda" or "cpu" device, in order; `only` is "blocks", "networks" or "all"."""
    blocks, networks = (BLOCKS, NETWORKS) if device == "cuda" else (CPU_BLOCKS, CPU_NETWORKS)
    return interleaved(blocks if only != "networks" else (), networks if only != "blocks" else ())


# -- Preparing networks ----------------------------------------------------------------------------------------------


def count_macs(model: nn.Module, resolution: int) -> tuple[int, int]:
    """Multiply-accumulates of convolutions and linear layers per image (1 MAC = 2 FLOPs), and the number of layers."""
    counted: list[int] = []

    def count(layer: Any, _: tuple[Tensor, ...], output: Tensor) -> None:
        counted.append(output.numel() * prod(layer.weight.shape[1:]))

    shapes_only = copy.deepcopy(model).to("meta")
    for module in shapes_only.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        shapes_only(torch.empty(1, 3, resolution, resolution, device="meta"))
    return sum(counted), len(counted)


@torch.no_grad()
def as_if_trained(model: nn.Module, resolution: int) -> nn.Module:
    """Give a network random scales and shifts, and batch norms with statistics between fresh ones and a random batch's.

    The batch's statistics alone would blow up what hardly differs between random images, as after a global pool.

    Args:
        model: the network, which is changed in place, on its device, and ends in evaluation mode.
    """
    device = next(model.parameters()).device
    rng = torch.Generator(device).manual_seed(0)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.endswith("bias"):
            parameter.normal_(0, 0.1, generator=rng)
        elif parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5, generator=rng)
    for norm in norms:
        norm.momentum = 0.5
    if norms:
        model.train()
        model(torch.randn(CALIBRATION_BATCH, 3, resolution, resolution, device=device, generator=rng))
    return model.eval()


def folded(model: nn.Module) -> nn.Module:
    """Copy a network and fold its batch norms into convolutions, also a ResNet's.

    Raises:
        ValueError: a batch norm is left.
    """
    copied = fold_batch_norms(model)
    if any(isinstance(module, nn.BatchNorm2d) for module in copied.modules()):
        # For timm's other classes torch's tracer finds out in which order layers are applied.
        copied = fold_traced(copied)
    if left := [name for name, module in copied.named_modules() if isinstance(module, nn.BatchNorm2d)]:
        raise ValueError(f"{type(model).__name__} keeps {len(left)} batch norms, the first of them {left[0]}")
    return copied
