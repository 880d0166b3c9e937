"""A search space as data: lists of choices, read from a TOML file, and the one rule that excludes combinations.

The rule: a group width must divide the channels it is applied to, which are the previous stage's in a stage's first
block and the stage's own in the blocks after it. `SearchSpace.assemble` repairs a choice that breaks it to the next
smaller valid one, so an invalid architecture is never built; a space in which some combination cannot be repaired is
refused when it is made.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from search_spaces.arch import (
    CHANNEL_MULTIPLE,
    IDENTITY,
    MAX_TOTAL_STRIDE,
    MIN_RESOLUTION,
    STEM_STRIDE,
    ArchSpec,
    StageSpec,
    strided,
)
from search_spaces.cost import Cost, head_cost, stage_cost, stem_cost

Choice = int | float | str
MAX_RESOLUTION = 2048  # pixels
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class StageChoices:
    """The choices of one stage, each a tuple in ascending order; the fields are those of `StageSpec`."""

    width: tuple[int, ...]
    kernel_size: tuple[int, ...]
    group_width: tuple[int, ...]
    expansion: tuple[float, ...]
    blocks: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        harmless: dict[str, Any] = dict(
            width=CHANNEL_MULTIPLE, kernel_size=1, group_width=1, expansion=1.0, blocks=1, stride=1
        )
        for field in dataclasses.fields(self):
            choices = _checked_choices(field.name, getattr(self, field.name))
            for choice in choices:
                StageSpec(**{**harmless, field.name: choice})
            if field.name == "expansion":
                choices = tuple(float(choice) for choice in choices)
            object.__setattr__(self, field.name, tuple(sorted(choices)))

    def valid_group_widths(self, in_channels: int, width: int, blocks: int) -> tuple[int, ...]:
        """The group widths that divide what they are applied to: all of `in_channels`, and `width` past one block."""
        return tuple(
            group for group in self.group_width if in_channels % group == 0 and (blocks == 1 or width % group == 0)
        )

    def specs(self, in_channels: int) -> Iterator[StageSpec]:
        """Every valid stage that `in_channels` channels may enter."""
        for width, blocks in itertools.product(self.width, self.blocks):
            groups = self.valid_group_widths(in_channels, width, blocks)
            for kernel, group, expansion, stride in itertools.product(
                self.kernel_size, groups, self.expansion, self.stride
            ):
                yield StageSpec(width, kernel, group, expansion, blocks, stride)


@dataclass(frozen=True)
class SearchSpace:
    """All architectures that a set of choices spans. See the module's docstring for the meaning of the fields.

    Args:
        resolution: choices in pixels; a single one, or one number, is no choice of the architecture's.
        stem_stride: choices of the stem's stride.
        shortcut: choices of `ArchSpec.shortcut`.

    Raises:
        ValueError: a choice is impossible or a combination cannot be repaired; the message names the field.
    """

    name: str
    description: str
    resolution: tuple[int, ...]
    stem_width: tuple[int, ...]
    head_width: tuple[int, ...]
    activation: tuple[str, ...]
    stages: tuple[StageChoices, ...]
    stem_stride: tuple[int, ...] = (STEM_STRIDE,)
    shortcut: tuple[str, ...] = (IDENTITY,)

    def __post_init__(self) -> None:
        # A name stands in lines and file names.
        if not isinstance(self.name, str) or not self.name or re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", self.name):
            raise ValueError(f"name={self.name!r} is not a name")
        object.__setattr__(self, "resolution", tuple(sorted(_checked_resolutions(_as_tuple(self.resolution)))))
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise ValueError("stages is empty: a space has at least one [[stages]] table")
        harmless: dict[str, Any] = dict(
            stem_width=CHANNEL_MULTIPLE, head_width=CHANNEL_MULTIPLE, activation="relu",
            stages=(StageSpec(CHANNEL_MULTIPLE, 1, 1, 1.0, 1, 1),),
        )  # fmt: skip
        for name in ("stem_width", "head_width", "activation", "stem_stride", "shortcut"):
            choices = _checked_choices(name, getattr(self, name))
            for choice in choices:
                ArchSpec(**{**harmless, name: choice})
            object.__setattr__(self, name, choices if isinstance(choices[0], str) else tuple(sorted(choices)))
        total_stride = max(self.stem_stride)
        strides = STEM_STRIDE
        in_widths = self.stem_width
        for number, stage in enumerate(self.stages, start=1):
            total_stride *= max(stage.stride)
            strides *= max(stage.stride)
            for in_width, width, blocks in itertools.product(in_widths, stage.width, stage.blocks):
                if not stage.valid_group_widths(in_width, width, blocks):
                    raise ValueError(
                        f"stage {number}: no group_width of {list(stage.group_width)} divides the {in_width} channels "
                        f"that enter it and its width of {width} (1 always does)"
                    )
            in_widths = stage.width
        if strides > MAX_TOTAL_STRIDE:
            raise ValueError(f"total stride {strides} (the stem's 2 included) is above {MAX_TOTAL_STRIDE}")
        for pixels in self.own_resolutions:
            if pixels % total_stride:
                raise ValueError(
                    f"resolution={list(self.resolution)}: the total stride of {total_stride} does not divide {pixels}"
                )

    @property
    def own_resolutions(self) -> tuple[int, ...]:
        """The resolutions of which each network has one; empty where all are trained and deployed alike."""
        return self.resolution if len(self.resolution) > 1 else ()

    @property
    def default_resolution(self) -> int:
        """The resolution for training and latency where nothing else is said: the anchor's."""
        return middle(self.resolution)

    def at(self, resolution: int) -> SearchSpace:
        """The space with one resolution in pixels for all networks; a rung of the ladder is then called by that."""
        return dataclasses.replace(
            self, name=re.sub("@[0-9,]+$", f"@{resolution}", self.name), resolution=(resolution,)
        )

    # -- text ----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The space as plain lists and numbers, ready for JSON; `from_dict` is the inverse."""
        fields = dataclasses.asdict(self)
        if not self.own_resolutions:
            fields["resolution"] = self.default_resolution
        # Studies that were begun before there was a choice do not have it.
        if self.stem_stride == (STEM_STRIDE,):
            del fields["stem_stride"]
        if self.shortcut == (IDENTITY,):
            del fields["shortcut"]
        return fields

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchSpace:
        """A space from the tables of its TOML file.

        Raises:
            ValueError: a key is wrong or missing, or a choice is impossible; the message names it.
        """
        fields = dict(data)
        _check_keys("the space", fields, cls, optional={"description", "stem_stride", "shortcut"})
        stages = fields["stages"]
        if not isinstance(stages, list | tuple) or not all(isinstance(stage, dict) for stage in stages):
            raise ValueError("stages is not a list of [[stages]] tables")
        parsed = []
        for number, stage in enumerate(stages, start=1):
            _check_keys(f"stage {number}", stage, StageChoices)
            try:
                parsed.append(StageChoices(**{key: _as_tuple(value) for key, value in stage.items()}))
            except ValueError as error:
                raise ValueError(f"stage {number}: {error}") from error
        fields["stages"] = tuple(parsed)
        for key in fields.keys() & {"stem_stride", "shortcut"}:
            fields[key] = _as_tuple(fields[key])
        for key in ("resolution", "stem_width", "head_width", "activation"):
            fields[key] = _as_tuple(fields[key])
        return cls(**{"description": "", **fields})

    # -- parameters ----------------------------------------------------------------------------------------------

    def choices(self) -> dict[str, tuple[Choice, ...]]:
        """Parameter name -> its choices, such as `stage2_width` -> (32, 48, 64), in the order of the network."""
        named: dict[str, tuple[Choice, ...]] = {"resolution": self.own_resolutions} if self.own_resolutions else {}
        named |= {"activation": self.activation, "stem_width": self.stem_width}
        if self.stem_stride != (STEM_STRIDE,):
            named["stem_stride"] = self.stem_stride
        if self.shortcut != (IDENTITY,):
            named["shortcut"] = self.shortcut
        for number, stage in enumerate(self.stages, start=1):
            for field in dataclasses.fields(stage):
                named[f"stage{number}_{field.name}"] = getattr(stage, field.name)
        named["head_width"] = self.head_width
        return named

    def assemble(self, values: Mapping[str, Choice]) -> ArchSpec:
        """The architecture that one choice per parameter gives.

        A group width that does not divide what it is applied to becomes the next smaller choice that does, or the
        smallest valid one. `values_of` gives the choices after that repair.
        """
        in_channels = int(values["stem_width"])
        stages = []
        for number, choices in enumerate(self.stages, start=1):
            stage: dict[str, Any] = {
                field.name: values[f"stage{number}_{field.name}"] for field in dataclasses.fields(choices)
            }
            valid = choices.valid_group_widths(in_channels, stage["width"], stage["blocks"])
            smaller = [group for group in valid if group <= stage["group_width"]]
            stage["group_width"] = max(smaller) if smaller else min(valid)
            stages.append(StageSpec(**stage))
            in_channels = stages[-1].width
        return ArchSpec(
            int(values["stem_width"]), tuple(stages), str(values["activation"]), int(values["head_width"]),
            int(values["resolution"]) if self.own_resolutions else None, int(values.get("stem_stride", STEM_STRIDE)),
            str(values.get("shortcut", IDENTITY)),
        )  # fmt: skip

    def values_of(self, arch: ArchSpec) -> dict[str, Choice]:
        """The inverse of `assemble`: parameter name -> the value it has in `arch`."""
        named: dict[str, Choice] = {} if arch.resolution is None else {"resolution": arch.resolution}
        named |= {"activation": arch.activation, "stem_width": arch.stem_width}
        if self.stem_stride != (STEM_STRIDE,):
            named["stem_stride"] = arch.stem_stride
        if self.shortcut != (IDENTITY,):
            named["shortcut"] = arch.shortcut
        for number, stage in enumerate(arch.stages, start=1):
            for field in dataclasses.fields(stage):
                named[f"stage{number}_{field.name}"] = getattr(stage, field.name)
        named["head_width"] = arch.head_width
        return named

    def sample(self, rng: random.Random) -> ArchSpec:
        """A random architecture: an independent uniform choice per parameter, repaired."""
        return self.assemble({name: rng.choice(choices) for name, choices in self.choices().items()})

    def architectures(self) -> Iterator[ArchSpec]:
        """Every valid architecture once; `size` says how many there are."""
        chains: list[tuple[int, tuple[StageSpec, ...]]] = [(width, ()) for width in self.stem_width]
        for choices in self.stages:
            chains = [
                (stem, (*stages, spec))
                for stem, stages in chains
                for spec in choices.specs(stages[-1].width if stages else stem)
            ]
        resolutions: tuple[int | None, ...] = self.own_resolutions or (None,)
        for (stem, stages), activation, head, resolution, stride, shortcut in itertools.product(
            chains, self.activation, self.head_width, resolutions, self.stem_stride, self.shortcut
        ):
            yield ArchSpec(stem, stages, activation, head, resolution, stride, shortcut)

    def anchor(self) -> ArchSpec:
        """The middle choice of every list: the one fixed network that all latencies of a study are compared with."""
        return self.assemble({name: middle(choices) for name, choices in self.choices().items()})

    def smallest(self) -> ArchSpec:
        """The first choice of every list: in general the fastest network, one end of the front."""
        return self.assemble({name: choices[0] for name, choices in self.choices().items()})

    # -- what the space spans ------------------------------------------------------------------------------------

    def size(self) -> int:
        """The number of distinct valid architectures."""
        ways = dict.fromkeys(self.stem_width, 1)
        for stage in self.stages:
            onward = dict.fromkeys(stage.width, 0)
            for in_width, count in ways.items():
                for width, blocks in itertools.product(stage.width, stage.blocks):
                    groups = len(stage.valid_group_widths(in_width, width, blocks))
                    onward[width] += count * groups * len(stage.kernel_size) * len(stage.expansion) * len(stage.stride)
            ways = onward
        of_the_rest = (self.activation, self.head_width, self.resolution, self.stem_stride, self.shortcut)
        return sum(ways.values()) * math.prod(map(len, of_the_rest))

    def cost_range(self, resolution: int, num_classes: int) -> tuple[Cost, Cost]:
        """The least and the greatest params and MACs of any valid architecture, each on its own.

        Args:
            resolution: resolution of the networks that have none of their own, in pixels.
        """
        ranges = [self._cost_range_at(pixels, num_classes) for pixels in self.own_resolutions or (resolution,)]
        # More pixels are more MACs.
        return ranges[0][0], ranges[-1][1]

    def _cost_range_at(self, resolution: int, num_classes: int) -> tuple[Cost, Cost]:
        """The cost range at one resolution; exact: dynamic programming over (channels, pixels) after each stage."""
        extremes: dict[tuple[int, int], tuple[Cost, Cost]] = {}
        for width, stride in itertools.product(self.stem_width, self.stem_stride):
            stem = stem_cost(width, resolution, stride)
            _widen(extremes, (width, strided(resolution, stride)), stem, stem)
        for choices in self.stages:
            onward: dict[tuple[int, int], tuple[Cost, Cost]] = {}
            for (in_width, size), (low, high) in extremes.items():
                for spec in choices.specs(in_width):
                    extra = stage_cost(in_width, spec, size)
                    _widen(onward, (spec.width, strided(size, spec.stride)), low + extra, high + extra)
            extremes = onward
        total: dict[tuple[int, int], tuple[Cost, Cost]] = {}
        for (width, _), (low, high) in extremes.items():
            for head_width in self.head_width:
                extra = head_cost(width, head_width, num_classes)
                _widen(total, (0, 0), low + extra, high + extra)
        return total[0, 0]

    def exclusions(self) -> list[str]:
        """A line for each group width of a stage that some width excludes."""
        lines = []
        in_widths = self.stem_width
        for number, stage in enumerate(self.stages, start=1):
            for group in stage.group_width:
                entering = [width for width in in_widths if width % group]
                own = [width for width in stage.width if width % group] if max(stage.blocks) > 1 else []
                parts = []
                if entering:
                    parts.append(f"{_listed(entering)} channels entering")
                if own:
                    parts.append(f"own width {_listed(own)} (from two blocks on)")
                if parts:
                    lines.append(f"stage {number}: group_width {group} never with {', nor with '.join(parts)}")
            in_widths = stage.width
        return lines


def middle(choices: Sequence[Value]) -> Value:
    """The middle choice, of an even number the one after the middle."""
    return choices[len(choices) // 2]


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _checked_resolutions(choices: tuple[Any, ...]) -> tuple[int, ...]:
    for choice in _checked_choices("resolution", choices):
        if not isinstance(choice, int) or isinstance(choice, bool) or not MIN_RESOLUTION <= choice <= MAX_RESOLUTION:
            raise ValueError(
                f"resolution={choice!r} is not a whole number of at least {MIN_RESOLUTION} pixels, and at most "
                f"{MAX_RESOLUTION}"
            )
    return choices


def _checked_choices(name: str, choices: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(choices, tuple) or not choices:
        raise ValueError(f"{name}={choices!r} holds no choice")
    for choice in choices:
        if not isinstance(choice, int | float | str):
            raise ValueError(f"{name}={choice!r} is neither a number nor a name")
    if len(set(choices)) < len(choices):
        raise ValueError(f"{name}={list(choices)} names a choice twice")
    return choices


def _check_keys(where: str, table: Mapping[str, Any], cls: type, optional: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    known = {field.name for field in dataclasses.fields(cls)}
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r} (known: {', '.join(sorted(known))})")
    for key in sorted(known - optional):
        if key not in table:
            raise ValueError(f"{where}: key {key!r} is missing")


def _widen(into: dict[tuple[int, int], tuple[Cost, Cost]], key: tuple[int, int], low: Cost, high: Cost) -> None:
    if key in into:
        lowest, highest = into[key]
        low = Cost(min(low.params, lowest.params), min(low.macs, lowest.macs))
        high = Cost(max(high.params, highest.params), max(high.macs, highest.macs))
    into[key] = (low, high)


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))
