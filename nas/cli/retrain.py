"""`retrain`: longer trainings."""

from __future__ import annotations

from typing import Annotated

import typer

from nas.cli.console import interruptible, note, out, reported
from nas.cli.opening import existing_store
from nas.cli.options import (
    Storage,
    StudyName,
    checked,
)
from nas.config import DEFAULT_STORAGE, DEFAULT_STUDY


def retrain(
    storage: Storage = DEFAULT_STORAGE,
    study: StudyName = DEFAULT_STUDY,
    top: Annotated[int | None, typer.Option(help="The front's so many most accurate; by default all of it.")] = None,
    dominated: Annotated[int, typer.Option(help="Candidates off the front, spread over the latencies.")] = 20,
    steps: Annotated[int | None, typer.Option(help="Of training; by default 4 times the study's.")] = None,
    data: Annotated[str | None, typer.Option(help="Other data than the study's, named as for the search.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels; by default the study's.")] = None,
    data_dir: Annotated[str, typer.Option(help="Folder of CIFAR's and timm's files.")] = "data",
    download: Annotated[bool, typer.Option("--download", help="Download CIFAR or timm's data.")] = False,
    to_rgb: Annotated[
        bool, typer.Option("--to-rgb", help="Convert images that are not RGB; else they are refused.")
    ] = False,
) -> None:
    """Train the front and some it left behind for longer, and say how well the search ranked them."""
    with interruptible(), reported(storage), existing_store(storage, study, write=True) as store:
        from nas.recorded import RecordedStudy
        from nas.validation import retrain as retraining

        flags = {
            "top": ("--top", top), "dominated": ("--dominated", dominated), "steps": ("--steps", steps),
            "resolution": ("--resolution", resolution),
        }  # fmt: skip
        config = checked(
            retraining.RetrainConfig, flags, top=top, dominated=dominated, steps=steps, data=data,
            resolution=resolution, data_dir=data_dir, download=download, to_rgb=to_rgb,
        )  # fmt: skip
        found = retraining.retrain(RecordedStudy.open(store, study), config, note)
        out.print(found.set_up, highlight=False, soft_wrap=True)
        for table in retraining.tables(found, f"Longer trainings of {study}"):
            out.print(table)
            out.print()
        for line in retraining.remarks(found):
            out.print(line, highlight=False, soft_wrap=True)
