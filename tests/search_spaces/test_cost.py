from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from search_spaces import ArchSpec, Cost, SearchSpace, StageSpec, builtin_spaces, cost, load_space
from search_spaces.arch import BlockSpec
from search_spaces.cost import block_cost


def counted(network: nn.Module, resolution: int) -> Cost:
    """Parameters and MACs as hooks see them in a real forward pass."""
    macs = 0

    def hook(module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        nonlocal macs
        if isinstance(module, nn.Conv2d):
            macs += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            macs += module.weight.numel()

    for module in network.modules():
        module.register_forward_hook(hook)
    with torch.inference_mode():
        network.eval()(torch.zeros(1, 3, resolution, resolution))
    return Cost(sum(p.numel() for p in network.parameters()), macs)


@pytest.mark.parametrize(("name", "resolution"), [("small", 32), ("small", 48), ("small", 33), ("imagenet", 64)])
def test_closed_forms_equal_what_is_counted_on_built_networks(name: str, resolution: int) -> None:
    space = load_space(name)
    rng = random.Random(resolution)
    for _ in range(8):
        arch = space.sample(rng)
        assert cost(arch, resolution, num_classes=7) == counted(arch.build(7), resolution), str(arch)


def test_fractional_expansions_and_strides_too(tiny_space: SearchSpace) -> None:
    rng = random.Random(0)
    for _ in range(20):
        arch = tiny_space.sample(rng)
        assert cost(arch, 17, num_classes=3) == counted(arch.build(3), 17), str(arch)


def test_one_block_by_hand() -> None:
    """16 channels, 3x3 in groups of 8, expansion 4, to 24 channels at stride 2 on 10x10 pixels."""
    block = BlockSpec(in_channels=16, out_channels=24, kernel_size=3, group_width=8, expansion=4, stride=2)
    weights = (16 * 8 * 3 * 3, 16 * 64, 64 * 24)
    assert block_cost(block, 10) == Cost(params=sum(weights) + 2 * (16 + 64 + 24), macs=sum(weights) * 5 * 5)


def test_one_network_by_hand() -> None:
    arch = ArchSpec(8, (StageSpec(8, 3, 1, 1, 1, 1),), "relu", 16)
    stem = 8 * 3 * 9
    block = (8 * 9, 8 * 8, 8 * 8)
    head = (8 * 16, 16 * 10)
    params = stem + 2 * 8 + sum(block) + 3 * 2 * 8 + sum(head) + 16 + 10
    assert cost(arch, 32, num_classes=10) == Cost(params, (stem + sum(block)) * 16 * 16 + sum(head))


@pytest.mark.parametrize("name", builtin_spaces())
def test_built_in_spaces_have_sensible_sizes(name: str) -> None:
    low, high = load_space(name).cost_range(load_space(name).default_resolution, 10)
    assert 0 < low.params < high.params
    assert 0 < low.macs < high.macs
