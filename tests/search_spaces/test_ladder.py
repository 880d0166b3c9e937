from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from search_spaces import SearchSpace, cost, ladder_space, load_space
from search_spaces.ladder import (
    GROWTH,
    LEAST_MAP,
    MOST_RESOLUTION,
    RUNGS,
    TOP_RUNG,
    nearest_rung,
    rung_macs,
    shown_resolutions,
    stage_strides,
)

RESOLUTIONS = (16, 32, 48, 64, 96, 128, 224, 256)


def anchor_macs(space: SearchSpace) -> int:
    return cost(space.anchor(), space.default_resolution, 10).macs


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_the_middle_of_each_rung_costs_two_and_a_half_times_that_of_the_one_below(resolution: int) -> None:
    lowest = nearest_rung((resolution,), 0)
    macs = [anchor_macs(ladder_space(resolution, rung)) for rung in RUNGS if rung >= lowest]
    # Four steps make a factor of 2.5. The lowest rungs consist of the narrowest networks, whose costs jump.
    for number, (below, above) in enumerate(zip(macs, macs[4:], strict=False)):
        assert (1.7, 2.1)[number >= 8] < above / below < (3.2, 2.9)[number >= 8]
    for below, above in pairwise(macs[8:]):
        assert 1.1 < above / below < 1.45
    assert macs[-1] == pytest.approx(10e9, rel=0.05)


def test_the_ladder_reaches_from_microcontrollers_to_ten_billions() -> None:
    assert anchor_macs(ladder_space(32, 0)) < 0.5e6
    assert anchor_macs(ladder_space(16, 0)) < 1e6
    assert rung_macs(TOP_RUNG) == 10e9
    assert rung_macs(3) == pytest.approx(rung_macs(2) * GROWTH)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("rung", [4, 6.25, 8])
def test_the_anchor_is_the_middle_of_what_is_drawn(resolution: int, rung: float) -> None:
    space = ladder_space(resolution, nearest_rung((resolution,), rung))
    rng = random.Random(0)
    drawn = [cost(space.sample(rng), resolution, 10).macs for _ in range(200)]
    assert 0.65 < median(drawn) / anchor_macs(space) < 1.4
    low, high = space.cost_range(resolution, 10)
    assert low.macs < anchor_macs(space) / 2
    assert high.macs > 1.5 * anchor_macs(space)


def test_strides_leave_a_map_that_a_convolution_can_see() -> None:
    assert stage_strides(16) == (1, 2)
    assert stage_strides(32) == (1, 2, 2)
    assert stage_strides(64) == (1, 2, 2, 2)
    # From here on the first stage halves the stem's map, too, as in `imagenet`.
    assert stage_strides(128) == stage_strides(224) == (2, 2, 2, 2)
    # Between two changes of the strides the map only grows.
    changes = [each for each in range(17, MOST_RESOLUTION + 1) if stage_strides(each) != stage_strides(each - 1)]
    for resolution in (16, *changes, *(each - 1 for each in changes), *range(20, MOST_RESOLUTION + 1, 20)):
        assert resolution / ladder_space(resolution, 8).anchor().total_stride >= LEAST_MAP


def test_widths_double_and_suit_the_kernels() -> None:
    for rung in (5, 7, 9):
        for stages in [ladder_space(64, rung).anchor().stages]:
            for before, after in pairwise(stages):
                assert 1.3 < after.width / before.width < 3
            assert all(stage.width % 16 == 0 for stage in stages if stage.width >= 32)
            assert all(stage.width % 32 == 0 for stage in stages if stage.width >= 128)
    depths = [sum(stage.blocks for stage in ladder_space(64, rung).anchor().stages) for rung in (4, 6, 8, 10)]
    assert depths == sorted(set(depths))


def test_a_rung_with_several_resolutions_is_that_of_the_middle_one() -> None:
    space = ladder_space((32, 48, 64), 5)
    assert space.own_resolutions == (32, 48, 64)
    assert space.name == "rung5@32,48,64"
    assert space.anchor().resolution == 48
    assert cost(space.anchor(), 1, 10).macs == pytest.approx(rung_macs(5), rel=0.1)


@pytest.mark.parametrize("size", [1, 8, 16, 28, 32, 33, 48, 64, 96, 100, 128, 150, 160, 224, 500, 4000])
def test_the_resolutions_shown_for_images_of_any_size_make_spaces(size: int) -> None:
    shown = shown_resolutions(size)
    assert len(ladder_space(shown, 8).own_resolutions) in (0, len(shown))
    if 16 <= size <= 224:
        assert min(shown) / 2 <= size <= 1.2 * max(shown)


def test_rungs_have_names_and_may_stand_in_files(tmp_path: Path) -> None:
    assert load_space("rung5@32") == ladder_space(32, 5)
    assert load_space("rung5.25@64,32,48") == ladder_space((32, 48, 64), 5.25)
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nrung = 6\nresolution = [32, 48]\n')
    mine = load_space(str(path))
    assert mine.name == "mine"
    assert mine.choices() == ladder_space((32, 48), 6).choices()
    assert SearchSpace.from_dict(json.loads(json.dumps(mine.to_dict()))) == mine


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rung5@8", "resolution=8 is not between 16 and 256"),
        ("rung5@512", "resolution=512 is not between 16 and 256"),
        ("rung5.1@32", "rung=5.1 is not a multiple of 0.25 between 0 and 11"),
        ("rung12@32", "rung=12 is not a multiple"),
        ("rung0@224", r"rung=0 does not exist at 224 pixels, where 2\.75 is the next"),
        ("rung5@32,36", r"resolution=\[32, 36\]: the total stride of 8 does not divide 36"),
        ("rung5", "neither a built-in space .*, nor a rung such as rung5@32, nor a TOML file"),
        ("rung5@32,", "neither a built-in space"),
    ],
)
def test_a_rung_that_is_none_is_refused_by_its_name(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_space(name)
    assert str(caught.value).startswith(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rung = 5\nresolution = 32\nstem_width = [16]", "rung=5 makes all choices, so that 'stem_width' cannot stand"),
        ("rung = 5\nresolution = 32\n[[stages]]\nwidth = 8", "rung=5 makes all choices, so that 'stages' cannot"),
        ("rung = 5", "resolution=None is neither"),
        ("rung = 5\nresolution = []", r"resolution=\[\] is neither"),
        ("rung = 5\nresolution = [32.5]", r"resolution=\[32.5\] is neither"),
        ('rung = "5"\nresolution = 32', "rung='5' is not a number"),
        ("rung = true\nresolution = 32", "rung=True is not a number"),
        ("rung = 5\nresolution = 7", "resolution=7 is not between"),
        ('rung = 5\nresolution = 32\nname = ""', "name='' is not a name"),
    ],
)
def test_a_file_whose_rung_is_none_or_mixed_with_choices_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_space(str(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
