"""Today's search on the figures of a study that 3c0a121 searched."""

from __future__ import annotations

import sqlite3

import typer
from typer.testing import CliRunner

from nas.lab.replay import main

app = typer.Typer()
app.command()(main)


def test_the_search_proposes_and_stores_what_it_did_at_3c0a121(stored_url: str) -> None:
    result = CliRunner().invoke(app, [stored_url])
    assert result.output == "4 candidates, 4 trials: the same\n"
    assert result.exit_code == 0


def test_what_differs_is_shown(stored_url: str) -> None:
    with sqlite3.connect(stored_url.removeprefix("sqlite:///")) as connection:
        connection.execute("update convfirst_candidates set params = 7 where number = 2")
    result = CliRunner().invoke(app, [stored_url])
    assert result.exit_code == 1
    assert "candidates: 4 rows of" in result.output
    assert result.output.endswith("4 candidates, 4 trials: different\n")
