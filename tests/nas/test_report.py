"""The report of studies whose scores are invented, read as a browser would read it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial
from PIL import Image

from nas.config import DataConfig, LatencyConfig, Limits, SearchConfig
from nas.errors import CandidateFailed, UsageError
from nas.lab.invented import FakeEvaluator
from nas.latency.values import Latency
from nas.pareto import hypervolume, running_hypervolume
from nas.recorded import RecordedStudy, deployment_of
from nas.report import data as report_data
from nas.report import page as report
from nas.report.architectures import MOST_COLUMNS, _rows, chosen_members
from nas.report.data import Material, gather, incomplete_trials
from nas.report.importance import FEWEST_TRIALS, importances
from nas.report.page import comparable, write_report
from nas.report.words import set_up
from nas.search.loop import run
from nas.training.proxy import ProxyResult
from nas.training.stopping import Rules
from nas.training.workers import Done
from nas.validation.contenders import Contender, ContenderKind
from search_spaces import ArchSpec
from studies import Candidate, CandidateLatency, CandidateState, LatencyStage, Store
from tests.conftest import make_tiny_space

HOSTILE = "<script>alert(1)</script> & 'Tom' $\\frac$"


class Failing(FakeEvaluator):
    """Trains nothing, for a reason whose figures differ."""

    def train_one(self, arch: ArchSpec) -> ProxyResult:
        raise CandidateFailed(f"the loss was <b>nan</b> after {arch.head_width} steps")


class Interrupted(FakeEvaluator):
    """Is interrupted at its first candidate."""

    def cost(self, arch: ArchSpec) -> Any:
        raise KeyboardInterrupt


class Page(HTMLParser):
    """What a page holds: its tags with their attributes, its text, its scripts, and the ids of open tags."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.inside: list[str] = []
        self.feed(source)
        self.close()
        assert not self.inside, f"not closed: {self.inside}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] == "script":
            self.scripts.append(data)
        elif not self.inside or self.inside[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def plots(self) -> dict[str, Any]:
        """What Plotly is handed."""
        (found,) = [script for script in self.scripts if script.lstrip().startswith("{")]
        plots: dict[str, Any] = json.loads(found)
        return plots


def searched(url: str, evaluator: FakeEvaluator | None = None, **changes: Any) -> Store:
    config = SearchConfig(**{"budget": 15, "storage": url, "latency": LatencyConfig(device="cpu"), **changes})
    with pytest.MonkeyPatch.context() as patch:
        # The dashboard's files of the front, which take half the time, are not asked for here.
        patch.setattr("nas.search.loop.show", lambda *_: 0)
        run(config, evaluator or FakeEvaluator())
    store = Store.open(url, create=True)
    assert store is not None
    return store


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, str]]:
    """15 complete candidates, some failed, one over a limit or more."""
    url = f"sqlite:///{tmp_path_factory.mktemp('report') / 'study.db'}"
    store = searched(url, limits=Limits(latency_ms=2.0, params=300_000))
    yield store, url
    store.close()


def contender(name: str = "resnet18", kind: ContenderKind = ContenderKind.TIMM, **changes: Any) -> Contender:
    fields: dict[str, Any] = dict(
        name=name, kind=kind, summary=name, trial=None, params=11_000_000, macs=37_000_000, accuracy=0.9,
        latency=Latency(4.0, 3.9, 4.2, repeats=50), engine="channels_last", resolution=64,
        learning_rate=0.002, steps=2000, batch_size=32, rates=3, converged=True, reason="at rest",
    )  # fmt: skip
    return Contender(**{**fields, **changes})


def made(
    store: Store, folder: Path, name: str = "convfirst", contenders: Sequence[Contender] = (),
    verdict: Sequence[str] = (), storage: str = "sqlite:///s.db",
) -> Page:  # fmt: skip
    paths = write_report(RecordedStudy.open(store, name), storage, folder, contenders, verdict)
    assert sorted(paths) == sorted(folder.iterdir())
    for path in paths[1:]:
        with Image.open(path) as image:
            image.verify()
    return Page(paths[0].read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def shown(study: tuple[Store, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Path]:
    """The study's page with one contender, and where it lies."""
    folder = tmp_path_factory.mktemp("shown")
    return made(study[0], folder, contenders=[contender()], storage="postgresql://me:secret@host/name"), folder


@pytest.fixture(scope="module")
def material(study: tuple[Store, str]) -> Material:
    return gather(RecordedStudy.open(study[0], "convfirst"))


# -- What it says ----------------------------------------------------------------------------------------------------


def test_the_page_tells_the_set_up_and_every_member_of_the_front(
    study: tuple[Store, str], material: Material, tmp_path: Path
) -> None:
    store, url = study
    page = made(store, tmp_path / "new" / "folder", storage=url)
    assert set_up(material) in page.text
    for words in (
        "space small", "model with seed 0", "complete: 15", "timed on invented", "onnxruntime 1.", "float32", "batch 1",
        "digits", "200 steps of 32", "latency at most 2 ms", "at most 300,000 parameters", "optuna 5",
        "fingerprint invented",
    ):  # fmt: skip
        assert words in set_up(material), words
    assert len(material.front) > 3
    for row in material.front.to_dict("records"):
        assert row["summary"] in page.text
        of_study = f"--trial {row['number']} --study convfirst --storage {url}"
        assert f"python run_search.py export {of_study}" in page.text
        assert f"python run_search.py analyze {of_study}" in page.text
    assert "run_search.py baselines" in page.text
    assert "15 trials are few for" in page.text
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {
        "report.html", "front.png", "architectures.png", "hypervolume.png", "time.png"
    }  # fmt: skip


def test_the_plots_hold_the_front_in_order_and_all_else_in_grey(material: Material, shown: tuple[Page, Path]) -> None:
    plots = shown[0].plots
    grey, red = plots["front"]["data"]
    assert red["x"] == list(material.front["latency_ms"]) == sorted(red["x"])
    assert len(grey["x"]) + len(red["x"]) == material.complete
    assert red["error_x"]["array"] == pytest.approx(
        list(material.front["latency_p80_ms"] - material.front["latency_ms"])
    )
    assert all("stem" in text and "trial" in text for text in red["hovertext"] + grey["hovertext"])
    volumes = plots["hypervolume_trials"]["data"][0]["y"]
    assert all(before < after for before, after in pairwise(volumes[:-1]))
    assert volumes[-1] == pytest.approx(
        hypervolume(material.evaluations["accuracy"], material.evaluations["latency_ms"], 2.0)
    )
    assert plots["hypervolume_trials"]["data"][0]["x"][-1] == material.complete
    # Plotly itself knows every property.
    graph_objects = pytest.importorskip("plotly.graph_objects")
    for plot in plots.values():
        graph_objects.Figure(plot)


def test_nothing_is_loaded_from_elsewhere_and_plotly_is_there_once(shown: tuple[Page, Path]) -> None:
    page, folder = shown
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            # Within the page, or in it as data.
            assert (attrs.get(name) or "#").startswith(("#", "data:")), (tag, attrs)
    assert sum("plotly.js v" in script for script in page.scripts) == 1
    assert len(page.scripts) == 3
    style = (folder / "report.html").read_text().partition("<style>")[2].partition("</style>")[0]
    assert "@import" not in style
    assert "url(" not in style
    assert "@media print" in style


def test_whoever_cannot_see_it_is_told(shown: tuple[Page, Path]) -> None:
    page, _ = shown
    pictures = page.all("img")
    assert len(pictures) == 5
    assert all(len(picture["alt"] or "") > 40 for picture in pictures)
    plots = [attrs for attrs in page.all("div") if "data-plot" in attrs]
    assert len(plots) == 4
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in plots)
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in page.all("div") if "tabindex" in attrs)
    assert any(attrs.get("name") == "viewport" for attrs in page.all("meta"))
    assert page.all("html") == [{"lang": "en"}]


def test_texts_of_a_database_are_no_markup(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.search.rounds.MAX_BARREN", 3)
    store = searched(sqlite_url, Failing(), study=HOSTILE)
    hostile = contender(HOSTILE, reason=HOSTILE, summary=HOSTILE, engine=HOSTILE)
    page = made(store, tmp_path / "out", HOSTILE, [hostile], [HOSTILE], storage=f"sqlite:///{HOSTILE}.db")
    # Plotly, its figures, and the few lines that draw them.
    assert len(page.scripts) == 3
    assert page.text.count(HOSTILE) >= 6
    assert "the loss was <b>nan</b> after" in page.text
    trace = page.plots["contenders"]["data"][0]
    assert "<script" not in trace["text"][0] + trace["hovertext"][0]
    store.close()


def test_baselines_get_a_plot_of_their_own_unless_they_were_trained_alike(
    study: tuple[Store, str], material: Material, tmp_path: Path
) -> None:
    store, _ = study
    fast = Latency(0.5, 0.4, 0.6, repeats=50)
    alike = contender("a twin", ContenderKind.DEFAULT, resolution=32, steps=200, latency=fast)
    longer = contender("resnet18", converged=False, reason="still rising", latency=Latency(6.0, 5.9, 6.2, repeats=50))
    assert comparable(material.recorded, alike)
    assert not comparable(material.recorded, longer)
    assert not comparable(material.recorded, replace(alike, resolution=64))
    page = made(store, tmp_path, contenders=[longer, alike], verdict=["Twice as fast, it says."])
    named = [name for trace in page.plots["front"]["data"] for name in trace.get("text", ())]
    assert "a twin" in named
    assert "resnet18" not in named
    assert [trace["text"] for trace in page.plots["contenders"]["data"]] == [["resnet18"], ["a twin"]]
    assert page.plots["contenders"]["layout"]["xaxis"]["type"] == "log"
    assert "Twice as fast, it says." in page.text
    assert "Twice as fast, it says." not in made(store, tmp_path / "without", verdict=["Twice as fast, it says."]).text
    assert "still rising" in page.text
    assert (tmp_path / "contenders.png").is_file()


def test_another_deployment_has_a_table_of_its_own_and_no_part_in_the_rest(sqlite_url: str, tmp_path: Path) -> None:
    store = searched(sqlite_url, budget=15)
    before = gather(RecordedStudy.open(store, "convfirst"))
    row = store.find_study("convfirst")
    assert row is not None
    device_id = store.devices.id_of(dict(kind="cuda", name="elsewhere <i>", driver="1", torch="2", triton="3"))
    config = LatencyConfig(device="cpu", engine="fused", batch_size=64)
    rows = [
        CandidateLatency(
            trial_id=candidate.trial_id, stage=LatencyStage.SEARCH, **deployment_of(config, device_id).as_columns(),
            median_ms=9.0, p20_ms=9.0, p80_ms=9.0, repeats=1, raw_median_ms=9.0, anchor_median_ms=1.0, weight_bytes=1,
            workspace_bytes=1,
        )
        for candidate in before.candidates if candidate.state == CandidateState.COMPLETE
    ]  # fmt: skip
    store.add_latencies(row.study_id, rows)
    after = gather(RecordedStudy.open(store, "convfirst"))
    assert after.history.equals(before.history)
    assert list(after.front["number"]) == list(before.front["number"])
    assert [len(members) for _, members in after.elsewhere] == [1]
    page = made(store, tmp_path / "out")
    assert "elsewhere <i>, fused, float32, batch 64, 32x32, 1 thread(s)" in page.text
    # Of a device that was never profiled no efficiency is known.
    assert "–" in page.text.partition("In other deployments")[2]
    store.close()


# -- Studies with little in them -------------------------------------------------------------------------------------


def test_an_empty_study_has_a_page(sqlite_url: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        searched(sqlite_url, Interrupted())
    store = Store.open(sqlite_url, create=False)
    assert store is not None
    page = made(store, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html"}
    for words in ("The front is empty", "No candidate is complete yet", "Nothing was evaluated yet", "interrupted"):
        assert words in page.text, words
    assert "0 complete trial(s) are too few" in page.text
    # Without a plot there is no use for Plotly.
    assert not page.scripts
    store.close()


def test_a_study_of_one_trial_has_a_page(sqlite_url: str, tmp_path: Path) -> None:
    store = searched(sqlite_url, budget=1)
    page = made(store, tmp_path / "out")
    assert "The front is one network" in page.text
    assert "1 complete trial(s) are too few" in page.text
    assert page.plots["hypervolume_trials"]["data"][0]["x"] == [0, 1]
    store.close()


def test_a_folder_of_bytes_that_are_no_text_is_shown_by_numbers(sqlite_url: str, tmp_path: Path) -> None:
    """Such a study was begun when --data still took it."""
    store = searched(sqlite_url, budget=1, data=DataConfig("caf\udce9"))
    assert r"caf\udce9" in made(store, tmp_path / "out").text
    store.close()


def test_a_study_of_failures_has_a_page(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.search.rounds.MAX_BARREN", 3)
    store = searched(sqlite_url, Failing())
    page = made(store, tmp_path / "out")
    assert "The front is empty" in page.text
    assert "the loss was <b>nan</b> after" in page.text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "time.png"}
    store.close()


# -- Its parts -------------------------------------------------------------------------------------------------------


def test_running_hypervolume_by_hand() -> None:
    """Up to 4 ms: a rectangle, one inside it, a step to its left, one too slow, and one that covers all."""
    accuracy = [0.5, 0.4, 0.25, 0.9, 1.0]
    latency_ms = [2.0, 3.0, 1.0, 4.0, 1.0]
    expected = [0.5 * 2 / 4, 0.25, (0.25 * 1 + 0.5 * 2) / 4, 1.25 / 4, 1.0 * 3 / 4]
    assert running_hypervolume(accuracy, latency_ms, 4.0) == pytest.approx(expected)
    assert running_hypervolume([], [], 4.0).shape == (0,)


def test_running_hypervolume_is_that_of_each_beginning() -> None:
    rng = np.random.default_rng(0)
    # Coarse, so that equal points and equal latencies come up.
    accuracy, latency_ms = rng.integers(0, 12, 200) / 12, rng.integers(1, 20, 200) / 10
    running = running_hypervolume(accuracy, latency_ms, 1.5)
    for count in range(1, 201):
        assert running[count - 1] == pytest.approx(hypervolume(accuracy[:count], latency_ms[:count], 1.5))


def test_incomplete_trials_are_grouped_by_what_went_wrong() -> None:
    def candidate(number: int, state: CandidateState, reason: str | None) -> Candidate:
        return Candidate(number=number, state=state, reason=reason)

    failed, over = CandidateState.FAILED, CandidateState.OVER_LIMIT
    candidates = [
        candidate(0, failed, "out of memory"), candidate(1, over, "latency 0.612 ms, limit 0.6 ms"),
        candidate(2, CandidateState.COMPLETE, None), candidate(3, over, "latency 0.7 ms, limit 0.6 ms"),
        candidate(4, failed, None), candidate(5, over, "latency 0.612 ms, limit 0.6 ms; conv2d 1.5e-3"),
    ]  # fmt: skip
    trials = []
    for number in range(9):
        attrs: dict[str, Any] = {6: {"duplicate_of": 2}, 7: {"reason": "interrupted"}}.get(number, {})
        state = {6: TrialState.PRUNED, 7: TrialState.FAIL, 8: TrialState.RUNNING}.get(number, TrialState.FAIL)
        trial = create_trial(state=state, user_attrs=attrs)
        trial.number = number
        trials.append(trial)
    assert [(group.outcome, group.reason, group.numbers) for group in incomplete_trials(candidates, trials)] == [
        ("over a limit", "latency … ms, limit 0.6 ms", (1, 3)),
        ("failed", "out of memory", (0,)),
        ("failed", "unknown", (4,)),
        ("over a limit", "latency 0.612 ms, limit 0.6 ms; conv2d 1.5e-3", (5,)),
        ("duplicate", "architecture of an earlier trial, not evaluated again", (6,)),
        ("interrupted", "interrupted", (7,)),
    ]


def optuna_study(count: int, values: Callable[[int], tuple[float, float]]) -> optuna.Study:
    study = optuna.create_study(directions=["maximize", "minimize"])
    distributions = {name: optuna.distributions.IntDistribution(0, 9) for name in ("width", "depth")}
    for number in range(count):
        params = {"width": number % 10, "depth": number // 7 % 10}
        study.add_trial(create_trial(params=params, distributions=distributions, values=values(number)))
    return study


def test_importances_tell_what_an_objective_depends_on() -> None:
    accuracy, latency = importances(
        optuna_study(60, lambda n: (n % 10, -(n // 7 % 10))).get_trials(), ["accuracy", "latency_ms"]
    )
    assert list(accuracy.shares) == ["width", "depth"]
    assert accuracy.shares["width"] > 0.9
    assert list(latency.shares) == ["depth", "width"]
    assert sum(latency.shares.values()) == pytest.approx(1)


def test_importances_that_cannot_be_told_say_why() -> None:
    few = importances(optuna_study(FEWEST_TRIALS - 1, lambda n: (n, n)).get_trials(), ["accuracy", "latency_ms"])
    assert all(not each.shares and "too few" in (each.why_not or "") for each in few)
    equal, varied = importances(optuna_study(30, lambda n: (0.5, n % 10)).get_trials(), ["accuracy", "latency_ms"])
    assert "All trials have the same accuracy" in (equal.why_not or "")
    assert varied.why_not is None


def test_importances_of_what_optuna_refuses_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr("nas.report.importance.get_param_importances", refuse)
    (found,) = importances(optuna_study(30, lambda n: (n, n)).get_trials(), ["accuracy"])
    assert found.why_not == "Optuna could not compute them (no such thing)."


def test_of_a_long_front_as_many_are_drawn_as_there_is_room_for(material: Material) -> None:
    front = material.front
    longer = front.loc[[index % len(front) for index in range(3 * MOST_COLUMNS)]].reset_index(drop=True)
    chosen = chosen_members(longer)
    assert len(chosen) == MOST_COLUMNS
    assert list(chosen.index)[:: MOST_COLUMNS - 1] == [0, 3 * MOST_COLUMNS - 1]
    assert chosen_members(front.head(MOST_COLUMNS)).equals(front.head(MOST_COLUMNS))


def test_the_picture_of_architectures_names_what_is_not_usual() -> None:
    plain = make_tiny_space().anchor()
    pooled = replace(plain, shortcut="pooled")
    named = [dict(_rows(archs)) for archs in ([plain], [plain, pooled])]
    assert named[0].keys().isdisjoint({"shortcuts", "resolution"})
    assert [cell.words for cell in named[1]["shortcuts"] if cell] == [("identity",), ("pooled",)]


# -- How it is written -----------------------------------------------------------------------------------------------


def test_what_was_there_stays_whole_if_the_making_fails(
    study: tuple[Store, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = study
    (tmp_path / "notes.txt").write_text("somebody's")
    write_report(RecordedStudy.open(store, "convfirst"), "sqlite:///s.db", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "page", fail)
    with pytest.raises(KeyboardInterrupt):
        write_report(RecordedStudy.open(store, "convfirst"), "sqlite:///s.db", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written_to_gets_one_line(study: tuple[Store, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "report.html").mkdir(parents=True)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "taken"):
        with pytest.raises(UsageError, match=r"^--out .*: [^\n]+$"):
            write_report(RecordedStudy.open(study[0], "convfirst"), "sqlite:///s.db", folder)


def test_passwords_do_not_reach_the_page(shown: tuple[Page, Path]) -> None:
    source = (shown[1] / "report.html").read_text()
    assert "secret" not in source.partition("<script>")[0]
    assert "postgresql://me:***@host/name" in shown[0].text


# -- Side by side ------------------------------------------------------------------------------------------------------


def candidate_at(number: int, end: float, seconds: float, train_seconds: float | None, worker: int | None) -> Any:
    """A candidate whose evaluation ended so many seconds after some moment."""
    finished_at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=end)
    return SimpleNamespace(
        number=number, finished_at=finished_at, total_seconds=seconds, train_seconds=train_seconds, worker=worker,
    )  # fmt: skip


def test_pauses_are_no_time_of_the_search() -> None:
    """Two trainings at once, a pause of an hour, one more alone; one candidate was over a limit."""
    candidates = [
        candidate_at(0, 10, 9, 8, 0), candidate_at(1, 12, 11, 10, 1), candidate_at(2, 3615, 5, 4, 0),
        candidate_at(3, 3617, 1, None, None),
    ]  # fmt: skip
    # The first two were proposed and timed one after the other before they were trained.
    trials: Any = [
        SimpleNamespace(number=0, duration=timedelta(seconds=10)), SimpleNamespace(number=1, duration=None),
        SimpleNamespace(number=3, duration=timedelta(seconds=2)),
    ]  # fmt: skip
    clock = report_data.clock_of(candidates, trials)
    assert [clock(each.finished_at) for each in candidates] == [10, 12, 17, 19]
    assert clock(candidates[1].finished_at + timedelta(hours=0.5)) == 12
    trainings = report_data.trainings_of(candidates, clock)
    assert trainings.to_numpy().tolist() == [[0, 2, 10], [1, 2, 12], [0, 13, 17]]
    material = SimpleNamespace(trainings=trainings)
    material.workers = Material.workers.fget(material)  # type: ignore[attr-defined]
    assert material.workers == 2
    assert Material.busy.fget(material) == pytest.approx((8 + 10 + 4) / (2 * 15))  # type: ignore[attr-defined]


def test_the_report_shows_how_busy_the_workers_were(tmp_path: Path) -> None:
    class Workers(FakeEvaluator):
        workers = 3

        def train(
            self, archs: Sequence[ArchSpec], seeds: Sequence[int] | None = None, rules: Rules = None
        ) -> Iterator[Done[ProxyResult]]:
            for done in super().train(archs, seeds, rules):
                time.sleep(0.02)
                if isinstance(done.result, ProxyResult):
                    done = replace(done, result=replace(done.result, seconds=0.02))
                yield replace(done, worker=done.index % 3)

    url = f"sqlite:///{tmp_path / 'study.db'}"
    run(SearchConfig(budget=8, storage=url, sampler="random"), Workers())
    store = Store.open(url, create=False)
    assert store is not None
    write_report(RecordedStudy.open(store, "convfirst"), url, tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert re.search(r"3 workers trained side by side, each for \d+% of the time on average\.", page)
    assert (tmp_path / "report" / "workers.png").exists()
    store.close()
