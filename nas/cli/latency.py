"""`latency`: a network's latency from its blocks."""

from __future__ import annotations

from typing import Annotated

import typer

from nas.cli.console import note, out, reported
from nas.cli.opening import existing_store, writable_store
from nas.cli.options import (
    BatchOption,
    ClassesOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    PrecisionOption,
    ResolutionOption,
    SecondsOption,
    Storage,
    ThreadsOption,
    deployment,
    given_fields,
)
from nas.config import AUTO, DEFAULT_STORAGE, DEFAULT_STUDY, Dtype


def latency(
    context: typer.Context,
    arch: Annotated[str, typer.Option(help="An architecture's line, or its JSON.")],
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure what the block latency table lacks of it.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure all of it anew.")] = False,
    storage: Storage = DEFAULT_STORAGE,
    device: DeviceOption = AUTO,
    engine: EngineOption = AUTO,
    dtype: DtypeOption = Dtype.AUTO,
    latency_batch: BatchOption = None,
    latency_resolution: ResolutionOption = None,
    latency_classes: ClassesOption = None,
    latency_threads: ThreadsOption = None,
    latency_precision: PrecisionOption = None,
    latency_seconds: SecondsOption = None,
) -> None:
    """An architecture's latency by the block latency table, at once: what it adds up to, and what is missing."""
    with reported(storage):
        from nas.errors import CandidateFailed, UsageError
        from nas.latency.analysis import analyse
        from nas.latency.analysis_table import table_lines
        from nas.latency.devices import check_device
        from nas.latency.subjects import choose

        (subject,) = choose(None, DEFAULT_STUDY, ("--arch", arch), None, given_fields(context), deployment)
        check_device(subject.config)
        measure = measure or again
        with writable_store(storage) if measure else existing_store(storage) as store:
            if measure:
                try:
                    analyse(store, subject, note, again=again)
                except CandidateFailed as error:
                    raise UsageError(f"--arch {arch}: {error}") from error
            for line in table_lines(store, subject):
                out.print(line, highlight=False, soft_wrap=True)
