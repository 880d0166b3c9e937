"""Options that the lab's commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Space = Annotated[str, typer.Option(help="Search space: small, imagenet, or a TOML file.")]
