"""A study goes on with its own settings, whatever the program's defaults are by then; flags that differ are refused.

The study in tests/data was made by commit 3c0a121 with `run_search.py --budget 4`.
"""

from __future__ import annotations

import dataclasses
import shlex
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import run_search
from nas.cli.search import search
from nas.config import DataConfig, LatencyConfig, Limits, ProxyConfig, SearchConfig
from nas.lab.invented import FakeEvaluator
from nas.options import Keep
from nas.recorded import RecordedStudy
from search_spaces import load_space
from studies import Store
from tests.conftest import TINY_TOML

DUMP = Path(__file__).parent / "data" / "study_3c0a121.sql"

# A default for each field of the identity that is not today's.
OTHER_DEFAULTS: dict[type[Any], dict[str, Any]] = {
    SearchConfig: {"space": load_space("imagenet"), "sampler": "random", "seed": 7},
    DataConfig: {"source": "cifar10", "resolution": 64, "to_rgb": True, "mirror": True, "reading": 7},
    ProxyConfig: {
        "steps": 300, "batch_size": 8, "learning_rate": 1e-3, "weight_decay": 0.5, "betas": (0.5, 0.6), "warmup": 0.5,
        "label_smoothing": 0.3, "threads": 3, "deterministic": True,
    },
    LatencyConfig: {
        "device": "cuda:1", "engine": "eager", "dtype": "bfloat16", "batch_size": 4, "resolution": 64, "num_classes": 3,
        "threads": 2, "precision": 0.5, "seconds": 1.0,
    },
    Limits: {"latency_ms": 1e-6, "params": 1, "macs": 1, "memory_mb": 1e-6},
}  # fmt: skip

# What each flag may say that the study does not.
DIFFERENT = {
    "--space": "imagenet", "--data": "cifar10", "--resolution": "64", "--to-rgb": "", "--mirror": "",
    "--proxy-steps": "300", "--proxy-batch": "8", "--proxy-lr": "0.001", "--threads": "7", "--deterministic": "",
    "--device": "cuda:1", "--engine": "eager", "--dtype": "bfloat16", "--latency-batch": "4",
    "--latency-resolution": "64", "--latency-classes": "3", "--latency-threads": "2", "--max-latency-ms": "9",
    "--max-params": "9000000", "--max-macs": "9000000000", "--max-memory-mb": "99", "--sampler": "random",
    "--seed": "7", "--early-stopping": "",
}  # fmt: skip

SAME = (
    "--space small --data digits --resolution 32 --no-mirror --proxy-steps 200 --proxy-batch 32 --proxy-lr 8e-3"
    " --threads 2 --device cpu --engine torchscript --dtype float32 --latency-batch 1 --latency-resolution 32"
    " --latency-classes 10 --latency-threads 1 --sampler tpe --seed 0"
)


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordedStudy:
    """The study of 3c0a121, where the README's command looks for it."""
    monkeypatch.chdir(tmp_path)
    Path("studies").mkdir()
    with sqlite3.connect("studies/convfirst.db") as connection:
        connection.executescript(DUMP.read_text())
    connection.close()
    store = Store.open("sqlite:///studies/convfirst.db", create=False)
    assert store is not None
    found = RecordedStudy.open(store, "convfirst")
    store.close()
    return found


@pytest.fixture
def asked(recorded: RecordedStudy, monkeypatch: pytest.MonkeyPatch) -> list[SearchConfig]:
    """The searches that were begun, on the device of the study and with its images."""
    configs: list[SearchConfig] = []

    class There(FakeEvaluator):
        device = recorded.device
        data_fingerprint = recorded.row.data_fingerprint

    def evaluator(config: SearchConfig, note: Callable[[str], None]) -> There:
        configs.append(config)
        return There()

    monkeypatch.setattr("nas.search.loop.Machine", evaluator)
    return configs


@pytest.fixture
def other_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of a later day, of which every default of a study's identity is another."""
    for owner, others in OTHER_DEFAULTS.items():
        names = [field.name for field in dataclasses.fields(owner)]
        defaults = owner.__init__.__defaults__  # type: ignore[misc]
        changed = tuple(others.get(name, default) for name, default in zip(names, defaults, strict=True))
        monkeypatch.setattr(owner.__init__, "__defaults__", changed)


def call(line: str) -> Result:
    return CliRunner().invoke(run_search.app, shlex.split(line))


def leaves(identity: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Each value of a nested identity by its path; a space is one value."""
    found: dict[str, Any] = {}
    for name, value in identity.items():
        nested = isinstance(value, dict) and name != "space"
        found |= leaves(value, f"{path}{name}.") if nested else {path + name: value}
    return found


def continued(recorded: RecordedStudy, asked: list[SearchConfig], line: str = "--budget 6") -> SearchConfig:
    """The search that a command went on with; it was asked for six candidates."""
    result = call(line)
    assert result.exit_code == 0, result.output
    assert "going on: 4 of 6" in result.stdout
    assert "budget met: 6 of 6 candidates" in result.stdout
    (config,) = asked
    with sqlite3.connect("studies/convfirst.db") as connection:
        stored = connection.execute("select config from convfirst_studies").fetchall()
        complete = "select count(*) from convfirst_candidates where state = 'complete'"
        assert connection.execute(complete).fetchone() == (6,)
    assert stored == [(recorded.row.config,)]
    return config


def test_the_readmes_command_continues_a_study_of_3c0a121(recorded: RecordedStudy, asked: list[SearchConfig]) -> None:
    assert continued(recorded, asked).identity() == recorded.config.identity()


@pytest.mark.usefixtures("other_defaults")
def test_it_does_so_when_every_default_has_changed(recorded: RecordedStudy, asked: list[SearchConfig]) -> None:
    now, then = leaves(SearchConfig().identity()), leaves(recorded.config.identity())
    assert [path for path in then if now[path] == then[path]] == []
    assert continued(recorded, asked).identity() == recorded.config.identity()


def test_flags_may_repeat_what_a_study_has(recorded: RecordedStudy, asked: list[SearchConfig]) -> None:
    assert continued(recorded, asked, f"--budget 6 {SAME}").identity() == recorded.config.identity()


def test_auto_is_as_good_as_left_out(recorded: RecordedStudy, asked: list[SearchConfig]) -> None:
    line = "--budget 6 --device auto --engine auto --dtype auto"
    assert continued(recorded, asked, line).latency == recorded.config.latency
    # To a name it means nothing.
    assert call("--budget 1 --study auto").exit_code == 0
    assert asked[-1].study == "auto"


def test_the_precision_of_measurements_is_a_runs_own(recorded: RecordedStudy, asked: list[SearchConfig]) -> None:
    line = "--budget 6 --latency-precision 0.5 --latency-seconds 1"
    assert continued(recorded, asked, line).latency == replace(recorded.config.latency, precision=0.5, seconds=1.0)


@pytest.mark.usefixtures("recorded")
def test_every_flag_that_says_something_else_is_refused_by_name(asked: list[SearchConfig]) -> None:
    declared = search.declared.values()  # type: ignore[attr-defined]
    assert set(DIFFERENT) == {option.name for option in declared if option.keep is Keep.FIXED}
    Path("mine.toml").write_text(TINY_TOML)
    before = Path("studies/convfirst.db").read_bytes()
    for flag, value in [*DIFFERENT.items(), ("--space", "mine.toml")]:
        result = call(f"--budget 6 {flag} {value}")
        assert result.exit_code == 2, (flag, result.output)
        (line,) = result.stderr.splitlines()
        assert "--study convfirst: was begun with another configuration" in line
        named = line.partition("(")[2]
        assert named.startswith((f"{flag}: study has ", f"{flag}.name: study has small, now ")), line
        if flag != "--space":
            # Nothing else is refused along with it.
            assert named.count("study has") == 1, line
    # What no study could have is told as for a new one.
    assert "--seed -1: is not between 0 and" in call("--budget 6 --seed -1").stderr
    assert asked == []
    assert Path("studies/convfirst.db").read_bytes() == before
