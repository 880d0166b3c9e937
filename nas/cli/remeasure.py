"""`remeasure`: latencies once more."""

from __future__ import annotations

from typing import Annotated

import typer

from nas.cli.console import reported, say
from nas.cli.fronts import print_front
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
        from nas.validation.remeasure import remeasure as measure_again

        # What is installed here measures, whichever version the study was begun with.
        deployment = moved(recorded.config.latency, **{"runtime": None, **given(LatencyConfig, context)})
        done = measure_again(recorded, deployment, everything, say)
        if done is None:
            say("The front is empty: nothing was measured.")
            return
        print_front(done.deployment.rows_of(recorded.store.front(study)), f"Pareto front of {study}")
        say(str(done))
