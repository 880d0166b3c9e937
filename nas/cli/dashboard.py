"""`dashboard`: the Optuna dashboard on a database."""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nas.cli.console import note, reported, say
from nas.cli.opening import existing_store, require_folder
from nas.cli.options import Storage, given, made, takes
from nas.config import DEFAULT_STORAGE
from nas.options import NAME, Checked, between, option

if TYPE_CHECKING:
    from studies import Store

# So long the files of the trials wait for a first look at a study.
FIRST_LOOK_S = 10.0


@dataclass(frozen=True)
class Address(Checked):
    """The address that the dashboard listens on."""

    host: str = option(
        "127.0.0.1", "--host", "Address to listen on; any but this machine's own lets others in", bounds=NAME
    )
    port: int = option(0, "--port", "Port to listen on; 0 takes a free one", bounds=between(0, 65535))


@takes(Address)
def dashboard(
    context: typer.Context,
    storage: Storage = DEFAULT_STORAGE,
    artifacts: Annotated[
        Path | None, typer.Option(help="Folder of the trials' files (default: next to the database)")
    ] = None,
) -> None:
    """Serve the Optuna dashboard on a study database, also while a search runs."""
    with reported(storage):
        from nas.report.dashboard import Server
        from studies.display import artifact_folder

        folder = artifact_folder(storage) if artifacts is None else artifacts
        address = made(Address, given(Address, context))
        require_folder("--artifacts", folder)
        with existing_store(storage) as store:
            server = Server(store, folder, address.host, address.port)
            server.warm_up()
            where = "at every address of this machine; " if server.everywhere else ""
            say(f"dashboard: {server.url} ({where}Ctrl-C ends it)")
            # As Ctrl-C does.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            # Drawing takes longer than anybody waits for a page, which shows what is there until then.
            drawing = threading.Thread(target=_bring_up_to_date, args=(store, folder, server.looked_at), daemon=True)
            drawing.start()
            server.run()
    sys.stdout.flush()
    if drawing.is_alive():
        # Python would end such a thread wherever it is, which within a library's C++ may abort the process. Files are
        # written whole or not at all.
        os._exit(0)


def _bring_up_to_date(store: Store, folder: Path, looked_at: threading.Event) -> None:
    """Bring the notes and files of all studies up to date, after somebody had a first look or none soon."""
    # Answers that are given meanwhile take twice as long.
    looked_at.wait(FIRST_LOOK_S)
    from nas.display.showcase import show
    from nas.errors import UsageError
    from nas.recorded import RecordedStudy
    from studies import StorageError

    for summary in store.summaries():
        try:
            count = show(RecordedStudy.open(store, summary.name), folder)
            say(f"{summary.name}: {count} files of its front made")
        except (StorageError, UsageError, OSError) as error:
            # The file is read-only, the disk is full, or another version wrote the study: what is there can be looked
            # at.
            note(f"{summary.name}: not brought up to date ({error})")
