"""`pareto`: a study's front."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nas.cli.console import note, reported
from nas.cli.fronts import print_front
from nas.cli.opening import existing_store
from nas.cli.options import Storage, StudyName
from nas.config import DEFAULT_STORAGE, DEFAULT_STUDY
from nas.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd


class OutputFormat(StrEnum):
    TABLE = "table"
    CSV = "csv"
    JSON = "json"


def pareto(
    storage: Storage = DEFAULT_STORAGE,
    study: StudyName = DEFAULT_STUDY,
    format: Annotated[OutputFormat, typer.Option(help="Format of the output: table, csv or json")] = OutputFormat.TABLE,
    plot: Annotated[Path | None, typer.Option(help="PNG, SVG or PDF file to draw the front in")] = None,
) -> None:
    """Print a study's Pareto front as it is now."""
    with reported(storage), existing_store(storage, study) as store:
        front = store.front(study)
        if plot is not None:
            (summary,) = (each for each in store.summaries() if each.name == study)
            _plot_front(store.evaluations(study), front, study, summary.stopped, plot)
        if format is OutputFormat.CSV:
            sys.stdout.write(front.to_csv(index=False))
        elif format is OutputFormat.JSON:
            sys.stdout.write(front.to_json(orient="records", indent=2) + "\n")
        else:
            print_front(front, f"Pareto front of {study}")


def _plot_front(evaluations: pd.DataFrame, front: pd.DataFrame, study: str, stopped: int, path: Path) -> None:
    from nas.display.notes import candidates_words
    from nas.display.study_plots import plot_front
    from studies import Deployment

    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {path}: not a .png, .svg or .pdf file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"--plot {path}: its folder does not exist")
    # It is written aside, and takes the place of what is there.
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise UsageError(f"--plot {path}: cannot be written")
    if front.empty:
        raise UsageError(f"--plot {path}: the front of {study} is empty")
    fronts = list(front.groupby(Deployment.columns(), sort=False))
    for number, (_, members) in enumerate(fronts, start=1):
        rows = Deployment.of_view(members.iloc[0]).rows_of(evaluations)
        target = path if len(fronts) == 1 else path.with_stem(f"{path.stem}_{number}")
        try:
            plot_front(rows, members, f"{study}: {candidates_words(len(rows), stopped)}", target)
        except OSError as error:
            raise UsageError(f"--plot {target}: cannot be written ({error.strerror or error})") from error
        note(f"drawn: {target}")
