"""What the compiler makes of the tilings that would be tuned first, for GPUs that need not be here."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from kernels import cost_model, head, mbconv, stem
from kernels.head import HeadProblem
from kernels.lab import inspect
from kernels.lab.inspect import Statics, block_statics, compile_for, read_statics
from kernels.mbconv import MBConvProblem
from kernels.problem import BlockProblem, Tiling
from kernels.stem import StemProblem
from tests.kernels.cases import CAPABILITIES

# batch, map, C, E, C', k, group width, stride, activation, dtype, most splits: every width of channels, form of
# convolution, kernel size, stride, activation and 16-bit dtype, small batches (split tiles) and large ones.
COVERING = [
    (128, 56, 64, 256, 64, 3, 8, 1, "silu", "float16", 32),
    (128, 112, 32, 64, 32, 3, 1, 1, "relu", "float16", 32),
    (128, 28, 128, 512, 128, 3, 16, 1, "gelu", "bfloat16", 32),
    (128, 14, 256, 1024, 256, 5, 8, 1, "silu", "float16", 32),
    (128, 7, 512, 2048, 512, 3, 32, 1, "hard_swish", "float16", 32),
    (128, 56, 96, 384, 96, 7, 1, 1, "silu", "float16", 32),
    (128, 56, 64, 192, 128, 5, 1, 2, "relu", "bfloat16", 32),
    (128, 28, 160, 960, 192, 3, 32, 2, "silu", "float16", 32),
    (32, 14, 320, 1280, 320, 3, 8, 1, "silu", "float16", 32),
    (32, 16, 40, 160, 24, 7, 8, 1, "gelu", "float16", 32),
    (1, 56, 64, 256, 64, 3, 8, 1, "silu", "float16", 32),
    (1, 28, 128, 256, 128, 7, 1, 1, "relu", "float16", 2),
    (1, 14, 256, 1024, 256, 3, 8, 1, "silu", "bfloat16", 4),
    (1, 7, 512, 2048, 512, 5, 16, 1, "silu", "float16", 32),
    (1, 14, 384, 2304, 384, 3, 1, 2, "hard_swish", "float16", 4),
    (1, 32, 24, 72, 24, 3, 24, 1, "silu", "float16", 1),
    (1, 16, 48, 192, 96, 5, 16, 2, "gelu", "float16", 8),
    (8, 14, 128, 512, 128, 3, 128, 1, "silu", "float16", 32),
]


def problem_of(row: tuple[object, ...]) -> BlockProblem:
    batch, size, channels, hidden, out, kernel_size, group, stride, activation, dtype, splits = row
    residual = stride == 1 and channels == out
    return BlockProblem(
        batch, size, size, channels, hidden, out, kernel_size, group, stride, activation, residual, dtype, splits
    )  # type: ignore[arg-type] # fmt: skip


MBCONV = MBConvProblem(128, 28, 28, 64, 256, 64, 5, 1, 1, "silu", True, True, "float16")
STEM = StemProblem(128, 224, 224, 3, 32, 3, 2, "gelu", "bfloat16")
HEAD = HeadProblem(128, 49, 384, 1280, 1000, "silu", "float16")
_HEAD_CONSTANTS = {"IN": 384, "PADDED_IN": 384, "OUT": 1280, "ACTIVATION": "silu", "WIDE": False}
_POOL = {"BLOCK_K": 64, "BLOCK_P": 32, "PIXEL_STEPS": 2}
MBCONVS = [MBCONV, replace(MBCONV, kernel_size=3, group_width=8), replace(MBCONV, kernel_size=3, group_width=32)]
# Kernel, constants, dtype, warps, whether it is a product.
OTHERS = [
    *(
        (mbconv.conv_project_kernel, mbconv.constants(problem, tiling), problem.dtype, tiling.num_warps, True)
        for problem in MBCONVS
        for tiling in mbconv.tilings(problem)
    ),
    (stem.stem_kernel, stem.constants(STEM, stem.tilings(STEM)[0]), STEM.dtype, 4, True),
    (head.pool_linear_kernel, {**_HEAD_CONSTANTS, **_POOL, "BLOCK_N": 16}, HEAD.dtype, 4, False),
    (head.pool_kernel, {"IN": 384, "WIDE": False, **_POOL}, HEAD.dtype, 4, False),
    (
        head.linear_kernel,
        {**_HEAD_CONSTANTS, "BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "STAGES": 3}, HEAD.dtype, 4, True,
    ),
]  # fmt: skip


# Those that change the shape, with a pooled shortcut.
POOLED = [replace(problem, residual=True) for problem in map(problem_of, COVERING) if not problem.residual]


def test_the_set_is_small() -> None:
    assert (len(COVERING) + len(POOLED)) * len(cost_model.GPU_SPECS) + len(OTHERS) <= 90


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other[0].__name__)
def test_the_other_kernels_compile_and_do_not_spill(other: tuple[Any, dict[str, object], str, int, bool]) -> None:
    kernel, fixed, dtype, warps, is_product = other
    statics = read_statics(compile_for(kernel, fixed, dtype, warps, 90))
    assert statics.complaints(90, dtype if is_product else "float32") == []
    assert bool(sum(statics.tensor_core.values())) == is_product


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "problem",
    [*map(problem_of, COVERING), *POOLED],
    ids=lambda problem: "-".join(str(value).lower() for value in astuple(problem)),
)
def test_the_first_tiling_compiles_fits_does_not_spill_and_uses_tensor_cores(
    problem: BlockProblem, capability: int
) -> None:
    tiling = cost_model.ranked(problem, cost_model.GPU_SPECS[capability])[0]
    statics = block_statics(problem, tiling, capability)
    assert not statics.complaints(capability, problem.dtype), inspect.shorthand(tiling)
    # With three launches the tiling is the convolution's, whose blocks are too small for Hopper's products.
    if capability == 90 and tiling.block_m >= 64 and tiling.launches == 1:
        assert statics.tensor_core["HGMMA"], "Hopper's own products are not used"
    if capability < 90:
        assert not statics.tensor_core["HGMMA"]
    # Pixels and weights come in 16 bytes a thread; narrower loads are biases and a depthwise convolution's weights.
    assert statics.global_loads.get(128, 0) > 0


PACKED_TANH = """
.version 8.6
.target sm_{target}
.address_size 64
.visible .entry kernel(.param .u64 kernel_param_0) {{
    .reg .b32 %r<2>; .reg .b64 %rd<1>;
    ld.param.u64 %rd0, [kernel_param_0];
    ld.global.b32 %r0, [%rd0];
    tanh.approx.f16x2 %r1, %r0;
    st.global.b32 [%rd0], %r1;
    ret;
}}
"""


@pytest.mark.parametrize("target", ["80", "89", "90a"])
def test_a_packed_tanh_takes_two_special_functions(target: str, tmp_path: Path) -> None:
    """This is why activations do not use it. If it fails, the hardware's own instruction may have become one."""
    source, cubin = tmp_path / "tanh.ptx", tmp_path / "tanh.cubin"
    source.write_text(PACKED_TANH.format(target=target))
    inspect._run("ptxas", f"-arch=sm_{target}", str(source), "-o", str(cubin))
    code = inspect._run("nvdisasm", "-c", str(cubin))
    assert code.count("MUFU.TANH.F16") == code.count("MUFU") == 2


ROWS = Tiling(64, 64, "mma", conv_stages=3, rows=4)


FLOAT32 = (*COVERING[0][:-2], "float32", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "tiling"),
    [
        *((row, None) for row in COVERING[:5]),
        (FLOAT32, replace(ROWS, block_m=128, rows=8)),
        (FLOAT32, replace(ROWS, block_m=128, num_warps=8, conv_stages=1)),
        (FLOAT32, Tiling(128, 64, "mma", num_warps=8, conv_stages=3)),
        (FLOAT32, Tiling(64, 16, "mma", num_warps=4, conv_stages=1, rows=2)),
        ((1, 14, 320, 640, 320, 7, 320, 1, "silu", "float32", 1), Tiling(32, 16, "dense", num_warps=8, num_stages=1)),
        (COVERING[0], ROWS),
        (COVERING[0], replace(ROWS, tiles_each=2)),
        (COVERING[0], replace(ROWS, block_m=128, num_warps=8, tiles_each=2)),
        (COVERING[5], Tiling(64, 32, "fma", rows=4)),
        (COVERING[2], Tiling(128, 128, "mma", num_warps=8, conv_stages=3, rows=4)),
    ],
    ids=str,
)
def test_shared_memory_is_counted_as_the_compiler_takes_it(row: tuple[object, ...], tiling: Tiling | None) -> None:
    problem = problem_of(row)
    tiling = tiling or cost_model.ranked(problem)[0]
    compiled = block_statics(problem, tiling, 90).shared_bytes
    assert 0.9 * compiled <= cost_model.shared_bytes(problem, tiling) <= 1.2 * compiled


@pytest.mark.parametrize("conv_stages", [1, 3])
@pytest.mark.parametrize("rows", [1, 4])
def test_what_a_step_of_the_convolution_loads_passes_one_barrier(rows: int, conv_stages: int) -> None:
    """Left to itself the compiler waits behind each load before it begins the next: of seven taps, seven times."""
    tiling = Tiling(128, 64, "mma", num_warps=8, conv_stages=conv_stages, rows=rows)
    problem = problem_of(COVERING[0])
    small, large = (block_statics(replace(problem, kernel_size=size), tiling, 90) for size in (3, 7))
    assert large.barriers == small.barriers
    if rows > 1:
        assert sum(large.global_loads.values()) > sum(small.global_loads.values())


def test_a_kernel_that_spills_or_does_not_fit_is_complained_of() -> None:
    problem = problem_of(COVERING[4])
    statics = block_statics(problem, Tiling(128, 64, "mma", num_stages=3), 90)
    told = statics.complaints(90, "float16")
    assert any("shared memory" in each for each in told)
    assert any("spill" in each for each in told)
    assert statics.registers == 255
    bare = Statics(32, 0, 0, 0, {"HGMMA": 0, "HMMA": 0}, {}, 0)
    assert bare.complaints(90, "float16") == ["no tensor-core instruction"]
    assert bare.complaints(90, "float32") == []


def invoke(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(inspect.main)
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_the_command_shows_a_table() -> None:
    code, output = invoke("--channels", "32", "--capability", "90", "--tilings", "1", "--run")
    assert code == 0, output
    assert "HGMMA" in output
    assert "32 -> 128 -> 32" in output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--capability", "70"), "70"),
        (("--channels", "12"), "in_channels=12"),
        (("--kernel-size", "4"), "kernel_size=4"),
    ],
)
def test_bad_input_is_named(arguments: tuple[str, ...], told: str) -> None:
    code, output = invoke(*arguments)
    assert code == 2
    assert told in output


def test_under_the_interpreter_it_is_said_why_not() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kernels.lab.inspect"], env={"TRITON_INTERPRET": "1", "PATH": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


@pytest.mark.gpu
def test_what_is_counted_for_the_gpu_at_hand_holds_there() -> None:
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor not in cost_model.GPU_SPECS:
        pytest.skip(f"no limits are known for compute capability {major}.{minor}")
    shared = torch.cuda.get_device_properties().shared_memory_per_block_optin
    assert shared == cost_model.GPU_SPECS[10 * major + minor].shared_bytes
