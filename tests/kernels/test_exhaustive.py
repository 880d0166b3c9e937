from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from kernels import cost_model
from kernels.cost_model import H200
from kernels.lab import exhaustive
from kernels.lab.benchmark import block_problem
from kernels.lab.benchmark_rows import BLOCKS, Block
from kernels.tune import Choice


def invoke(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(exhaustive.main)
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_ranks_are_the_cost_models() -> None:
    ranked: list[object] = list("abcdef")
    assert exhaustive.ranks(Choice(("b", "a", "e"), "tuned", (1.0, 2.0, 3.0), 9.0), ranked) == (2, 1.0)
    assert exhaustive.ranks(Choice(("e", "a", "b"), "tuned", (1.0, 1.5, 3.0), 9.0), ranked) == (5, 1.5)
    assert exhaustive.ranks(Choice(("x", "a"), "tuned", (1.0, 2.0), 9.0), ranked) == (None, 2.0)


def record(row: Block, factor: float) -> dict[str, Any]:
    """As if every tiling took what is counted of it, but for the third, which takes `factor` times that."""
    problem = block_problem(row, row.layers(torch.float16, torch.device("meta")), torch.float16)
    tilings = cost_model.ranked(problem)[:12]
    counted = {tiling: 1e3 * cost_model.estimate(problem, tiling) for tiling in tilings}
    counted[tilings[2]] *= factor
    by_time = sorted(counted, key=counted.__getitem__)
    choice = Choice(tuple(by_time), "tuned", tuple(counted[tiling] for tiling in by_time), 9.0)
    return {**exhaustive.record_of(row, problem, choice, H200), "identity": {"device": "a GPU"}}


def test_times_of_another_machine_are_held_against_the_cost_model(tmp_path: Path) -> None:
    path = tmp_path / "tilings.jsonl"
    # The first line of a block is an older one.
    lines = [record(BLOCKS[0], 0.1), record(BLOCKS[0], 1.0), record(BLOCKS[1], 0.5)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    code, output = invoke("--times", str(path))
    assert code == 0, output
    assert "among the first 3 for 2 of 2 blocks" in output
    first, second = (line.split("│") for line in output.splitlines() if line.startswith("│"))
    assert [cell.strip() for cell in first[6:9]] == ["1", "1.00", "1.00"]
    assert [cell.strip() for cell in second[6:8]] == ["3", "1.00"]
    # A fastest tiling that is offered no more is a miss; half a line at the end, of a run that was killed, is nothing.
    lines[2]["tilings"][0]["block_e"] = 48
    path.write_text(json.dumps(lines[2]) + "\n" + json.dumps(lines[2])[:50])
    output = invoke("--times", str(path))[1]
    assert "for 0 of 1 blocks" in output
    assert "not offered" in output


@pytest.mark.parametrize(
    "content", ["", "{}", "no json", "[]", "3", '{"kind": "tilings", "name": "x", "identity": {"device": 1}}']
)
def test_a_file_of_something_else_is_refused_by_name(content: str, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(content)
    code, output = invoke("--times", str(path))
    assert code == 2
    assert "some.jsonl" in output.replace("\n", "")
    assert invoke("--times", str(tmp_path / "nosuch"))[0] == 2


def test_without_a_gpu_it_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, output = invoke()
    assert code == 2
    assert "no CUDA device" in output


@pytest.mark.gpu
def test_tilings_are_timed_on_a_gpu(tmp_path: Path) -> None:
    code, output = invoke("--rows", "1", "--most", "8", "--out", str(tmp_path))
    assert code == 0, output
    assert "of 1 blocks" in output
    assert "of 1 blocks" in invoke("--times", str(tmp_path / "tilings.jsonl"))[1]
