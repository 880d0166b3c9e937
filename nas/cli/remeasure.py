"""`remeasure`: latencies once more."""

from __future__ import annotations

from typing import Annotated

import typer

from nas.cli.console import out, reported, say
from nas.cli.opening import existing_study
from nas.cli.options import Storage, StudyName, given, takes
from nas.config import DEFAULT_STORAGE, DEFAULT_STUDY, LatencyConfig, moved


@takes(
    LatencyConfig, "device", "engine", "dtype", "batch_size", "threads", "precision", "seconds", default="the study's"
)
def remeasure(
    context: typer.Context,
    storage: Storage = DEFAULT_STORAGE,
    study: StudyName = DEFAULT_STUDY,
    everything: Annotated[
        bool, typer.Option("--all", help="Measure all complete candidates, not only the front")
    ] = False,
) -> None:
    """Measure a study's front again, in turns; in another deployment, measure all of its candidates there."""
    with reported(storage), existing_study(storage, study, write=True) as recorded:
        from nas.display.front_table import front_table
        from nas.display.notes import deployment_line
        from nas.validation.remeasure import remeasure as measure_again

        done = measure_again(recorded, moved(recorded.config.latency, **given(LatencyConfig, context)), everything, say)
        if done is None:
            say("The front is empty: nothing was measured.")
            return
        front = done.deployment.rows_of(recorded.store.front(study))
        if front.empty:
            say("The front is empty now.")
        else:
            out.print(front_table(front, f"Pareto front of {study}\n{deployment_line(front.iloc[0])}"))
        say(str(done))
