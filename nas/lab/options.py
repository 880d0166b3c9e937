"""Options that the lab's commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Spaces = Annotated[
    list[str] | None, typer.Option("--space", help="Search space; may be repeated (default: both built-in ones).")
]
Space = Annotated[str, typer.Option(help="Search space: small, imagenet, or a TOML file.")]
