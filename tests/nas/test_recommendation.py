"""Which network of a front to take: the choice, its words, and the places where it is told."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nas.cli.app import app
from nas.config import LatencyConfig, Limits, SearchConfig
from nas.errors import UsageError
from nas.lab.invented import FakeEvaluator
from nas.recommendation import Member, advice, choose, directory_name, doubt_line, recommend
from nas.recorded import RecordedStudy
from nas.report.page import write_report
from nas.search import loop as search
from nas.search.confirmation import trainings_of_share
from nas.search.loop import SearchResult
from nas.training.proxy import ProxyResult
from search_spaces import ArchSpec
from studies import Store
from tests.conftest import copy_database, quicken
from tests.nas.test_confirmation import Noisy, WithTestImages

# Up to 0.4 ms a doubling brings ten points, beyond it one.
FRONT = [
    Member(3, 0.6, 0.01, 0.1, "a"), Member(1, 0.7, 0.01, 0.2, "b"), Member(7, 0.8, 0.01, 0.4, "c"),
    Member(2, 0.81, 0.01, 0.8, "d"), Member(9, 0.82, 0.01, 1.6, "e"),
]  # fmt: skip


def config_at(url: str) -> SearchConfig:
    return SearchConfig(budget=30, storage=url, sampler="random", latency=LatencyConfig(device="cpu", engine="eager"))


@pytest.fixture
def config(sqlite_url: str) -> SearchConfig:
    return config_at(sqlite_url)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, SearchResult]:
    """A whole search, made once: its storage and its result."""
    folder = tmp_path_factory.mktemp("recommended")
    config = config_at(f"sqlite:///{folder / 'study.db'}")
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch, folder)
        return config.storage, search.run(config, Noisy())


@pytest.fixture
def confirmed(once: tuple[str, SearchResult], config: SearchConfig) -> SearchResult:
    """The result of `search.run(config, Noisy())`, whose database is there."""
    copy_database(once[0], config.storage)
    return once[1]


def opened(config: SearchConfig) -> RecordedStudy:
    store = Store.open(config.storage, create=False)
    assert store is not None
    return RecordedStudy.open(store, config.study)


@pytest.mark.parametrize(
    ("latency_ms", "number", "name"),
    [
        (0.8, 42, "convfirst_0p8ms_t042"),
        (0.8444, 7, "convfirst_0p84ms_t007"),
        (12.34, 0, "convfirst_12ms_t000"),
        (123.4, 1234, "convfirst_120ms_t1234"),
        (0.00123, 1, "convfirst_0p0012ms_t001"),
        (1.0, 1, "convfirst_1ms_t001"),
    ],
)
def test_names_are_readable_identifiers(latency_ms: float, number: int, name: str) -> None:
    assert directory_name(latency_ms, number) == name
    assert name.isidentifier()


def test_without_a_limit_it_is_the_knee() -> None:
    found = choose(FRONT, None)
    assert (found.chosen, found.faster, found.more_accurate) == (FRONT[2], FRONT[1], FRONT[3])
    assert found.lines() == [
        "recommended: trial 7, 80.0 +-1.0 % at 0.4 ms; it is the knee of the front: up to it, a doubling of the "
        "latency brings 10.0 points, beyond it 1.0",
        "next faster: trial 1, 70.0 +-1.0 % at 0.2 ms, -10.0 points for 0.50 times the latency",
        "next more accurate: trial 2, 81.0 +-1.0 % at 0.8 ms, +1.0 points for 2.00 times the latency (within their "
        "intervals)",
    ]


@pytest.mark.parametrize(("limit_ms", "number"), [(0.1, 3), (0.39, 1), (0.8, 2), (5.0, 9)])
def test_within_a_limit_it_is_the_most_accurate(limit_ms: float, number: int) -> None:
    found = choose(FRONT, limit_ms)
    assert found.chosen.number == number
    assert found.reason == f"it is the most accurate network of the front within {limit_ms:g} ms"
    assert (found.faster is None) == (number == 3)
    assert (found.more_accurate is None) == (number == 9)


def test_a_front_without_a_knee_has_a_most_accurate_one() -> None:
    hollow = [Member(0, 0.5, None, 0.1, ""), Member(1, 0.51, None, 0.8, ""), Member(2, 0.9, None, 1.6, "")]
    assert choose(hollow, None).chosen.number == 2
    assert "has no knee" in choose(hollow, None).reason
    assert choose(hollow[:1], None).reason == "it is the only network of the front"
    assert choose(hollow[:2], None).chosen.number == 1
    equal = [replace(member, accuracy=0.5) for member in hollow]
    assert choose(equal, None).chosen.number == 2


def test_a_search_ends_with_what_to_take(config: SearchConfig, confirmed: SearchResult) -> None:
    recorded = opened(config)
    found = recommend(recorded)
    assert list(confirmed.advice[: len(found.lines())]) == found.lines()
    folder = directory_name(found.chosen.latency_ms, found.chosen.number)
    assert confirmed.advice[-1] == f"time it: python run_search.py bench exports/{folder}"
    assert found.chosen.half is not None
    fastest = float(recorded.front()["latency_ms"].min())
    assert recommend(recorded, fastest).chosen.latency_ms == fastest
    with pytest.raises(UsageError, match=r"--max-latency-ms 0\.001: the fastest network takes"):
        recommend(recorded, 0.001)


def test_the_limit_of_the_study_counts(config: SearchConfig) -> None:
    result = search.run(replace(config, limits=Limits(latency_ms=0.5)), FakeEvaluator())
    assert "it is the most accurate network of the front within 0.5 ms" in result.advice[0]
    assert recommend(opened(config)).chosen.latency_ms <= 0.5


def test_of_a_front_that_is_not_confirmed_it_says_so(config: SearchConfig) -> None:
    search.run(replace(config, confirm=0), Noisy())
    recorded = opened(config)
    line = doubt_line(recorded, config.storage)
    assert line is not None
    assert "of one training each, and flatter the front; python run_search.py confirm --storage" in line
    assert line in advice(recorded, config.storage)
    assert "+-" not in recommend(recorded).lines()[0]


@pytest.fixture
def few(config: SearchConfig) -> SearchConfig:
    """A short search, not confirmed."""
    search.run(replace(config, budget=3, confirm=0), Noisy())
    return config


def test_what_is_said_of_a_short_search_can_be_done(few: SearchConfig) -> None:
    recorded = opened(few)
    line = doubt_line(recorded, few.storage)
    assert line is not None
    (share,) = re.findall(r"--share (\S+) trains its members again", line)
    assert trainings_of_share(float(share), recorded.passes()) >= len(recorded.front()) > 1


def test_of_a_single_network_it_is_said_too(few: SearchConfig) -> None:
    recorded = opened(few)
    line = doubt_line(recorded, few.storage, recorded.front().head(1))
    assert line is not None
    assert line.startswith("this accuracy is of the one training that chose the network, and flatters it; python ")
    assert recommend(recorded, front=recorded.front().head(1)).reason == "it is the only network of the front"
    assert doubt_line(recorded, few.storage, recorded.front().head(0)) is None


class Alike(Noisy):
    """All networks are as accurate as each other, but for noise."""

    def scattered(self, arch: ArchSpec, seed: int) -> ProxyResult:
        result = super().scattered(arch, seed)
        return replace(result, accuracy=0.5 + result.accuracy - FakeEvaluator().train_one(arch).accuracy)


def test_of_a_front_within_its_noise_it_says_so_and_what_would_help(config: SearchConfig, tmp_path: Path) -> None:
    search.run(config, Alike())
    recorded = opened(config)
    assert len(recorded.front()) > 1
    line = doubt_line(recorded, config.storage)
    assert line is not None
    assert "are equally accurate within their intervals; further trainings would tell them apart" in line
    assert "--share " in line
    assert line in advice(recorded, config.storage)
    page = write_report(recorded, config.storage, tmp_path)[0].read_text()
    assert html.escape(line[1:]) in page
    # More trainings of networks that have been trained as often as that are not made.
    trained = recorded.front().assign(accuracy_trainings=12)
    most = doubt_line(recorded, config.storage, trained)
    assert most is not None
    assert most.endswith("within their intervals; more validation images would tell them apart")


@pytest.mark.usefixtures("confirmed")
def test_the_command_says_it_in_words_and_in_json(config: SearchConfig) -> None:
    line = ["recommend", "--storage", config.storage]
    said = CliRunner().invoke(app, line)
    assert said.exit_code == 0, said.output
    assert said.stdout.splitlines() == advice(opened(config), config.storage)
    told = json.loads(CliRunner().invoke(app, [*line, "--format", "json"]).stdout)
    found = recommend(opened(config))
    assert told["recommended"]["trial"] == found.chosen.number
    assert told["commands"]["train_it"].endswith(f"--trial {found.chosen.number} --out exports")
    for value in ("0", "-1", "nan", "inf"):
        refused = CliRunner().invoke(app, [*line, "--max-latency-ms", value])
        assert refused.exit_code == 2
        assert f"--max-latency-ms {float(value)}: is not positive and finite" in refused.output
    refused = CliRunner().invoke(app, [*line, "--max-latency-ms", "1e-9"])
    assert refused.exit_code == 2
    assert "the fastest network takes" in refused.output


@pytest.mark.usefixtures("confirmed")
def test_the_report_says_which_one_to_take(config: SearchConfig, tmp_path: Path) -> None:
    recorded = opened(config)
    found = recommend(recorded)
    page = (write_report(recorded, config.storage, tmp_path)[0]).read_text()
    assert "Which one to take" in page
    assert f"Recommended: trial {found.chosen.number}, " in page
    assert f"bench exports/{directory_name(found.chosen.latency_ms, found.chosen.number)}" in page
    # Of accuracies on test images it has none to show.
    assert "test images</th>" not in page


def test_the_report_shows_accuracies_on_test_images_where_there_are_any(config: SearchConfig, tmp_path: Path) -> None:
    search.run(replace(config, budget=15), WithTestImages())
    recorded = opened(config)
    page = write_report(recorded, config.storage, tmp_path)[0].read_text()
    assert "test images</th>" in page
    first = recorded.front().iloc[0]
    assert f'<td class="number">{100 * first["test_accuracy"]:.1f} %</td>' in page
