"""Searches in a world that a table describes: what they are judged by."""

from __future__ import annotations

import json
import lzma
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from optuna.trial import TrialState
from typer import Typer
from typer.testing import CliRunner

from nas.lab import benchmark_search
from nas.lab.benchmark_search import (
    DIRECTIONS,
    METHODS,
    Method,
    Searched,
    _declined,
    differences,
    look,
    reached,
    savings,
    search,
)
from nas.lab.testbed import Plan
from nas.lab.world import World
from nas.search.front_sampler import STARTUP_TRIALS, FrontModel, Memory
from nas.search.model import Model
from nas.search.sampling import Proposer
from tests.nas.invented_table import NOISE, SPACE, STEPS, networks


@pytest.fixture(scope="module")
def world() -> World:
    return World(networks(150), SPACE, 32, 10)


@pytest.mark.parametrize("method", [*METHODS, "nsga2", "model+timing+stopping"])
def test_a_search_is_looked_at_and_repeats(method: str, world: World) -> None:
    looks = search(world, method, seed=1, looks=(6, 14))
    assert len(looks) == 2
    assert looks == search(world, method, seed=1, looks=(6, 14))
    assert looks != search(world, method, seed=2, looks=(6, 14))
    assert looks[0]["found"] <= looks[1]["found"]
    assert looks[0]["seconds"] < looks[1]["seconds"]
    for each in looks:
        # What is reported is part of what was found.
        assert 0 < each["confirmed"] <= each["found"] < 1
        assert 0 < each["unconfirmed"] <= each["found"]
        assert each["searching seconds"] < each["seconds"]


def test_stopping_saves_seconds_and_counts_what_it_gives_up(world: World) -> None:
    whole, given_up = (search(world, name, seed=3, looks=(60,))[0] for name in ("random", "random+stopping"))
    assert given_up["searching seconds"] < 0.98 * whole["searching seconds"]
    assert given_up["found"] >= whole["found"] - 0.02
    assert 0 <= given_up["wrong"] <= given_up["reached"]
    assert whole["reached"] == 0
    assert given_up["reached"] > 0


def test_what_is_timed_too_slow_is_not_trained(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = search(world, "model", seed=4, looks=(17,))
    assert plain[0]["declined"] == 0
    # Of a demand that nothing meets half of the candidates are declined, once there are enough to model.
    for worth, declined in ((0.0, 0), (1e9, 17 - 1)):
        monkeypatch.setattr(benchmark_search, "STILL_WORTH", worth)
        timing = search(world, "model+timing", seed=4, looks=(17,))
        assert timing[0]["declined"] == declined
        assert (timing == plain) == (declined == 0)


def test_a_candidate_is_declined_by_its_latency_and_teaches_it(world: World) -> None:
    memory = Memory(SPACE, 32, 10, world.reference_ms)
    proposer = Proposer(SPACE, "model", 0, DIRECTIONS, [], memory)
    for arch in [network.arch for network in networks(STARTUP_TRIALS)]:
        number = proposer.propose_this(arch).number
        proposer.tell(number, [world.train(arch, 0).accuracy, world.truth(arch)[1]], TrialState.COMPLETE, {})
    proposal = proposer.propose()
    guessed_ms = float(np.exp(latency_model(proposer, memory).predict(memory.points([proposal.arch]))[0][0]))
    assert not _declined(proposer, memory, proposal, 0.9 * guessed_ms)
    assert _declined(proposer, memory, proposal, 3 * guessed_ms)
    later_ms = float(np.exp(latency_model(proposer, memory).predict(memory.points([proposal.arch]))[0][0]))
    assert later_ms > 1.5 * guessed_ms


def latency_model(proposer: Proposer, memory: Memory) -> Model:
    done = [trial for trial in proposer.study.get_trials(deepcopy=False) if trial.state != TrialState.RUNNING]
    return FrontModel.of(memory, done).latency


@pytest.mark.parametrize("name", ["tpe+timing", "model+stopping+timing", "+stopping", "model+", "model+timing+timing"])
def test_only_the_model_can_decide_by_a_latency(name: str) -> None:
    with pytest.raises(ValueError, match="no such method; it is one of"):
        Method.of(name)


def test_optimism_is_what_a_front_claims_too_much(world: World) -> None:
    archs = [network.arch for network in networks(60)]
    truth = [world.truth(arch) for arch in archs]
    rng = np.random.default_rng(0)
    lucky = [accuracy + NOISE * rng.standard_normal() for accuracy, _ in truth]
    points = [(accuracy, each, ms, ms) for (accuracy, ms), each in zip(truth, lucky, strict=True)]
    assert look(world, Searched(archs, points, 60, 1.0, 60.0), 0)["optimism as searched"] > 0.005
    honest = [(accuracy, accuracy, ms, ms) for accuracy, ms in truth]
    found = look(world, Searched(archs, honest, 60, 1.0, 60.0), 0)
    assert found["optimism as searched"] == 0
    assert found["unconfirmed"] == found["found"]


def looks(*confirmed: float, seconds: float = 10.0) -> list[dict[str, float]]:
    return [
        {"found": each + 0.1, "confirmed": each, "searching seconds": seconds, "wrong": 1, "reached": 4}
        for each in confirmed
    ]


def test_differences_are_paired() -> None:
    found = {"a": [looks(0.5 + 0.1 * seed) for seed in range(4)], "b": [looks(0.4 + 0.1 * seed) for seed in range(4)]}
    assert differences(found, (20,)) == [
        "a - b, found: +0.1000 ±0.0000 at 20", "a - b, confirmed: +0.1000 ±0.0000 at 20"
    ]  # fmt: skip


def test_a_line_says_when_a_method_is_as_good_as_others_in_the_end() -> None:
    found = {"a": [looks(0.4, 0.6, 0.7)] * 3, "b": [looks(0.3, 0.4, 0.5)] * 3}
    assert reached(found, (20, 60, 200)) == ["a reaches after 60 what b confirms after 200 (+0.1000 ±0.0000)"]


def test_savings_are_those_of_searches_with_the_same_seed() -> None:
    found = {"a+stopping": [looks(0.4, seconds=6.0), looks(0.5, seconds=6.0)], "a": [looks(0.41), looks(0.51)]}
    assert savings(found, (200,)) == [
        "a+stopping, 200 candidates: 2 of 8 false stops (25.0%), +0.6000 ±0.0000 of the search's seconds, "
        "+0.0100 ±0.0000 lost, 0.0100 at most"
    ]  # fmt: skip
    assert "seconds" not in savings({"a+stopping": found["a+stopping"]}, (200,))[0]


def packed(path: Path, count: int) -> Path:
    plan = Plan("small", "digits", 32, STEPS, 32, 8e-3, 8, 10)
    rows = [
        {"arch": str(each.arch), "found": False, "params": each.params, "macs": each.macs, "long": [],
         "latency_ms": each.latency_ms, "short": [list(asdict(one).values())[1:] for one in each.short]}
        for each in networks(count)
    ]  # fmt: skip
    with lzma.open(path, "wt") as file:
        json.dump({"plan": asdict(plan), "found": [], "networks": rows}, file)
    return path


def command(*line: str) -> str:
    """The last line of a refusal."""
    app = Typer()
    app.command()(benchmark_search.main)
    result = CliRunner().invoke(app, list(line))
    assert result.exit_code != 0
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output + str(result.exception)


def test_bad_input_is_a_line_that_names_it(tmp_path: Path) -> None:
    small, other = packed(tmp_path / "small.json.xz", 20), tmp_path / "other.json.xz"
    other.write_bytes(b"no table")
    assert f"--table {small}: 20 networks, 4 of them with several seeds, are too few" in command("--table", str(small))
    assert f"--table {other}: is no table of nas.lab.testbed" in command("--table", str(other))
    with lzma.open(other, "wt") as file:
        file.write("[]")
    assert f"--table {other}: is no table of nas.lab.testbed" in command("--table", str(other))
    assert "--table nowhere: No such file" in command("--table", "nowhere")
    for option in ("--seeds", "--workers"):
        refusal = " ".join(command("--table", str(small), option, "0").split())
        assert f"'{option}'" in refusal
        assert "greater than or equal to 1" in refusal
    assert "--method grid: no such method; it is one of model, tpe" in command(
        "--table", str(small), "--method", "grid"
    )


def test_the_command_prints_tables_and_draws_curves(tmp_path: Path) -> None:
    path = packed(tmp_path / "table.json.xz", 80)
    app = Typer()
    app.command()(benchmark_search.main)
    plot, out = tmp_path / "curves.png", tmp_path / "figures.json"
    line = ["--table", str(path), "--seeds", "2", "--trials", "25", "--workers", "1", "--plot", str(plot)]
    result = CliRunner().invoke(
        app, [*line, "--method", "random+stopping", "--method", "random", "--out", str(out)]
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for words in ("confirmed, mean of 2 seeds", "random+stopping - random, found", "false stops"):
        assert words in result.output
    assert plot.stat().st_size > 1000
    assert len(json.loads(out.read_text())["runs"]["random"]) == 2
