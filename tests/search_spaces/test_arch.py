from __future__ import annotations

import dataclasses
import itertools
import random
import re
from typing import Any

import pytest
import timm
import torch
from timm.layers import make_divisible
from torch import nn

from search_spaces import ACTIVATIONS, ArchSpec, StageSpec, builtin_spaces, load_space
from search_spaces.arch import HeadSpec, StemSpec, expanded_channels
from search_spaces.timm_config import model_args

STAGE = StageSpec(width=24, kernel_size=5, group_width=8, expansion=2.5, blocks=2, stride=2)
ARCH = ArchSpec(stem_width=16, stages=(STAGE,), activation="silu", head_width=64)

# Another valid value of every field.
OTHER_STAGE = dict(width=32, kernel_size=7, group_width=1, expansion=3.0, blocks=1, stride=1)
OTHER_ARCH = dict(
    stem_width=24,
    stages=(STAGE, STAGE),
    activation="gelu",
    head_width=128,
    resolution=64,
    stem_stride=1,
    shortcut="pooled",
)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(StageSpec)])
def test_every_stage_field_survives_json_and_changes_the_id(field: str) -> None:
    changed = dataclasses.replace(STAGE, **{field: OTHER_STAGE[field]})
    arch = dataclasses.replace(ARCH, stages=(changed,))
    assert ArchSpec.from_json(arch.to_json()) == arch
    assert arch.arch_id != ARCH.arch_id
    assert changed.arch_string != STAGE.arch_string
    assert str(arch) != str(ARCH)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ArchSpec)])
def test_every_field_survives_json_and_changes_the_id(field: str) -> None:
    arch = dataclasses.replace(ARCH, **{field: OTHER_ARCH[field]})
    assert ArchSpec.from_json(arch.to_json()) == arch
    assert arch.arch_id != ARCH.arch_id
    assert str(arch) != str(ARCH)


def test_a_network_sees_images_at_its_own_resolution() -> None:
    own = dataclasses.replace(ARCH, resolution=64)
    assert own.shown(32) == 64
    assert ARCH.shown(32) == 32
    assert own.walk(32) == ARCH.walk(64)
    assert str(own) == f"64 px | {ARCH}"
    assert ArchSpec.parse(f"  64  px|{ARCH}") == own
    assert "resolution" not in ARCH.to_dict()
    for wrong in ("4 px | ", "x px | ", "64px | ", "64 px 32 px | "):
        with pytest.raises(ValueError, match=r"resolution|is not a stem|is not an architecture"):
            ArchSpec.parse(f"{wrong}{ARCH}")


def test_a_stem_without_stride_leaves_a_map_twice_as_wide() -> None:
    fine = dataclasses.replace(ARCH, stem_stride=1)
    assert fine.total_stride == ARCH.total_stride // 2
    assert [step.out_size for step in fine.walk(32)[:-1]] == [step.out_size for step in ARCH.walk(64)[:-1]]
    assert str(fine) == str(ARCH).replace("stem 16", "stem 16/1")
    assert "stem_stride" not in ARCH.to_dict()
    assert ArchSpec.parse(str(ARCH).replace("stem 16", "stem 16/2")) == ARCH
    x = torch.randn(1, 3, 16, 16)
    assert fine.build(5).eval().conv_stem(x).shape[-1] == 16


def test_pooled_shortcuts_go_around_every_block() -> None:
    pooled = dataclasses.replace(ARCH, shortcut="pooled")
    assert str(pooled) == str(ARCH).replace("| head", "| pooled shortcuts | head")
    assert ArchSpec.parse(str(pooled).replace("pooled shortcuts", " pooled  shortcuts ")) == pooled
    assert "shortcut" not in ARCH.to_dict()
    assert [block.residual for block in ARCH.blocks] == [False, True]
    assert [block.residual for block in pooled.blocks] == [True, True]
    # Blocks that keep the shape are alike in both.
    assert ARCH.blocks[1] == pooled.blocks[1]
    assert ARCH.blocks[0] != pooled.blocks[0]
    for wrong in ("pooled", "pooled shortcut"):
        with pytest.raises(ValueError, match="is not a stage"):
            ArchSpec.parse(str(pooled).replace("pooled shortcuts", wrong))
    with pytest.raises(ValueError, match="is not an architecture"):
        ArchSpec.parse("silu stem 16 | pooled shortcuts")
    with pytest.raises(ValueError, match="stages"):
        ArchSpec.parse("silu stem 16 | pooled shortcuts | head 64")
    with pytest.raises(ValueError, match="shortcut='conv' is none of identity, pooled"):
        dataclasses.replace(ARCH, shortcut="conv")


@torch.no_grad()
def test_a_pooled_shortcut_is_the_mean_of_a_strides_pixels_with_zeros_for_more_channels() -> None:
    arch = ArchSpec.parse("relu stem 8 | 1x16/2 k3 g1 e1 | 1x8 k3 g1 e1 | pooled shortcuts | head 0")
    network = arch.build(5).eval()
    wider, narrower = (stage[0] for stage in network.blocks)
    for block in (wider, narrower):
        # Nothing but the shortcut is left.
        block.pw_proj.conv.weight.zero_()
    x = torch.randn(2, 8, 5, 6)
    expected = torch.zeros(2, 16, 3, 3)
    for row, column in itertools.product(range(3), range(3)):
        expected[:, :8, row, column] = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((2, 3))
    torch.testing.assert_close(wider(x), expected)
    torch.testing.assert_close(narrower(expected), expected[:, :8])
    # The same weights as without.
    plain = dataclasses.replace(arch, shortcut="identity").build(5)
    assert list(plain.state_dict()) == list(network.state_dict())


def test_pooled_shortcuts_drop_their_blocks_as_timms_own_do() -> None:
    arch = ArchSpec.parse("relu stem 8 | 1x16/2 k3 g1 e1 | 1x16 k3 g1 e1 | pooled shortcuts | head 0")
    network: Any = timm.create_model("convfirst", **model_args(arch), num_classes=5, drop_path_rate=0.9)
    # timm drops later blocks more often.
    assert [type(stage[0].drop_path) for stage in network.blocks] == [nn.Identity, timm.layers.DropPath]
    block = network.blocks[0][0]
    block.drop_path = timm.layers.DropPath(0.999999)
    x = torch.randn(4, 8, 4, 4)
    torch.testing.assert_close(block.train()(x), block.shortcut(x))


@torch.no_grad()
def test_pooled_shortcuts_can_be_scripted() -> None:
    arch = ArchSpec.parse("relu stem 8 | 1x16/2 k3 g1 e1 | 1x8 k3 g1 e1 | pooled shortcuts | head 0")
    network = arch.build(5).eval()
    x = torch.randn(2, 3, 9, 10)
    assert torch.equal(torch.jit.script(network)(x), network(x))


def test_a_head_may_be_a_classifier_alone() -> None:
    short = dataclasses.replace(ARCH, head_width=0)
    assert str(short).endswith("| head 0")
    assert ArchSpec.parse(str(short)) == short
    network = short.build(5).eval()
    assert network(torch.randn(1, 3, 16, 16)).shape == (1, 5)
    for wrong in (False, -8, 4):
        with pytest.raises(ValueError, match="head_width"):
            dataclasses.replace(ARCH, head_width=wrong)


def test_arch_id_is_the_same_on_every_machine_and_in_every_version() -> None:
    assert ARCH.arch_id == "ada6eb962fa0"


def test_equal_architectures_are_equal_however_they_were_written() -> None:
    whole = dataclasses.replace(STAGE, expansion=4)
    fraction = dataclasses.replace(STAGE, expansion=4.0)
    assert whole == fraction
    assert whole.arch_string == fraction.arch_string == "uir_r2_a5_k0_s2_e4_c24_gs8"
    assert ArchSpec(16, [whole], "silu", 64).arch_id == ArchSpec(16, (fraction,), "silu", 64).arch_id  # type: ignore[arg-type]


def test_readable_line() -> None:
    assert str(ARCH) == "silu stem 16 | 2x24/2 k5 g8 e2.5 | head 64"


@pytest.mark.parametrize("name", builtin_spaces())
def test_the_readable_line_comes_back_equal(name: str) -> None:
    space = load_space(name)
    rng = random.Random(0)
    for arch in [space.anchor(), space.smallest(), *(space.sample(rng) for _ in range(200))]:
        for text in (str(arch), arch.to_json()):
            parsed = ArchSpec.parse(text)
            assert parsed == arch
            assert parsed.arch_id == arch.arch_id


@pytest.mark.parametrize("expansion", [4, 0.1, 1 / 3, 2.0000001, 1e-7, 1e20, 123456789.0])
def test_every_digit_of_an_expansion_comes_back(expansion: float) -> None:
    """Six digits were printed once, of which 1 / 3 does not come back."""
    stage = dataclasses.replace(STAGE, expansion=expansion)
    assert StageSpec.parse(str(stage)) == stage
    assert f"_e{str(stage).rpartition(' e')[2]}_" in stage.arch_string


@pytest.mark.parametrize(
    "text",
    [
        "  silu   stem\t16 |2x24/2  k5 g8 e2.5|head  64\n",
        "silu stem 16\n| 2x24/2 k5 g8 e2.50\n| head 064",
        f"\n {ARCH.to_json().replace(',', ', ')} ",
    ],
)
def test_extra_spaces_do_not_matter(text: str) -> None:
    assert ArchSpec.parse(text) == ARCH


def test_a_stride_of_one_may_be_written_out() -> None:
    assert StageSpec.parse("2x24/1 k5 g8 e3") == StageSpec.parse("2x24 k5 g8 e3")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # The whole.
        (str(ARCH), "", "'' is not an architecture, such as 'silu stem 16 | "),
        (str(ARCH), "3fa8b1c0d2e4", "'3fa8b1c0d2e4' is not an architecture"),
        ("| 2x24/2 k5 g8 e2.5 ", "", "'silu stem 16 | head 64' is not an architecture"),
        ("| head 64", "", "'silu stem 16 | 2x24/2 k5 g8 e2.5' is not an architecture"),
        # The stem.
        ("silu stem", "stem", "'stem 16' is not a stem, such as 'silu stem 16'"),
        ("stem 16", "stem", "'silu stem' is not a stem"),
        ("stem 16", "stem -16", "'silu stem -16' is not a stem"),
        ("stem 16", "stem 20", "stem_width=20 is not a multiple of 8"),
        ("silu", "tanh", "activation='tanh' is none of silu, "),
        # A stage.
        ("2x24/2 k5", "24/2 k5", "stage 1: '24/2 k5 g8 e2.5' is not a stage, such as '2x32/2 k3 g8 e4'"),
        ("2x24/2", "2x24/", "stage 1: '2x24/ k5 g8 e2.5' is not a stage"),
        ("2x24/2", "2x24/3", "stage 1: stride=3 is neither 1 nor 2"),
        ("2x24", "0x24", "stage 1: blocks=0"),
        ("2x24", "2x20", "stage 1: width=20 is not a multiple of 8"),
        ("k5", "k4", "stage 1: kernel_size=4 is not odd"),
        ("k5", "k5.0", "stage 1: '2x24/2 k5.0 g8 e2.5' is not a stage"),
        ("k5 g8", "g8 k5", "stage 1: '2x24/2 g8 k5 e2.5' is not a stage"),
        ("g8", "g16", "stage 1: group_width=16 does not divide width=24"),
        (" g8", "", "stage 1: '2x24/2 k5 e2.5' is not a stage"),
        ("e2.5", "e0", "stage 1: expansion=0.0 is not a positive number"),
        ("e2.5", "e1e999", "stage 1: expansion=inf is not a positive number"),
        ("e2.5", "e-2", "stage 1: '2x24/2 k5 g8 e-2' is not a stage"),
        ("e2.5", "e2.5.1", "stage 1: '2x24/2 k5 g8 e2.5.1' is not a stage"),
        ("e2.5", "e2.5 e3", "stage 1: '2x24/2 k5 g8 e2.5 e3' is not a stage"),
        ("| head", "| | head", "stage 2: '' is not a stage"),
        ("| head", "| 1x32\nk3 | head", "stage 2: '1x32 k3' is not a stage"),
        ("| head", "| 1x32 k3 g16 e1 | head", "group_width=16 of stage 2 does not divide the 24 channels"),
        ("| head", "| 1x8/2 k1 g1 e1" * 5 + "| head", "total stride 128 is above 32"),
        # The head.
        ("| head 64", "| 1x24 k3 g1 e1", "'1x24 k3 g1 e1' is not a head, such as 'head 128'"),
        ("head 64", "head", "'head' is not a head"),
        ("head 64", "head 64 |", "stage 2: 'head 64' is not a stage"),
        ("head 64", "head 60", "head_width=60 is not a multiple of 8"),
        # JSON.
        (str(ARCH), "{", "not an architecture: '{' (Expecting property name"),
        (str(ARCH), "{}", "not an architecture: '{}' ('stages')"),
        (str(ARCH), ARCH.to_json().replace("24", "20"), "width=20 is not a multiple of 8"),
    ],
)
def test_what_does_not_parse_is_named_in_one_line(old: str, new: str, message: str) -> None:
    text = str(ARCH).replace(old, new)
    assert text != str(ARCH)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        ArchSpec.parse(text)
    assert "\n" not in str(caught.value)


def test_a_long_text_is_not_quoted_in_full() -> None:
    with pytest.raises(ValueError, match="is not an architecture") as caught:
        ArchSpec.parse("silu\n" * 10_000)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 12, "width=12 is not a multiple of 8"),
        ("width", 0, "width=0"),
        ("width", 8.0, "width=8.0"),
        ("kernel_size", 4, "kernel_size=4 is not odd"),
        ("kernel_size", -3, "kernel_size=-3"),
        ("group_width", 0, "group_width=0"),
        ("group_width", 16, "group_width=16 does not divide width=24"),
        ("expansion", 0, "expansion=0"),
        ("expansion", "4", "expansion='4'"),
        ("expansion", float("nan"), "expansion=nan"),
        ("expansion", float("inf"), "expansion=inf"),
        ("blocks", 0, "blocks=0"),
        ("stride", 3, "stride=3"),
        ("stride", 2.0, "stride=2.0"),
    ],
)
def test_impossible_stages_are_refused_by_name(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(STAGE, **{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(stem_width=20), "stem_width=20"),
        (dict(head_width=-8), "head_width=-8"),
        (dict(activation="tanh"), "activation='tanh'"),
        (dict(stages=()), "stages"),
        (dict(stages=(dataclasses.replace(STAGE, stride=2),) * 5), "total stride 64"),
    ],
)
def test_impossible_networks_are_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ARCH, **changes)


def test_a_group_width_must_divide_the_channels_that_enter_the_stage() -> None:
    """timm fails there with an empty AssertionError: 16 divides the stage's 32 channels, but not the stem's 24."""
    stage = StageSpec(width=32, kernel_size=3, group_width=16, expansion=2, blocks=2, stride=1)
    with pytest.raises(ValueError, match="group_width=16 of stage 1 does not divide the 24 channels"):
        ArchSpec(24, (stage,), "relu", 64)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"stages": 3}', ARCH.to_json().replace("width", "wide")])
def test_other_text_is_not_an_architecture(text: str) -> None:
    with pytest.raises(ValueError, match="not an architecture"):
        ArchSpec.from_json(text)


def test_expanded_channels_are_rounded_as_timm_rounds() -> None:
    for channels in range(8, 520, 8):
        for expansion in (0.5, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.3, 4.0, 6.0):
            assert expanded_channels(channels, expansion) == make_divisible(channels * expansion)


@pytest.mark.parametrize("name", builtin_spaces())
def test_timm_builds_what_the_value_says(name: str) -> None:
    space = load_space(name)
    rng = random.Random(0)
    for _ in range(10):
        arch = space.sample(rng)
        network = arch.build(num_classes=7)
        blocks = [block for stage in network.blocks for block in stage]
        assert len(blocks) == len(arch.blocks)
        for built, spec in zip(blocks, arch.blocks, strict=True):
            conv = built.dw_start.conv
            assert (conv.in_channels, conv.kernel_size[0], conv.stride[0]) == (
                spec.in_channels, spec.kernel_size, spec.stride,
            )  # fmt: skip
            assert conv.in_channels // conv.groups == spec.group_width
            assert built.pw_exp.conv.out_channels == spec.expanded_channels
            assert built.pw_proj.conv.out_channels == spec.out_channels
            assert built.has_skip == spec.residual
            assert isinstance(built.layer_scale, torch.nn.Identity)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_networks_run_and_shrink_by_the_total_stride(activation: str) -> None:
    arch = dataclasses.replace(ARCH, activation=activation)
    network = arch.build(num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    assert network(images).shape == (2, 5)
    assert network.forward_features(images).shape == (2, 24, 32 // arch.total_stride, 32 // arch.total_stride)
    modules = {type(module).__name__.lower() for module in network.modules()}
    assert any(activation.replace("_", "") in name for name in modules)


def test_a_walk_by_hand() -> None:
    """At odd sizes strided parts round up; the head gives one pixel."""
    stages = (StageSpec(8, 3, 1, 1, 1, 1), StageSpec(16, 5, 8, 2, 2, 2))
    stem, *blocks, head = ArchSpec(8, stages, "relu", 32).walk(33)
    assert (stem.name, stem.spec, stem.in_size, stem.out_size) == ("stem", StemSpec(3, 8), 33, 17)
    assert [(step.name, step.in_size, step.out_size) for step in blocks] == [
        ("stage1.0", 17, 17), ("stage2.0", 17, 9), ("stage2.1", 9, 9),
    ]  # fmt: skip
    assert tuple(step.spec for step in blocks) == ArchSpec(8, stages, "relu", 32).blocks
    assert (head.name, head.spec, head.in_size, head.out_size) == ("head", HeadSpec(16, 32), 9, 1)
