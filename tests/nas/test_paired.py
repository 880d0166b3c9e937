"""The lab that trains architectures with the same seeds."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from nas.lab import paired
from nas.lab.paired import interval
from tests.conftest import make_tiny_space

SPACE = make_tiny_space(resolution=(16, 24))


def invoke(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(paired.main)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_an_interval_of_few_values_is_wide() -> None:
    assert interval([0.5, 0.5, 0.5]) == (0.5, 0.0)
    mean, half = interval([0.4, 0.6])
    # Student's t with one degree of freedom.
    assert (mean, half) == pytest.approx((0.5, 12.706 * 0.1), rel=1e-3)
    assert math.isnan(interval([0.3])[1])


@pytest.mark.slow
def test_what_was_trained_is_not_trained_again(tmp_path: Path, images: Path) -> None:
    one, other = str(SPACE.smallest()), str(SPACE.anchor())
    out = tmp_path / "found.json"
    command = [one, other, "--data", str(images), "--steps", "2", "--workers", "1", "--out", str(out)]
    code, output = invoke(*command, "--seeds", "2")
    assert code == 0, output
    stored = json.loads(out.read_text())
    found = stored["accuracies"]
    assert {line: set(by_seed) for line, by_seed in found.items()} == {one: {"0", "1"}, other: {"0", "1"}}
    found[one]["0"] = 0.125
    out.write_text(json.dumps(stored))
    code, output = invoke(*command, "--seeds", "2", "--rate", "0.001")
    assert code == 2
    assert "holds accuracies of other trainings" in output
    code, output = invoke(*command, "--seeds", "3")
    assert code == 0, output
    after = json.loads(out.read_text())["accuracies"]
    assert after[one]["0"] == 0.125
    assert set(after[other]) == {"0", "1", "2"}
    lines = [line for line in output.splitlines() if " | " in line]
    assert [len(re.findall(r"\+-[0-9.]+ %", line)) for line in lines] == [1, 2]


def test_bad_input_gets_a_line() -> None:
    code, output = invoke("nonsense")
    assert (code, output.count("\n")) == (2, 1)
    assert "'nonsense' is not an architecture" in output
