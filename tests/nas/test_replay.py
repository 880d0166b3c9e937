"""Today's search on the figures of a study that 3c0a121 searched."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from nas.config import LatencyConfig, SearchConfig
from nas.lab.replay import main
from nas.search import loop as search
from nas.search.live_study import LiveStudy
from tests.conftest import quicken
from tests.nas.test_stopping import Learning

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


class TwoWorkers(Learning):
    workers = 2


@pytest.fixture(scope="module")
def stopped_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A study of two workers that gave trainings up."""
    folder = tmp_path_factory.mktemp("replay")
    url = f"sqlite:///{folder / 'study.db'}"
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch, folder)
        latency = LatencyConfig(device="cpu", engine="eager")
        config = SearchConfig(budget=40, storage=url, latency=latency, sampler="tpe", confirm=0)
        result = search.run(config, TwoWorkers())
    assert result.stopped > 0
    return url


def test_a_study_of_several_workers_that_gave_trainings_up_is_replayed(
    stopped_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch, tmp_path)
    result = CliRunner().invoke(app, [stopped_url, "--workers", "2"])
    assert result.output.startswith("40 candidates, ")
    assert "of them given up" in result.output
    assert result.output.endswith(": the same\n")
    # Candidates are proposed in rounds of their number.
    alone = CliRunner().invoke(app, [stopped_url])
    assert alone.exit_code == 1
    assert "different" in alone.output + str(alone.exception)


def test_a_training_that_would_not_be_given_up_today_is_named(
    stopped_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch, tmp_path)
    monkeypatch.setattr(LiveStudy, "rules", lambda self, archs, latency_ms: [None] * len(archs))
    result = CliRunner().invoke(app, [stopped_url, "--workers", "2"])
    assert result.exit_code == 1
    assert "different: today's search goes on with the training of" in str(result.exception)
