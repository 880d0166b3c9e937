"""What a candidate costs, and what a study's opening costs, does not grow with the study: counted in SQL statements."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.orm import Session
from typer.testing import CliRunner

import run_search
from nas.config import Limits, SearchConfig
from nas.display.showcase import show
from nas.lab.invented import FakeEvaluator
from nas.recorded import RecordedStudy
from nas.report.dashboard import Server
from nas.search.loop import Event, Silent, run
from studies import Candidate, CandidateLatency, CandidateState, Store
from studies.optuna_storage import OptunaStorage
from tests.statements import statements

# SQLAlchemy and Optuna read what belongs to 500 rows with one statement.
MORE = 600


class Counting(Silent):
    """Counts what is sent for each complete candidate."""

    def __init__(self, sent: list[str]) -> None:
        self.sent, self.before = sent, 0
        self.each: list[int] = []

    def begin(self, complete: int, budget: int) -> None:
        self.before = len(self.sent)

    def candidate(self, event: Event) -> None:
        if event.outcome.state == CandidateState.COMPLETE:
            self.each.append(len(self.sent) - self.before)
        self.before = len(self.sent)


def lengthen(url: str, study: str, count: int) -> None:
    """Add complete candidates to a study, as slow and wrong as none on its front."""
    store = Store.open(url, create=True)
    assert store is not None
    with Session(store.engine) as session, session.begin():
        number = session.scalar(text("SELECT MAX(number) + 1 FROM trials"))
        example = session.scalars(select(Candidate).where(Candidate.state == CandidateState.COMPLETE)).first()
        assert example is not None
        (latency,) = [row for row in example.latencies if row.stage == "search"]
        columns = "study_id, number, state, datetime_start, datetime_complete"
        values = ":study, :number, 'COMPLETE', CURRENT_TIMESTAMP, CURRENT_TIMESTAMP"
        session.execute(
            text(f"INSERT INTO trials ({columns}) VALUES ({values})"),
            [{"study": example.study_id, "number": number + k} for k in range(count)],
        )
        made = session.execute(text("SELECT trial_id, number FROM trials WHERE number >= :first"), {"first": number})
        rows = [{"id": trial_id, "number": number} for trial_id, number in made]
        for objective, value in enumerate((0.01, 100.0)):
            columns = "trial_id, objective, value, value_type"
            session.execute(
                text(f"INSERT INTO trial_values ({columns}) VALUES (:id, {objective}, {value}, 'FINITE')"), rows
            )
        names = [column.name for column in Candidate.__table__.columns]
        latency_names = [column.name for column in CandidateLatency.__table__.columns if column.name != "latency_id"]
        same = {name: getattr(example, name) for name in names} | {"accuracy": 0.01}
        added = [{"trial_id": row["id"], "number": row["number"], "arch_id": f"more{row['number']}"} for row in rows]
        session.execute(insert(Candidate), [same | fields for fields in added])
        same = {name: getattr(latency, name) for name in latency_names} | {"median_ms": 100.0}
        session.execute(insert(CandidateLatency), [same | {"trial_id": row["id"]} for row in rows])
    store.close()


@pytest.fixture
def config(any_url: str) -> SearchConfig:
    return SearchConfig(budget=15, storage=any_url)


@pytest.mark.parametrize("limits", [Limits(), Limits(latency_ms=50.0)])
def test_a_candidate_costs_as_many_statements_in_a_long_study(config: SearchConfig, limits: Limits) -> None:
    config = replace(config, sampler="random", limits=limits, early_stopping=False, confirm=0)
    with statements() as sent:
        early = Counting(sent)
        run(config, FakeEvaluator(), early)
    # Random proposals are never known ones; a search of them has no openers.
    assert len(set(early.each)) == 1
    lengthen(config.storage, config.study, MORE)
    with statements() as sent:
        late = Counting(sent)
        run(replace(config, budget=15 + MORE + 10), FakeEvaluator(), late)
    assert len(late.each) == 10
    assert set(late.each) == set(early.each)
    # It was 139 without limits while Optuna wrote each parameter and attribute by itself.
    assert early.each[0] < 45


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_running_search_never_lists_the_trials(
    config: SearchConfig, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads them when it begins."""
    listed: list[str] = []
    original = OptunaStorage._get_trials

    def get(self: OptunaStorage, *arguments: object, **named: object) -> object:
        listed.append("trials")
        return original(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(OptunaStorage, "_get_trials", get)
    counting = Counting(listed)
    run(replace(config, sampler=sampler), FakeEvaluator(), counting)
    assert listed
    assert counting.each == [0] * 15


def opened_by_pareto(url: str, folder: Path) -> None:
    assert CliRunner().invoke(run_search.app, ["pareto", "--storage", url]).exit_code == 0


def opened_by_report(url: str, folder: Path) -> None:
    assert CliRunner().invoke(run_search.app, ["report", "--storage", url, "--out", str(folder)]).exit_code == 0


def opened_by_dashboard(url: str, folder: Path) -> None:
    store = Store.open(url, create=False)
    assert store is not None
    server = Server(store, folder, "127.0.0.1", 0)
    server.warm_up()
    server.server.close()
    show(RecordedStudy.open(store, "convfirst"), folder)
    store.close()


@pytest.mark.parametrize("command", [opened_by_pareto, opened_by_report, opened_by_dashboard])
def test_a_long_study_opens_with_as_many_statements(
    config: SearchConfig, tmp_path: Path, command: Callable[[str, Path], None]
) -> None:
    run(config, FakeEvaluator())
    counts = []
    for more in (0, MORE):
        if more:
            lengthen(config.storage, config.study, more)
        if command is opened_by_dashboard:
            # The first time it writes notes and files that are not there.
            command(config.storage, tmp_path / "files")
        with statements() as sent:
            command(config.storage, tmp_path / "files")
        counts.append(len(sent))
    assert counts[1] == counts[0]


@pytest.mark.parametrize("module", ["nas.cli.fronts, nas.recorded", "nas.report.page", "nas.report.dashboard"])
def test_what_reads_a_study_does_not_import_torch(module: str) -> None:
    """It takes a second, of the three that `pareto` took."""
    code = f"import sys, {module}; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
