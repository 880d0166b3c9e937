"""`report`: a study on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nas.cli.console import out, reported
from nas.cli.opening import existing_store, require_folder
from nas.cli.options import Storage, StudyName
from nas.config import DEFAULT_STORAGE, DEFAULT_STUDY


def report(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the page and its figures")],
    storage: Storage = DEFAULT_STORAGE,
    study: StudyName = DEFAULT_STUDY,
) -> None:
    """Write a study's report: one HTML file to hand around, and its main figures as PNGs."""
    with reported(storage):
        require_folder("--out", out_dir)
        with existing_store(storage, study) as store:
            from nas.report.page import write_report
            from nas.validation.baselines import contenders, verdict

            found = contenders(store, study)
            for path in write_report(store, study, storage, out_dir, found, verdict(found)):
                out.print(f"made: {path}", highlight=False, soft_wrap=True)
