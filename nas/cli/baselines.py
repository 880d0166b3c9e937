"""`baselines`: known networks beside a study's own."""

from __future__ import annotations

import typer

from nas.cli.console import interruptible, note, out, reported, say
from nas.cli.opening import existing_study
from nas.cli.options import Storage, StudyName, given, made, takes
from nas.config import DEFAULT_STORAGE, DEFAULT_STUDY
from nas.validation.config import BaselineConfig


@takes(BaselineConfig)
def baselines(context: typer.Context, storage: Storage = DEFAULT_STORAGE, study: StudyName = DEFAULT_STUDY) -> None:
    """Train and measure known networks beside a study's own, and print how they compare."""
    with interruptible(), reported(storage), existing_study(storage, study, write=True) as recorded:
        from nas.validation import baselines as known
        from nas.validation.contenders import contenders, failures
        from nas.validation.verdict import table, training_lines, verdict

        config = made(BaselineConfig, given(BaselineConfig, context))
        known.compare(recorded, config, note)
        compared = contenders(recorded)
        out.print(table(compared, f"Baselines of {study}"))
        for line in (*training_lines(compared), *failures(recorded), *verdict(compared)):
            say(line)
