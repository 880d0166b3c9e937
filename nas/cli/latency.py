"""`latency`: a network's latency from its blocks."""

from __future__ import annotations

from typing import Annotated

import typer

from nas.cli.console import note, reported, say
from nas.cli.opening import existing_store, writable_store
from nas.cli.options import ARCH, Again, Storage, given, takes
from nas.config import DEFAULT_STORAGE, DEFAULT_STUDY, LatencyConfig
from nas.errors import CandidateFailed, UsageError


@takes(
    LatencyConfig,
    resolution="the network's own, or 224 for total stride 32, else 32",
    num_classes="1000 for total stride 32, else 10",
)
def latency(
    context: typer.Context,
    arch: Annotated[str, ARCH],
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the parts that the block latency table lacks")
    ] = False,
    again: Again = False,
    storage: Storage = DEFAULT_STORAGE,
) -> None:
    """Print an architecture's latency as the sum of its blocks in the block latency table."""
    with reported(storage):
        from nas.latency.analysis import analyse
        from nas.latency.analysis_table import table_lines
        from nas.latency.devices import check_device
        from nas.latency.subjects import choose

        (subject,) = choose(None, DEFAULT_STUDY, ("--arch", arch), None, given(LatencyConfig, context))
        check_device(subject.config)
        measure = measure or again
        with writable_store(storage) if measure else existing_store(storage) as store:
            if measure:
                try:
                    analyse(store, subject, note, again=again)
                except CandidateFailed as error:
                    raise UsageError(f"--arch {arch}: {error}") from error
            for line in table_lines(store, subject):
                say(line)
