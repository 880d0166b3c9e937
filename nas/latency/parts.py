"""Cutting of networks into the parts that are measured alone: a ConvFirst network into stem, blocks and head, any other
into its convolutions and linear layers.

A part is identified by its shape, a canonical JSON text: parts of one shape share one row of the block latency table,
whatever networks they are in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from nas.config import LatencyConfig
from nas.latency.engines import deploy, fold, ready
from nas.latency.roofline import Block, Layer, arch_blocks, single
from search_spaces import ArchSpec
from search_spaces.arch import IDENTITY, STEM_STRIDE, BlockSpec, HeadSpec, StemSpec, Step


@dataclass(frozen=True)
class Part:
    """One part of a network in one deployment.

    Args:
        block: the part's name, and what it computes and moves.
        shape: canonical JSON of everything that decides what is run, except device, engine, dtype and batch.
        input_shape: shape of the tensor that enters it, batch included.
        fused: whether fused kernels can run it. Then its ideal time is that of one kernel, also where it runs as two or
            the tuner chose torch's layers because they were faster.
    """

    block: Block
    shape: str
    input_shape: tuple[int, ...]
    fused: bool = False

    @property
    def shape_id(self) -> str:
        return shape_id(self.shape)


def canonical(**fields: Any) -> str:
    """The JSON text of some fields: equal fields give equal text."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def shape_id(shape: str) -> str:
    """Twelve hex digits that equal shapes share."""
    return hashlib.sha256(shape.encode()).hexdigest()[:12]


# Engines that run a part of a network differently than it runs alone (see `nas.latency.onnx_parts`).
WITHIN_NETWORKS = ("onnxruntime",)
# The shape of what a call costs besides what it runs, which is no part of any network.
CALL = canonical(kind="call")
CALL_ID = shape_id(CALL)


def network_shape(name: str, config: LatencyConfig) -> str:
    """The shape of a whole network, known by an architecture's line or a timm model's name."""
    return canonical(kind="network", name=name, size=config.resolution, classes=config.num_classes)


def surroundings(config: LatencyConfig) -> dict[str, Any]:
    """The fields of a part's shape that say in which surroundings it runs; none where it runs alone."""
    return {"within": "network"} if config.engine in WITHIN_NETWORKS else {}


def itemsize(config: LatencyConfig) -> int:
    """Bytes of one element of weights and activations."""
    size: int = getattr(torch, config.dtype).itemsize
    return size


# -- ConvFirst networks ----------------------------------------------------------------------------------------------


def arch_parts(arch: ArchSpec, config: LatencyConfig) -> list[Part]:
    """Stem, blocks and head of an architecture, in order. Nothing is built, unless the engine is `fused`."""
    batch = config.batch_size
    blocks = arch_blocks(arch, batch, config.resolution, config.num_classes, itemsize(config))
    fused, splits = _fused_parts(arch, config) if config.engine == "fused" else (set[str](), dict[str, int]())
    parts = []
    for step, block in zip(arch.walk(config.resolution), blocks, strict=True):
        # A head without convolution has no activation.
        activation = "none" if isinstance(step.spec, HeadSpec) and not step.spec.width else arch.activation
        shape = _shape(step, config.num_classes) | {"activation": activation, "size": step.in_size}
        if step.name in splits:
            shape["splits"] = splits[step.name]
        shape |= surroundings(config)
        input_shape = (batch, step.spec.in_channels, step.in_size, step.in_size)
        parts.append(Part(block, canonical(**shape), input_shape, step.name in fused))
    return parts


def _shape(step: Step, num_classes: int) -> dict[str, Any]:
    """The fields of a step's shape, without its input size and activation."""
    spec = step.spec
    if isinstance(spec, StemSpec):
        # Without the usual stride, so that what databases hold of stems stays theirs.
        stride = {} if spec.stride == STEM_STRIDE else {"stride": spec.stride}
        return dict(kind="stem", out=spec.out_channels) | stride
    if isinstance(spec, BlockSpec):
        # Likewise, the usual shortcut is left out.
        shortcut = {} if spec.shortcut == IDENTITY else {"shortcut": spec.shortcut}
        return shortcut | dict(
            kind="convfirst", into=spec.in_channels, hidden=spec.expanded_channels, out=spec.out_channels,
            kernel_size=spec.kernel_size, group_width=spec.group_width, stride=spec.stride,
        )  # fmt: skip
    return dict(kind="head", into=spec.in_channels, hidden=spec.width, out=num_classes)


def _fused_parts(arch: ArchSpec, config: LatencyConfig) -> tuple[set[str], dict[str, int]]:
    """Names of the parts that are fused, and how many programs may share a tile of those that are split.

    A fused block's tilings depend on the scratch that its network lends it.
    """
    from kernels import fuse

    fused = fuse(arch.build(config.num_classes).eval(), getattr(torch, config.dtype))
    cut = _cut(fused.network)
    splits = {name: int(module.max_splits) for name, module in cut.items() if hasattr(module, "max_splits")}  # type: ignore[arg-type]
    return {block_name(status.name) for status in fused.fusion if status.fused}, splits


def block_name(module_name: str) -> str:
    """The part of a ConvFirst network to which a module belongs, by the names of timm's `MobileNetV3`."""
    first, *rest = module_name.split(".")
    if first == "blocks":
        return f"stage{int(rest[0]) + 1}.{rest[1]}"
    return "stem" if first in ("conv_stem", "bn1") else "head"


def _cut(network: Any) -> dict[str, nn.Module]:
    """The parts of a timm `MobileNetV3`, fused or not, by the names that `arch_parts` gives them."""
    parts: dict[str, nn.Module] = {"stem": nn.Sequential(network.conv_stem, network.bn1)}
    for number, stage in enumerate(network.blocks, start=1):
        parts |= {f"stage{number}.{index}": block for index, block in enumerate(stage)}
    parts["head"] = nn.Sequential(
        network.global_pool, network.conv_head, network.norm_head, network.act2, network.flatten, network.classifier
    )
    return parts


def arch_modules(arch: ArchSpec, config: LatencyConfig) -> dict[str, nn.Module]:
    """The folded modules of an architecture's parts, by name; with the engine `fused`, those of the fused network.

    Raises:
        CandidateFailed: the engine cannot compile it.
    """
    network = arch.build(config.num_classes)
    if config.engine != "fused":
        return _cut(fold(network, config))
    size = arch.shown(config.resolution)
    fused: Any = deploy(network, config, _example((config.batch_size, 3, size, size), config))
    return _cut(fused.network)


def _example(shape: Sequence[int], config: LatencyConfig) -> Tensor:
    x = torch.zeros(tuple(shape), dtype=getattr(torch, config.dtype), device=config.device)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def prepared(module: nn.Module, example: Tensor, config: LatencyConfig) -> nn.Module:
    """A module of folded parts as the engine runs it; parts of a fused network are ready as they are.

    Raises:
        CandidateFailed: the engine cannot compile it.
    """
    return module if config.engine == "fused" else ready(module.eval(), config, example)


# -- Layers of any network -------------------------------------------------------------------------------------------


def layer_parts(network: nn.Module, config: LatencyConfig) -> list[tuple[Part, nn.Module]]:
    """The convolutions and linear layers of a network, each with its folded module, in the order in which they run.

    The products of attention, norms, activations and poolings are not among them.
    """
    folded = fold(network, config)
    found: list[tuple[Part, nn.Module]] = []

    def note(name: str, module: nn.Conv2d | nn.Linear, x: Tensor, out: Tensor) -> None:
        part = layer_part(name, module, tuple(x.shape), tuple(out.shape), itemsize(config), surroundings(config))
        found.append((part, module))

    hooks = [
        module.register_forward_hook(lambda module, args, out, name=name: note(name, module, args[0], out))
        for name, module in folded.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    x = _example((config.batch_size, 3, config.resolution, config.resolution), config)
    try:
        with torch.inference_mode():
            folded(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def layer_part(
    name: str, layer: nn.Conv2d | nn.Linear, input_shape: tuple[int, ...], output_shape: tuple[int, ...], itemsize: int,
    surroundings: Mapping[str, Any] = MappingProxyType({}),
) -> Part:  # fmt: skip
    """A layer as a part of its own.

    Args:
        input_shape, output_shape: (N, C, H, W), or (N, ..., features).
        itemsize: bytes of one element.
        surroundings: further fields of its shape.
    """
    weights = layer.weight.numel()
    outputs = torch.Size(output_shape).numel()
    counted = Layer(
        name,
        macs=outputs * weights // layer.weight.shape[0],
        input_bytes=itemsize * torch.Size(input_shape).numel(),
        weight_bytes=itemsize * (weights + (0 if layer.bias is None else layer.bias.numel())),
        output_bytes=itemsize * outputs,
    )
    if isinstance(layer, nn.Conv2d):
        depthwise = layer.groups == layer.in_channels > 1
        kind = "depthwise" if depthwise else "conv"
        shape = canonical(
            kind=type(layer).__name__, into=layer.in_channels, out=layer.out_channels, kernel_size=layer.kernel_size,
            stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups,
            bias=layer.bias is not None, size=input_shape[2:], out_size=output_shape[2:], **surroundings,
        )  # fmt: skip
    else:
        kind = "linear"
        shape = canonical(
            kind="linear", into=layer.in_features, out=layer.out_features, bias=layer.bias is not None,
            rows=input_shape[1:-1], **surroundings,
        )  # fmt: skip
    return Part(single(counted, kind), shape, input_shape)
