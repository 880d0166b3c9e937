"""`recommend`: the network to take."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import typer

from nas.cli.console import reported, say
from nas.cli.opening import existing_study
from nas.cli.options import Storage, StudyName, given, made, takes
from nas.config import DEFAULT_STORAGE, DEFAULT_STUDY
from nas.options import FINITE, Checked, option


class OutputFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True)
class Wanted(Checked):
    """What a user wants of a network.

    Raises:
        FieldError: a field has a value that it cannot have.
    """

    max_latency_ms: float | None = option(
        None, "--max-latency-ms", "Limit on the latency", default="the study's", bounds=FINITE
    )


@takes(Wanted)
def recommend(
    context: typer.Context,
    storage: Storage = DEFAULT_STORAGE,
    study: StudyName = DEFAULT_STUDY,
    format: Annotated[OutputFormat, typer.Option(help="Format of the output: text or json")] = OutputFormat.TEXT,
) -> None:
    """Say which network of a study's front to take: the most accurate within a limit, or the one at its
    knee, after which more latency brings little accuracy."""
    with reported(storage), existing_study(storage, study) as recorded:
        from nas.recommendation import advice, commands, doubt_line
        from nas.recommendation import recommend as find

        max_latency_ms = made(Wanted, given(Wanted, context)).max_latency_ms
        if format is OutputFormat.JSON:
            found = find(recorded, max_latency_ms)
            does = {what.replace(" ", "_"): line for what, line in commands(study, storage, found.chosen)}
            told = found.to_dict() | {"doubt": doubt_line(recorded, storage), "commands": does}
            sys.stdout.write(json.dumps(told, indent=2) + "\n")
            return
        for line in advice(recorded, storage, max_latency_ms):
            say(line)
