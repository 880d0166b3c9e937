"""The front as a table for the terminal."""

from __future__ import annotations

import pandas as pd
from rich.table import Table

from nas.display.notes import accuracy_line
from nas.recorded import is_confirmed
from nas.reporting import console_table

FRONT_COLUMNS = {
    "number": ("trial", "{:d}"),
    "accuracy": ("accuracy", "{:.4f}"),
    "interval": ("95 %", "{}"),
    "test_accuracy": ("test", "{:.3f}"),
    "latency_ms": ("latency ms", "{:.4f}"),
    "computational_efficiency": ("of peak", "{:.1%}"),
    "params": ("params k", "{:,.0f}"),
    "macs": ("MMACs", "{:,.2f}"),
    "summary": ("architecture", "{}"),
}


def front_table(front: pd.DataFrame, title: str) -> Table:
    """Rows of the view `pareto_front` as a table for the terminal, which fits into 80 columns."""
    front = front.assign(params=front["params"] / 1e3, macs=front["macs"] / 1e6)
    columns = dict(FRONT_COLUMNS)
    if is_confirmed(front):
        columns["accuracy"] = ("accuracy", "{:.3f}")
        ends = zip(front["accuracy_low"], front["accuracy_high"], strict=True)
        front = front.assign(interval=[f"{low:.3f}-{high:.3f}" for low, high in ends])
    else:
        del columns["interval"]
    if front["test_accuracy"].isna().all():
        del columns["test_accuracy"]
    table = console_table(f"{title}\n{accuracy_line(front)}")
    for name, (header, _) in columns.items():
        if name == "summary":
            table.add_column(header, overflow="fold")
        else:
            table.add_column(header, justify="right", no_wrap=True)
    for row in front.to_dict("records"):
        # The efficiency is unknown where the device was never profiled.
        table.add_row(*("" if pd.isna(row[name]) else form.format(row[name]) for name, (_, form) in columns.items()))
    return table
