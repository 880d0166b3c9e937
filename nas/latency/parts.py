"""A network cut into the parts that are measured alone: a ConvFirst network into stem, blocks and head, any other into
its convolutions and linear layers.

A part is known by its shape, a canonical JSON text: two parts of one shape, in whatever networks, are one row of the
block latency table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nas.config import LatencyConfig
from nas.latency.engines import deploy, fold, ready
from nas.latency.roofline import Block, Layer, arch_blocks, single
from search_spaces import ArchSpec
from search_spaces.arch import STEM_STRIDE
from search_spaces.cost import strided


@dataclass(frozen=True)
class Part:
    """One part of a network in one deployment.

    Args:
        block: its name and what it computes and moves.
        shape: everything that decides what is run but device, engine, dtype and batch, as canonical JSON.
        input_shape: of the tensor that enters it, batch included.
        fused: whether fused kernels can run it: then it is bounded as one kernel, also where it is two or the tuner has
            found torch's layers faster.
    """

    block: Block
    shape: str
    input_shape: tuple[int, ...]
    fused: bool = False

    @property
    def shape_id(self) -> str:
        return shape_id(self.shape)


def canonical(**fields: Any) -> str:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def shape_id(shape: str) -> str:
    """Twelve hex digits that equal shapes share."""
    return hashlib.sha256(shape.encode()).hexdigest()[:12]


# Not a part of any network: what a call costs beside what is in it.
CALL = canonical(kind="call")


def itemsize(config: LatencyConfig) -> int:
    size: int = getattr(torch, config.dtype).itemsize
    return size


# -- ConvFirst networks ----------------------------------------------------------------------------------------------


def arch_parts(arch: ArchSpec, config: LatencyConfig) -> list[Part]:
    """Stem, blocks and head of an architecture, in order. Nothing is built, unless the engine is `fused`."""
    batch, classes = config.batch_size, config.num_classes
    counted = arch_blocks(arch, batch, config.resolution, classes, itemsize(config))
    fused, splits = _fused_parts(arch, config) if config.engine == "fused" else (set[str](), dict[str, int]())
    size = strided(config.resolution, STEM_STRIDE)
    shapes: list[dict[str, Any]] = [
        dict(kind="stem", out=arch.stem_width, size=config.resolution, activation=arch.activation)
    ]
    inputs: list[tuple[int, ...]] = [(batch, 3, config.resolution, config.resolution)]
    for spec in arch.blocks:
        shapes.append(dict(
            kind="convfirst", into=spec.in_channels, hidden=spec.expanded_channels, out=spec.out_channels,
            kernel_size=spec.kernel_size, group_width=spec.group_width, stride=spec.stride, size=size,
            activation=arch.activation,
        ))  # fmt: skip
        inputs.append((batch, spec.in_channels, size, size))
        size = strided(size, spec.stride)
    width = arch.stages[-1].width
    shapes.append(
        dict(kind="head", into=width, hidden=arch.head_width, out=classes, size=size, activation=arch.activation)
    )
    inputs.append((batch, width, size, size))
    return [
        Part(
            block,
            canonical(**shape, **({"splits": splits[block.name]} if block.name in splits else {})),
            into,
            block.name in fused,
        )
        for block, shape, into in zip(counted, shapes, inputs, strict=True)
    ]


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
    """The folded modules of an architecture's parts, by name; of the engine `fused` those of the fused network.

    Raises:
        CandidateFailed: the engine cannot compile it.
    """
    network = arch.build(config.num_classes)
    if config.engine != "fused":
        return _cut(fold(network, config))
    fused: Any = deploy(network, config, _example((config.batch_size, 3, config.resolution, config.resolution), config))
    return _cut(fused.network)


def _example(shape: Sequence[int], config: LatencyConfig) -> Tensor:
    x = torch.zeros(tuple(shape), dtype=getattr(torch, config.dtype), device=config.device)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def prepared(module: nn.Module, example: Tensor, config: LatencyConfig) -> nn.Module:
    """A module of folded parts as the engine runs it; those of a fused network are ready.

    Raises:
        CandidateFailed: the engine cannot compile it.
    """
    return module if config.engine == "fused" else ready(module.eval(), config, example)


# -- Layers of any network -------------------------------------------------------------------------------------------


def layers(network: nn.Module, config: LatencyConfig) -> list[tuple[Part, nn.Module]]:
    """The convolutions and linear layers of a network in the order they run, with the folded layers.

    Attention's products, norms, activations and poolings are not among them.
    """
    folded = fold(network, config)
    found: list[tuple[Part, nn.Module]] = []

    def note(name: str, module: nn.Conv2d | nn.Linear, x: Tensor, out: Tensor) -> None:
        part = layer_part(name, module, tuple(x.shape), tuple(out.shape), itemsize(config))
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
    name: str, layer: nn.Conv2d | nn.Linear, input_shape: tuple[int, ...], output_shape: tuple[int, ...], itemsize: int
) -> Part:
    """A layer on an input (N, C, H, W), or (..., features), batch included."""
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
            bias=layer.bias is not None, size=input_shape[2:], out_size=output_shape[2:],
        )  # fmt: skip
    else:
        kind = "linear"
        shape = canonical(
            kind="linear", into=layer.in_features, out=layer.out_features, bias=layer.bias is not None,
            rows=input_shape[1:-1],
        )  # fmt: skip
    return Part(single(counted, kind), shape, input_shape)
