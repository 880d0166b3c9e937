"""`bench`: exported networks timed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nas.cli.console import note, out, reported
from nas.cli.options import (
    DeviceOption,
    DtypeOption,
    PrecisionOption,
    ResolutionOption,
    SecondsOption,
    deployment,
    given_fields,
)
from nas.config import AUTO, Dtype


def bench(
    context: typer.Context,
    directories: Annotated[list[Path], typer.Argument(help="Exported networks.", show_default=False)],
    device: DeviceOption = AUTO,
    dtype: DtypeOption = Dtype.AUTO,
    latency_batch: Annotated[
        int | None, typer.Option(help="Images; by default as exported.", rich_help_panel="Deployment")
    ] = None,
    latency_resolution: ResolutionOption = None,
    latency_threads: Annotated[
        int | None, typer.Option(help="CPU threads; by default as exported.", rich_help_panel="Deployment")
    ] = None,
    latency_precision: PrecisionOption = None,
    latency_seconds: SecondsOption = None,
) -> None:
    """Measure exported networks on this machine, in every format that runs here."""
    with reported(str(directories[0])):
        from nas.errors import CandidateFailed, UsageError
        from nas.export import bench as benches
        from nas.export.directories import read

        networks = [(folder, read(folder)) for folder in directories]
        told = networks[0][1].deployment
        config = deployment(told, **{"device": benches.device_here(told.device), **given_fields(context)})
        try:
            rows = benches.bench(networks, config, note)
        except CandidateFailed as error:
            raise UsageError(f"bench: {error}") from error
        where = f"{config.device}, batch {config.batch_size}, {config.resolution}x{config.resolution}"
        for table in benches.tables(rows, f"{where}, {config.threads} CPU thread(s)"):
            out.print(table)
            out.print()
        for line in benches.remarks(rows):
            out.print(line, highlight=False, soft_wrap=True)
