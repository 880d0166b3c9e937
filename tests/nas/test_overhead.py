"""The lab of what a candidate costs besides, on small studies."""

from __future__ import annotations

import os
import re
import sqlite3
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from nas.lab import overhead
from nas.lab.overhead import opening_line

app = typer.Typer()
app.command()(overhead.main)


def test_what_is_drawn_again_becomes_trials_of_known_architectures(sqlite_url: str) -> None:
    arguments = ["--trials", "40", "--drawn", "40", "--again", "0.8", "--storage", sqlite_url]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    evaluated = re.match(r"40 complete, (\d+) evaluated: ", result.output)
    assert evaluated is not None
    with sqlite3.connect(sqlite_url.removeprefix("sqlite:///")) as connection:
        states = dict(connection.execute("SELECT state, COUNT(*) FROM trials GROUP BY state"))
        notes = connection.execute("SELECT COUNT(*) FROM study_system_attributes WHERE key LIKE '%:note_ver'")
        assert notes.fetchone()[0] > sum(states.values()) - 1
        query = "SELECT COUNT(*) FROM convfirst_candidates WHERE state = 'stopped'"
        (stopped,) = connection.execute(query).fetchone()
    assert states["COMPLETE"] + stopped == 40
    assert states["COMPLETE"] + stopped + states.get("FAIL", 0) == int(evaluated[1])
    states["PRUNED"] -= stopped
    # A share p of the draws, and two in a row at most, make p + p * p of them for a candidate, 1.44: fewer at first.
    assert 0.7 < states["PRUNED"] / int(evaluated[1]) < 1.9


def test_openings_are_told_as_ranges() -> None:
    times = [{"pareto": (1.24, 1.0), "report": (8.0, 7.0)}, {"pareto": (1.26, 0.5), "report": (9.0, 7.04)}]
    told = "pareto 1.2 to 1.3 s, 0.5 to 1.0 of the processor; report 8.0 to 9.0 s, 7.0 to 7.0 of the processor"
    assert opening_line(times) == f"opened 2 times: {told}"


@pytest.mark.slow
def test_the_commands_that_open_a_study_are_timed(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    CliRunner().invoke(app, ["--trials", "3", "--storage", sqlite_url], catch_exceptions=False)
    times = overhead.time_opening(sqlite_url, tmp_path)
    assert list(times) == ["pareto", "report", "dashboard"]
    for seconds, used in times.values():
        # A process of several threads may use several cores.
        assert 0 < used < seconds * (os.cpu_count() or 1) + 0.1
    assert (tmp_path / "report" / "report.html").is_file()
