"""Pareto fronts as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nas.cli.console import out

if TYPE_CHECKING:
    import pandas as pd


def print_front(front: pd.DataFrame, title: str) -> None:
    """Print a table of the front for each deployment in it."""
    from nas.display.front_table import front_table
    from nas.display.notes import deployment_line
    from studies import Deployment

    if front.empty:
        out.print("The front is empty: no candidate is complete, or all turned out over a limit.")
        return
    # Latencies of different deployments are not compared.
    for _, members in front.groupby(Deployment.columns(), sort=False):
        out.print(front_table(members, f"{title}\n{deployment_line(members.iloc[0])}"))
