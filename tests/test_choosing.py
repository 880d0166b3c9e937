"""The space of a new study on the command line: named, or chosen by a limit or by the images."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from nas.config import LatencyConfig
from nas.lab.invented import FakeEvaluator
from nas.latency.values import Latency
from nas.reporting import Note
from nas.search.auto_space import Timer
from search_spaces import ArchSpec, SearchSpace, cost, load_space
from tests.conftest import TINY_TOML
from tests.test_run_search import call, picture_folder, refused

SEVERAL = TINY_TOML.replace("resolution = 16", "resolution = [16, 24]")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr("nas.search.loop.Machine", lambda *_: FakeEvaluator())
    (tmp_path / "several.toml").write_text(SEVERAL)


@pytest.fixture
def deployments(monkeypatch: pytest.MonkeyPatch) -> list[LatencyConfig]:
    """The deployments in which networks are timed, on a device that takes 0.01 ms for a million MACs."""
    seen: list[LatencyConfig] = []

    @contextlib.contextmanager
    def timer(config: LatencyConfig, note: Note) -> Iterator[Timer]:
        seen.append(config)

        def time(arch: ArchSpec) -> Latency:
            ms = 0.01 + cost(arch, config.resolution, 10).macs / 1e8
            return Latency(ms, ms, ms, 10, 0.02)

        yield time

    monkeypatch.setattr("nas.search.auto_space.timer", timer)
    return seen


def stored_space(study: str = "convfirst") -> SearchSpace:
    """The space that a study has, as data."""
    with contextlib.closing(sqlite3.connect("studies/convfirst.db")) as connection:
        ((config,),) = connection.execute(
            "select config from convfirst_studies join studies using (study_id) where study_name = ?", (study,)
        )
    return SearchSpace.from_dict(json.loads(config)["space"])


def test_with_a_limit_the_space_is_chosen_once(
    deployments: list[LatencyConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = call("--budget 2 --max-latency-ms 0.5 --engine torchscript --latency-threads 2")
    assert begun.exit_code == 0, begun.output
    chosen = stored_space()
    assert chosen.name.startswith("rung")
    assert f"space {chosen.name}: 12 random networks of it take" in begun.stdout
    assert [(each.engine, each.threads) for each in deployments] == [("torchscript", 2)]

    @contextlib.contextmanager
    def never(config: LatencyConfig, note: Note) -> Iterator[Timer]:
        raise AssertionError("chosen again")
        yield

    monkeypatch.setattr("nas.search.auto_space.timer", never)
    for more in ("", " --space auto", f" --space {chosen.name}"):
        again = call(f"--budget 3 --max-latency-ms 0.5{more}")
        assert again.exit_code == 0, again.output
    assert stored_space() == chosen
    assert "space" in refused("--budget 3 --space small")


def test_digits_without_a_limit_are_searched_as_ever() -> None:
    assert call("--budget 2").exit_code == 0
    assert stored_space() == load_space("small")
    assert call("--budget 2 --space auto --study auto").exit_code == 0
    assert stored_space("auto").name.startswith("rung")


def test_without_a_limit_the_images_decide(tmp_path: Path) -> None:
    picture_folder(tmp_path / "few", 2)
    result = call("--budget 2 --data few")
    assert result.exit_code == 0, result.output
    line = next(line for line in result.stdout.splitlines() if line.startswith("space rung"))
    assert re.search(r"it suits [0-9]+ images of 2 classes; with --max-latency-ms it would be one that fits", line)


@pytest.mark.usefixtures("deployments")
@pytest.mark.parametrize(
    ("flags", "resolutions"),
    [
        ("--data cifar10", (32, 48, 64)),
        ("--data cifar10 --resolution 48", (48,)),
        ("--data cifar10 --latency-resolution 64", (64,)),
        ("--data cifar10 --resolution 32 --latency-resolution 64", (64,)),
    ],
)
def test_the_resolutions_are_those_that_suit_the_images_or_the_one_that_is_said(
    flags: str, resolutions: tuple[int, ...]
) -> None:
    assert call(f"--budget 2 --max-latency-ms 1 {flags}").exit_code == 0
    assert stored_space().resolution == resolutions


def test_a_resolution_that_is_said_is_that_of_all_networks() -> None:
    assert call("--budget 2 --space several.toml").exit_code == 0
    assert stored_space().own_resolutions == (16, 24)
    assert call("--budget 2 --space rung3@32,48,64 --resolution 48 --study rung").exit_code == 0
    assert stored_space("rung") == load_space("rung3@32,48,64").at(48)
    assert stored_space("rung").name == "rung3@48"
    assert call("--budget 2 --space several.toml --resolution 16 --study one").exit_code == 0
    assert stored_space("one").resolution == (16,)
    # The same command goes on.
    assert call("--budget 3 --space several.toml --resolution 16 --study one").exit_code == 0
    assert call("--budget 3 --study one").exit_code == 0
    assert call("--budget 3 --space several.toml --study one").exit_code == 0
    assert "--resolution 24: the networks of the space tiny have" in refused("--budget 2 --resolution 24")
    assert re.search(
        r"--latency-resolution 24: the networks of the space tiny have resolutions of their own .16, 24.",
        refused("--budget 2 --space several.toml --latency-resolution 24 --study two"),
    )


@pytest.mark.usefixtures("deployments")
@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--max-latency-ms 0.000001", "--max-latency-ms 1e-06: the fastest network of the lowest rung .* takes 0.01"),
        ("--max-latency-ms 1000000", r"--max-latency-ms 1e\+06: no limit to the highest rung"),
        ("space auto --max-latency-ms 0.000001", "--max-latency-ms 1e-06: the fastest network"),
        ("--max-latency-ms inf", "--max-latency-ms inf: is not positive and finite"),
        ("--space several.toml --resolution 4", "--resolution 4: is not between 8 and 2048 pixels"),
        ("--max-latency-ms 1 --budget 0", "--budget 0"),
        ("--max-latency-ms 1 --data nosuch", "--data nosuch: not digits"),
        (
            "--max-latency-ms 1 --resolution 512",
            "--space auto: resolution=512 is not between 16 and 256 pixels; name a",
        ),
        ("--max-latency-ms 1 --ray-address auto", "--space auto: times networks on this machine, not on a cluster"),
        ("space auto --max-latency-ms 0", "--max-latency-ms 0.*positive"),
        ("space small --max-latency-ms 1", "--max-latency-ms: is for `space auto` only"),
        ("space small --device cpu", "--device: is for `space auto` only"),
        ("space rung12@32", "space rung12@32: rung=12 is not a multiple of 0.25 between 0 and 11"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing_behind(tmp_path: Path, line: str, told: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert re.search(told, refused(line))
    assert sorted(tmp_path.rglob("*")) == before


def test_space_auto_shows_what_would_be_taken(deployments: list[LatencyConfig]) -> None:
    result = call("space auto --max-latency-ms 0.5 --data cifar100 --latency-batch 4")
    assert result.exit_code == 0, result.output
    assert deployments[0].batch_size == 4
    assert deployments[0].num_classes == 100
    for part in ("anchors of rungs that were timed", "MMACs", "resolution", "architectures:", "anchor: 48 px | "):
        assert part in result.stdout
    assert re.search(r"space rung\S+@32,48,64: 12 random networks of it take .* of them at most 0.5 ms", result.stdout)
    by_images = call("space auto --data cifar100")
    assert "it suits 45,000 images of 100 classes" in by_images.stdout
    assert "(100 classes)" in by_images.stdout
    assert "were timed" not in by_images.stdout
