from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from search_spaces import ArchSpec, SearchSpace, StageSpec, builtin_spaces, cost, load_space
from tests.conftest import LFS_POINTER, TINY_TOML, make_tiny_space


def enumerated(space: SearchSpace) -> set[ArchSpec]:
    """Every architecture of a one- or two-stage space, by trying all products and keeping what can be made."""
    found = set()
    per_stage = [
        list(itertools.product(s.width, s.kernel_size, s.group_width, s.expansion, s.blocks, s.stride))
        for s in space.stages
    ]
    resolutions = space.own_resolutions or (None,)
    whole = itertools.product(
        space.stem_width, space.activation, space.head_width, resolutions, space.stem_stride, space.shortcut
    )
    for stem, activation, head, *rest in whole:
        for stages in itertools.product(*per_stage):
            try:
                found.add(ArchSpec(stem, tuple(StageSpec(*stage) for stage in stages), activation, head, *rest))
            except ValueError:
                continue
    return found


def two_stage_space() -> SearchSpace:
    one = make_tiny_space().stages[0]
    return make_tiny_space(stages=(one, one), activation=("relu",))


def two_resolutions() -> SearchSpace:
    return make_tiny_space(resolution=(16, 24), activation=("relu",))


@pytest.mark.parametrize(
    "space",
    [
        make_tiny_space(),
        two_stage_space(),
        two_resolutions(),
        make_tiny_space(stem_stride=(1, 2), head_width=(0, 16)),
        make_tiny_space(shortcut=("identity", "pooled")),
    ],
    ids=["one-stage", "two-stage", "resolutions", "stem strides", "shortcuts"],
)
def test_size_and_cost_range_equal_brute_force(space: SearchSpace) -> None:
    everything = enumerated(space)
    assert space.size() == len(everything)
    listed = list(space.architectures())
    assert set(listed) == everything
    assert len(listed) == len(everything)
    costs = [cost(arch, 16, 10) for arch in everything]
    low, high = space.cost_range(16, 10)
    assert (low.params, high.params) == (min(c.params for c in costs), max(c.params for c in costs))
    assert (low.macs, high.macs) == (min(c.macs for c in costs), max(c.macs for c in costs))


def test_samples_reach_every_architecture_and_nothing_else(tiny_space: SearchSpace) -> None:
    rng = random.Random(0)
    assert {tiny_space.sample(rng) for _ in range(20_000)} == enumerated(tiny_space)


def test_shortcuts_may_be_a_choice(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text(TINY_TOML.replace("head_width", 'shortcut = ["pooled", "identity"]\nhead_width'))
    space = load_space(str(path))
    assert space.choices()["shortcut"] == space.shortcut == ("pooled", "identity")
    assert SearchSpace.from_dict(space.to_dict()) == space
    rng = random.Random(0)
    drawn = {space.sample(rng) for _ in range(20)}
    assert {arch.shortcut for arch in drawn} == {"identity", "pooled"}
    assert all(space.assemble(space.values_of(arch)) == arch for arch in drawn)
    for unsaid in (make_tiny_space().to_dict(), make_tiny_space().choices()):
        assert "shortcut" not in unsaid
    path.write_text(TINY_TOML.replace("head_width", 'shortcut = "none"\nhead_width'))
    with pytest.raises(ValueError, match="shortcut='none' is none of identity, pooled"):
        load_space(str(path))


def test_of_several_resolutions_each_network_has_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TINY_TOML.replace("resolution = 16", "resolution = [24, 16, 32]"))
    space = load_space(str(path))
    assert space.own_resolutions == (16, 24, 32)
    assert space.anchor().resolution == space.default_resolution == 24
    rng = random.Random(0)
    drawn = [space.sample(rng) for _ in range(50)]
    assert {arch.resolution for arch in drawn} == {16, 24, 32}
    for arch in drawn:
        assert space.values_of(arch)["resolution"] == arch.resolution
        assert space.assemble(space.values_of(arch)) == arch
    assert SearchSpace.from_dict(space.to_dict()) == space
    # Without a choice the text of a space is what it always was, and networks leave their resolution to others.
    single = make_tiny_space()
    assert single.to_dict()["resolution"] == 16
    assert single.own_resolutions == ()
    assert "resolution" not in single.choices()
    assert single.anchor().resolution is None


def test_the_stems_stride_may_be_a_choice(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TINY_TOML.replace("head_width", "stem_stride = [2, 1]\nhead_width"))
    space = load_space(str(path))
    assert space.stem_stride == (1, 2)
    rng = random.Random(0)
    drawn = [space.sample(rng) for _ in range(20)]
    assert {arch.stem_stride for arch in drawn} == {1, 2}
    assert all(space.assemble(space.values_of(arch)) == arch for arch in drawn)
    assert SearchSpace.from_dict(space.to_dict()) == space
    assert "stem_stride" not in make_tiny_space().to_dict()
    assert "stem_stride" not in make_tiny_space().choices()


@pytest.mark.parametrize("name", builtin_spaces())
def test_assemble_and_values_of_are_inverse(name: str) -> None:
    space = load_space(name)
    rng = random.Random(1)
    for _ in range(200):
        arch = space.sample(rng)
        values = space.values_of(arch)
        assert list(values) == list(space.choices())
        assert all(value in space.choices()[name] for name, value in values.items())
        assert space.assemble(values) == arch


def test_an_invalid_group_width_becomes_the_next_smaller_valid_one() -> None:
    space = load_space("small")
    values = space.values_of(space.anchor()) | {"stem_width": 24, "stage1_group_width": 16}
    assert space.assemble(values).stages[0].group_width == 8


def test_where_no_smaller_group_width_is_valid_the_smallest_valid_one_is_taken() -> None:
    stage = dict(width=[48], kernel_size=[3], group_width=[16, 24], expansion=[1], blocks=[1], stride=[1])
    space = SearchSpace.from_dict(
        dict(name="x", resolution=32, stem_width=[24], head_width=[8], activation=["relu"], stages=[stage])
    )
    assert space.assemble(space.values_of(space.anchor()) | {"stage1_group_width": 16}).stages[0].group_width == 24


@pytest.mark.parametrize("name", builtin_spaces())
def test_spaces_survive_json(name: str) -> None:
    import json

    space = load_space(name)
    assert SearchSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space


def test_built_in_spaces_say_what_they_are_for() -> None:
    assert {"small", "imagenet"} <= set(builtin_spaces())
    assert load_space("small").default_resolution == 32
    imagenet = load_space("imagenet")
    assert imagenet.default_resolution == 224
    assert {imagenet.sample(random.Random(i)).total_stride for i in range(20)} == {32}


def test_excluded_combinations_are_listed(tiny_space: SearchSpace) -> None:
    assert tiny_space.exclusions() == [
        "stage 1: group_width 16 never with 8 channels entering, nor with own width 8 (from two blocks on)"
    ]


def test_a_users_own_space(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TINY_TOML)
    space = load_space(str(path))
    assert space.name == "tiny"
    assert space.head_width == (16,)
    assert space.stages[0].expansion == (1.0, 1.5, 2.0)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("head_width", "head_wide", "unknown key 'head_wide'"),
        ("blocks = [1, 2]", "", "stage 1: key 'blocks' is missing"),
        ("kernel_size", "kernel", "stage 1: unknown key 'kernel'"),
        ("kernel_size = [3, 5]", "kernel_size = [3, 4]", "kernel_size=4 is not odd"),
        ("stem_width = [8, 16]", "stem_width = [8, 12]", "stem_width=12"),
        ("stem_width = [8, 16]", "stem_width = [8]\nstem_stride = [1, 3]", "stem_stride=3 is neither 1 nor 2"),
        ("stem_width = [8, 16]", "stem_width = []", "stem_width=.. holds no choice"),
        ("stem_width = [8, 16]", "stem_width = [8, 8]", "names a choice twice"),
        ("stem_width = [8, 16]", "stem_width = {min = 8, max = 16}", "stem_width={.* is neither a number nor a name"),
        ("kernel_size = [3, 5]", "kernel_size = [[3, 5]]", r"stage 1: kernel_size=\[3, 5\] is neither a number"),
        ('["relu", "silu"]', '["relu", "swoosh"]', "activation='swoosh'"),
        ("group_width = [1, 8, 16]", "group_width = [16]", "no group_width of .16. divides the 8 channels"),
        ("stride = [1, 2]", "stride = [1, 4]", "stride=4"),
        ("resolution = 16", "resolution = 2", "resolution=2"),
        ("resolution = 16", "resolution = [16, 18]", r"resolution=.16, 18.: the total stride of 4 does not divide 18"),
        ("resolution = 16", "resolution = [16, 16]", "names a choice twice"),
        ("resolution = 16", "resolution = [16.5]", "resolution=16.5 is not a whole number of at least 8 pixels"),
        ("resolution = 16", "resolution = []", "resolution=.. holds no choice"),
        ('name = "tiny"', "name = 3", "name=3"),
        ('name = "tiny"', r'name = "a\u0000b"', "name=.* is not a name"),
        ('name = "tiny"', r'name = "a\nb"', "name=.* is not a name"),
        ("[[stages]]", "[stages]", "stages is not a list"),
        ("name", "name =", "Invalid|Expected"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_the_fault(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    path = tmp_path / "wrong.toml"
    assert before in TINY_TOML
    path.write_text(TINY_TOML.replace(before, after, 1))
    with pytest.raises(ValueError, match=message) as caught:
        load_space(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_files_of_all_editors(tmp_path: Path, encoding: str, line_end: str) -> None:
    path = tmp_path / "mine.toml"
    text = TINY_TOML.replace("tiny", "\u4e2d\u6587 caf\u00e9")
    path.write_bytes(text.replace("\n", line_end).encode(encoding))
    assert load_space(str(path)).name == "\u4e2d\u6587 caf\u00e9"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TINY_TOML.replace("tiny", "caf\u00e9").encode("latin-1"), "is not encoded in UTF-8"),
        (TINY_TOML.encode("utf-16"), "is not encoded in UTF-8"),
        (LFS_POINTER.encode(), "Git LFS's pointer to the file, which `git lfs pull` fetches"),
        (b"", "key 'activation' is missing"),
        (b"a = " + b"[" * 100_000, "recursion"),
    ],
)
def test_a_file_that_is_no_toml_is_refused_with_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_space(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a" * 300, ".", "\udcff.toml"])
def test_what_is_no_file_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"neither a built-in space .* nor a TOML file that exists"):
        load_space(name)


def test_an_unknown_space_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError,
        match=r"nosuch: neither a built-in space \(imagenet, small\), nor a rung such as rung5@32, nor a TOML file",
    ):
        load_space("nosuch")
