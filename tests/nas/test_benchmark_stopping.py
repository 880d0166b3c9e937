"""Early stopping, replayed over stored trainings."""

from __future__ import annotations

import json
import lzma
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from nas.config import LatencyConfig, SearchConfig
from nas.lab import benchmark_stopping
from nas.lab.benchmark_stopping import Trainings, _interval, of_study, of_table, replay
from nas.lab.testbed import Plan
from nas.search import loop as search
from nas.training.proxy import ProxyResult
from tests.conftest import quicken
from tests.nas.test_stopping import Learning


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    folder = tmp_path_factory.mktemp("trainings")
    config = SearchConfig(
        budget=80, storage=f"sqlite:///{folder / 'study.db'}", sampler="random", confirm=0, early_stopping=False,
        latency=LatencyConfig(device="cpu", engine="eager"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch, folder)
        search.run(config, Learning())
    return of_study(f"{config.storage}#{config.study}")


def test_a_replay_saves_seconds_and_loses_little(trainings: Trainings) -> None:
    assert len(trainings.rows) == 80
    found = replay(trainings, 0.02, seed=0)
    assert 0.5 < found.share < 0.95
    assert 0 <= found.lost < 0.02
    assert found.wrong <= found.reached
    assert replay(trainings, 0.02, seed=0) == found
    assert replay(trainings, 0.02, seed=1) != found
    # A rule that is never sure gives nothing up, and one that needs no reason saves most.
    assert replay(trainings, 1e-12, seed=0).share == pytest.approx(1.0, abs=0.05)
    assert replay(trainings, 0.45, seed=0).share < found.share


def test_nothing_is_lost_where_nothing_is_given_up(trainings: Trainings) -> None:
    def without_curve(result: ProxyResult) -> ProxyResult:
        return replace(result, curve=())

    rows = tuple((arch, latency_ms, without_curve(result)) for arch, latency_ms, result in trainings.rows)
    found = replay(replace(trainings, rows=rows), 0.02, seed=0)
    assert (found.share, found.lost, found.wrong) == (1.0, 0.0, 0)


def test_a_table_is_replayed_as_a_study_is(trainings: Trainings, tmp_path: Path) -> None:
    plan = Plan("small", "digits", 32, 200, 32, 8e-3, 8, 10)
    networks = [
        {
            "arch": str(arch), "found": False, "params": 1, "macs": 1, "latency_ms": latency_ms, "long": [],
            "short": [[0, False, result.accuracy, result.loss, result.seconds,
                       [[point.step, point.train_loss, point.train_accuracy] for point in result.curve]]],
        }
        for arch, latency_ms, result in trainings.rows
    ]  # fmt: skip
    path = tmp_path / "table.json.xz"
    with lzma.open(path, "wt") as file:
        json.dump({"plan": asdict(plan), "networks": networks}, file)
    table = of_table(path)
    assert replay(replace(table, most_ms=trainings.most_ms), 0.02, seed=0) == replay(trainings, 0.02, seed=0)


def test_the_command_prints_a_line_for_each_rule(trainings: Trainings) -> None:
    app = Typer()
    app.command()(benchmark_stopping.main)
    result = CliRunner().invoke(app, ["--study", trainings.name, "--seeds", "2", "--workers", "1"])
    assert result.exit_code == 0, result.output
    for words in ("80 trainings, 2 orders", "2%", "4% (default)", "10%"):
        assert words in result.output
    # The orders of one study are no sample of studies.
    assert "±" not in result.output
    refused = CliRunner().invoke(app, [])
    assert refused.exit_code != 0


def test_intervals_are_over_studies_not_over_orders() -> None:
    # The mean of 0.8 and 0.9, and 12.71 (Student's t of one degree) standard errors of 0.05.
    assert _interval([0.8, 0.9]) == "0.8500 ±0.6353"


def test_a_study_that_gave_trainings_up_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that it gave up the ends are missing, and only trainings about which the rule was right are left."""
    quicken(monkeypatch, tmp_path)
    config = SearchConfig(
        budget=38, storage=f"sqlite:///{tmp_path / 'study.db'}", confirm=0,
        latency=LatencyConfig(device="cpu", engine="eager"),
    )  # fmt: skip
    stopped = search.run(config, Learning()).stopped
    assert stopped > 0
    with pytest.raises(
        SystemExit, match=rf"^--study .*: {stopped} of its trainings were given up.*--no-early-stopping"
    ):
        of_study(f"{config.storage}#{config.study}")
