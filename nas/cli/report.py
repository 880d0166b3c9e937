"""`report`: a study on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nas.cli.console import reported, say
from nas.cli.opening import existing_study, require_folder
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
        with existing_study(storage, study) as recorded:
            from nas.report.collector import resting_collector
            from nas.report.page import write_report
            from nas.validation.contenders import contenders
            from nas.validation.verdict import verdict

            compared = contenders(recorded)
            with resting_collector():
                paths = write_report(recorded, storage, out_dir, compared, verdict(compared))
            for path in paths:
                say(f"made: {path}")
