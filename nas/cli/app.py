"""All commands as one program."""

from __future__ import annotations

import io
import itertools
import sys
from typing import Any

import typer
from typer import rich_utils
from typer.core import TyperGroup

from nas.cli import (
    analyze,
    baselines,
    bench,
    confirm,
    dashboard,
    device,
    export,
    latency,
    pareto,
    recommend,
    remeasure,
    report,
    retrain,
    search,
    space,
    studies,
    train,
)  # fmt: skip
from nas.cli.console import fail

# Defaults are told as in the help of options that dataclasses declare.
rich_utils.DEFAULT_STRING = "(default: {})"


class _Program(TyperGroup):
    """The commands, after a look at the streams and at what was typed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # Names may hold letters that the terminal's encoding lacks; these are printed as \uXXXX.
                stream.reconfigure(errors="backslashreplace")
        for before, typed in itertools.pairwise(["", *args]):
            # Python stands in surrogates for bytes that it cannot decode; files and databases would not take them.
            if any("\ud800" <= letter <= "\udfff" for letter in typed):
                named = f"{before} {typed}" if before.startswith("--") else typed
                fail(f"{named}: holds bytes that are no text in {sys.getfilesystemencoding()}")
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Program, add_completion=False, no_args_is_help=False, pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)  # fmt: skip
app.callback(invoke_without_command=True)(search.search)
for command in (
    pareto.pareto, recommend.recommend, studies.studies, dashboard.dashboard, report.report, baselines.baselines,
    export.export, bench.bench, confirm.confirm, retrain.retrain, space.space, device.device, remeasure.remeasure,
    analyze.analyze, latency.latency, train.train,
):  # fmt: skip
    app.command()(command)
