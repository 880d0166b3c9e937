"""`recommend`: the network to take."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from typing import Annotated

import typer

from nas.cli.console import reported, say
from nas.cli.opening import existing_study
from nas.cli.options import Storage, StudyName
from nas.config import DEFAULT_STORAGE, DEFAULT_STUDY
from nas.errors import UsageError


class OutputFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


def recommend(
    storage: Storage = DEFAULT_STORAGE,
    study: StudyName = DEFAULT_STUDY,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="Limit on the latency (default: the study's)", show_default=False)
    ] = None,
    format: Annotated[OutputFormat, typer.Option(help="Format of the output: text or json")] = OutputFormat.TEXT,
) -> None:
    """Say which network of a study's front to take: the most accurate within a limit, or the one at its
    knee, after which more latency brings little accuracy."""
    with reported(storage), existing_study(storage, study) as recorded:
        from nas.recommendation import advice, commands, doubt_line
        from nas.recommendation import recommend as find

        if max_latency_ms is not None and not max_latency_ms > 0:
            raise UsageError(f"--max-latency-ms {max_latency_ms:g}: is not a number above 0")
        if format is OutputFormat.JSON:
            found = find(recorded, max_latency_ms)
            does = {what.replace(" ", "_"): line for what, line in commands(study, storage, found.chosen)}
            told = found.to_dict() | {"doubt": doubt_line(recorded, storage), "commands": does}
            sys.stdout.write(json.dumps(told, indent=2) + "\n")
            return
        for line in advice(recorded, storage, max_latency_ms):
            say(line)
