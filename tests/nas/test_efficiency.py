from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from nas.latency.roofline import (
    Block,
    Efficiency,
    Layer,
    Machine,
    NetworkEfficiency,
    arch_blocks,
    chain,
    computational_efficiency,
    conv_layer,
    convfirst_block,
    everything_else,
    head_block,
    ideal_seconds,
    linear_layer,
    single,
    stem_block,
    waterline,
)
from search_spaces import SearchSpace, builtin_spaces, cost, load_space

# 1 MAC/s and 1 byte/s a thousand times: milliseconds are counts.
ROUND = Machine(macs_per_s=1000, bytes_per_s=1000)


def layer(macs: int, moved: int, name: str = "layer") -> Layer:
    return Layer(name, macs, input_bytes=moved, weight_bytes=0, output_bytes=0)


# -- Counts by hand --------------------------------------------------------------------------------------------------


def test_depthwise_block_with_residual_by_hand() -> None:
    """2 images of 10x8 pixels; 16 channels, 3x3 depthwise, to 64 and back to 16 with the input added; float16."""
    block = convfirst_block("block", 2, 10, 8, 16, 64, 16, 3, 1, 1, residual=True, itemsize=2)
    pixels = 2 * 10 * 8
    assert [(each.name, each.macs) for each in block.layers] == [
        ("conv", pixels * 16 * 9), ("expand", pixels * 16 * 64), ("project", pixels * 64 * 16),
    ]  # fmt: skip
    narrow, wide = 2 * pixels * 16, 2 * pixels * 64
    # Weights and biases of the three layers.
    weights = [2 * (16 * 9 + 16), 2 * (16 * 64 + 64), 2 * (64 * 16 + 16)]
    unfused = [narrow + weights[0] + narrow, narrow + weights[1] + wide, wide + weights[2] + narrow + narrow]
    assert [each.moved_bytes for each in block.layers] == unfused
    assert block.unfused_bytes == sum(unfused)
    assert block.fused_bytes == narrow + sum(weights) + narrow
    assert block.macs == pixels * (16 * 9 + 16 * 64 + 64 * 16) == 350_720
    assert block.intensity(fused=True) == 2 * 350_720 / (2 * 5120 + 2 * (160 + 1088 + 1040)) == 701_440 / 14_816
    assert block.intensity(fused=False) == 701_440 / sum(unfused)
    assert block.fused_workspace_bytes == narrow + narrow
    # While expanding and while projecting: narrow, wide and the block's input.
    assert block.unfused_workspace_bytes == narrow + wide + narrow


def test_grouped_block_with_stride_by_hand() -> None:
    """1 image of 9x6 pixels to 5x3; 16 channels, 5x5 in groups of 8, to 32, to 24; float32."""
    block = convfirst_block("block", 1, 9, 6, 16, 32, 24, 5, 8, 2, residual=False, itemsize=4)
    pixels = 5 * 3
    assert [each.macs for each in block.layers] == [pixels * 16 * 8 * 25, pixels * 16 * 32, pixels * 32 * 24]
    weights = 4 * ((16 * 8 * 25 + 16) + (16 * 32 + 32) + (32 * 24 + 24))
    tensors = [4 * 9 * 6 * 16, 4 * pixels * 16, 4 * pixels * 32, 4 * pixels * 24]
    assert block.fused_bytes == tensors[0] + weights + tensors[3]
    assert block.unfused_bytes == tensors[0] + 2 * tensors[1] + 2 * tensors[2] + tensors[3] + weights
    assert block.fused_workspace_bytes == tensors[0] + tensors[3]
    # The convolution's input is the largest tensor, and nothing keeps it alive later.
    assert block.unfused_workspace_bytes == tensors[0] + tensors[1]


def test_pooled_shortcuts_read_the_input_by_hand() -> None:
    """The same block with a shortcut, from all its input; and one to fewer channels, from as many of them."""
    plain, added = (convfirst_block("block", 1, 9, 6, 16, 32, 24, 5, 8, 2, each, itemsize=4) for each in (False, True))
    assert added.fused_bytes == plain.fused_bytes
    assert added.unfused_bytes == plain.unfused_bytes + 4 * 9 * 6 * 16
    assert added.macs == plain.macs
    plain, added = (convfirst_block("block", 1, 9, 6, 16, 32, 8, 5, 8, 1, each, itemsize=4) for each in (False, True))
    assert added.unfused_bytes == plain.unfused_bytes + 4 * 9 * 6 * 8


def test_stem_by_hand() -> None:
    """4 images of 33x33 pixels in 3 channels to 17x17 in 24; float16."""
    block = stem_block("stem", 4, 33, 33, 3, 24, itemsize=2)
    assert block.kind == "stem"
    assert block.macs == 4 * 17 * 17 * 24 * 3 * 9
    moved = 2 * (4 * 33 * 33 * 3 + (24 * 3 * 9 + 24) + 4 * 17 * 17 * 24)
    assert block.fused_bytes == block.unfused_bytes == moved
    assert block.intensity(fused=True) == block.intensity(fused=False) == 2 * block.macs / moved
    assert block.fused_workspace_bytes == block.unfused_workspace_bytes == 2 * (4 * 33 * 33 * 3 + 4 * 17 * 17 * 24)


def test_head_by_hand() -> None:
    """2 images of 4x3 pixels in 32 channels, 64 features, 10 classes; float16."""
    block = head_block("head", 2, 4, 3, 32, 64, 10, itemsize=2)
    assert [(each.name, each.macs) for each in block.layers] == [
        ("pool", 0), ("conv_head", 2 * 32 * 64), ("classifier", 2 * 64 * 10),
    ]  # fmt: skip
    read, pooled, features, logits = 2 * 2 * 4 * 3 * 32, 2 * 2 * 32, 2 * 2 * 64, 2 * 2 * 10
    weights = 2 * (32 * 64 + 64) + 2 * (64 * 10 + 10)
    assert block.fused_bytes == read + weights + logits
    assert block.unfused_bytes == read + 2 * pooled + 2 * features + logits + weights
    assert block.fused_workspace_bytes == read + logits
    assert block.unfused_workspace_bytes == read + pooled


def test_single_layers_by_hand() -> None:
    linear = linear_layer("fc", 8, 100, 10, itemsize=4)
    block = single(linear, "linear")
    assert block.name == "fc"
    assert block.macs == 8 * 100 * 10
    assert block.fused_bytes == block.unfused_bytes == 4 * (8 * 100 + 100 * 10 + 10 + 8 * 10)
    assert block.intensity(True) == 2 * 8000 / 7560
    assert block.fused_workspace_bytes == block.unfused_workspace_bytes == 4 * (8 * 100 + 8 * 10)

    # A full 3x3 convolution, to whose output something of its shape is added.
    conv = conv_layer("conv", 1, 6, 6, 8, 16, 3, 8, 1, itemsize=1, shortcut_bytes=576)
    assert conv == Layer("conv", 36 * 16 * 8 * 9, 36 * 8, 16 * 8 * 9 + 16, 36 * 16, shortcut_bytes=36 * 16)
    assert single(conv, "conv").fused_bytes == 36 * 8 + (16 * 8 * 9 + 16) + 36 * 16 + 36 * 16
    assert single(conv, "conv").fused_workspace_bytes == 36 * 8 + 36 * 16 + 36 * 16


def test_what_has_no_operations_has_no_intensity() -> None:
    assert everything_else().intensity(fused=True) == 0
    assert everything_else().kind == "other"


@pytest.mark.parametrize("name", builtin_spaces())
@pytest.mark.parametrize("batch", [1, 5])
def test_blocks_of_random_architectures_sum_to_their_cost(name: str, batch: int) -> None:
    space = load_space(name)
    rng = random.Random(batch)
    for _ in range(50):
        arch = space.sample(rng)
        resolution = rng.choice([space.default_resolution, 33, 50])
        blocks = arch_blocks(arch, batch, resolution, 7, itemsize=2)
        assert sum(block.macs for block in blocks) == batch * cost(arch, resolution, num_classes=7).macs, str(arch)
        assert len(blocks) == len(arch.blocks) + 2
        for block in blocks:
            assert block.fused_bytes <= block.unfused_bytes


def test_fractional_expansions_too(tiny_space: SearchSpace) -> None:
    rng = random.Random(0)
    for _ in range(20):
        arch = tiny_space.sample(rng)
        assert sum(block.macs for block in arch_blocks(arch, 1, 17, 3, 4)) == cost(arch, 17, num_classes=3).macs


def test_blocks_are_named_by_stage() -> None:
    arch = load_space("small").anchor()
    names = [block.name for block in arch_blocks(arch, 1, 32, 10, 2)]
    expected = [f"stage{n}.{i}" for n, stage in enumerate(arch.stages, start=1) for i in range(stage.blocks)]
    assert names == ["stem", *expected, "head"]


# -- Time by hand ----------------------------------------------------------------------------------------------------


def test_ideal_time_is_the_larger_of_operations_and_bytes() -> None:
    compute, memory = single(layer(300, 200), "conv"), single(layer(100, 400), "conv")
    assert ideal_seconds(compute, ROUND, fused=True) == 0.3
    assert ideal_seconds(memory, ROUND, fused=True) == 0.4
    assert Efficiency(compute, ROUND, True, None).bound_by == "compute"
    assert Efficiency(memory, ROUND, True, None).bound_by == "memory"
    assert Efficiency(compute, ROUND, True, None).bound == 1
    assert Efficiency(memory, ROUND, True, None).bound == 0.25


def test_unfused_ideal_time_is_summed_over_layers() -> None:
    """Each layer waits for its own limit: 0.3 s of operations and then 0.4 s of bytes, where one kernel overlaps."""
    block = Block("block", "mbconv", (layer(300, 200), layer(100, 400)), 150, 0, 0)
    assert ideal_seconds(block, ROUND, fused=False) == pytest.approx(0.3 + 0.4)
    assert ideal_seconds(block, ROUND, fused=True) == pytest.approx(max(300 + 100, 150) / 1000)
    assert Efficiency(block, ROUND, False, None).bound_by == "memory"  # 0.4 s of operations, 0.6 s of bytes
    assert Efficiency(block, ROUND, True, None).bound_by == "compute"


def test_efficiency_and_gap_of_one_block() -> None:
    row = Efficiency(single(layer(300, 200), "conv"), ROUND, fused=True, seconds=0.4)
    assert row.compute_seconds == row.ideal_seconds == 0.3
    assert row.efficiency == pytest.approx(0.75)
    assert row.gap_seconds == pytest.approx(0.1)
    assert computational_efficiency(300, 0.4, ROUND) == pytest.approx(0.75)
    unmeasured = Efficiency(row.block, ROUND, fused=True, seconds=None)
    assert unmeasured.efficiency is None
    assert unmeasured.gap_seconds is None


def test_waterline_of_two_kernels_by_hand() -> None:
    """F    B    t*   t
    compute-bound   300  200  0.3  0.5
    memory-bound    100  500  0.5  0.75
    everything else   0    0    0  0.75
    sum             400       0.8  2.0    at 1000 MAC/s: waterline 400 / 800, achieved 400 / 2000
    """
    rows = [
        Efficiency(single(layer(300, 200), "conv"), ROUND, True, 0.5),
        Efficiency(single(layer(100, 500), "depthwise"), ROUND, True, 0.75),
        Efficiency(everything_else(), ROUND, True, 0.75),
    ]
    assert waterline(rows) == pytest.approx(0.5)
    assert NetworkEfficiency("network", "", tuple(rows), seconds=2.0).achieved == pytest.approx(0.2)
    assert NetworkEfficiency("network", "", tuple(rows[:2]), seconds=1.25).achieved == pytest.approx(0.32)
    # One roofline of all operations and bytes would promise more: 400 / 700.
    assert waterline(rows) < 400 / 700
    other = rows[2]
    assert (other.bound, other.efficiency, other.ideal_seconds, other.gap_seconds) == (0, 0, 0, 0.75)

    network = NetworkEfficiency("network", "", tuple(rows), seconds=1.6)
    assert network.waterline == waterline(rows)
    assert network.achieved == pytest.approx(0.25)
    assert network.rows_seconds == pytest.approx(2)


def test_rows_do_not_add_up_where_one_is_not_measured() -> None:
    rows = [Efficiency(single(layer(300, 200), "conv"), ROUND, True, seconds) for seconds in (0.5, None)]
    assert waterline(rows) == 1
    network = NetworkEfficiency("network", "", tuple(rows), seconds=1.0)
    assert network.achieved == pytest.approx(0.6)
    assert network.rows_seconds is None


def test_ridge_is_where_both_take_equally_long() -> None:
    machine = Machine(macs_per_s=400e12, bytes_per_s=4e12)
    block = single(layer(10_000, 100), "conv")
    assert machine.ridge == 200 == block.intensity(True)
    assert ideal_seconds(block, machine, True) == pytest.approx(10_000 / 400e12) == pytest.approx(100 / 4e12)


# -- Errors ----------------------------------------------------------------------------------------------------------

BLOCK = single(layer(300, 200), "conv")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Machine(0, 1), "macs_per_s=0"),
        (lambda: Machine(1, float("nan")), "bytes_per_s=nan"),
        (lambda: Machine(float("inf"), 1), "macs_per_s=inf"),
        (lambda: Layer("layer", -1, 1, 1, 1), "macs=-1"),
        (lambda: Layer("layer", 1, 1, 1, 1, shortcut_bytes=-2), "shortcut_bytes=-2"),
        (lambda: Layer("layer", 1, 0, 0, 0), "macs=1 and no bytes"),
        (lambda: Block("block", "conv", (), -1, 0, 0), "fused_bytes=-1"),
        (lambda: Block("block", "conv", (layer(3, 2),), 0, 0, 0), "fused_bytes=0 with macs=3"),
        (lambda: conv_layer("conv", 0, 8, 8, 8, 8, 3, 1, 1, 2), "batch=0"),
        (lambda: conv_layer("conv", 1, 8, -8, 8, 8, 3, 1, 1, 2), "width=-8"),
        (lambda: conv_layer("conv", 1, 8, 8, 8, 8, 4, 1, 1, 2), "kernel_size=4"),
        (lambda: conv_layer("conv", 1, 8, 8, 8, 8, 3, 3, 1, 2), "group_width=3"),
        (lambda: conv_layer("conv", 1, 8, 8, 8, 12, 3, 1, 1, 2), "out_channels=12"),
        (lambda: conv_layer("conv", 1, 8, 8, 8, 8, 3, 1, 0, 2), "stride=0"),
        (lambda: linear_layer("fc", 1, 0, 10, 2), "in_features=0"),
        (lambda: linear_layer("fc", 1, 10, 10, 2.0), "itemsize=2.0"),  # type: ignore[arg-type]
        (lambda: head_block("head", 1, 0, 8, 8, 16, 10, 2), "height=0"),
        (lambda: arch_blocks(load_space("small").anchor(), 1, 0, 10, 2), "height=0"),
        (lambda: chain("block", "conv", []), "layers of block is empty"),
        (lambda: chain("block", "conv", [layer(3, 2), layer(3, 2, "next")]), "next reads 2 bytes"),
        (
            lambda: chain("block", "conv", [Layer("a", 1, 4, 0, 4, shortcut_bytes=4), layer(3, 4)]),
            "which is not the last",
        ),
        (lambda: chain("block", "conv", [Layer("a", 1, 3, 0, 4, shortcut_bytes=4)]), "shortcut_bytes=4"),
        (lambda: computational_efficiency(1, 0, ROUND), "seconds=0"),
        (lambda: computational_efficiency(-1, 1, ROUND), "macs=-1"),
        (lambda: Efficiency(BLOCK, ROUND, True, 0.0), "seconds=0.0"),
        (lambda: waterline([]), "rows is empty"),
        (lambda: waterline([Efficiency(everything_else(), ROUND, True, 1.0)]), "macs=0 in all 1 rows"),
        (
            lambda: waterline([Efficiency(BLOCK, machine, True, 1.0) for machine in (ROUND, Machine(1, 1))]),
            "macs_per_s=1,",
        ),
        (lambda: NetworkEfficiency("n", "", (Efficiency(BLOCK, ROUND, True, 1.0),), -1.0), "seconds=-1.0"),
        (lambda: NetworkEfficiency("n", "", (), 1.0), "rows is empty"),
    ],
)
def test_nonsense_is_refused_by_name_and_value(make: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        make()


def test_it_costs_no_import_of_torch() -> None:
    code = "import sys, nas.latency.roofline; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
