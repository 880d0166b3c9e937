from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from timm.layers import make_divisible

from search_spaces import ACTIVATIONS, ArchSpec, StageSpec, builtin_spaces, load_space
from search_spaces.arch import expanded_channels

STAGE = StageSpec(width=24, kernel_size=5, group_width=8, expansion=2.5, blocks=2, stride=2)
ARCH = ArchSpec(stem_width=16, stages=(STAGE,), activation="silu", head_width=64)

# Another valid value of every field.
OTHER_STAGE = dict(width=32, kernel_size=7, group_width=1, expansion=3.0, blocks=1, stride=1)
OTHER_ARCH = dict(stem_width=24, stages=(STAGE, STAGE), activation="gelu", head_width=128)


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
        ("blocks", 0, "blocks=0"),
        ("stride", 3, "stride=3"),
    ],
)
def test_impossible_stages_are_refused_by_name(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(STAGE, **{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(stem_width=20), "stem_width=20"),
        (dict(head_width=0), "head_width=0"),
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
    with pytest.raises(ValueError, match=r"not an architecture|Expecting value"):
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
