"""`retrain`: longer trainings."""

from __future__ import annotations

import typer

from nas.cli.console import interruptible, note, out, reported, say
from nas.cli.opening import existing_study
from nas.cli.options import Storage, StudyName, given, made, takes
from nas.config import DEFAULT_STORAGE, DEFAULT_STUDY
from nas.validation.config import RetrainConfig


@takes(RetrainConfig)
def retrain(context: typer.Context, storage: Storage = DEFAULT_STORAGE, study: StudyName = DEFAULT_STUDY) -> None:
    """Train a study's front and some dominated networks for longer, and print how well the search ranked them."""
    with interruptible(), reported(storage), existing_study(storage, study, write=True) as recorded:
        from nas.validation import retrain as retraining

        config = made(RetrainConfig, given(RetrainConfig, context))
        found = retraining.retrain(recorded, config, note)
        say(found.set_up)
        for table in retraining.tables(found, f"Longer trainings of {study}"):
            out.print(table)
            out.print()
        for line in retraining.remarks(found):
            say(line)
