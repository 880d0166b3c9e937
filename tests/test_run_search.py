"""The command line. What a subprocess must show is in test_kill.py; here it runs in this process."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import run_search
from nas.config import SearchConfig
from nas.overhead import FakeEvaluator
from nas.search import run
from studies import Owner
from tests.conftest import TINY_TOML


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.search.RealEvaluator", lambda _config: FakeEvaluator())


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test leaves behind by default lands in its own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")


def call(line: str) -> Result:
    # Consoles look their stream up when they print, so the runner's is used.
    return CliRunner().invoke(run_search.app, shlex.split(line))


def refused(line: str) -> str:
    """The one line that a wrong command prints."""
    result = call(line)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.mark.usefixtures("fake")
def test_one_command_does_the_job_and_the_readers_read_it(tmp_path: Path) -> None:
    result = call("--budget 6")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "studies" / "convfirst.db").is_file()
    lines = result.stdout.splitlines()
    progress = [line for line in lines if re.match(r"\d/6  ", line)]
    assert [int(line[0]) for line in progress if "accuracy" in line][-1] == 6
    for part in ("accuracy", "latency", "ms", "best", "front", "hypervolume", "left"):
        assert part in progress[-1]
    for part in ("Pareto front of convfirst (6 candidates)", "budget met: 6 of 6", "studies/convfirst.db", "in all"):
        assert part in result.stdout

    rows = sqlite3.connect("studies/convfirst.db").execute("select number from pareto_front").fetchall()
    table = call("pareto")
    assert table.exit_code == 0
    assert table.stdout.count("stem") == len(rows)
    frame = pd.read_csv(io.StringIO(call("pareto --format csv").stdout))
    assert sorted(frame["number"]) == sorted(row[0] for row in rows)
    records = json.loads(call("pareto --format json").stdout)
    assert [record["number"] for record in records] == list(frame["number"])
    listed = call("studies").stdout
    assert "convfirst" in listed
    assert "invented" in listed

    again = call("--budget 6")
    assert again.exit_code == 0
    assert "going on: 6 of 6" in again.stdout


@pytest.mark.usefixtures("fake")
def test_flags_become_the_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs: list[SearchConfig] = []
    real_run = run

    def recorded(config: SearchConfig, **rest: object) -> object:
        configs.append(config)
        return real_run(config, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr("nas.search.run", recorded)
    (tmp_path / "mine.toml").write_text(TINY_TOML)
    line = (
        "--budget 2 --time-limit 60 --sampler nsga2 --seed 7 --space mine.toml --storage sqlite:///other.db"
        " --study mine --data somewhere --data-dir d --download --resolution 24 --proxy-steps 9 --proxy-batch 5"
        " --proxy-lr 0.01 --threads 3 --deterministic --device cpu --engine eager --dtype bfloat16 --latency-batch 4"
        " --latency-resolution 48 --latency-classes 7 --latency-threads 2 --latency-seconds 0.5 --max-latency-ms 9"
        " --max-params 1000000000 --max-macs 2000000000 --max-memory-mb 500"
    )
    assert call(line).exit_code == 0
    (config,) = configs
    assert (config.budget, config.time_limit_s, config.sampler, config.seed) == (2, 60, "nsga2", 7)
    assert (config.space.name, config.storage, config.study) == ("tiny", "sqlite:///other.db", "mine")
    data, proxy, latency, limits = config.data, config.proxy, config.latency, config.limits
    assert (data.source, data.resolution, data.data_dir, data.download) == ("somewhere", 24, "d", True)
    assert (proxy.steps, proxy.batch_size, proxy.learning_rate, proxy.threads) == (9, 5, 0.01, 3)
    assert proxy.deterministic
    assert (latency.device, latency.engine, latency.dtype, latency.batch_size) == ("cpu", "eager", "bfloat16", 4)
    assert (latency.resolution, latency.num_classes, latency.threads, latency.seconds) == (48, 7, 2, 0.5)
    assert (limits.latency_ms, limits.params, limits.macs, limits.memory_mb) == (9, 10**9, 2 * 10**9, 500)


@pytest.mark.usefixtures("fake")
def test_the_command_line_and_the_library_agree_on_defaults() -> None:
    """A study begun by one is continued by the other."""
    assert call("--budget 2").exit_code == 0
    assert run(SearchConfig(budget=4), FakeEvaluator()).complete == 4
    assert "5 of 5" in call("--budget 5").stdout


@pytest.mark.usefixtures("fake")
def test_a_study_that_another_machine_left_claimed_can_be_taken_over() -> None:
    assert call("--budget 2").exit_code == 0

    def claim(owner: Owner) -> None:
        with sqlite3.connect("studies/convfirst.db") as connection:
            connection.execute("update convfirst_studies set owner = ?", (str(owner),))

    me = Owner.me()
    claim(replace(me, host="vanished", pid=77))
    assert "is being searched by process 77 on vanished (if that is gone for good, --take-over)" in refused(
        "--budget 3"
    )
    assert "seed: study has 0, now 1" in refused("--budget 3 --take-over --seed 1")
    assert "vanished" in refused("--budget 3")
    assert call("--budget 3 --take-over").exit_code == 0
    # A process of this machine can be seen to live, and is not robbed.
    claim(Owner(me.host, os.getppid(), psutil.Process(os.getppid()).create_time()))
    assert f"is being searched by process {os.getppid()}" in refused("--budget 4 --take-over")


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_front_can_be_drawn(tmp_path: Path, suffix: str) -> None:
    assert call("--budget 6").exit_code == 0
    result = call(f"pareto --plot front.{suffix}")
    assert result.exit_code == 0
    drawn = (tmp_path / f"front.{suffix}").read_bytes()
    assert drawn.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])
    assert f"front.{suffix}" in result.stderr
    assert "--plot front.txt: not a .png" in refused("pareto --plot front.txt")
    assert "--plot no/front.png: its folder" in refused("pareto --plot no/front.png")


@pytest.mark.usefixtures("fake")
def test_a_locked_database_gets_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.store.OPEN_TIMEOUT_S", 0.2)
    assert call("--budget 2").exit_code == 0
    holder = sqlite3.connect("studies/convfirst.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    assert re.search("--storage sqlite:///studies/convfirst.db: .*locked", refused("--budget 3"))
    holder.close()
    assert call("--budget 3").exit_code == 0


def test_passwords_are_not_printed() -> None:
    line = refused("--storage postgresql+psycopg://me:secret@127.0.0.1:1/x")
    assert "--storage postgresql+psycopg://me:***@127.0.0.1:1/x: " in line
    assert "secret" not in line


def test_a_read_only_folder_gets_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the answer of the system's own question, since root, who runs this on CI, may write everywhere."""
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    assert f"the folder {tmp_path} is read-only" in refused("--storage sqlite:///x.db")
    assert not list(tmp_path.iterdir())


def test_help_groups_the_flags() -> None:
    text = call("--help").stdout
    for group in ("Search", "Study", "Data and training", "Latency", "Limits", "Commands"):
        assert f" {group} " in text


@pytest.mark.parametrize("name", ["small", "imagenet", "mine.toml"])
def test_space_prints_choices_count_and_ranges(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine.toml").write_text(TINY_TOML)
    text = call(f"space {name}").stdout
    for part in ("stage1_group_width", "architectures: ", "params: ", "MACs: ", "excluded: stage 1", "anchor: "):
        assert part in text


def picture_folder(root: Path, classes: int, mode: str = "RGB") -> None:
    for index in range(classes):
        (root / f"class{index}").mkdir(parents=True)
        for number in range(3):
            Image.fromarray(np.full((8, 8, 3), number, np.uint8)).convert(mode).save(
                root / f"class{index}" / f"{number}.png"
            )


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--budget 0", "--budget 0: not at least 1|--budget 0: is not at least 1"),
        ("--budget -1", "--budget -1: .*at least 1"),
        ("--time-limit 0", "--time-limit 0.*positive"),
        ("--seed -1", "--seed -1"),
        ("--resolution 4", "--resolution 4: .*at least 8"),
        ("--proxy-steps 0", "--proxy-steps 0"),
        ("--proxy-batch 1", "--proxy-batch 1"),
        ("--proxy-lr -1", "--proxy-lr -1"),
        ("--threads 0", "--threads 0"),
        ("--latency-batch 0", "--latency-batch 0"),
        ("--latency-resolution 0", "--latency-resolution 0"),
        ("--latency-classes 0", "--latency-classes 0"),
        ("--latency-threads 0", "--latency-threads 0"),
        ("--latency-seconds 0", "--latency-seconds 0"),
        ("--max-latency-ms 0", "--max-latency-ms 0"),
        ("--max-params -5", "--max-params -5"),
        ("--study ''", "--study"),
        ("--data nosuch", "--data nosuch: not digits"),
        ("--data empty", "--data empty: no images"),
        ("--data one", "--data one: .*at least 2"),
        ("--data grey", "--data grey: .*not an RGB image"),
        ("--data broken", "--data broken: .*0.png cannot be read as an image"),
        ("--data cifar10", "--data cifar10: .*--download"),
        ("--space nosuch", "--space nosuch: neither a built-in space"),
        ("--space wrong.toml", "--space wrong.toml: .*unknown key 'wide'"),
        ("--space impossible.toml", "--space impossible.toml: .*kernel_size=4 is not odd"),
        ("--device cuda:99", "--device cuda:99: "),
        ("--device tpu", "--device tpu: not a device"),
        ("--device cpu --engine nosuch", "--engine nosuch: none of"),
        (
            "--device cpu --engine fused",
            "--engine fused: does not run on cpu",
        ),
        ("--device cpu --dtype float16", "--dtype float16: not on the CPU"),
        ("--storage nonsense", "--storage nonsense: "),
        ("--storage postgresql+psycopg://a@127.0.0.1:1/x", "--storage postgresql.*refused"),
        ("--storage sqlite:////proc/nowhere/x.db", "--storage sqlite:////proc/nowhere/x.db"),
        ("--storage sqlite:///wrong.toml", "--storage sqlite:///wrong.toml: .*not a database"),
        ("--storage sqlite:///foreign.db", "--storage sqlite:///foreign.db: .*other tables"),
        ("--study x pareto", "--study: belongs after the command"),
        ("pareto", "--storage sqlite:///studies/convfirst.db: there is no study database"),
        ("studies --storage sqlite:///none.db", "--storage sqlite:///none.db: there is no study database"),
        ("space nosuch", "space nosuch: neither"),
        ("space --classes 0", "--classes 0"),
        ("space --resolution 0", "--resolution 0"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing_behind(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "empty").mkdir()
    picture_folder(tmp_path / "one", 1)
    picture_folder(tmp_path / "grey", 2, mode="L")
    picture_folder(tmp_path / "broken", 2)
    (tmp_path / "broken" / "class0" / "0.png").write_bytes(b"no image")
    (tmp_path / "wrong.toml").write_text(TINY_TOML.replace("width = [8, 16]\nkernel", "wide = [8, 16]\nkernel"))
    (tmp_path / "impossible.toml").write_text(TINY_TOML.replace("[3, 5]", "[4]"))
    with sqlite3.connect(tmp_path / "foreign.db") as connection:
        connection.execute("create table customers (name text)")
    before = sorted(tmp_path.rglob("*"))
    assert re.search(told, refused(line))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("fake")
def test_other_configurations_and_unknown_studies_get_one_line() -> None:
    assert call("--budget 2").exit_code == 0
    assert "seed: study has 0, now 5" in refused("--budget 3 --seed 5")
    assert "--study nosuch: not in" in refused("pareto --study nosuch")
    assert "convfirst" in refused("pareto --study nosuch")


@pytest.mark.parametrize("line", ["--sampler nosuch", "--budget many", "--nosuch", "pareto --format xml"])
def test_typers_own_refusals_exit_with_2(line: str) -> None:
    assert call(line).exit_code == 2


def test_an_empty_study_has_an_empty_front(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.search.RealEvaluator", lambda _config: FakeEvaluator())
    assert call("--budget 2 --time-limit 0.000001").exit_code == 0
    assert "empty" in call("pareto").stdout
    assert json.loads(call("pareto --format json").stdout) == []
