"""Blocks whose layers have a launch each: their products in every size, and when they are offered."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import cost_model, layered, problem
from kernels.convfirst import constants, launch, layer_by_layer
from kernels.lab.inspect import block_statics
from kernels.packing import pack
from kernels.problem import PRODUCT_TILINGS, BlockProblem, ProductTiling, Tiling, product_tilings
from tests.kernels.cases import CAPABILITIES, error_bound, make_operands

# More pixels than the largest tile, more outputs and inputs than any step, and none of them a multiple of one.
AWKWARD = BlockProblem(1, 9, 15, 40, 200, 136, 3, 8, 1, "silu", False, "float16")
LAYERED = Tiling(16, 16, "mma", num_stages=1, part=16, launches=3)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("cut", PRODUCT_TILINGS, ids=lambda cut: f"{cut.block_m}x{cut.block_n}x{cut.block_k}")
def test_products_of_every_size(
    cut: ProductTiling, dtype: str, kernel_device: torch.device, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problem, "PRODUCT_TILINGS", (cut,))
    block = replace(AWKWARD, dtype=dtype)
    x, layers = make_operands(block, seed=1, device=kernel_device)
    out = launch(x, pack(layers, block), block, LAYERED, x)
    exact = layer_by_layer(x.double(), [layer.double() for layer in layers], block).cpu()
    assert bool(((out.double().cpu() - exact).abs() <= error_bound(x, layers, block)).all())


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("cut", PRODUCT_TILINGS, ids=lambda cut: f"{cut.block_m}x{cut.block_n}x{cut.block_k}")
def test_products_compile_and_do_not_spill(
    cut: ProductTiling, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problem, "PRODUCT_TILINGS", (cut,))
    block = replace(AWKWARD, in_channels=256, hidden_channels=1024, out_channels=256, residual=True)
    statics = block_statics(block, replace(LAYERED, part=32), capability)
    assert not statics.complaints(capability, "float16")
    if capability == 90 and cut.block_m >= 64:
        assert statics.tensor_core["HGMMA"]


def test_offsets_into_what_a_shortcut_reads_are_wide_enough() -> None:
    """A pooled shortcut reads four times as many pixels as the products have rows."""
    block = BlockProblem(1024, 256, 256, 32, 32, 32, 3, 8, 2, "relu", True, "float16")
    wide = [fixed["WIDE"] for fixed, _ in layered.product_constants(block)]
    assert wide == [False, True]
    assert layered.conv_constants(block, LAYERED)["WIDE"]
    assert constants(block, Tiling(64, 32, "mma"))["WIDE"]


def test_products_are_cut_so_that_a_gpu_is_busy() -> None:
    def cuts(batch: int, size: int, channels: int) -> list[tuple[int, int]]:
        block = BlockProblem(batch, size, size, channels, 4 * channels, channels, 3, 8, 1, "silu", True, "float16")
        return [(cut.block_m, cut.block_n) for cut in product_tilings(block)]

    assert cuts(128, 14, 256) == [(128, 128), (128, 128)]
    assert cuts(1, 7, 512) == [(32, 32), (16, 16)]
    assert cuts(1, 1, 8) == [(16, 16), (16, 16)]


def test_they_are_offered_for_few_pixels_of_many_channels_and_not_first_for_large_maps() -> None:
    deep = BlockProblem(1, 7, 7, 512, 2048, 512, 3, 8, 1, "silu", True, "float16", max_splits=32)
    assert 3 in {tiling.launches for tiling in cost_model.ranked(deep)[:4]}
    large = BlockProblem(128, 56, 56, 64, 256, 64, 3, 8, 1, "silu", True, "float16")
    first = cost_model.ranked(large)[:4]
    assert {tiling.launches for tiling in first} == {1}
    assert 3 in {tiling.launches for tiling in cost_model.ranked(large)}
    # A full convolution reads all channels for each: no slices of them.
    full = replace(deep, in_channels=64, hidden_channels=256, out_channels=64, group_width=64)
    assert 3 not in {tiling.launches for tiling in cost_model.ranked(full)}


def test_three_launches_take_no_scratch_and_split_nothing() -> None:
    block = replace(AWKWARD, max_splits=4)
    assert LAYERED.fits(block)
    assert LAYERED.partial_bytes(block) == 0
    assert not replace(LAYERED, splits=2).fits(block)
    assert not replace(LAYERED, tiles_each=2).fits(block)
    assert not replace(LAYERED, out_splits=2).fits(block)
    assert not replace(LAYERED, rows=2).fits(block)
