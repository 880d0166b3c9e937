"""The developers' commands that search on a cluster, in small."""

from __future__ import annotations

import importlib.util
import re

import pytest
import typer
from typer.testing import CliRunner, Result

from nas.lab import cluster_busy, stress

pytestmark = pytest.mark.slow


def invoke(main: object, *arguments: str) -> Result:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: searches on a cluster were not tested")
    app = typer.Typer()
    app.command()(main)  # type: ignore[type-var]
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


@pytest.mark.postgres
def test_nothing_is_lost_whatever_is_killed() -> None:
    result = invoke(stress.main, "--budget", "36", "--workers", "4", "--seconds", "1", "--pause", "3")
    assert result.exit_code == 0, result.output
    faults = [int(count) for count in re.findall(r"(\d+) times a ", result.output)]
    assert sum(faults) >= 3
    assert "36 candidates" in result.output
    assert "0 lost, 0 duplicated, 0 beyond the budget" in result.output


def test_workers_of_a_cluster_are_kept_busy() -> None:
    result = invoke(cluster_busy.main, "--workers", "4", "--candidates", "24", "--seconds", "3")
    assert result.exit_code == 0, result.output
    found = re.search(r"4 workers, 24 candidates of 3 s: ([0-9.]+)% busy", result.output)
    assert found
    assert 0 < float(found.group(1)) <= 100
