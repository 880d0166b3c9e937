"""`studies`: what a database holds."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from nas.cli.console import out, reported
from nas.cli.opening import existing_store
from nas.cli.options import Storage
from nas.config import DEFAULT_STORAGE


def studies(
    storage: Storage = DEFAULT_STORAGE,
    study: Annotated[str | None, typer.Option(help="Name of the only study to list", rich_help_panel="Study")] = None,
) -> None:
    """List the studies of a database."""
    with reported(storage), existing_store(storage, study) as store:
        table = Table(*("study", "complete", "over limit", "failed", "device", "engine", "begun (UTC)"))
        # A name is shown as a whole.
        table.columns[0].overflow = "fold"
        for row in store.summaries():
            if study not in (None, row.name):
                continue
            complete = f"{row.complete}, {row.stopped} stopped early" if row.stopped else str(row.complete)
            counts = (complete, row.over_limit, row.failed)
            table.add_row(row.name, *map(str, counts), row.device, row.engine, row.created_at)
        out.print(table)
