"""`space`: a search space in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from nas.cli.console import out, reported, say
from nas.cli.options import given, made, takes, typed_options
from nas.config import AUTO, DataConfig, LatencyConfig, Limits
from nas.errors import UsageError
from nas.options import Checked, at_least, option, same_as
from nas.reporting import console_table

if TYPE_CHECKING:
    from nas.search.auto_space import Choice
    from search_spaces import SearchSpace


@dataclass(frozen=True)
class Shown(Checked):
    """The networks whose parameters and operations are counted, and what `auto` chooses by; None is the space's or the
    data's own."""

    classes: int | None = option(
        None, "--classes", "Classes of the networks", default="the data's if known, else 10", bounds=at_least(1)
    )
    resolution: int | None = option(
        None, "--resolution", "Width and height of the images, in pixels", default="the space's", bounds=at_least(8)
    )
    source: str = same_as(DataConfig, "source")
    data_dir: str = same_as(DataConfig, "data_dir")
    max_latency_ms: float | None = same_as(Limits, "latency_ms")
    latency: LatencyConfig = field(default_factory=LatencyConfig)


# The options that every space takes; the others are for `auto`.
COUNTED = ("--classes", "--resolution")


@takes(Shown)
def space(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(help="Search space: auto, small, imagenet, a rung such as rung5@32, or a TOML file")
    ] = "small",
) -> None:
    """Print a search space: its choices and exclusions, the number of its architectures, and their cost.

    `space auto` times networks, or looks at the images, and shows which space a search would take.

    \b
    Examples:
      run_search.py space imagenet
      run_search.py space auto --max-latency-ms 2 --data photos
    """
    with reported(name):
        from search_spaces import load_space

        shown = given(Shown, context)
        counted = made(Shown, {key: value for key, value in shown.items() if key != "latency"})
        known_classes = 10
        if name == AUTO:
            choice = _chosen(shown)
            found, known_classes = choice.space, choice.classes
        else:
            if others := [flag for flag in typed_options(context) if flag.startswith("--") and flag not in COUNTED]:
                raise UsageError(f"{others[0]}: is for `space auto` only")
            try:
                found = load_space(name)
            except ValueError as error:
                raise UsageError(f"space {error}") from error
            if counted.resolution is not None:
                found = found.at(counted.resolution)
        pixels, classes = found.default_resolution, counted.classes or known_classes
        table = Table("parameter", "choices", title=f"{found.name}: {found.description}", title_justify="left")
        for parameter, choices in found.choices().items():
            table.add_row(parameter, "  ".join(f"{c:g}" if isinstance(c, float) else str(c) for c in choices))
        out.print(table)
        low, high = found.cost_range(pixels, classes)
        for line in found.exclusions():
            say(f"excluded: {line}")
        say(f"architectures: {found.size():,}")
        say(f"params: {low.params:,} to {high.params:,} ({classes} classes)")
        say(f"MACs:   {low.macs:,} to {high.macs:,} ({_images(found, pixels)})")
        say(f"anchor: {found.anchor()}")
        if name == AUTO:
            say(choice.reason)


def _chosen(shown: dict[str, Any]) -> Choice:
    """The space that a search would take."""
    from nas.cli.choosing import chosen_space
    from search_spaces import cost, ladder_space

    images: dict[str, Any] = {key: shown[key] for key in ("source", "data_dir", "resolution") if key in shown}
    deployment = dict(shown["latency"])
    if "classes" in shown:
        deployment.setdefault("num_classes", shown["classes"])
    choice = chosen_space(images, deployment, shown.get("max_latency_ms"))
    if choice.anchors_ms:
        table = console_table("anchors of rungs that were timed", "rung", "MMACs", "latency ms", text=("rung",))
        for rung, latency_ms in sorted(choice.anchors_ms.items()):
            timed = ladder_space(choice.space.resolution, rung)
            macs = cost(timed.anchor(), timed.default_resolution, 10).macs
            table.add_row(timed.name, f"{macs / 1e6:,.1f}", f"{latency_ms:.4g}")
        out.print(table)
    return choice


def _images(space: SearchSpace, pixels: int) -> str:
    if own := space.own_resolutions:
        return f"one image of {own[0]}x{own[0]} to {own[-1]}x{own[-1]}"
    return f"one image of {pixels}x{pixels}"
