from __future__ import annotations

import pytest
import torch
import typer
from typer.testing import CliRunner

from kernels import exhaustive
from kernels.tune import Choice


def invoke(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(exhaustive.main)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_ranks_are_the_cost_models() -> None:
    ranked: list[object] = list("abcdef")
    assert exhaustive.ranks(Choice(("b", "a", "e"), "tuned", (1.0, 2.0, 3.0), 9.0), ranked) == (2, 1.0)
    assert exhaustive.ranks(Choice(("e", "a", "b"), "tuned", (1.0, 1.5, 3.0), 9.0), ranked) == (5, 1.5)


def test_without_a_gpu_it_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, output = invoke()
    assert code == 2
    assert "no CUDA device" in output


@pytest.mark.gpu
def test_tilings_are_timed_on_a_gpu() -> None:
    code, output = invoke("--rows", "1", "--most", "8")
    assert code == 0, output
    assert "of 1 blocks" in output
