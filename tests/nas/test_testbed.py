"""Tables of evaluated networks: made in parts, packed and read again."""

from __future__ import annotations

import json
import lzma
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nas.config import SearchConfig
from nas.lab import testbed
from nas.lab.invented import FakeEvaluator
from nas.lab.testbed import Plan, checkpoints_of, jobs_of, lines_of, random_networks, read_table
from nas.search import loop as search
from nas.training.proxy import ProxyResult
from search_spaces import load_space

SPACE = load_space("small")


def test_networks_of_a_smaller_table_are_the_first_of_a_greater() -> None:
    assert random_networks(SPACE, 5) == random_networks(SPACE, 9)[:5]
    assert len({arch.arch_id for arch in random_networks(SPACE, 60)}) == 60


def test_any_first_part_of_the_trainings_is_a_balanced_table() -> None:
    archs = random_networks(SPACE, 20)
    plan = Plan("small", "digits", 32, 200, 32, 8e-3, 8, 10)
    jobs = list(jobs_of(archs[:15], archs[15:], plan))
    assert len(jobs) == len(set(jobs)) == 20 + 2 * 4 + 3 * 3
    assert [seed for arch, seed, long in jobs if arch == archs[0] and not long] == [0, 1, 2]
    assert [seed for arch, seed, long in jobs if arch == archs[10] and long] == [100, 101, 102]
    assert [seed for arch, seed, long in jobs if arch == archs[1]] == [0]
    # What is done with found networks does not depend on the number of random ones.
    assert [job for job in jobs_of(archs[:10], archs[15:], plan) if job[0] in archs[15:]] == [
        job for job in jobs if job[0] in archs[15:]
    ]


def test_random_and_found_networks_come_in_turns() -> None:
    """A table that is stopped halfway has both."""
    archs = random_networks(SPACE, 12)
    plan = Plan("small", "digits", 32, 200, 32, 8e-3, 8, 100)
    order = list(dict.fromkeys(arch for arch, _, _ in jobs_of(archs[:8], archs[8:], plan)))
    assert [arch in archs[8:] for arch in order] == [False, True, False] * 4
    assert {arch for arch, _, _ in jobs_of(archs, [], plan)} == set(archs)


def test_networks_are_validated_where_the_curve_has_points() -> None:
    assert checkpoints_of(200) == [50, 70, 100, 150]
    assert checkpoints_of(1600) == [400, 560, 800, 1200]
    assert checkpoints_of(10) == [2, 4, 5, 8]


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    testbed.append(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": ')
    testbed.append(path, {"a": 2})
    assert lines_of(path) == [{"a": 1}, {"a": 2}]


def test_a_table_is_made_packed_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inline: None) -> None:
    """The trainings are invented; each is made once, also when the command is called again."""
    trained: list[tuple[str, int]] = []

    def train_new(build: object, data: object, config: object, seed: int, *rest: object) -> tuple[None, ProxyResult]:
        trained.append((str(build), seed))
        return None, ProxyResult(0.5 + 0.01 * seed % 0.1, 1.0, (), 1.0, 0)

    monkeypatch.setattr(testbed, "train_new", train_new)
    monkeypatch.setattr(testbed.image_data, "load_all", lambda *rest: iter([(32, None)]))
    monkeypatch.setattr(testbed.DataFiles, "write", lambda self, data: None)
    folder, table = tmp_path / "table", tmp_path / "table.json.xz"
    run = CliRunner().invoke
    line = ["train", str(folder), "--random", "6", "--steps", "20", "--long-every", "5", "--workers", "1"]
    for _ in range(2):
        result = run(testbed.app, line)
        assert result.exit_code == 0, result.output
    assert len(trained) == 6 + 2 * 2 + 3 * 2
    assert "was begun with another plan" in str(run(testbed.app, [*line, "--rate", "0.001"]).exception)
    for arch in random_networks(SPACE, 6):
        testbed.append(folder / testbed.LATENCIES, {"arch": str(arch), "latency_ms": 0.25})
    twice = lines_of(folder / testbed.TRAININGS)[0]
    testbed.append(folder / testbed.TRAININGS, twice)
    assert run(testbed.app, ["pack", str(folder), str(table)]).exit_code == 0
    networks = read_table(table)
    assert [network.arch for network in networks] == random_networks(SPACE, 6)
    assert [(len(network.short), len(network.long)) for network in networks] == [(3, 3), *[(1, 0)] * 4, (3, 3)]
    assert {network.latency_ms for network in networks} == {0.25}
    shown = run(testbed.app, ["show", str(table)])
    assert shown.exit_code == 0
    assert "16" in shown.output
    # Another machine goes on with the table alone: what it holds is not trained again.
    other = tmp_path / "other"
    assert run(testbed.app, ["unpack", str(table), str(other)]).exit_code == 0
    before = len(trained)
    line[1:4] = [str(other), "--random", "8"]
    assert run(testbed.app, line).exit_code == 0
    assert len(trained) == before + 2
    for arch in random_networks(SPACE, 8)[6:]:
        testbed.append(other / testbed.LATENCIES, {"arch": str(arch), "latency_ms": 0.25})
    again = tmp_path / "again.json.xz"
    assert run(testbed.app, ["pack", str(other), str(again)]).exit_code == 0
    assert read_table(again)[:6] == networks
    assert len(read_table(again)) == 8
    assert "is there already" in str(run(testbed.app, ["unpack", str(table), str(other)]).exception)


def test_the_slow_third_has_a_tau_of_its_own(tmp_path: Path) -> None:
    """There single trainings say least, as all networks are accurate."""
    archs = random_networks(SPACE, 9)
    # The fast six are ranked as by long trainings, the slow three the other way round.
    short = [0.5, 0.51, 0.52, 0.53, 0.54, 0.55, 0.62, 0.61, 0.6]
    long = [0.6, 0.61, 0.62, 0.63, 0.64, 0.65, 0.7, 0.71, 0.72]
    rows = [
        {"arch": str(arch), "found": False, "params": 1, "macs": 1, "latency_ms": 1.0 + index,
         "short": [[0, False, short[index], 1.0, 2.0, []]],
         "long": [[100 + seed, True, long[index], 1.0, 8.0, []] for seed in range(3)]}
        for index, arch in enumerate(archs)
    ]  # fmt: skip
    path = tmp_path / "table.json.xz"
    plan = Plan("small", "digits", 32, 200, 32, 8e-3, 4, 1)
    with lzma.open(path, "wt") as file:
        json.dump({"plan": asdict(plan), "found": [], "networks": rows[::-1]}, file)
    shown = CliRunner().invoke(testbed.app, ["show", str(path)])
    assert shown.exit_code == 0, shown.output
    lines = (line.partition("│") for line in shown.output.splitlines())
    found = {name.strip(): value.strip() for name, _, value in lines}
    # 3 of 36 pairs are the other way round.
    assert found["tau of one training to the long mean"] == "0.83"
    assert found["the same in the slow third, 3 networks"] == "-1.00"


def test_found_networks_keep_their_places(tmp_path: Path) -> None:
    """A later call may name other studies, whose networks come after those that were found before."""
    urls = [f"sqlite:///{tmp_path / name}.db" for name in ("one", "other")]
    for seed, url in enumerate(urls):
        search.run(SearchConfig(budget=6, storage=url, seed=seed, confirm=0, sampler="random"), FakeEvaluator())
    one, other = (testbed.found_networks([f"{url}#convfirst"]) for url in urls)
    assert len(one) == len(other) == 6
    assert testbed.found_networks([f"{urls[1]}#convfirst"], before=one) == [*one, *other]
    assert testbed.found_networks([], before=one) == one
