"""A whole search that times its candidates with the fused kernels: on a GPU, or under Triton's interpreter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kernels.device_functions import run_on_cpu
from nas.config import LatencyConfig
from nas.latency.engines import deploy
from run_search import app
from search_spaces import load_space
from tests.conftest import INTERPRETED, TINY_TOML


# Interpreted, a search of two networks takes minutes.
@pytest.mark.slow
@pytest.mark.kernels
def test_a_search_with_the_fused_engine(tmp_path: Path, sqlite_url: str, kernel_device: torch.device) -> None:
    if run_on_cpu() and not INTERPRETED:
        pytest.skip("a search knows a GPU and the interpreter: what it does with emulated kernels was not tested")
    space = tmp_path / "tiny.toml"
    space.write_text(TINY_TOML)
    command = ["--budget", "2", "--space", str(space), "--storage", sqlite_url, "--proxy-steps", "3"]
    if INTERPRETED:
        command += ["--device", "cpu", "--engine", "fused", "--latency-resolution", "8"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    front = CliRunner().invoke(app, ["pareto", "--storage", sqlite_url, "--format", "json"])
    rows = json.loads(front.output)
    assert rows
    # On CUDA by default.
    assert {row["engine"] for row in rows} == {"fused"}
    assert all(row["latency_ms"] > 0 and row["accuracy"] > 0 for row in rows)


@pytest.mark.kernels
def test_the_engine_deploys_a_fused_network(kernel_device: torch.device) -> None:
    network = load_space("small").smallest().build(10).eval().to(kernel_device)
    x = torch.randn(1, 3, 8, 8, device=kernel_device).contiguous(memory_format=torch.channels_last)
    config = LatencyConfig(device=str(kernel_device), engine="fused", dtype="float32")
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        module = deploy(network, config, x)
        torch.testing.assert_close(module(x), network(x), rtol=1e-4, atol=1e-4)
    assert all(status.fused for status in module.fusion)
