"""All commands as one program."""

from __future__ import annotations

import typer
from typer import rich_utils

from nas.cli import (
    analyze,
    baselines,
    bench,
    dashboard,
    device,
    export,
    latency,
    pareto,
    remeasure,
    report,
    retrain,
    search,
    space,
    studies,
)  # fmt: skip

# Defaults are told as in the help of options that dataclasses declare.
rich_utils.DEFAULT_STRING = "(default: {})"

app = typer.Typer(add_completion=False, no_args_is_help=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
app.callback(invoke_without_command=True)(search.search)
for command in (
    pareto.pareto, studies.studies, dashboard.dashboard, report.report, baselines.baselines, export.export,
    bench.bench, retrain.retrain, space.space, device.device, remeasure.remeasure, analyze.analyze, latency.latency,
):  # fmt: skip
    app.command()(command)
