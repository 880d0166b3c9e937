from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from nas.config import LatencyConfig
from nas.latency.parts import Part, arch_modules, arch_parts, canonical, layer_part, layer_parts, prepared, shape_id
from nas.latency.timm_networks import timm_model
from search_spaces import ArchSpec, StageSpec, cost, load_space
from tests.conftest import make_tiny_space

EAGER = LatencyConfig(device="cpu", engine="eager")


def random_archs(name: str, count: int) -> list[ArchSpec]:
    rng = random.Random(0)
    space = make_tiny_space() if name == "tiny" else load_space(name)
    return [space.sample(rng) for _ in range(count)]


def fed(arch: ArchSpec, config: LatencyConfig) -> dict[str, tuple[int, ...]]:
    """What enters each part of the built network in a real forward pass, by name."""
    network: nn.Module = arch.build(config.num_classes).eval()
    found: dict[str, tuple[int, ...]] = {}
    modules = {"stem": network.conv_stem, "head": network.global_pool}
    modules |= {
        f"stage{number}.{index}": block
        for number, stage in enumerate(network.blocks, start=1)
        for index, block in enumerate(stage)
    }
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, args, name=name: found.update({name: tuple(args[0].shape)}))
    with torch.inference_mode():
        network(torch.zeros(config.batch_size, 3, config.resolution, config.resolution))
    return found


# -- ConvFirst networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "resolution"), [("tiny", 17), ("small", 32), ("small", 33), ("imagenet", 64), ("rung4@32", 33)]
)
def test_the_parts_of_a_network_have_all_its_operations(name: str, resolution: int) -> None:
    config = replace(EAGER, batch_size=3, resolution=resolution, num_classes=7)
    for arch in random_archs(name, 20):
        parts = arch_parts(arch, config)
        assert sum(part.block.macs for part in parts) == 3 * cost(arch, resolution, 7).macs, str(arch)
        assert [part.block.name for part in parts[:1] + parts[-1:]] == ["stem", "head"]
        assert len(parts) == len(arch.blocks) + 2


@pytest.mark.parametrize(("name", "resolution"), [("tiny", 17), ("small", 33), ("rung4@32", 33)])
def test_the_parts_inputs_are_those_of_the_built_network(name: str, resolution: int) -> None:
    config = replace(EAGER, batch_size=2, resolution=resolution)
    for arch in random_archs(name, 5):
        assert {part.block.name: part.input_shape for part in arch_parts(arch, config)} == fed(arch, config), str(arch)


def test_equal_blocks_are_one_shape_wherever_they_stand() -> None:
    """The second and third of a stage, and another network's block that happens to be the same."""
    stage = StageSpec(width=32, kernel_size=3, group_width=8, expansion=4, blocks=3, stride=2)
    parts = arch_parts(ArchSpec(16, (stage,), "relu", 64), EAGER)
    first, second, third = parts[1:4]
    assert second.shape_id == third.shape_id != first.shape_id
    # There 32 channels come out of the stem of an image half as large: a first block, at stride 1.
    other = arch_parts(ArchSpec(32, (replace(stage, blocks=1, stride=1),), "relu", 128), replace(EAGER, resolution=16))
    assert other[1].shape_id == second.shape_id
    # Of the shapes of all these nothing else is equal, and ids tell apart what shapes do.
    everything = parts + other
    assert len({part.shape_id for part in everything}) == len({part.shape for part in everything})
    assert len({part.shape for part in everything}) == len(everything) - 2


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        (dict(batch_size=4), []),
        (dict(dtype="bfloat16"), []),
        (dict(engine="torchscript"), []),
        (dict(threads=2), []),
        (dict(num_classes=100), ["head"]),
        (dict(resolution=48), ["stem", "stage1.0", "head"]),
    ],
    ids=lambda value: " ".join(value) or "nothing",
)
def test_a_shape_is_a_problem_and_no_deployment(changes: dict[str, object], changed: list[str]) -> None:
    """Device, engine, dtype, batch and threads are columns of the table."""
    arch = make_tiny_space().smallest()
    before, after = arch_parts(arch, EAGER), arch_parts(arch, replace(EAGER, **changes))  # type: ignore[arg-type]
    differing = [one.block.name for one, other in zip(before, after, strict=True) if one.shape != other.shape]
    assert differing == changed


def test_the_activation_and_every_size_of_a_block_are_in_its_shape() -> None:
    def block(stem: int = 16, activation: str = "relu", shortcut: str = "identity", **changes: int) -> str:
        fields = dict(width=16, kernel_size=3, group_width=8, expansion=2, blocks=1, stride=1)
        stage = StageSpec(**(fields | changes))  # type: ignore[arg-type]
        return arch_parts(ArchSpec(stem, (stage,), activation, 64, shortcut=shortcut), EAGER)[1].shape_id

    others = [
        block(stem=32), block(activation="silu"), block(width=32), block(kernel_size=5), block(group_width=16),
        block(expansion=3), block(stride=2), block(stride=2, shortcut="pooled"), block(width=32, shortcut="pooled"),
    ]  # fmt: skip
    assert len({block(), *others}) == len(others) + 1
    assert block(blocks=2) == block() == block(shortcut="pooled")


def test_shapes_are_canonical() -> None:
    assert canonical(b=1, a=(2, 3)) == canonical(a=[2, 3], b=1) == '{"a":[2,3],"b":1}'
    assert shape_id('{"a":1}') == shape_id('{"a":1}') != shape_id('{"a":2}')
    assert len(shape_id("")) == 12


@pytest.mark.parametrize("engine", ["eager", "torchscript"])
@pytest.mark.parametrize("name", ["tiny", "small", "rung4@32"])
def test_the_parts_one_after_the_other_compute_what_the_network_does(name: str, engine: str) -> None:
    config = LatencyConfig(device="cpu", engine=engine, batch_size=2, num_classes=7, resolution=24)
    torch.manual_seed(0)
    x = image = torch.randn(2, 3, 24, 24).contiguous(memory_format=torch.channels_last)
    for arch in random_archs(name, 2):
        torch.manual_seed(1)
        modules = arch_modules(arch, config)
        torch.manual_seed(1)
        network = arch.build(7).eval()
        x = image
        with torch.inference_mode():
            for part in arch_parts(arch, config):
                assert tuple(x.shape) == part.input_shape
                x = prepared(modules[part.block.name], x, config)(x)
            torch.testing.assert_close(x, network(image), rtol=1e-4, atol=1e-4)


def test_of_the_fused_engine_the_lent_scratch_is_part_of_the_problem() -> None:
    """How far a fused block's tiles may be split depends on the memory that its network lends it."""
    config = LatencyConfig(device="cpu", engine="fused", dtype="float16")
    arch = load_space("small").smallest()
    fused, plain = arch_parts(arch, config), arch_parts(arch, replace(config, engine="eager"))
    assert '"splits":' in fused[-2].shape
    assert [part.block for part in fused] == [part.block for part in plain]


@pytest.mark.kernels
def test_the_fused_parts_compute_what_the_network_does(kernel_device: torch.device) -> None:
    config = LatencyConfig(device=str(kernel_device), engine="fused", dtype="float32", resolution=8)
    arch = ArchSpec.parse("relu stem 8/1 | 1x16/2 k3 g8 e2 | 2x8/2 k3 g1 e1 | pooled shortcuts | head 0")
    torch.manual_seed(1)
    modules = arch_modules(arch, config)
    torch.manual_seed(1)
    network = arch.build(10).eval().to(kernel_device)
    x = image = torch.randn(1, 3, 8, 8, device=kernel_device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for part in arch_parts(arch, config):
            assert tuple(x.shape) == part.input_shape
            x = prepared(modules[part.block.name], x, config)(x)
        torch.testing.assert_close(x, network(image), rtol=1e-3, atol=1e-3)


# -- Layers of any network -------------------------------------------------------------------------------------------


def weighted(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def hooked_macs(network: nn.Module, x: Tensor) -> int:
    """As hooks see them in a real forward pass."""
    macs = 0

    def hook(module: nn.Conv2d | nn.Linear, _inputs: object, out: Tensor) -> None:
        nonlocal macs
        macs += out.numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(hook)
    with torch.inference_mode():
        network(x)
    return macs


def kinds(found: list[tuple[Part, nn.Module]]) -> dict[str, int]:
    names = [part.block.kind for part, _ in found]
    return {kind: names.count(kind) for kind in dict.fromkeys(names)}


def test_a_resnet_is_twenty_convolutions_and_a_classifier() -> None:
    """Of 224 pixels and 1000 classes its operations are known, 1,814,073,344; those of convolutions go by the area."""
    config = replace(EAGER, resolution=64)
    network = timm_model("resnet18", 10)
    found = layer_parts(network, config)
    names = [part.block.name for part, _ in found]
    assert sorted(names) == sorted(weighted(network))
    assert names[0] == "conv1"
    assert names[-1] == "fc"
    convolutions = (1_814_073_344 - 512 * 1000) * 64**2 // 224**2
    assert sum(part.block.macs for part, _ in found) == convolutions + 512 * 10
    assert kinds(found) == {"conv": 20, "linear": 1}
    # Folded: a bias stands for the norm, which adds no layer. The four of the first stage are one shape.
    assert len({part.shape_id for part, _ in found if part.block.name.startswith("layer1.")}) == 1
    # The first convolution of the second stage, its second, and the 1x1 one beside them.
    assert len({part.shape_id for part, _ in found if part.block.name.startswith("layer2.")}) == 3


def test_a_convnext_has_depthwise_layers_too() -> None:
    config = replace(EAGER, resolution=64, batch_size=2)
    network = timm_model("convnext_atto", 10)
    found = layer_parts(network, config)
    assert sorted(part.block.name for part, _ in found) == sorted(weighted(network))
    assert sum(part.block.macs for part, _ in found) == hooked_macs(network, torch.zeros(2, 3, 64, 64))
    assert kinds(found) == {"conv": 28, "depthwise": 12, "linear": 1}
    assert all("conv_dw" in part.block.name for part, _ in found if part.block.kind == "depthwise")


def test_layers_shapes_know_neither_dtype_nor_batch() -> None:
    network = timm_model("resnet18", 10)
    small = replace(EAGER, resolution=32)
    one = layer_parts(network, small)
    other = layer_parts(network, replace(small, batch_size=3, dtype="bfloat16"))
    assert [part.shape for part, _ in one] == [part.shape for part, _ in other]
    for (part, _), (larger, module) in zip(one, other, strict=True):
        assert larger.input_shape == (3, *part.input_shape[1:])
        assert larger.block.macs == 3 * part.block.macs
        assert module.weight.dtype == torch.bfloat16
    # Half the bytes of thrice the activations, and of the same weights.
    (first, _), (larger, _) = one[-1], other[-1]
    assert 2 * larger.block.layers[0].weight_bytes == first.block.layers[0].weight_bytes == 4 * (512 * 10 + 10)
    assert 2 * larger.block.layers[0].input_bytes == 3 * first.block.layers[0].input_bytes == 3 * 4 * 512


def test_layers_run_on_the_inputs_that_are_told() -> None:
    for part, module in layer_parts(timm_model("convnext_atto", 10), replace(EAGER, resolution=32)):
        with torch.inference_mode():
            out = module(torch.zeros(part.input_shape))
        assert 4 * out.numel() == part.block.layers[0].output_bytes


def test_a_convolution_that_pads_its_input_itself_is_another_problem() -> None:
    """Of equal fields: TensorFlow's padding, which timm has a class for, is a kernel of its own."""
    fields = dict(in_channels=8, out_channels=8, kernel_size=3, stride=2, padding=0)
    plain, same = nn.Conv2d(**fields), Conv2dSame(**fields)  # type: ignore[arg-type]
    shapes = {
        layer_part("conv", layer, (1, 8, 16, 16), (1, 8, 8, 8), 4).shape for layer in (plain, same)
    }  # fmt: skip
    assert len(shapes) == 2
    # What comes out tells, too.
    assert layer_part("conv", plain, (1, 8, 16, 16), (1, 8, 7, 7), 4).shape not in shapes


class Twice(nn.Module):
    """Runs one convolution twice, a linear layer on each pixel, and another layer never."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, stride=2)
        self.mix = nn.Linear(3, 5)
        self.idle = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.conv(x))
        out: Tensor = self.mix(x.flatten(2).transpose(1, 2))
        return out


def test_a_layer_is_told_as_often_as_it_runs() -> None:
    found = [part for part, _ in layer_parts(Twice(), replace(EAGER, resolution=8, batch_size=2))]
    assert [part.block.name for part in found] == ["conv", "conv", "mix"]
    assert [part.input_shape for part in found] == [(2, 3, 8, 8), (2, 3, 4, 4), (2, 4, 3)]
    assert [part.block.macs for part in found] == [2 * 16 * 3 * 27, 2 * 4 * 3 * 27, 2 * 4 * 3 * 5]
    # Four rows an image: with another resolution it would be another problem.
    assert '"rows":[4]' in found[-1].shape
