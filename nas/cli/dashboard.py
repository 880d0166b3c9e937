"""`dashboard`: the Optuna dashboard on a database."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from nas.cli.console import note, reported, say
from nas.cli.opening import existing_store, require_folder
from nas.cli.options import Storage
from nas.config import DEFAULT_STORAGE


def dashboard(
    storage: Storage = DEFAULT_STORAGE,
    host: Annotated[str, typer.Option(help="Address to listen on; any but this machine's own lets others in")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one")] = 0,
    artifacts: Annotated[
        Path | None, typer.Option(help="Folder of the trials' files (default: next to the database)")
    ] = None,
) -> None:
    """Serve the Optuna dashboard on a study database, also while a search runs."""
    with reported(storage):
        from nas.display.showcase import show
        from nas.errors import UsageError
        from nas.recorded import RecordedStudy
        from nas.report.dashboard import Server
        from studies import StorageError
        from studies.display import artifact_folder

        folder = artifact_folder(storage) if artifacts is None else artifacts
        require_folder("--artifacts", folder)
        with existing_store(storage) as store:
            server = Server(store, folder, host, port)
            for summary in store.summaries():
                try:
                    made = show(RecordedStudy.open(store, summary.name), folder)
                    say(f"{summary.name}: {made} files of its front made")
                except (StorageError, UsageError) as error:
                    # The file is read-only, say, or another version wrote the study: what is there can be looked at.
                    note(f"{summary.name}: not brought up to date ({error})")
            server.warm_up()
            say(f"dashboard: {server.url} (Ctrl-C ends it)")
            # As Ctrl-C does.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            server.run()
