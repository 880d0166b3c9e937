"""`baselines`: known networks beside a study's own."""

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


def baselines(
    storage: Storage = DEFAULT_STORAGE,
    study: StudyName = DEFAULT_STUDY,
    models: Annotated[
        str | None,
        typer.Option(help="timm models, separated by commas, or all; by default those that suit the device."),
    ] = None,
    found: Annotated[int, typer.Option(help="Members of the front, from the fastest to the most accurate.")] = 3,
    steps: Annotated[int | None, typer.Option(help="Of training; by default 4 times the study's.")] = None,
    learning_rates: Annotated[
        str | None,
        typer.Option(help="Of which the best counts, separated by commas; by default 1/8, 1/2 and 2 of the study's."),
    ] = None,
    map_size: Annotated[
        int | None,
        typer.Option(
            "--map",
            help="Pixels across of the final map of networks that are not ours; the study's, on a CPU half of it.",
        ),
    ] = None,
    data_dir: Annotated[str, typer.Option(help="Folder of CIFAR's and timm's files.")] = "data",
    download: Annotated[bool, typer.Option("--download", help="Download CIFAR or timm's data.")] = False,
) -> None:
    """Train and measure known networks beside a study's own, and say what the found ones are worth."""
    with interruptible(), reported(storage), existing_store(storage, study, write=True) as store:
        from nas.recorded import RecordedStudy
        from nas.validation import baselines as known
        from nas.validation.contenders import contenders, failures
        from nas.validation.verdict import table, training_lines, verdict

        flags = {
            "models": ("--models", models), "found": ("--found", found), "steps": ("--steps", steps),
            "learning_rates": ("--learning-rates", learning_rates), "map_size": ("--map", map_size),
        }  # fmt: skip
        config = checked(
            known.BaselineConfig, flags, models=known.names(models), found=found, steps=steps,
            learning_rates=known.rates(learning_rates), map_size=map_size, data_dir=data_dir, download=download,
        )  # fmt: skip
        recorded = RecordedStudy.open(store, study)
        known.compare(recorded, config, note)
        compared = contenders(recorded)
        out.print(table(compared, f"Baselines of {study}"))
        for line in (*training_lines(compared), *failures(recorded), *verdict(compared)):
            out.print(line, highlight=False, soft_wrap=True)
