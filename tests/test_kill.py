"""Real processes, really killed: the search is started as a user starts it, on a real (tiny) training."""

from __future__ import annotations

import os
import random
import re
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kernels.device_info import DeviceInfo
from nas.latency.device_profile import DeviceProfile, store_profile
from studies import Store
from tests.conftest import TINY_TOML

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
KILLS = 10
BUDGET = 90
FIRST_SECONDS = 8.0


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A search of the tiny space on twelve pictures, some 0.2 s a candidate."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(6):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{index}.png")
    (tmp_path / "tiny.toml").write_text(TINY_TOML)
    flags = {
        "--space": "tiny.toml", "--data": "pictures", "--proxy-steps": "2", "--proxy-batch": "4", "--threads": "1",
        "--device": "cpu", "--latency-seconds": "0.001", "--budget": str(BUDGET),
    }  # fmt: skip
    return [sys.executable, "-u", str(ROOT / "run_search.py"), *(word for pair in flags.items() for word in pair)]


@pytest.fixture
def profiled(tmp_path: Path) -> None:
    """A database that knows the device already, of which the measuring takes seconds at every first start."""
    (tmp_path / "studies").mkdir()
    store = Store.open(f"sqlite:///{tmp_path / 'studies' / 'convfirst.db'}", create=True)
    assert store is not None
    store_profile(store, DeviceInfo.of(torch.device("cpu")), "float32", 1, DeviceProfile(1e10, 4e10, 2e-6))
    store.close()


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
        # Ignored where the tests run in the background of a shell, which a child would inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    """Read the process's output up to a line with `words` in it."""
    assert process.stdout is not None
    read = ""
    for line in process.stdout:
        read += line
        if words in line:
            return
    raise AssertionError(f"the process ended without {words!r}:\n{read}")


def finish(process: subprocess.Popen[str]) -> str:
    # Generous: another test's processes may have the cores.
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def complete(folder: Path) -> int:
    """Complete candidates in the database, which may not be there yet."""
    path = folder / "studies" / "convfirst.db"
    if not path.is_file():
        return 0
    with sqlite3.connect(path) as connection:
        query = "select count(*) from convfirst_candidates where state = 'complete'"
        return int(connection.execute(query).fetchone()[0])


def check(folder: Path, budget: int) -> None:
    """Exactly `budget` distinct complete candidates, and the same ones in Optuna's tables as in ours."""
    connection = sqlite3.connect(folder / "studies" / "convfirst.db")
    ours = dict(connection.execute("select trial_id, arch_id from convfirst_candidates where state = 'complete'"))
    assert len(ours) == len(set(ours.values())) == budget
    states = Counter(state for (state,) in connection.execute("select state from trials"))
    assert states["RUNNING"] == 0
    complete = {trial_id for (trial_id,) in connection.execute("select trial_id from trials where state = 'COMPLETE'")}
    assert complete == set(ours)
    query = "select c.trial_id from convfirst_candidates c join trial_values v on v.trial_id = c.trial_id"
    valued = [trial_id for (trial_id,) in connection.execute(f"{query} and v.objective = 0 and v.value = c.accuracy")]
    assert set(valued) == complete
    numbers = [number for (number,) in connection.execute("select number from trials")]
    assert sorted(numbers) == list(range(len(numbers)))
    connection.close()


def test_killed_at_ten_random_moments_it_ends_with_exactly_its_budget(command: list[str], tmp_path: Path) -> None:
    moments = random.Random(0)
    finished = 0
    for kill in range(KILLS):
        process = start(command, tmp_path)
        if kill < 4:
            # While the anchor is measured, the database and the study are made, and the first candidates come.
            wait_for(process, "loading data")
            time.sleep(moments.uniform(0, FIRST_SECONDS))
        else:
            wait_for(process, "/")
            time.sleep(moments.uniform(0, 1.0))
        assert process.poll() is None, "the search ended before it was killed: BUDGET is too small for this machine"
        process.kill()
        output, _ = process.communicate()
        # What was once told to be finished is never lost.
        finished = max([finished, *(int(count) for count in re.findall(rf"^(\d+)/{BUDGET} ", output, re.MULTILINE))])
        assert complete(tmp_path) >= finished
    output = finish(start(command, tmp_path))
    assert "budget met" in output
    check(tmp_path, BUDGET)
    assert f"going on: {BUDGET} of {BUDGET}" in finish(start(command, tmp_path))
    check(tmp_path, BUDGET)


@pytest.mark.usefixtures("profiled")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_it_soon_and_says_how_to_go_on(
    command: list[str], tmp_path: Path, sent: signal.Signals
) -> None:
    process = start(command, tmp_path)
    wait_for(process, f"1/{BUDGET}")
    # As a terminal sends Ctrl-C: to the whole process group.
    os.killpg(process.pid, sent)
    begin = time.monotonic()
    output, _ = process.communicate(timeout=30)
    seconds = time.monotonic() - begin
    assert process.returncode == 130
    assert "the same command goes on from there" in output
    assert "Traceback" not in output
    # Not a benchmark: a search that waited for its candidate, or for its threads, would take far longer on a real one.
    assert seconds < 10
    budget = 5
    finish(start([*command[:-1], str(budget)], tmp_path))
    check(tmp_path, budget)


@pytest.mark.usefixtures("profiled")
def test_a_second_process_on_the_same_study_is_refused(command: list[str], tmp_path: Path) -> None:
    first = start(command, tmp_path)
    try:
        wait_for(first, f"1/{BUDGET}")
        second = start(command, tmp_path)
        output, _ = second.communicate(timeout=200)
        assert second.returncode == 2
        assert f"is being searched by process {first.pid}" in output
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()


@pytest.mark.usefixtures("profiled")
def test_on_a_terminal_a_live_line_shows_the_course(command: list[str], tmp_path: Path) -> None:
    import pty

    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*command[:-1], "3"], cwd=tmp_path, stdout=slave, stderr=slave, stdin=slave,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "160"},
    )  # fmt: skip
    os.close(slave)
    seen = b""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if select.select([master], [], [], 1.0)[0]:
            try:
                seen += os.read(master, 65536)
            except OSError:
                # The other end is closed: the process has ended.
                break
    assert process.wait(timeout=10) == 0
    text = seen.decode()
    for part in (
        "3/3",
        "accuracy",
        "latency",
        "best",
        "front",
        "hypervolume",
        "Pareto front of convfirst",
        "budget met",
    ):
        assert part in text
