"""The lab that measures how well `--space auto` fits, on an invented device."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from nas.config import LatencyConfig
from nas.lab import ladder
from nas.lab.ladder import Timed, use
from nas.latency.values import Latency
from nas.reporting import Note
from nas.search.auto_space import Timer
from search_spaces import ArchSpec, cost, load_space


def invoke(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(ladder.main)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


@pytest.fixture(autouse=True)
def _invented(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def timer(config: LatencyConfig, note: Note) -> Iterator[Timer]:
        def time(arch: ArchSpec) -> Latency:
            ms = 0.01 + cost(arch, config.resolution, 10).macs / 1e8
            return Latency(ms, ms, ms, 10, 0.02)

        yield time

    monkeypatch.setattr("nas.search.auto_space.timer", timer)


def test_the_share_that_keeps_a_limit_and_what_it_uses() -> None:
    found = Timed(load_space("small"), (1, 2, 3, 4), (0.5, 0.9, 1.0, 1.1))
    assert use(found, 1.0) == (0.75, 1.0)
    assert use(found, 0.95) == (0.5, 0.9 / 0.95)
    assert use(found, 0.1) == (0.0, 0.0)


def test_a_table_and_a_picture(tmp_path: Path) -> None:
    code, output = invoke(
        "--limits", "0.1,1", "--networks", "20", "--draws", "2", "--drawn", "2", "--plot", str(tmp_path / "a.png")
    )
    assert code == 0, output
    lines = [line for line in output.splitlines() if "@32,48,64" in line]
    assert len(lines) == 4
    for line in lines:
        keep, used = map(int, re.findall(r"([0-9]+)%", line))
        assert 15 < keep < 85
        assert 60 < used <= 100
    assert Image.open(tmp_path / "a.png").size == (1200, 825)


def test_bad_input_gets_a_line() -> None:
    code, output = invoke("--limits", "0.1,x")
    assert (code, output.count("\n")) == (2, 1)
    assert "could not convert string to float: 'x'" in output
    code, output = invoke("--limits", "0.000001")
    assert code == 2
    assert "--max-latency-ms 1e-06" in output
