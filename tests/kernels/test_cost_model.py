from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest

from kernels import cost_model
from kernels.cost_model import GPU_SPECS, H200
from kernels.problem import MAX_SPLITS, BlockProblem, Tiling
from tests.kernels.cases import covering_cases

# The first row of the table in the paper's terms: 56x56, C 64, e 4, k 3, g 8, batch 128.
PROBLEM = BlockProblem(128, 56, 56, 64, 256, 64, 3, 8, 1, "silu", True, "float16")
TILING = Tiling(128, 64, "mma")
PIXELS = 128 * 56 * 56


def test_macs_of_a_block() -> None:
    assert PROBLEM.conv_macs == PIXELS * 64 * 9 * 8
    assert PROBLEM.mlp_macs == PIXELS * (64 * 256 + 256 * 64)
    assert PROBLEM.macs == PROBLEM.conv_macs + PROBLEM.mlp_macs


def test_terms_are_work_over_rate() -> None:
    found = cost_model.terms(PROBLEM, TILING)
    clock = 132 * 1.755e9
    assert found["dram"] == pytest.approx(2 * PIXELS * 64 * 2 / 4.3e12)
    # Grouped weights as dense blocks of 16: twice the groups' own.
    assert found["tensor"] == pytest.approx(PIXELS * 64 * 9 * 16 / 250e12 + 2 * PIXELS * 64 * 256 / 395e12)
    # Of a tile's pixels and taps one copy into shared memory and one out of it (four warps for four blocks of channels)
    # past the first-level cache, weights of both kinds once in, the hidden ones once out for 64 pixels.
    conv = 9 * 64 * 2 * (128 * (2 + 1) + 2 * 16)
    hidden = 4 * (128 * 64 * 2) + 64 * 128 * 2 * (4 * 2 + 5)
    ends = 128 * 64 * (3 * 2 + 3 * 4)
    assert found["shared"] == pytest.approx(PIXELS / 128 * (conv + hidden + ends) / (128 * clock))
    assert found["special"] == pytest.approx(PIXELS * 256 / (16 * clock))
    weights = 9 * 64 * 16 + 2 * 64 * 256
    slots = 256 * 4.5 + 64 * (5 + 9 * 2 / 16 * 20) + weights / 128 * 2 / 16 * 18
    assert found["issue"] == pytest.approx(PIXELS * slots / (128 * clock))
    # 48 KiB of shared memory leave the first-level cache too little for the taps, and for the residual.
    assert found["l2"] == pytest.approx((PIXELS / 128 * weights + (9 + 1 + 1) * PIXELS * 64) * 2 / 5.5e12)


def test_taps_come_from_the_second_level_cache_where_the_first_does_not_hold_them() -> None:
    smaller = replace(TILING, block_e=32)
    weights = PIXELS / 128 * (9 * 64 * 16 + 2 * 64 * 256)
    served = cost_model.l2_bytes(PROBLEM, smaller, H200)
    # 128 pixels lie on three rows of 56; with a rim they need five of 58.
    assert served == pytest.approx(2 * (weights + PIXELS / 128 * 5 * 58 * 64 + PIXELS * 64))
    # Asynchronous copies pass it by, for the residual as well.
    past = cost_model.l2_bytes(PROBLEM, replace(smaller, conv_stages=3), H200)
    assert past == pytest.approx(2 * (weights + (9 + 1 + 1) * PIXELS * 64))
    # A full convolution reads its whole input for each part of its output.
    full = replace(PROBLEM, in_channels=128, out_channels=128, group_width=128, residual=False)
    whole, halves = (
        cost_model.l2_bytes(full, replace(smaller, conv="dense", conv_stages=3, part=part), H200) for part in (128, 64)
    )
    assert halves - whole == pytest.approx(2 * 9 * PIXELS * 128)


def test_a_tile_of_several_rows_loads_a_row_of_the_input_once_for_a_column_of_taps() -> None:
    tiling = replace(TILING, rows=8, conv_stages=3)
    # Ten rows of 16 columns, for each of three columns of taps, for 128 pixels.
    assert cost_model.loaded_pixels(PROBLEM, tiling) == 3 * 10 * 16
    assert cost_model.distinct_pixels(PROBLEM, tiling) == 10 * 18
    plain, rows = (cost_model.terms(PROBLEM, each) for each in (replace(TILING, conv_stages=3), tiling))
    for name in ("l2", "shared", "issue"):
        assert rows[name] < plain[name]
    assert rows["tensor"] == plain["tensor"]
    strided = replace(PROBLEM, stride=2, residual=False)
    assert cost_model.loaded_pixels(strided, tiling) == 3 * 17 * 16
    # 56 rows in tiles of 8, columns of 128 images side by side.
    assert tiling.tiles(PROBLEM) == 128 * 56 / 16 * 7
    assert tiling.tiles(strided) == 128 * 28 / 16 * 4


def test_columns_in_pairs_share_loads_and_have_fewer_zeros() -> None:
    tiling = replace(TILING, conv="pairs", rows=4)
    rows = replace(TILING, rows=4)
    # Six rows of 16 pairs, four columns of the input for each.
    assert cost_model.loaded_pixels(PROBLEM, tiling) == 6 * 16 * 4
    # Of these an instruction asks for ten columns for four pairs.
    assert cost_model.fetched_pixels(PROBLEM, tiling) == 6 * 16 * 10 / 4
    found, plain = (cost_model.terms(PROBLEM, each) for each in (tiling, rows))
    for name in ("l2", "shared", "tensor", "issue"):
        assert found[name] < plain[name]
    # Three rows of taps, of four columns of eight channels.
    assert found["tensor"] == pytest.approx(PIXELS * 64 * 3 * 4 * 8 / 250e12 + 2 * PIXELS * 64 * 256 / 395e12)
    # A seven wide map takes eight columns of each image.
    odd = replace(PROBLEM, height=7, width=7)
    assert (rows.tiles(odd), tiling.tiles(odd)) == (128 * 7 / 32 * 2, 128 * 8 / 32 * 2)


def test_pairs_need_rows_of_enough_columns_and_stride_one() -> None:
    tiling = replace(TILING, conv="pairs", rows=4)
    assert tiling.fits(PROBLEM)
    assert not replace(tiling, rows=1).fits(PROBLEM)
    assert not replace(tiling, rows=8).fits(PROBLEM)
    assert not replace(tiling, conv_stages=3).fits(PROBLEM)
    for other in (dict(group_width=16), dict(group_width=1), dict(stride=2, residual=False)):
        assert "pairs" not in {each.conv for each in cost_model.fitting_tilings(replace(PROBLEM, batch=1, **other))}


def test_weights_that_are_kept_are_fetched_once_a_program() -> None:
    kept = replace(TILING, tiles_each=24)
    programs = ceil(PIXELS / 128 / 24)
    assert kept.programs(PROBLEM) == programs
    found = cost_model.l2_bytes(PROBLEM, kept, H200) / 2
    of_tiles = PIXELS / 128 * 9 * 64 * 16 + (9 + 1 + 1) * PIXELS * 64
    assert found == pytest.approx(programs * 2 * 64 * 256 + of_tiles)
    assert cost_model.shared_bytes(PROBLEM, kept) > 2 * 2 * 64 * 256


def test_waste_of_tiles_and_of_padded_channels_is_in_the_terms() -> None:
    small = replace(PROBLEM, batch=1, height=3, width=3)
    one_tile = cost_model.terms(small, TILING)
    full = cost_model.terms(replace(small, height=8, width=16), TILING)
    assert one_tile["tensor"] == full["tensor"]
    odd = replace(PROBLEM, in_channels=40, hidden_channels=160, out_channels=40)
    # 40 channels are computed as 32 + 16, and 160 hidden ones as three blocks of 64.
    assert cost_model.terms(odd, TILING)["tensor"] == pytest.approx(
        PIXELS * 48 * 9 * 16 / 250e12 + 2 * PIXELS * 48 * 192 / 395e12
    )


def test_a_depthwise_convolution_without_tensor_cores_costs_lanes_instead() -> None:
    depthwise = replace(PROBLEM, group_width=1)
    plain = cost_model.terms(depthwise, replace(TILING, conv="fma"))
    diagonal = cost_model.terms(depthwise, replace(TILING, conv="diagonal"))
    assert plain["issue"] > diagonal["issue"]
    assert plain["tensor"] < diagonal["tensor"]


def test_the_bound_counts_what_no_kernel_avoids() -> None:
    found = cost_model.least_terms(PROBLEM)
    clock = 132 * 1.755e9
    weights = 64 * 9 * 8 + 2 * 64 * 256
    assert found["dram"] == pytest.approx((2 * PIXELS * 64 + weights) * 2 / 4.3e12)
    assert found["tensor"] == pytest.approx(PROBLEM.macs / 395e12)
    assert found["special"] == pytest.approx(PIXELS * 256 / 2 / (16 * clock))
    assert found["issue"] == pytest.approx(PIXELS * (256 * 1.5 + 64 / 2) / (128 * clock))
    assert cost_model.bound(PROBLEM) == ("tensor", found["tensor"])
    # Without tensor cores a depthwise convolution's products take other lanes, at the same time.
    depthwise = replace(PROBLEM, group_width=1)
    assert cost_model.least_terms(depthwise)["tensor"] == pytest.approx(PROBLEM.mlp_macs / 395e12)
    # The roofline counts them all.
    assert cost_model.roofline(depthwise) == pytest.approx(depthwise.macs / 395e12)
    # Few channels: the bytes of a large map take longest.
    assert cost_model.bound(replace(PROBLEM, in_channels=32, hidden_channels=128, out_channels=32))[0] == "dram"


def test_fusion_saves_what_it_should() -> None:
    assert cost_model.roofline(PROBLEM) == pytest.approx(38e-6, rel=0.02)
    assert cost_model.layer_roofline(PROBLEM) == pytest.approx(155e-6, rel=0.02)


@pytest.mark.parametrize("capability", GPU_SPECS)
def test_no_tiling_is_predicted_to_beat_the_bound_or_the_roofline(capability: int) -> None:
    gpu = GPU_SPECS[capability]
    main = [
        replace(PROBLEM, height=size, width=size, in_channels=width, hidden_channels=times * width, out_channels=width,
                kernel_size=kernel_size, group_width=group, activation=activation, batch=batch)
        for size, width, kernel_size, group, times, activation, batch in (
            (56, 64, 3, 8, 4, "silu", 128), (14, 256, 3, 8, 4, "silu", 128),
            (56, 32, 7, 1, 2, "relu", 128), (7, 512, 3, 16, 2, "gelu", 1),
        )
    ]  # fmt: skip
    for problem in [*main, *(case.problem for case in covering_cases()[::20])]:
        least = max(cost_model.bound(problem, gpu)[1], cost_model.roofline(problem, gpu))
        every = cost_model.fitting_tilings(problem, gpu)
        assert every
        assert least <= min(cost_model.estimate(problem, tiling, gpu) for tiling in every)


def test_small_batches_spread_over_the_chip() -> None:
    for size, channels in ((14, 256), (7, 512), (28, 128)):
        small = BlockProblem(1, size, size, channels, 4 * channels, channels, 3, 8, 1, "silu", True, "float16")
        split = replace(small, max_splits=MAX_SPLITS)
        first = cost_model.ranked(split)[0]
        assert all(launch.programs >= 48 for launch in cost_model.launch_costs(split, first))
        unsplit = cost_model.ranked(small)[0]
        assert unsplit.partial_bytes(small) == 0
        assert all(launch.programs >= 16 for launch in cost_model.launch_costs(small, unsplit))


@pytest.mark.parametrize("capability", GPU_SPECS)
def test_what_is_ranked_fits(capability: int) -> None:
    gpu = GPU_SPECS[capability]
    for case in covering_cases()[::6]:
        found = cost_model.ranked(case.problem, gpu)
        assert found
        assert len(set(found)) == len(found)
        for tiling in found:
            assert tiling.fits(case.problem)
            assert tiling.splits <= case.problem.max_splits
            assert cost_model.shared_bytes(case.problem, tiling) <= gpu.shared_bytes


def test_the_first_tilings_differ_in_more_than_pipelining() -> None:
    first = cost_model.ranked(PROBLEM)[:6]
    assert len({(tiling.block_m, tiling.splits, tiling.conv, tiling.tiles_each > 1) for tiling in first}) >= 3


def test_programs_of_several_tiles_fill_the_chip_twice() -> None:
    kept = [tiling for tiling in cost_model.ranked(PROBLEM) if tiling.tiles_each > 1]
    assert kept
    for tiling in kept:
        slots = 2 * H200.multiprocessors * cost_model.resident(PROBLEM, tiling, H200)
        assert slots * (tiling.tiles_each - 1) < tiling.tiles(PROBLEM) <= slots * tiling.tiles_each
        assert cost_model.shared_bytes(PROBLEM, tiling) <= H200.shared_bytes


def test_several_tiles_a_program_are_not_split() -> None:
    lent = replace(PROBLEM, batch=1, max_splits=8)
    several = replace(TILING, block_m=32, tiles_each=2)
    assert several.fits(lent)
    assert replace(several, tiles_each=1, splits=2).fits(lent)
    assert not replace(several, splits=2).fits(lent)
    assert not replace(several, out_splits=2).fits(lent)


def test_rows_leave_sixteen_columns_or_more_and_are_not_for_full_convolutions() -> None:
    assert replace(TILING, rows=8).fits(PROBLEM)
    assert not replace(TILING, block_m=64, rows=8).fits(PROBLEM)
    full = replace(PROBLEM, group_width=64)
    assert replace(TILING, conv="dense").fits(full)
    assert not replace(TILING, conv="dense", rows=2).fits(full)


def test_the_largest_term_is_named() -> None:
    name, seconds = cost_model.largest_term(PROBLEM, TILING, H200)
    assert seconds == max(cost_model.terms(PROBLEM, TILING).values())
    assert name in cost_model.terms(PROBLEM, TILING)
