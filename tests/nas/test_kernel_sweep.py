from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from kernels import packing
from kernels.problem import BlockProblem, Tiling
from nas.lab import kernel_sweep
from search_spaces import SearchSpace, load_space
from tests.conftest import TINY_TOML, make_tiny_space

FINE = make_tiny_space(name="fine", resolution=(16, 24), stem_stride=(1, 2), shortcut=("identity", "pooled"))


@pytest.mark.parametrize(
    "space",
    [FINE, *map(load_space, ("small", "imagenet", "rung6@32,48,64", "rung11@224"))],
    ids=lambda space: space.name,
)
def test_every_block_that_is_sampled_is_among_those_swept(space: SearchSpace) -> None:
    specs = set(kernel_sweep.block_specs(space))
    rng = random.Random(0)
    for _ in range(50):
        arch = space.sample(rng)
        size = arch.shown(space.default_resolution) // arch.stem_stride
        for block in arch.blocks:
            assert (size, block) in specs
            size = -(-size // block.stride)


def invoke(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(kernel_sweep.main)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


@pytest.mark.slow
def test_a_sweep_writes_a_line_a_block_and_goes_on(tmp_path: Path) -> None:
    toml, out = tmp_path / "tiny.toml", tmp_path / "out.jsonl"
    toml.write_text(TINY_TOML)
    command = ["--space", str(toml), "--batch", "1", "--limit", "2", "--workers", "1"]
    code, output = invoke(*command, "--out", str(out))
    assert code == 0, output
    assert "0 known" in output
    assert "2 of 2 first tilings have nothing to complain of" in output
    # As a run that was killed leaves it.
    with out.open("a") as file:
        file.write('{"problem": {"batch"')
    code, output = invoke(*command, "--out", str(out))
    assert code == 0, output
    assert "2 known" in output
    rows = [json.loads(line) for line in out.read_text().splitlines() if line.endswith("}")]
    assert len({json.dumps(row["problem"]) for row in rows}) == len(rows) == 4
    assert all(row["tilings"][0]["statics"]["registers"] <= 255 for row in rows)


@pytest.mark.slow
def test_what_was_compiled_is_also_run(tmp_path: Path) -> None:
    toml, out = tmp_path / "tiny.toml", tmp_path / "out.jsonl"
    toml.write_text(TINY_TOML)
    command = ["--space", str(toml), "--batch", "128", "--limit", "1", "--workers", "1", "--out", str(out)]
    code, output = invoke(*command, "--run")
    assert code == 0, output
    assert "4 of 4 tilings have nothing to complain of" in output
    # Lines of the two kinds do not stand for each other.
    assert "0 known" in invoke(*command)[1]


def test_a_kernel_that_computes_wrong_is_complained_of(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = BlockProblem(128, 16, 16, 16, 32, 16, 3, 8, 1, "relu", True, "float16")
    tiling = Tiling(16, 16, "mma")
    assert kernel_sweep._emulated_complaints(problem, tiling, 90) == []
    large = replace(problem, in_channels=128, hidden_channels=512, out_channels=128)
    told = kernel_sweep._emulated_complaints(large, Tiling(128, 128, "mma", num_stages=3, conv_stages=3), 89)
    assert "shared memory" in told[0]
    packed = packing.pack
    monkeypatch.setattr(
        packing, "pack", lambda layers, problem: replace(packed(layers, problem), expand_bias=torch.zeros(128))
    )
    assert "computes wrong" in kernel_sweep._emulated_complaints(problem, tiling, 90)[0]
    monkeypatch.setattr(packing, "pack", lambda layers, problem: replace(packed(layers, problem), conv=layers[0][:8]))
    assert "outside the tensors" in kernel_sweep._emulated_complaints(problem, tiling, 90)[0]


@pytest.mark.parametrize(
    ("arguments", "told"), [(("--capability", "70"), "--capability"), (("--space", "nosuch"), "nosuch")]
)
def test_bad_input_is_named(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    code, output = invoke(*arguments, "--out", str(out))
    assert code == 2
    assert told in output
    assert not out.exists()
