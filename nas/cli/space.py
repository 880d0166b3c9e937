"""`space`: a search space in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from nas.cli.console import out, reported, say
from nas.cli.options import given, made, takes
from nas.errors import UsageError
from nas.options import Checked, at_least, option

if TYPE_CHECKING:
    from search_spaces import SearchSpace


@dataclass(frozen=True)
class Counted(Checked):
    """The networks whose parameters and operations are counted; a resolution of None is the space's."""

    classes: int = option(10, "--classes", "Classes of the networks", bounds=at_least(1))
    resolution: int | None = option(
        None, "--resolution", "Width and height of the images, in pixels", default="the space's", bounds=at_least(8)
    )


@takes(Counted)
def space(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Search space: small, imagenet or a TOML file")] = "small",
) -> None:
    """Print a search space: its choices and exclusions, the number of its architectures, and their cost."""
    with reported(name):
        from search_spaces import load_space

        counted = made(Counted, given(Counted, context))
        try:
            loaded = load_space(name)
        except ValueError as error:
            raise UsageError(f"space {error}") from error
        pixels, classes = counted.resolution or loaded.default_resolution, counted.classes
        table = Table("parameter", "choices", title=f"{loaded.name}: {loaded.description}", title_justify="left")
        for parameter, choices in loaded.choices().items():
            table.add_row(parameter, "  ".join(f"{c:g}" if isinstance(c, float) else str(c) for c in choices))
        out.print(table)
        low, high = loaded.cost_range(pixels, classes)
        for line in loaded.exclusions():
            say(f"excluded: {line}")
        say(f"architectures: {loaded.size():,}")
        say(f"params: {low.params:,} to {high.params:,} ({classes} classes)")
        say(f"MACs:   {low.macs:,} to {high.macs:,} ({_images(loaded, pixels)})")
        say(f"anchor: {loaded.anchor()}")


def _images(space: SearchSpace, pixels: int) -> str:
    if own := space.own_resolutions:
        return f"one image of {own[0]}x{own[0]} to {own[-1]}x{own[-1]}"
    return f"one image of {pixels}x{pixels}"
