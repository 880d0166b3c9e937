"""`bench`: exported networks timed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nas.cli.console import note, out, reported, say
from nas.cli.options import given, takes
from nas.config import LatencyConfig, moved
from nas.errors import CandidateFailed, UsageError


@takes(
    LatencyConfig, "device", "dtype", "batch_size", "resolution", "threads", "precision", "seconds",
    default="as exported",
)  # fmt: skip
def bench(
    context: typer.Context,
    directories: Annotated[list[Path], typer.Argument(help="Directories of exported networks", show_default=False)],
) -> None:
    """Measure exported networks on this machine, in every format that runs here."""
    with reported(str(directories[0])):
        from nas.export import bench as benches
        from nas.export.directories import read

        networks = [(folder, read(folder)) for folder in directories]
        told = networks[0][1].deployment
        config = moved(
            told, **{"device": benches.device_here(told.device), "runtime": None, **given(LatencyConfig, context)}
        )
        try:
            asked = given(LatencyConfig, context).get("resolution")
            rows = benches.bench(networks, config, note, asked)
        except CandidateFailed as error:
            raise UsageError(f"bench: {error}") from error
        sizes = {asked} if asked else {network.resolution for _, network in networks}
        shown = " and ".join(f"{size}x{size}" for size in sorted(sizes))
        where = f"{config.device}, batch {config.batch_size}, {shown}"
        for table in benches.tables(rows, f"{where}, {config.threads} CPU thread(s)"):
            out.print(table)
            out.print()
        for line in benches.remarks(rows):
            say(line)
