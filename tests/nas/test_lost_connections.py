"""A search whose connections to PostgreSQL are lost at any statement and any commit ends as if none had been.

A commit whose answer was lost took effect, or did not: both are tried for each.
"""

from __future__ import annotations

import json
import logging
import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text

from nas import search
from nas.config import Limits, SearchConfig
from nas.errors import CandidateFailed
from nas.lab.invented import FakeEvaluator
from nas.latency.values import Measurement
from nas.search.loop import Silent
from nas.training.proxy import ProxyResult
from search_spaces import ArchSpec, StageChoices
from studies import StorageError, Store
from tests.conftest import make_tiny_space
from tests.cuts import AFTER, BEFORE, Chooser, cutting

psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed: lost connections were not tested")
pytestmark = pytest.mark.postgres

BUDGET = 6
# Few enough architectures that some are proposed again; some break the limit, and some fail.
SPACE = make_tiny_space(
    stem_width=(16,),
    stages=(
        StageChoices(
            width=(8, 16), kernel_size=(3, 7), group_width=(1, 16), expansion=(1.0,), blocks=(1, 2), stride=(1,)
        ),
    ),
)
LIMITS = Limits(latency_ms=0.2)
SEED = 5
# One search for every so many messages.
STRIDE = 120


class Remembering(FakeEvaluator):
    """Knows what it was asked to evaluate."""

    def __init__(self) -> None:
        super().__init__()
        self.timed: list[str] = []
        self.trained: list[str] = []

    def measure(self, arch: ArchSpec) -> Measurement:
        self.timed.append(arch.arch_id)
        return super().measure(arch)

    def train_one(self, arch: ArchSpec) -> ProxyResult:
        self.trained.append(arch.arch_id)
        if arch.stages[0].kernel_size == 7:
            raise CandidateFailed("the loss diverged (invented)")
        return super().train_one(arch)


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def stored(url: str) -> dict[str, Any]:
    """All that a search leaves in its database, but for ids and times."""
    store = Store.open(url, create=False)
    assert store is not None
    study = store.find_study("convfirst")
    assert study is not None
    assert study.owner is None
    trials = store.optuna_storage.get_all_trials(study.study_id)
    numbers = {str(trial._trial_id): trial.number for trial in trials}
    with store.engine.connect() as connection:
        blocks = connection.execute(text("SELECT shape, median_ms FROM convfirst_block_latencies ORDER BY shape")).all()
        optuna_studies = connection.execute(text("SELECT study_name FROM studies")).all()
        profiles = connection.execute(text("SELECT COUNT(*) FROM convfirst_profiles")).scalar_one()
    attrs = store.optuna_storage.get_study_system_attrs(study.study_id)
    # A key is a note's, `dashboard:<trial id>:note_..`, or a file's, `dashboard:artifacts:<trial id>:<file id>`.
    files = {key: value for key, value in attrs.items() if key.startswith("dashboard:artifacts:")}
    keys = sorted(
        ":".join(str(numbers.get(part, part)) for part in key.split(":")) for key in attrs if key not in files
    )
    found = {
        "study": [study.config, study.anchor, study.anchor_ms, optuna_studies, profiles],
        "trials": [plain(trial) for trial in trials],
        "candidates": [
            (
                row.number, numbers[str(row.trial_id)], row.arch_id, row.state, row.reason, row.accuracy, row.params,
                [(each.stage, each.median_ms, each.over_limit) for each in row.latencies],
                [point[:2] for point in json.loads(store.learning_curve(row.trial_id) or "[]")],
            )
            for row in store.candidates(study.study_id)
        ],
        "blocks": blocks,
        "front": store.front("convfirst")["number"].tolist(),
        "attributes": keys,
        "files": sorted((numbers[key.split(":")[2]], value.split('"filename"')[1]) for key, value in files.items()),
    }  # fmt: skip
    store.close()
    return found


def plain(trial: FrozenTrial) -> tuple[Any, ...]:
    attrs = {key: value for key, value in trial.user_attrs.items() if key != "seconds"}
    return trial.number, trial.state, trial.values, trial.params, attrs, trial.system_attrs, trial.constraints


def interrupted(url: str) -> None:
    """A study whose process was killed: of two running trials one has a row of ours, which Optuna was not told of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nas.search.trials.Trials.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        patch.setattr("nas.search.live_study.LiveStudy.recover", lambda _: None)
        with pytest.raises(KeyboardInterrupt):
            search.run(searched(url), FakeEvaluator())
    store = Store.open(url, create=True)
    assert store is not None
    study = store.find_study("convfirst")
    assert study is not None
    store.optuna_storage.create_new_trial(study.study_id)
    store.close()


def nothing(url: str) -> None:
    """No study."""


def searched(url: str) -> SearchConfig:
    # TPE proposes known architectures, too.
    return SearchConfig(
        budget=BUDGET, storage=url, space=SPACE, limits=LIMITS, seed=SEED, block_table=True, sampler="tpe"
    )


class Databases:
    """Empty databases of one server, which goes with them."""

    def __init__(self, server: str) -> None:
        self.server = server
        self.admin = psycopg.connect(f"{server.replace('+psycopg', '')}/postgres", autocommit=True)

    def new(self) -> str:
        name = f"test_{uuid.uuid4().hex}"
        self.admin.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
        return f"{self.server}/{name}"


@pytest.fixture
def databases(postgres_server: str) -> Iterator[Databases]:
    made = Databases(postgres_server)
    with made.admin:
        yield made


@dataclass(frozen=True)
class Course:
    """A search, and what it left."""

    sent: int
    cuts: int
    timed: list[str]
    trained: list[str]
    why: str
    notes: list[str]
    left: dict[str, Any]


def course(databases: Databases, cut: Chooser, before: Callable[[str], None] = nothing) -> Course:
    """Search a new database, and cut the connections where `cut` says so."""
    url = databases.new()
    before(url)
    evaluator, notes = Remembering(), Notes()
    with cutting(databases.server, cut) as wire:
        result = search.run(searched(url), evaluator, notes)
    assert result.complete == BUDGET
    return Course(wire.sent, wire.cuts, evaluator.timed, evaluator.trained, result.why, notes.lines, stored(url))


def check(broken: Course, whole: Course, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing tells them apart but the number of messages."""
    assert broken.left == whole.left
    assert replace(broken, sent=0, cuts=0) == replace(whole, sent=0, cuts=0)
    # SQLAlchemy's pool logs errors that nobody is told of otherwise.
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def check_meaning(whole: Course) -> None:
    """The unbroken search has everything that could go wrong."""
    states = [state for _, state, *_ in whole.left["trials"]]
    assert set(states) == {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    assert any("duplicate_of" in attrs for _, _, _, _, attrs, _, _ in whole.left["trials"])
    rows = whole.left["candidates"]
    assert {state for _, _, _, state, *_ in rows} == {"complete", "over_limit", "failed"}
    assert [number for number, *_ in whole.left["trials"]] == list(range(len(states)))
    assert all(number == optunas for number, optunas, *_ in rows)
    assert len({arch_id for _, _, arch_id, *_ in rows}) == len(rows)
    assert whole.left["blocks"]


def never(number: int, texts: tuple[str, ...], moment: str) -> bool:
    return False


class EachOnce:
    """Cuts before and after each statement and commit, once for each kind of transaction and each place in it.

    Statements that begin alike are of one kind: others name as many values as a candidate has blocks.
    """

    def __init__(self) -> None:
        self.seen: set[object] = set()

    def __call__(self, number: int, texts: tuple[str, ...], moment: str) -> bool:
        kind = tuple(text[:60] for text in texts), moment
        new = kind not in self.seen
        self.seen.add(kind)
        return new


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.reconnecting.RETRY_S", 0.001)


@pytest.mark.usefixtures("shown")
@pytest.mark.parametrize("before", [nothing, interrupted])
def test_every_kind_of_statement_may_lose_its_connection(
    databases: Databases,
    before: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One for each of an operation's statements, and more.
    monkeypatch.setattr("studies.reconnecting.MOST_LOSSES", 1000)
    whole = course(databases, never, before)
    check_meaning(whole)
    broken = course(databases, EachOnce(), before)
    assert broken.cuts > 100
    check(broken, whole, caplog)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_answers_of_many_commits_may_be_lost(
    databases: Databases, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """In any two attempts of an operation, for example in the second transaction of each."""
    rng = random.Random(seed)

    def cut(number: int, texts: tuple[str, ...], moment: str) -> bool:
        return texts[-1] == "COMMIT" and moment == AFTER and rng.random() < 0.4

    broken = course(databases, cut)
    assert broken.cuts > 50
    check(broken, course(databases, never), caplog)


@pytest.mark.parametrize("moment", [BEFORE, AFTER])
def test_one_connection_may_be_lost_at_any_moment(
    databases: Databases, moment: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = course(databases, never)
    first = 0 if moment == BEFORE else STRIDE // 2
    # The last two messages give the study up.
    for lost in (*range(first, whole.sent - 2, STRIDE), whole.sent - 2, whole.sent - 1):
        broken = course(databases, lambda number, _, when, lost=lost: (number, when) == (lost, moment))
        assert broken.cuts == 1
        check(broken, whole, caplog)


def test_a_server_that_ends_every_connection_ends_the_search(
    databases: Databases,
) -> None:
    url = databases.new()
    with (
        cutting(databases.server, lambda number, _, moment: number > 100 and moment == BEFORE) as wire,
        pytest.raises(StorageError, match="terminating connection due to administrator command"),
    ):
        search.run(searched(url), Remembering())
    # Those that tidy up lose one each, as the server was given up.
    assert 10 < wire.cuts < 20
    assert search.run(searched(url), Remembering()).complete == BUDGET
