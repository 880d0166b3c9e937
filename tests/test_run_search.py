"""The command line. What a subprocess must show is in test_kill.py; here it runs in this process."""

from __future__ import annotations

import contextlib
import html
import io
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

import run_search
from kernels.device_info import DeviceInfo
from nas.config import LatencyConfig, SearchConfig, installed_runtime
from nas.errors import CandidateFailed
from nas.lab.invented import FakeEvaluator
from nas.latency import device_profile
from nas.latency.block_table import BlockTable, sum_errors, sum_errors_line
from nas.latency.device_profile import DeviceProfile
from nas.latency.engines import ENGINES
from nas.latency.parts import CALL, arch_parts, network_shape
from nas.latency.values import Latency, Measurement, ShapeLatency
from nas.search.loop import run
from search_spaces import ArchSpec, load_space
from studies import Owner, Store
from tests.conftest import TINY_TOML, Room, copy_database, make_tiny_space, quicken
from tests.nas.conftest import inline  # noqa: F401 (a fixture)

# The smallest that there is.
ARCH = str(make_tiny_space().smallest())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.search.loop.Machine", lambda *_: FakeEvaluator())


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The storage of a search of two candidates."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch, folder)
        run(SearchConfig(budget=2, storage=f"sqlite:///{folder / 'study.db'}"), FakeEvaluator())
    return f"sqlite:///{folder / 'study.db'}"


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

    monkeypatch.setattr("nas.search.loop.run", recorded)
    (tmp_path / "mine.toml").write_text(TINY_TOML)
    line = (
        "--budget 2 --time-limit 60 --sampler nsga2 --seed 7 --space mine.toml --storage sqlite:///other.db"
        " --study mine --data somewhere --data-dir d --download --resolution 24 --proxy-steps 9 --proxy-batch 5"
        " --proxy-lr 0.01 --threads 3 --deterministic --device cpu --engine eager --dtype bfloat16 --latency-batch 4"
        " --latency-resolution 48 --latency-classes 7 --latency-threads 2 --latency-seconds 0.5 --latency-precision 0.1"
        " --block-table --max-latency-ms 9"
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
    assert latency.precision == 0.1
    assert config.block_table
    assert (limits.latency_ms, limits.params, limits.macs, limits.memory_mb) == (9, 10**9, 2 * 10**9, 500)


@pytest.mark.usefixtures("fake")
def test_names_are_printed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets and colons mean something to the library that prints tables."""
    monkeypatch.setattr("nas.cli.console.out.width", 140)
    name = "[/x] [red]b :smile:"
    storage = "sqlite:///[v3]/a.db"
    for command in ("--budget 2", "pareto", "studies"):
        result = call(f"{command} --storage {storage}" + (f" --study '{name}'" if command != "studies" else ""))
        assert result.exit_code == 0, result.output
        assert name in result.stdout
    ended = call(f"--budget 2 --storage {storage} --study '{name}'").stdout
    assert f"study '{name}' is in {storage}\n" in ended
    # What it says to type can be typed.
    again = next(line for line in ended.splitlines() if line.startswith("front again: "))
    assert name in call(again.partition("run_search.py ")[2]).stdout
    assert f"(there: {name})" in refused(f"pareto --storage {storage} --study other")


def test_an_interrupt_while_torch_is_imported_ends_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(typed: object) -> None:
        raise KeyboardInterrupt

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("nas.cli.search._config", interrupted)
    monkeypatch.setattr("os._exit", leave)
    result = call("--budget 1")
    assert result.exit_code == 130
    assert "the same command goes on from there" in result.stderr


def test_the_deployments_classes_are_by_default_those_of_the_data(tmp_path: Path) -> None:
    for name in ("ant", "bee", "cat"):
        (tmp_path / "pictures" / "train" / name).mkdir(parents=True)
        (tmp_path / "pictures" / "train" / name / "0.png").touch()
    seen: list[int] = []

    def classes(line: str) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nas.cli.search._run", lambda config, take_over: seen.append(config.latency.num_classes))
            assert call(line).exit_code == 0
        return seen[-1]

    assert classes("--budget 1") == 10
    assert classes("--budget 1 --data cifar100") == 100
    assert classes("--budget 1 --data pictures") == 3
    assert classes("--budget 1 --data pictures --space imagenet") == 3
    assert classes("--budget 1 --data pictures --latency-classes 7") == 7
    assert classes("--budget 1 --data hfds/imagenet-1k --space imagenet") == 1000
    # The digits stand for whatever a network of that size is for.
    assert classes("--budget 1 --space imagenet") == 1000


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
    if suffix == "svg":
        # All candidates of the front's deployment are in it.
        assert b"convfirst: 6 candidates" in drawn
    assert "--plot front.txt: not a .png" in refused("pareto --plot front.txt")
    assert "--plot no/front.png: its folder" in refused("pareto --plot no/front.png")
    with pytest.MonkeyPatch.context() as patch:
        # The tests may run as root, who may write anywhere.
        patch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
        assert "--plot other.png: cannot be written" in refused("pareto --plot other.png")


@pytest.mark.usefixtures("fake")
def test_a_locked_database_gets_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.opening.OPEN_TIMEOUT_S", 0.2)
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


@pytest.mark.usefixtures("fake", "wide")
def test_a_full_disk_gets_one_line_and_files_stay_as_they_were(tmp_path: Path, room: Room) -> None:
    assert call("--budget 4").exit_code == 0
    old = tmp_path / "front.png"
    old.write_text("an older front")

    def there() -> list[Path]:
        # SQLite keeps its WAL where it has no room to end it.
        return sorted(path for path in tmp_path.rglob("*") if not path.name.endswith(("-shm", "-wal")))

    before = there()
    # Room for the memory of a WAL, which is 32 KiB, and not for a picture.
    for line, told in {
        "pareto --plot front.png": "--plot front.png: cannot be written (File too large)",
        "report --out new/report": "--out new/report: File too large",
        "--budget 8 --study other": "--storage sqlite:///studies/convfirst.db: ",
    }.items():
        with room(33):
            assert refused(line).startswith(f"Error: {told}"), line
        assert there() == before
    assert old.read_text() == "an older front"


@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_what_cannot_be_printed_is_told(buffered: str) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full: a full disk behind standard output was not tested")
    command = [sys.executable, str(Path(run_search.__file__)), "space", "small"]
    env = {**os.environ, "PYTHONUNBUFFERED": buffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=env, check=False)
    assert done.returncode == 2
    assert done.stderr == "Error: standard output or a temporary file: No space left on device\n"


def test_a_warning_is_a_line_of_its_own() -> None:
    assert call("studies --storage sqlite:///none.db").exit_code == 2
    assert warnings.formatwarning("words", UserWarning, "file.py", 1) == "Warning: words\n"


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
        ("--budget 0", "--budget 0: is not between 1 and 1,000,000"),
        ("--budget -1", "--budget -1: .*between 1 and"),
        ("--budget 99999999999999999999999", "--budget 9*: is not between 1 and"),
        ("--proxy-lr inf", "--proxy-lr inf: is not positive and finite"),
        ("--max-params 100", "--max-params 100: the smallest value in the space 'small' is 11,810"),
        ("--max-macs 1", "--max-macs 1: the smallest value in the space 'small' is"),
        ("--time-limit 0", "--time-limit 0.*positive"),
        ("--seed -1", "--seed -1"),
        ("--resolution 4", "--resolution 4: .*between 8 and 2048 pixels"),
        ("--proxy-steps 0", "--proxy-steps 0"),
        ("--proxy-batch 1", "--proxy-batch 1"),
        ("--proxy-lr -1", "--proxy-lr -1"),
        ("--threads 0", "--threads 0"),
        ("--threads 100000", "--threads 100000: is not between 1 and 1024"),
        ("--latency-batch 0", "--latency-batch 0"),
        ("--latency-resolution 0", "--latency-resolution 0"),
        ("--latency-classes 0", "--latency-classes 0"),
        ("--latency-threads 0", "--latency-threads 0"),
        ("--latency-seconds 0", "--latency-seconds 0"),
        ("--latency-precision 0", "--latency-precision 0.*between 0 and 1"),
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
        ("device --device tpu", "--device tpu: not a device"),
        ("device --device cuda:99", "--device cuda:99: "),
        ("device --device cpu --dtype float16", "--dtype float16: not on the CPU"),
        ("device --latency-threads 0", "--latency-threads 0: .*between 1 and 1024"),
        ("device --storage nonsense", "--storage nonsense: "),
        ("latency --arch nonsense", "--arch nonsense: 'nonsense' is not an architecture"),
        ("latency --arch nonsense --measure", "--arch nonsense: 'nonsense' is not an architecture"),
        (f"latency --arch '{ARCH}'", "--storage sqlite:///studies/convfirst.db: there is no study database"),
        (f"latency --arch '{ARCH.replace('8 |', '9 |')}'", "--arch .*: stem_width=9 is not a multiple of 8"),
        (f"latency --arch '{ARCH}' --device tpu", "--device tpu: not a device"),
        (f"latency --arch '{ARCH}' --measure --latency-resolution 4", "--latency-resolution 4: .*between 8 and"),
        ("analyze", "analyze: give one of --trial, --arch, --timm$"),
        (f"analyze --arch '{ARCH}' --timm resnet18", "give one of --trial, --arch, --timm, not several"),
        ("analyze --trial 1 --arch x --timm y", "give one of --trial, --arch, --timm, not several"),
        ("analyze --timm resnet1", "--timm resnet1: timm has no such model .did you mean resnet18"),
        ("analyze --timm convnext_tiny.nonsense", "--timm convnext_tiny.nonsense: timm has no such weights of convn"),
        (
            "analyze --timm resnet18 --out one/class0/0.png/deeper",
            "--out one/class0/0.png/deeper: .*0.png is not a fol",
        ),
        ("analyze --timm qqqqqqqqqq", "--timm qqqqqqqqqq: timm has no such model$"),
        ("analyze --arch nonsense", "--arch nonsense: 'nonsense' is not an architecture"),
        ("analyze --arch 'relu stem 8 | 1x8 | head 16'", "--arch relu .*: stage 1: '1x8' is not a stage"),
        ("analyze --trial 3", "--study convfirst: not in the database, so there is no --trial 3"),
        ("analyze --timm resnet18 --out one/class0/0.png", "--out one/class0/0.png: .*0.png is not a folder"),
        ("analyze --timm resnet18 --device cuda:99", "--device cuda:99: "),
        ("analyze --timm resnet18 --device tpu", "--device tpu: not a device"),
        ("analyze --timm resnet18 --device cpu --engine nosuch", "--engine nosuch: none of"),
        ("analyze --timm resnet18 --latency-batch 0", "--latency-batch 0: .*at least 1"),
        ("analyze --timm resnet18 --latency-seconds 0", "--latency-seconds 0.0: .*positive"),
        ("analyze --timm resnet18 --latency-classes 0", "--latency-classes 0: .*at least 1"),
        (f"analyze --arch '{ARCH}' --against nonsense", "--against nonsense: timm has no such model"),
        (f"analyze --arch '{ARCH}' --against 'a | b | c'", "--against a . b . c: 'a' is not a stem"),
        (f"analyze --arch '{ARCH}' --against '{{}}'", "--against {}: not an architecture"),
        (f"analyze --arch '{ARCH}' --against 7", "--study convfirst: not in the database, so there is no --against 7"),
        (f"analyze --arch '{ARCH}' --device cpu --engine fused", "--engine fused: does not run on cpu"),
        (f"analyze --arch '{ARCH}' --storage nonsense", "--storage nonsense: "),
        ("--storage ''", "--storage : is no database's URL"),
        ("remeasure", "--storage sqlite:///studies/convfirst.db: there is no study database"),
        ("remeasure --storage sqlite:///foreign.db", "--storage sqlite:///foreign.db: "),
        ("dashboard", "--storage sqlite:///studies/convfirst.db: there is no study database"),
        ("dashboard --storage sqlite:///foreign.db", "--storage sqlite:///foreign.db: "),
        ("dashboard --artifacts one/class0/0.png", "--artifacts one/class0/0.png: .*0.png is not a folder"),
        ("report --out r", "--storage sqlite:///studies/convfirst.db: there is no study database"),
        ("report --out r --storage sqlite:///foreign.db", "--storage sqlite:///foreign.db: "),
        ("report --out one/class0/0.png", "--out one/class0/0.png: .*0.png is not a folder"),
        ("baselines", "--storage sqlite:///studies/convfirst.db: there is no study database"),
        ("retrain", "--storage sqlite:///studies/convfirst.db: there is no study database"),
        ("confirm", "--storage sqlite:///studies/convfirst.db: there is no study database"),
        ("export", "--storage sqlite:///studies/convfirst.db: there is no study database"),
        ("export --storage sqlite:///foreign.db", "--storage sqlite:///foreign.db: "),
        ("export --out one/class0/0.png", "--out one/class0/0.png: .*0.png is not a folder"),
        ("export --format gguf", "--format gguf: none of timm, onnx, torch-export"),
        ("export --checkpoint best.pth", "--checkpoint best.pth: belongs to one DIRECTORY"),
        ("export empty", "empty: nothing to do"),
        ("export empty --format timm", "empty: nothing to do"),
        ("export empty --format onnx", "empty: holds no config.json"),
        ("export nowhere --format onnx", "nowhere: no such directory"),
        ("export empty --format onnx --top 3", "--top: is for networks of a study, not for empty"),
        ("export empty --format torch-export --softmax", "--softmax: is for --format onnx"),
        ("export --normalise", "--normalise: is for --format onnx"),
        ("export empty --classes names.txt --format onnx", "--classes names.txt: is for --checkpoint"),
        ("bench empty", "empty: holds no config.json"),
        ("bench nowhere", "nowhere: no such directory"),
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


NAMES = [r"cost $a_b$ \frac{x} <b>x</b> | `q` [red] :smile: 'y'", "\u4e2d\u6587\u7814\u7a76", "\u4e2d" * 512]


def on_latin_1(*line: str) -> Result:
    """A command on a terminal that knows Western European letters only."""
    return CliRunner(charset="latin-1").invoke(run_search.app, line)


@pytest.mark.usefixtures("fake", "shown")
@pytest.mark.parametrize("name", NAMES, ids=["marks", "chinese", "long"])
def test_a_study_of_any_name_is_shown_by_every_command(name: str, tmp_path: Path) -> None:
    """On a Latin-1 terminal, letters that it lacks are shown by their numbers."""
    shown = name.encode("latin-1", "backslashreplace").decode("latin-1")
    told = {}
    for command in ("", "pareto", "pareto --format csv", "pareto --format json", "pareto --plot front.svg", "studies",
                    "report --out r", "export --out e"):  # fmt: skip
        result = on_latin_1(*command.split(), *([] if command else ["--budget", "2"]), "--study", name)
        assert result.exit_code == 0, (command, result.output, result.exception)
        told[command] = result.stdout
    for command in ("", "pareto"):
        # Long titles are broken.
        assert shown.replace(" ", "") in re.sub(r"\s", "", told[command])
    assert f"study '{shown}' is in sqlite:///studies/convfirst.db" in told[""]
    # In a table its rows are apart.
    assert told["studies"].count("\\u4e2d") == shown.count("\\u4e2d")
    assert all(row["study_name"] == name for row in json.loads(told["pareto --format json"]))
    assert shown in told["pareto --format csv"]
    escaped = html.escape(name, quote=False)
    page = (tmp_path / "r" / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")
    assert f"<title>{escaped}: ConvFirst search</title>" in page
    (card,) = list((tmp_path / "e").glob("*/README.md"))[:1]
    fence = "``" if "`" in name else "`"
    assert f"{fence}{' ' * (len(fence) - 1)}{name}" in card.read_text(encoding="utf-8")
    compile(card.with_name(f"{card.parent.name}.py").read_bytes(), "exported", "exec")
    assert yaml.safe_load(card.with_name("train.yaml").read_text(encoding="utf-8"))["model"] == card.parent.name
    again = on_latin_1("--budget", "2", "--study", name)
    assert "going on: 2 of 2" in again.stdout


NOT_UTF8 = "caf\udce9"  # as Python reads the bytes of Latin-1 that a shell passes on


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    "line",
    [
        "--study X", "--study=X", "--storage sqlite:///X.db", "--space X", "--data X", "--data-dir X", "--device X",
        "pareto --study X", "pareto --plot X.png", "studies --study X", "space X", "report --out X", "export X",
        "export --out X", "export a --checkpoint X", "bench X", "dashboard --host X", "dashboard --artifacts X",
        "analyze --timm X", "analyze --arch X", "X", "--X",
    ],
)  # fmt: skip
def test_bytes_that_are_no_text_get_one_line(line: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(run_search.app, line.replace("X", NOT_UTF8).split())
    assert result.exit_code == 2, result.output
    flag, _, _ = line.rpartition(" ")
    (told,) = result.stderr.splitlines()
    assert re.match(rf"Error: .*{flag.split(' ')[-1] if flag.split(' ')[-1].startswith('--') else ''}", told)
    assert "caf\\udce9" in told
    assert told.endswith(": holds bytes that are no text in utf-8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "a\u2028b", "a\tb", "x" * 513])
def test_names_that_are_hard_to_show_are_refused_where_a_study_is_new(name: str, tmp_path: Path, of_two: str) -> None:
    """One that is there already, as SQLite has them, is read and continued."""
    result = CliRunner().invoke(run_search.app, ["--study", name])
    assert result.exit_code == 2, result.output
    (told,) = result.stderr.split("\n")[:-1]
    assert told.startswith("Error: --study ")
    assert told.endswith(": is not a name of at most 512 characters, without control characters")
    assert told.isprintable()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "studies").mkdir()
    copy_database(of_two, "sqlite:///studies/convfirst.db")
    with contextlib.closing(sqlite3.connect("studies/convfirst.db")) as connection, connection:
        connection.execute("UPDATE studies SET study_name = ?", [name])
    for line in (["pareto"], ["--budget", "3"], ["export"]):
        result = CliRunner().invoke(run_search.app, [*line, "--study", name])
        assert result.exit_code == 0, result.output


def test_a_refusal_is_one_line_whatever_it_names(tmp_path: Path) -> None:
    result = CliRunner().invoke(run_search.app, ["--storage", "sqlite:///a\nb.db"])
    assert result.stderr == "Error: --storage sqlite:///a\\nb.db: holds control characters, or bytes that are no text\n"
    assert list(tmp_path.iterdir()) == []


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
    monkeypatch.setattr("nas.search.loop.Machine", lambda *_: FakeEvaluator())
    assert call("--budget 2 --time-limit 0.000001").exit_code == 0
    assert "empty" in call("pareto").stdout
    assert json.loads(call("pareto --format json").stdout) == []


@pytest.mark.parametrize(
    "line",
    [
        "analyze --trial many",
        "latency",
        "remeasure --dtype int8",
        "device --again yes",
        "dashboard --port 70000",
        "report",
    ],
)
def test_typers_own_refusals_of_commands_exit_with_2(line: str) -> None:
    assert call(line).exit_code == 2


# -- The device ------------------------------------------------------------------------------------------------------


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Profiles are invented, each better than the one before; yields the dtype and threads of each."""
    asked: list[tuple[str, int]] = []

    def measure(config: LatencyConfig) -> DeviceProfile:
        asked.append((config.dtype, config.threads))
        return DeviceProfile(copy_bytes_per_s=1e10 * len(asked), macs_per_s=5e10 * len(asked), launch_seconds=1e-6)

    monkeypatch.setattr(device_profile, "measure_profile", measure)
    monkeypatch.setattr(BlockTable, "anchor_ms", lambda table, anchor, measure: 1.0)
    return asked


def test_a_devices_limits_are_measured_once_and_printed(tmp_path: Path, profiled: list[tuple[str, int]]) -> None:
    result = call("device --device cpu")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "studies" / "convfirst.db").is_file()
    for words in ("float32, 1 thread(s)", "copy 10.0 GB/s", "product 100.0 GFLOP/s", "launch 1.00 us"):
        assert words in result.stdout
    assert call("device --device cpu").stdout == result.stdout
    assert profiled == [("float32", 1)]
    assert "copy 20.0 GB/s" in call("device --device cpu --again").stdout
    # All that are known are printed, by device, dtype and threads.
    result = call("device --device cpu --dtype bfloat16 --latency-threads 2 --storage sqlite:///studies/convfirst.db")
    assert profiled[-1] == ("bfloat16", 2)
    assert result.stdout.count(" GB/s") == 2
    # Another database knows nothing of it.
    call("device --device cpu --storage sqlite:///other.db")
    assert profiled[3:] == [("float32", 1)]


def test_a_device_is_measured_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_profile, "SECONDS", 0.02)
    result = call("device --device cpu --latency-threads 2")
    assert result.exit_code == 0, result.output
    assert re.search(
        r"float32, 2 thread.s.: copy [\d.,]+ GB/s .* product [\d.,]+ GFLOP/s, launch [\d.]+ us", result.stdout
    )


# -- Latency from the block table ------------------------------------------------------------------------------------


def filled(config: LatencyConfig, arch: ArchSpec, leave_out: int = 0) -> None:
    """A table that holds a call and all of an architecture's parts at 4 ms each, but the last so many."""
    store = Store.open("sqlite:///studies/convfirst.db", create=True)
    assert store is not None
    parts = arch_parts(arch, config)
    shapes = [CALL, *(part.shape for part in parts[: len(parts) - leave_out])]
    table = BlockTable(store, DeviceInfo.of(torch.device(config.device)), config)
    table.add([ShapeLatency(shape, Latency(4.0, 4.0, 4.0, 10, 0.01)) for shape in dict.fromkeys(shapes)])
    if not leave_out:
        table.add([ShapeLatency(network_shape(str(arch), config), Latency(7.5, 7.5, 7.5, 10, 0.01))])
    store.close()


def test_an_architecture_of_which_nothing_was_measured_is_told_so(profiled: list[tuple[str, int]]) -> None:
    call("device --device cpu")
    result = call(f"latency --arch '{ARCH}' --device cpu")
    assert result.exit_code == 0, result.output
    assert "none of 3 parts is measured\nmissing: stem, stage1.0, head, a call's cost; --measure" in result.stdout


def test_an_architecture_whose_parts_are_in_the_table_adds_up() -> None:
    """4 ms of the call, and of each part of three."""
    filled(LatencyConfig(device="cpu"), ArchSpec.parse(ARCH))
    result = call(f"latency --device cpu --arch '{ARCH}'")
    assert result.exit_code == 0, result.output
    assert "16.0000 ms, the sum of 3 parts, all of them measured" in result.stdout
    assert "7.5000 ms measured as a whole" in result.stdout
    assert f"{installed_runtime('onnxruntime')}, float32, batch 1, 32x32, 1 thread(s)" in result.stdout
    # Its JSON is the same architecture.
    as_json = call(f"latency --device cpu --arch '{ArchSpec.parse(ARCH).to_json()}'")
    assert as_json.stdout == result.stdout
    # Another deployment is another table, another resolution other shapes.
    assert "none of 3 parts" in call(f"latency --device cpu --arch '{ARCH}' --latency-batch 2").stdout
    assert "1 of 3 parts" not in call(f"latency --device cpu --arch '{ARCH}' --latency-resolution 32").stdout
    other = call(f"latency --device cpu --arch '{ARCH}' --latency-classes 7").stdout
    assert "2 of 3 parts are measured, 8.0000 ms together" in other
    assert "missing: head; --measure" in other


def test_what_is_missing_is_told_by_name() -> None:
    filled(LatencyConfig(device="cpu"), ArchSpec.parse(ARCH), leave_out=1)
    text = call(f"latency --device cpu --arch '{ARCH}'").stdout
    assert "2 of 3 parts are measured" in text
    assert "missing: head; --measure" in text
    assert "as a whole" not in text


QUICK = "--device cpu --engine eager --latency-seconds 0.02 --latency-resolution 16"


def test_what_is_missing_is_measured_if_asked_to() -> None:
    line = f"latency --arch '{ARCH}' {QUICK}"
    result = call(f"{line} --measure")
    assert result.exit_code == 0, result.output
    assert "all of them measured" in result.stdout
    assert "ms measured as a whole" in result.stdout
    # From the table, at once, the same figures again.
    assert call(line).stdout == result.stdout


def test_sums_are_held_against_networks_on_the_day_of_the_studys_anchor() -> None:
    """16 ms by its parts. The study's anchor took 2 ms and the table's 1 ms: the machine was half as fast then."""
    config, arch = LatencyConfig(device="cpu"), ArchSpec.parse(ARCH)
    filled(config, arch)
    store = Store.open("sqlite:///studies/convfirst.db", create=False)
    assert store is not None
    table = BlockTable(store, DeviceInfo.of(torch.device(config.device)), config)
    unknown = load_space("small").anchor()
    found = sum_errors(table, [arch, unknown, arch], [20.0, 1.0, 64.0], anchor_ms=2.0, anchor_in_table_ms=1.0)
    assert found == pytest.approx([0.6, -0.5])
    assert sum_errors(table, [arch], [20.0], 2.0, None) == []
    assert "within 55.0% (median of 2; at most 60.0%)" in sum_errors_line(found)
    store.close()


# -- Analysis --------------------------------------------------------------------------------------------------------


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that has room for all columns."""
    monkeypatch.setattr("nas.cli.analyze.out", Console(width=140))


@pytest.mark.usefixtures("wide")
def test_an_architecture_is_analysed_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has a row a part, the plots are there, and a second time nothing is measured."""
    result = call(f"analyze --arch '{ARCH}' {QUICK} --out plots")
    assert result.exit_code == 0, result.output
    for words in ("part", "t* us", "gap us", "of peak", "bound by", "workspace KB", "stem", "stage1.0", "head"):
        assert words in result.stdout
    arch = ArchSpec.parse(ARCH)
    assert f"ConvFirst {arch.arch_id}" in result.stdout
    assert "eager, float32, batch 1, 16x16, cpu" in result.stdout
    assert re.search(r"[\d.]+ ms as a network, [\d.]+ ms as the sum of its parts \([-+][\d.]+%\)", result.stdout)
    assert re.search(
        r"MMACs; efficiency [\d.]+% of [\d.,]+ GFLOP/s, waterline [\d.]+% \(layer by layer; ", result.stdout
    )
    assert f"measuring ConvFirst {arch.arch_id}: 3 parts" in result.stderr
    files = sorted((tmp_path / "plots").iterdir())
    assert [path.name for path in files] == [
        "efficiency_gap.png", "efficiency_gap.svg", "waterline.png", "waterline.svg",
    ]  # fmt: skip
    for path in files:
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
        assert f"plots/{path.name}" in result.stderr
    again = call(f"analyze --arch '{ARCH}' {QUICK}")
    assert again.stdout == result.stdout
    assert again.stderr == ""
    # On a narrow terminal some columns are left out, and no figure is cut.
    monkeypatch.setattr("nas.cli.analyze.out", Console(width=80))
    narrow = call(f"analyze --arch '{ARCH}' {QUICK}").stdout
    assert "workspace" not in narrow
    assert max(map(len, narrow.splitlines()[:8])) <= 80
    for words in ("MMACs", "t* us", "of peak", "gap us", "bound by", "stage1.0"):
        assert words in narrow


@pytest.mark.usefixtures("wide")
def test_layers_are_told_and_all_is_measured_again_if_asked_to() -> None:
    line = f"analyze --arch '{ARCH}' {QUICK}"
    result = call(f"{line} --layers")
    assert result.exit_code == 0, result.output
    rows = [text.split("│")[0].strip() for text in result.stdout.splitlines() if "│" in text]
    conv = ["dw_start.conv", "pw_exp.conv", "pw_proj.conv"]
    assert rows[:8] == ["stem", "conv_stem", "stage1.0", *conv, "head", "conv_head"]
    # Each has a time of its own.
    times = [text.split("│")[7].strip() for text in result.stdout.splitlines() if "│" in text]
    assert all(re.fullmatch(r"[\d.,]+", each) for each in times)
    before = call(line)
    assert before.stderr == ""
    again = call(f"{line} --again")
    assert "3 parts" in again.stderr
    assert again.stdout != before.stdout
    assert call(line).stdout == again.stdout
    # Likewise for the sum.
    before = call(f"latency --arch '{ARCH}' {QUICK}")
    assert call(f"latency --arch '{ARCH}' {QUICK} --again").stdout != before.stdout


def test_parts_that_the_cap_ended_are_told() -> None:
    config, arch = LatencyConfig(device="cpu"), ArchSpec.parse(ARCH)
    filled(config, arch)
    store = Store.open("sqlite:///studies/convfirst.db", create=True)
    assert store is not None
    (part, *_) = arch_parts(arch, config)
    BlockTable(store, DeviceInfo.of(torch.device(config.device)), config).add(
        [ShapeLatency(part.shape, Latency(4.0, 4.0, 4.0, 10, 0.123, True))]
    )
    store.close()
    told = call(f"latency --device cpu --arch '{ARCH}'").stdout
    assert "1 of these figures ended at the time cap: known within 12% at worst (--again measures anew)" in told


@pytest.mark.usefixtures("wide")
def test_a_timm_model_is_analysed_beside_an_architecture() -> None:
    result = call(f"analyze --timm test_efficientnet --against '{ARCH}' {QUICK} --latency-resolution 32")
    assert result.exit_code == 0, result.output
    assert result.stdout.count(" ms as a network") == 2
    for words in ("test_efficientnet", "conv_stem", "depthwise", "stage1.0", "classifier"):
        assert words in result.stdout
    assert "measuring test_efficientnet: the whole" in result.stderr
    assert "shapes of layers" in result.stderr


def test_a_timm_model_that_does_not_take_the_resolution_gets_one_line() -> None:
    line = "analyze --timm test_vit --device cpu --engine eager --latency-resolution 72"
    assert re.search("analyze: test_vit does not run on images of 72x72 .*72", refused(line))


@pytest.mark.usefixtures("fake")
def test_a_trial_is_analysed_in_the_deployment_of_its_study(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("--budget 2 --device cpu --engine eager --latency-batch 2 --latency-classes 3").exit_code == 0
    assert "--trial 77: the study convfirst has no such candidate" in refused("analyze --trial 77")
    assert "--trial -1: the study convfirst has no such candidate" in refused("analyze --trial -1")
    assert "--study other: not in the database" in refused("analyze --trial 0 --study other")
    assert "--against 78: the study convfirst has no such candidate" in refused("analyze --trial 0 --against 78")
    asked: list[LatencyConfig] = []

    def analyse(_store: Store, subject: Any, _note: object, **_: bool) -> None:
        asked.append(subject.config)
        raise CandidateFailed("out of memory")

    monkeypatch.setattr("nas.latency.analysis.analyse", analyse)
    monkeypatch.setattr("nas.latency.devices.check_device", lambda config: torch.device("cpu"))
    assert "analyze: out of memory" in refused("analyze --trial 0 --latency-threads 2")
    deployment = asked[-1]
    assert (deployment.engine, deployment.batch_size, deployment.num_classes, deployment.threads) == ("eager", 2, 3, 2)
    # Elsewhere what suits that device: a study on a CPU says nothing of a GPU's engine and dtype.
    refused("analyze --trial 0 --device cuda")
    deployment = asked[-1]
    assert (deployment.device, deployment.engine, deployment.dtype) == ("cuda", "fused", "float16")
    assert (deployment.batch_size, deployment.num_classes) == (2, 3)
    refused("analyze --trial 0 --device cuda --engine compile --dtype float32")
    assert (asked[-1].engine, asked[-1].dtype, asked[-1].precision) == ("inductor", "float32", 0.02)


# -- Measuring again -------------------------------------------------------------------------------------------------


class Meter:
    """Measures nothing: all as the study did, and slower by so much."""

    reference_ms = 1.0

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
        return [
            replace(measured, latency=measured.latency.scaled(self.factor))
            for measured in map(FakeEvaluator().measure, archs)
        ]

    def close(self) -> None:
        pass


@pytest.fixture
def meters(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[LatencyConfig]]:
    """Puts fake meters in the place of real ones; returns where their deployments are kept."""

    def make(factor: float) -> list[LatencyConfig]:
        made: list[LatencyConfig] = []

        def meter_for(config: LatencyConfig, _anchor: ArchSpec, _reference_ms: float | None) -> Meter:
            made.append(config)
            return Meter(factor)

        monkeypatch.setattr("nas.validation.remeasure.meter_for", meter_for)
        return made

    return make


@pytest.mark.usefixtures("fake", "profiled")
def test_a_study_is_measured_in_another_deployment(meters: Callable[[float], list[LatencyConfig]]) -> None:
    assert call("--budget 6 --device cpu").exit_code == 0
    before = json.loads(call("pareto --format json").stdout)
    made = meters(2.0)
    line = "remeasure --latency-batch 8 --latency-threads 2 --engine eager --dtype bfloat16 --latency-seconds 1"
    result = call(f"{line} --latency-precision 0.2")
    assert result.exit_code == 0, result.output
    (config,) = made
    assert (config.batch_size, config.threads, config.engine, config.dtype) == (8, 2, "eager", "bfloat16")
    assert (config.seconds, config.precision, config.resolution) == (1.0, 0.2, 32)
    told = re.findall(r"^(\d)/6  trial \d+: [\d.]+ ms$", result.stdout, re.MULTILINE)
    assert told == ["1", "2", "3", "4", "5", "6"]
    assert "measuring the front in turns" in result.stdout
    assert "Pareto front of convfirst" in result.stdout
    assert f"{len(before)} networks in turns: latencies moved by +0.0% to +0.0%" in result.stdout
    assert "it stays as it was" in result.stdout
    fronts = json.loads(call("pareto --format json").stdout)
    there = [row for row in fronts if row["engine"] == "eager"]
    assert [row for row in fronts if row["engine"] != "eager"] == before
    assert [row["number"] for row in there] == [row["number"] for row in before]
    assert [row["latency_ms"] for row in there] == pytest.approx([2 * row["latency_ms"] for row in before])
    # Both are drawn, each by itself.
    drawn = call("pareto --plot front.png")
    assert drawn.exit_code == 0, drawn.output
    assert "front_1.png" in drawn.stderr
    assert "front_2.png" in drawn.stderr

    # A second time the front only, unless all are asked for.
    meters(2.0)
    assert "trial" not in call(line).stdout.partition("measuring the front")[0]
    meters(3.0)
    result = call(f"{line} --all")
    assert "6/6  trial" in result.stdout


@pytest.mark.usefixtures("fake", "profiled")
def test_a_front_of_which_all_break_the_limit_is_empty(
    meters: Callable[[float], list[LatencyConfig]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # At home, where the limit holds.
    monkeypatch.setattr(FakeEvaluator, "device", DeviceInfo.of(torch.device("cpu")))
    assert call("--budget 3 --device cpu --space small --max-latency-ms 1.5").exit_code == 0
    meters(10.0)
    result = call("remeasure")
    assert result.exit_code == 0, result.output
    assert "The front is empty: no candidate is complete, or all turned out over a limit." in result.stdout
    assert "broke the latency limit" in result.stdout
    assert "all turned out over a limit" in call("pareto").stdout
    # The search goes on from there.
    assert call("--budget 3 --device cpu --space small --max-latency-ms 1.5").exit_code == 0


# -- Leaving the house -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake", "profiled")
def test_the_front_is_exported_and_directories_are_given_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("--budget 6 --device cpu").exit_code == 0
    front = json.loads(call("pareto --format json").stdout)
    result = call("export")
    assert result.exit_code == 0, result.output
    assert "the search kept none" in result.stderr
    made = result.stdout.split()
    assert [Path(path).name[-4:] for path in made] == [f"t{member['number']:03d}" for member in front]
    assert sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "exports").iterdir()) == sorted(made)
    for line, told in (
        ("export", "--out exports: is not empty"),
        ("export --force --trial 99", "--trial 99: there is no such candidate"),
        ("export --force --top 0", "--top 0: "),
        ("export --force --min-accuracy 1.1", "--min-accuracy 1.1: is not between 0 and 1, which is 100 %"),
        ("export --force --max-latency-ms 0.000001", "--max-latency-ms 1e-06: the fastest takes"),
        ("export --force --study nosuch", "--study nosuch: not in"),
        ("export --force --format onnx", "--format onnx: .* has no weights"),
        (f"export {made[0]} --format onnx", "--format onnx: .* has no weights"),
        (f"export {made[0]} --checkpoint nowhere.pth", "--checkpoint nowhere.pth: no such file"),
        (f"bench {made[0]} --device cuda:99", "--device cuda:99: "),
        (f"bench {made[0]} --latency-batch 0", "--latency-batch 0: "),
        ("retrain --study nosuch", "--study nosuch: not in"),
        ("retrain --top 0", "--top 0: "),
        ("retrain --dominated -1", "--dominated -1: "),
        ("retrain --steps 0", "--steps 0: "),
        ("retrain --resolution 1", "--resolution 1: "),
        ("retrain --resolution 3000", "--resolution 3000: is not between 8 and 2048 pixels"),
        ("retrain --data ./nowhere", "--data ./nowhere: no such folder"),
    ):
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "exports").rglob("*")}
        assert re.search(told, refused(line)), line
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "exports").rglob("*")} == before
    arch = ArchSpec.from_json(front[0]["arch"])
    torch.save({"state_dict": arch.build(4).state_dict()}, "best.pth.tar")
    result = call(f"export {made[0]} --checkpoint best.pth.tar")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / made[0] / "config.json").read_text())["num_classes"] == 4
    assert (tmp_path / made[0] / "model.safetensors").is_file()
    # The weights of a training are in the way now.
    number = front[0]["number"]
    assert "holds the weights of best.pth.tar" in refused(f"export --force --trial {number}")
    assert call(f"export --force --trial {front[-1]['number']}").exit_code == 0
    monkeypatch.setattr("nas.export.bench.ENGINES", {name: ENGINES[name] for name in ("eager", "torchscript")})
    quickly = "--latency-seconds 0.1 --latency-precision 0.9"
    result = call(f"bench {made[0]} {quickly}")
    assert result.exit_code == 0, result.output
    assert "cpu, batch 1, 32x32, 1 CPU thread(s)" in result.stdout
    for format in ("eager", "torchscript", "torch.export"):
        assert format in result.stdout
    # A deployment of one's own is kept, but for the device.
    result = call(f"bench {made[0]} {quickly} --latency-batch 2 --dtype bfloat16")
    assert "bfloat16" in result.stdout
    assert "cpu, batch 2" in result.stdout


@pytest.mark.usefixtures("fake", "profiled", "inline")
def test_retraining_prints_networks_and_ranks(tmp_path: Path) -> None:
    assert call("--budget 6 --device cpu --proxy-batch 4 --threads 1").exit_code == 0
    picture_folder(tmp_path / "pictures", 2)
    # As the invented study's data cannot be had.
    result = call("retrain --data pictures --resolution 16 --steps 2 --top 1 --dominated 3")
    assert result.exit_code == 0, result.output
    assert "2 steps of 4 images of pictures at 16x16" in result.stdout
    assert "Kendall" in result.stdout
    assert "The front among these" in result.stdout or "No network" in result.stdout
    # Of an invented search, most candidates may be on the front.
    assert re.search(r"(\d) networks, \1 to be trained", result.stderr)
    again = call("retrain --data pictures --resolution 16 --steps 2 --top 1 --dominated 3")
    assert re.search(r"\d networks, 0 to be trained", again.stderr)


@pytest.mark.usefixtures("fake", "profiled")
def test_what_cannot_be_confirmed_gets_one_line() -> None:
    assert call("--budget 1 --device cpu --time-limit 0.000001 --study nothing").exit_code == 0
    assert "--study nothing: has no complete candidate" in refused("confirm --study nothing")
    ended = call("--budget 12 --device cpu --confirm 0")
    assert ended.exit_code == 0
    assert "hypervolume as searched" in ended.stdout
    assert "as confirmed" not in ended.stdout
    before = call("pareto --format json").stdout
    for line, told in (
        ("confirm --share 0", "--share 0: is less than one training for 12 candidates"),
        ("confirm --share 11", "--share 11.0: .*between 0 and 10"),
        ("confirm --data nosuch", "--data nosuch: "),
        ("confirm --workers 0", "--workers 0: .*between 1 and 1024"),
        ("--budget 12 --device cpu --confirm -1", "--confirm -1.0: .*between 0 and 10"),
    ):
        assert re.search(told, refused(line)), line
    assert call("pareto --format json").stdout == before
    # The same search with a share confirms what it found.
    ended = call("--budget 12 --device cpu")
    assert re.search(r"as confirmed \d\.\d{4} \(optimism [+-]\d\.\d{4}\)", ended.stdout)
    assert all(row["confirmed"] == 1 for row in json.loads(call("pareto --format json").stdout))


# -- Looking ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake", "profiled")
def test_a_report_is_made_of_whatever_a_study_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing, failures only, one, and some."""
    monkeypatch.setattr("nas.search.rounds.MAX_BARREN", 10)
    assert call("--budget 1 --device cpu --study nothing --time-limit 0.000001").exit_code == 0
    assert call("--budget 1 --device cpu --study failures --space small --max-latency-ms 0.000001").exit_code == 0
    for study, budget in (("one", 1), ("some", 6)):
        assert call(f"--budget {budget} --device cpu --study {study}").exit_code == 0
    for study in ("nothing", "failures", "one", "some"):
        result = call(f"report --out reports/{study} --study {study}")
        assert result.exit_code == 0, result.output
        assert f"made: reports/{study}/report.html" in result.stdout
        page = (tmp_path / "reports" / study / "report.html").read_text()
        assert page.startswith("<!DOCTYPE html>") or page.startswith("<!doctype html>")
        # Nobody has made baselines yet.
        assert "run_search.py baselines" in page
    assert "--study nosuch: not in" in refused("report --out r --study nosuch")


@pytest.mark.usefixtures("fake", "profiled")
def test_baselines_of_a_study_of_nothing_are_refused() -> None:
    assert call("--budget 1 --device cpu --time-limit 0.000001").exit_code == 0
    assert "--study convfirst" in refused("baselines")
    assert call("--budget 2 --device cpu").exit_code == 0
    for line, told in (
        ("--models nosuch", "--models nosuch: timm has no such model"),
        ("--models ,", "--models ,: is not a list of timm models"),
        ("--found 0", "--found 0: .*at least 1"),
        ("--steps 1", "--steps 1: .*at least 2"),
        ("--learning-rates 0.1,x", "--learning-rates 0.1,x: not numbers"),
        ("--learning-rates -1", "--learning-rates -1.0: .*positive"),
        ("--map 0", "--map 0: .*at least 1"),
    ):
        assert re.search(told, refused(f"baselines {line}")), line


@pytest.mark.usefixtures("fake", "profiled")
def test_what_cannot_be_measured_again_gets_one_line(meters: Callable[[float], list[LatencyConfig]]) -> None:
    made = meters(1.0)
    assert call("--budget 2 --device cpu --time-limit 0.000001").exit_code == 0
    assert "--study convfirst: has no complete candidate" in refused("remeasure")
    assert call("--budget 2 --device cpu --study other").exit_code == 0
    before = call("pareto --study other --format json").stdout
    for line, told in (
        ("--study nosuch", "--study nosuch: not in .*there: convfirst, other"),
        ("--study other --device tpu", "--device tpu: not a device"),
        ("--study other --device cuda:99", "--device cuda:99: "),
        ("--study other --engine nosuch", "--engine nosuch: none of"),
        ("--study other --engine fused", "--engine fused: does not run on cpu"),
        ("--study other --dtype float16", "--dtype float16: not on the CPU"),
        ("--study other --latency-batch 0", "--latency-batch 0: .*at least 1"),
        ("--study other --latency-threads 0", "--latency-threads 0: .*between 1 and 1024"),
        ("--study other --latency-seconds -1", "--latency-seconds -1.0: .*positive"),
        ("--study other --latency-precision 2", "--latency-precision 2.0: .*between 0 and 1"),
    ):
        assert re.search(told, refused(f"remeasure {line}")), line
    assert made == []
    assert call("pareto --study other --format json").stdout == before
    # A study that is being searched is left alone.
    owner = Owner(Owner.me().host, os.getppid(), psutil.Process(os.getppid()).create_time())
    with sqlite3.connect("studies/convfirst.db") as connection:
        connection.execute("update convfirst_studies set owner = ?", (str(owner),))
    assert f"is being searched by process {os.getppid()}" in refused("remeasure --study other")
    assert made == []


def test_a_machine_without_a_temporary_folder_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where /tmp is full: Python tries to write in each folder that it knows of."""

    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/var/tmp']")

    monkeypatch.setattr("tempfile.gettempdir", none)
    result = CliRunner().invoke(run_search.app, ["space"])
    assert result.exit_code == 2
    assert result.stderr == (
        "Error: TMPDIR: there is no folder for temporary files (No usable temporary directory found in ['/tmp', "
        "'/var/tmp'])\n"
    )
