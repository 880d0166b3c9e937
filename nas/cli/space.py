"""`space`: a search space in words."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from nas.cli.console import out, reported


def space(
    name: Annotated[str, typer.Argument(help="small, imagenet, or a TOML file.")] = "small",
    classes: Annotated[int, typer.Option(help="Of the classifier that is counted in.")] = 10,
    resolution: Annotated[int | None, typer.Option(help="Pixels; by default the space's.")] = None,
) -> None:
    """Print a search space: its choices, what is excluded, how many architectures, and what they cost."""
    with reported(name):
        from nas.errors import UsageError
        from search_spaces import load_space

        try:
            loaded = load_space(name)
        except ValueError as error:
            raise UsageError(f"space {error}") from error
        if classes < 1:
            raise UsageError(f"--classes {classes}: not at least 1")
        if resolution is not None and resolution < 8:
            raise UsageError(f"--resolution {resolution}: not at least 8 pixels")
        pixels = resolution or loaded.resolution
        table = Table("parameter", "choices", title=f"{loaded.name}: {loaded.description}", title_justify="left")
        for parameter, choices in loaded.choices().items():
            table.add_row(parameter, "  ".join(f"{c:g}" if isinstance(c, float) else str(c) for c in choices))
        out.print(table)
        low, high = loaded.cost_range(pixels, classes)
        for line in loaded.exclusions():
            out.print(f"excluded: {line}", highlight=False)
        out.print(f"architectures: {loaded.size():,}", highlight=False)
        out.print(f"params: {low.params:,} to {high.params:,} ({classes} classes)", highlight=False)
        out.print(f"MACs:   {low.macs:,} to {high.macs:,} (one image of {pixels}x{pixels})", highlight=False)
        out.print(f"anchor: {loaded.anchor()}", highlight=False, soft_wrap=True)
