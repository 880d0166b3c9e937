"""`remeasure`: latencies once more."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from nas.cli.console import out, reported
from nas.cli.opening import existing_store
from nas.cli.options import (
    BatchOption,
    PrecisionOption,
    SecondsOption,
    Storage,
    StudyName,
    ThreadsOption,
    deployment,
    given_fields,
)
from nas.config import DEFAULT_STORAGE, DEFAULT_STUDY, Dtype


def remeasure(
    context: typer.Context,
    storage: Storage = DEFAULT_STORAGE,
    study: StudyName = DEFAULT_STUDY,
    everything: Annotated[bool, typer.Option("--all", help="All complete candidates, not the front only.")] = False,
    device: Annotated[
        str | None, typer.Option(help="By default the study's, as all that follows.", rich_help_panel="Deployment")
    ] = None,
    engine: Annotated[str | None, typer.Option(rich_help_panel="Deployment")] = None,
    dtype: Annotated[Dtype | None, typer.Option(rich_help_panel="Deployment")] = None,
    latency_batch: BatchOption = None,
    latency_threads: ThreadsOption = None,
    latency_precision: PrecisionOption = None,
    latency_seconds: SecondsOption = None,
) -> None:
    """Measure a study's front again, in turns; with other settings all candidates, as a second latency of theirs."""
    with reported(storage), existing_store(storage, study, write=True) as store:
        from nas.display.notes import deployment_line
        from nas.recorded import RecordedStudy
        from nas.search.progress import front_table
        from nas.validation.remeasure import remeasure as measure_again

        recorded = RecordedStudy.open(store, study)
        note = partial(out.print, highlight=False, soft_wrap=True)
        done = measure_again(recorded, deployment(recorded.config.latency, **given_fields(context)), everything, note)
        if done is None:
            out.print("The front is empty: nothing was measured.")
            return
        front = done.deployment.rows_of(store.front(study))
        if front.empty:
            out.print("The front is empty now.")
        else:
            out.print(front_table(front, f"Pareto front of {study}\n{deployment_line(front.iloc[0])}"))
        note(str(done))
