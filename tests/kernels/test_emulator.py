"""The compiled kernels, run without a GPU; and that whatever the emulator watches for it does see.

All tests marked `kernels` run so, too: `python -m pytest -m kernels --emulate 90`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import contest, convfirst, cost_model, layered, ops, stem, tune
from kernels.compiling import Task, compile_together
from kernels.convfirst import launch, layer_by_layer
from kernels.cost_model import GPU_SPECS
from kernels.lab.emulator import EmulationError, Traffic, emulated
from kernels.lab.emulator import launch as emulated_launch
from kernels.lab.emulator.memory import GlobalMemory
from kernels.lab.emulator.program import Program
from kernels.lab.emulator.ptx import parse
from kernels.lab.emulator.values import described
from kernels.lab.inspect import compile_block, shorthand
from kernels.packing import pack
from kernels.problem import BlockProblem, Tiling
from kernels.timing import cpu_clock
from tests.kernels.cases import BlockCase, covering_cases, error_bound, make_operands, new_scratch
from tests.kernels.test_inspect import COVERING, problem_of
from tests.kernels.test_other_kernels import STEM, check, draw

CPU = torch.device("cpu")


# -- Instructions ----------------------------------------------------------------------------------------------------

HEADER = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid {threads}
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<99>;
	.reg .b64 %rd<9>;
"""
# Each thread's own four bytes of the output.
ADDRESS = """
	ld.param.b64 %rd1, [kernel_param_0];
	mov.u32 %r1, %tid.x;
	shl.b32 %r2, %r1, 2;
	cvt.u64.u32 %rd2, %r2;
	add.s64 %rd3, %rd1, %rd2;
"""


def run(body: str, threads: int = 32, elements: int | None = None) -> np.ndarray:
    """What the threads leave in a tensor of 32-bit words that begins as zeros."""
    out = torch.zeros(elements or threads, dtype=torch.int32)
    code = parse(HEADER.format(threads=threads) + ADDRESS + body + "\n}\n")
    Program(code, {"kernel_param_0": out.data_ptr()}, GlobalMemory([out]), 4096, (0, 0, 0)).run()
    return out.numpy().view(np.uint32)


def value_of(body: str) -> int:
    """%r9, after these instructions."""
    return int(run(body + "st.global.b32 [%rd3], %r9;")[0])


def bits(value: float) -> str:
    return f"0f{np.float32(value).view(np.uint32):08X}"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("mov.b32 %r8, -7; mul.hi.s32 %r9, %r8, 5;", 0xFFFFFFFF),
        ("mov.b32 %r8, -7; mul.hi.u32 %r9, %r8, 5;", 4),
        ("mov.b32 %r8, -7; mad.lo.s32 %r9, %r8, 5, 3;", 0xFFFFFFE0),
        ("mov.b32 %r8, -7; mul.wide.s32 %rd4, %r8, 5; shr.s64 %rd5, %rd4, 32; cvt.u32.u64 %r9, %rd5;", 0xFFFFFFFF),
        ("mov.b32 %r8, -7; mul.wide.u32 %rd4, %r8, 5; shr.u64 %rd5, %rd4, 32; cvt.u32.u64 %r9, %rd5;", 4),
        ("mov.b32 %r8, -7; div.s32 %r9, %r8, 2;", 0xFFFFFFFD),
        ("mov.b32 %r8, -7; rem.s32 %r9, %r8, 2;", 0xFFFFFFFF),
        ("mov.b32 %r8, 1; shl.b32 %r9, %r8, 32;", 0),
        ("mov.b32 %r8, -8; shr.s32 %r9, %r8, 40;", 0xFFFFFFFF),
        ("mov.b32 %r8, -8; shr.u32 %r9, %r8, 1;", 0x7FFFFFFC),
        ("mov.b32 %r8, 0xABCD; bfe.u32 %r9, %r8, 8, 4;", 0xB),
        ("mov.b32 %r8, 0xABCD; bfe.s32 %r9, %r8, 8, 4;", 0xFFFFFFFB),
        ("mov.b32 %r7, 0x33221100; mov.b32 %r8, 0x77665544; prmt.b32 %r9, %r7, %r8, 0x5410;", 0x55441100),
        ("mov.b32 %r8, 5; setp.lt.u32 %p1, %r8, 6; selp.b32 %r9, 1, 2, %p1;", 1),
        ("mov.b32 %r8, -5; setp.lt.u32 %p1, %r8, 6; selp.b32 %r9, 1, 2, %p1;", 2),
        (f"mov.b32 %r8, {bits(np.nan)}; setp.gtu.f32 %p1, %r8, {bits(1)}; selp.b32 %r9, 1, 2, %p1;", 1),
        (f"mov.b32 %r8, {bits(np.nan)}; setp.gt.f32 %p1, %r8, {bits(1)}; selp.b32 %r9, 1, 2, %p1;", 2),
        # The first source is the upper half; 1 is 3C00 and 3F80, 2 is 4000 in both.
        (f"mov.b32 %r7, {bits(1)}; mov.b32 %r8, {bits(2)}; cvt.rn.f16x2.f32 %r9, %r7, %r8;", 0x3C004000),
        (f"mov.b32 %r7, {bits(1)}; mov.b32 %r8, {bits(2)}; cvt.rn.bf16x2.f32 %r9, %r7, %r8;", 0x3F804000),
        # Ties go to even: 1 + 2^-8 lies between 1 and 1 + 2^-7, 1 + 3 * 2^-8 between that and 1 + 2^-6.
        (f"mov.b32 %r8, {bits(1 + 2**-8)}; cvt.rn.bf16x2.f32 %r9, %r8, {bits(1 + 3 * 2**-8)};", 0x3F803F82),
        (f"mov.b32 %r8, {bits(np.nan)}; max.f32 %r9, %r8, {bits(2)};", 0x40000000),
        (f"mov.b32 %r8, {bits(np.nan)}; max.NaN.f32 %r7, %r8, {bits(2)}; setp.nan.f32 %p1, %r7, %r7; "
         "selp.b32 %r9, 1, 2, %p1;", 1),
        ("mov.b32 %r7, 0x22221111; mov.b32 {%rs1, %rs2}, %r7; mov.b32 %r9, {%rs2, %rs1};", 0x11112222),
    ],
)  # fmt: skip
def test_instructions_do_what_the_isa_says(body: str, expected: int) -> None:
    assert value_of(body) == expected


def test_a_tanh_is_as_inexact_as_the_hardwares() -> None:
    xs = np.linspace(-4, 4, 33, dtype=np.float32)
    found = [np.uint32(value_of(f"mov.b32 %r8, {bits(x)}; tanh.approx.f32 %r9, %r8;")).view(np.float32) for x in xs]
    error = np.abs(np.array(found) - np.tanh(xs))
    assert 0 < error.max() <= 2**-11


def test_threads_part_and_meet_again() -> None:
    found = run(
        """
        setp.lt.u32 %p1, %r1, 20;
        mov.b32 %r9, 0;
        @%p1 bra $L_FEW;
        add.s32 %r9, %r9, 100;
        bra.uni $L_END;
    $L_FEW:
        setp.lt.u32 %p2, %r1, 3;
        @!%p2 bra $L_END;
        add.s32 %r9, %r9, 1;
    $L_END:
        bar.sync 0;
        add.s32 %r9, %r9, 1000;
        st.global.b32 [%rd3], %r9;
        ret;
        """
    )
    assert found.tolist() == [1001] * 3 + [1000] * 17 + [1100] * 12


def test_a_shuffle_crosses_lanes_of_a_warp() -> None:
    found = run("shfl.sync.bfly.b32 %r9, %r1, 3, 31, -1; st.global.b32 [%rd3], %r9;", threads=64)
    assert found.tolist() == [lane ^ 3 for lane in range(64)]


def test_additions_to_one_place_are_all_counted_and_told_apart() -> None:
    found = run("atom.global.gpu.acq_rel.add.u32 %r9, [%rd1 + 0], 2; st.global.b32 [%rd3+4], %r9;", elements=33)
    assert found[0] == 64
    assert sorted(found[1:].tolist()) == list(range(0, 64, 2))


# -- What it watches for ---------------------------------------------------------------------------------------------

OWN = "st.shared.b32 [%r2], %r1;"
NEIGHBOURS = "xor.b32 %r3, %r2, 128;"
COPY = "cp.async.ca.shared.global [%r2], [%rd3], 0x4; cp.async.commit_group;"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("ld.global.b32 %r9, [%rd3+4];", "outside the tensors"),
        ("st.global.b32 [%rd3+-4], %r1;", "outside the tensors"),
        ("ld.global.v2.b32 {%r8, %r9}, [%rd3];", "misaligned"),
        ("ld.shared.b32 %r9, [%r2];", "nobody wrote"),
        (OWN + "ld.shared.b32 %r9, [%r2+4096];", "of 4096 shared"),
        (OWN + NEIGHBOURS + "ld.shared.b32 %r9, [%r3];", "reads what another wrote"),
        (OWN + "bar.sync 0; ld.shared.b32 %r9, [%r2];" + NEIGHBOURS + "st.shared.b32 [%r3], %r1;", "overwrites"),
        (OWN + NEIGHBOURS + "st.shared.b32 [%r3], %r1;", "two warps write"),
        ("mov.b32 %r3, 0; st.shared.b32 [%r3], %r1;", "different values to one place"),
        (
            "mov.b32 %r3, 0; st.shared.b32 [%r3], 5; bar.sync 0; ld.shared.b32 %r9, [%r3]; setp.gt.u32 %p1, %r1, 31;"
            "@%p1 st.shared.b32 [%r3], 6;",
            "overwrites",
        ),
        ("add.sat.s32 %r9, %r1, 1;", ".sat is not known"),
        (COPY + "bar.sync 0; ld.shared.b32 %r9, [%r2];", "being copied"),
        (COPY + "cp.async.wait_group 1; ld.shared.b32 %r9, [%r2];", "being copied"),
        ("setp.lt.u32 %p1, %r1, 20; @%p1 bra $L_ONE; bar.sync 0; $L_ONE: mov.b32 %r9, 0;", "not for all"),
        ("add.s32 %r9, %r8, 1;", "%r8 has no value"),
        ("vabsdiff4.u32 %r9, %r1, %r1, 0;", "not known"),
    ],
)
def test_what_a_kernel_does_wrong_is_told(body: str, told: str) -> None:
    with pytest.raises(EmulationError, match=re.escape(told)):
        run(body, threads=64)


def test_what_is_right_passes() -> None:
    exchanged = OWN + "bar.sync 0;" + NEIGHBOURS + "ld.shared.b32 %r9, [%r3]; st.global.b32 [%rd3], %r9;"
    assert run(exchanged, threads=64).tolist() == [*range(32, 64), *range(32)]
    copied = COPY + "cp.async.wait_group 0; ld.shared.b32 %r9, [%r2]; add.s32 %r9, %r9, 1; st.global.b32 [%rd3], %r9;"
    assert run(copied, threads=64).tolist() == [1] * 64


PIPELINED = BlockCase(
    BlockProblem(2, 7, 9, 64, 256, 64, 3, 8, 1, "silu", True, "float16"),
    Tiling(64, 32, "mma", num_stages=3, conv_stages=3),
)


@pytest.mark.parametrize(
    ("statement", "instead", "told"),
    [
        (r"bar\.sync\s+0;", "", "no barrier between|before that was waited for|nobody wrote"),
        (r"cp\.async\.wait_group\s+\d+;", "cp.async.wait_group 99;", "waited for|nobody wrote"),
        (r"(@!?%p\d+\s+)?cp\.async\.c[ag][^;]*;", "", "nobody wrote"),
        (r"wgmma\.wait_group\.sync\.aligned\s+\d+;", "", "not waited for|product still reads"),
        (r"\[ (%rd\d+) \+ 0 \]", r"[ \1 + 1048576 ]", "outside the tensors"),
    ],
)
def test_a_kernel_that_is_spoilt_is_found_out(
    statement: str, instead: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert error_share(PIPELINED, 90) <= 1
    good = compile_block(PIPELINED.problem, PIPELINED.tiling, 90)[0].asm["ptx"]
    bad = re.sub(statement, instead, good)
    assert bad != good
    monkeypatch.setattr(emulated_launch, "Program", lambda code, *rest: Program(parse(bad), *rest))
    with pytest.raises(EmulationError, match=told):
        error_share(PIPELINED, 90)


@pytest.mark.parametrize("major_rows", [False, True])
@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_a_described_matrix_lies_in_a_place_of_its_own(mode: int, major_rows: bool) -> None:
    row_bytes = {0: 16, 1: 128, 2: 64, 3: 32}[mode]
    stride, leading = 8 * row_bytes, 16 * row_bytes
    descriptor = (mode << 62) | ((stride >> 4) << 32) | ((leading >> 4) << 16) | (4096 >> 4)
    addresses = described(descriptor, 8 * row_bytes // 16, 16, major_rows)
    assert len(set(addresses.ravel().tolist())) == addresses.size
    assert addresses.min() >= 4096
    # Eight elements that follow one another along the contiguous dimension stay together.
    runs = (addresses.T if major_rows else addresses)[:, :8]
    assert (np.diff(runs, axis=1) == 2).all()


BLOCK = BlockProblem(1, 8, 16, 64, 256, 64, 3, 8, 1, "silu", True, "float16")
WIDER = replace(BLOCK, in_channels=128, hidden_channels=512, out_channels=128)


def test_bank_conflicts_and_sectors_are_counted() -> None:
    warps = np.zeros(32, np.int64)
    lanes = np.arange(32)
    for stride_words, conflicts in ((1, 1), (2, 2), (32, 32), (0, 1), (33, 1)):
        traffic = Traffic()
        traffic.count_shared(4 * stride_words * lanes, 4, warps)
        assert (traffic.shared_wavefronts, traffic.shared_least) == (conflicts, 1)
    # Sixteen bytes a thread go by eight threads; two warps go apart.
    traffic = Traffic()
    traffic.count_shared(16 * np.arange(64), 16, np.repeat([0, 1], 32))
    assert traffic.shared_wavefronts == traffic.shared_least == 8
    traffic.count_global(np.arange(32) * 4 + 2**40, 4)
    traffic.count_global(np.arange(32) * 64 + 2**40, 2)
    assert (traffic.global_bytes, traffic.global_sectors) == (128 + 64, 4 + 32)


# -- The kernels -----------------------------------------------------------------------------------------------------


def error_share(case: BlockCase, capability: int, traffic: Traffic | None = None) -> float:
    """The emulated kernel's error, as a share of what rounding can make of it."""
    problem = case.problem
    x, layers = make_operands(problem, seed=1, device=CPU)
    with emulated(capability, traffic):
        out = launch(x, pack(layers, problem), problem, case.tiling, new_scratch(problem, case.tiling, CPU))
    exact = layer_by_layer(x.double(), [layer.double() for layer in layers], problem)
    # NaN is passed on.
    return float(((out.double() - exact).abs() / error_bound(x, layers, problem)).max())


@pytest.mark.parametrize("case", covering_cases()[::12], ids=str)
def test_blocks_of_the_covering_set(case: BlockCase, poisoned: None) -> None:
    assert error_share(case, 80) <= 1


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id="-".join(map(str, row)), marks=[pytest.mark.slow] if row[2] > 64 else [])  # type: ignore[operator]
        for row in COVERING
        if row[2] <= 320  # type: ignore[operator]
    ],
)
def test_the_likeliest_tiling_for_hopper_computes_right(row: tuple[object, ...], poisoned: None) -> None:
    """Tilings of the real problems, products of warp groups among them, on a few of their pixels."""
    traffic = Traffic()
    problem = problem_of(row)
    tiling = next(tiling for tiling in cost_model.ranked(problem, GPU_SPECS[90]) if tiling.launches == 1)
    few = replace(problem, batch=min(problem.batch, 2), height=min(problem.height, 7), width=min(problem.width, 9))
    assert tiling.fits(few), shorthand(tiling)
    assert error_share(BlockCase(few, tiling), 90, traffic) <= 1, shorthand(tiling)
    assert ("wgmma" in traffic.instructions) == (tiling.block_m >= 64)


@pytest.mark.parametrize(
    ("problem", "tiling"),
    [
        (BLOCK, Tiling(128, 64, "mma", num_stages=2, conv_stages=3)),
        (BLOCK, Tiling(64, 64, "mma", num_stages=3)),
        (BLOCK, Tiling(32, 64, "mma", num_stages=3, conv_stages=3)),
        (replace(BLOCK, max_splits=2), Tiling(64, 64, "mma", 2, num_stages=2, conv_stages=3)),
        (replace(BLOCK, group_width=1), Tiling(128, 128, "fma", num_warps=8, num_stages=3)),
        (replace(BLOCK, group_width=1), Tiling(64, 64, "diagonal", num_stages=3, conv_stages=3)),
        (WIDER, Tiling(128, 128, "mma", num_warps=8, num_stages=3, conv_stages=3)),
        (BLOCK, Tiling(64, 64, "mma", num_stages=2, rows=4)),
        (BLOCK, Tiling(128, 64, "mma", num_stages=2, rows=2)),
        (WIDER, Tiling(128, 64, "mma", num_warps=8, num_stages=2, rows=4)),
        (BLOCK, Tiling(64, 64, "mma", num_stages=2, conv_stages=3, rows=4, tiles_each=2)),
        (replace(BLOCK, group_width=1, kernel_size=5), Tiling(64, 64, "fma", num_stages=2, rows=4)),
        (WIDER, Tiling(64, 128, "mma", num_warps=8, num_stages=2, conv_stages=3, rows=2)),
        (replace(BLOCK, width=32), Tiling(128, 64, "pairs", num_warps=8, num_stages=2, rows=4, tiles_each=2)),
        (replace(WIDER, height=4, width=64), Tiling(256, 64, "pairs", num_warps=8, num_stages=3, rows=4, part=64)),
        (replace(WIDER, group_width=128), Tiling(64, 64, "dense", num_warps=8, num_stages=3, conv_stages=3)),
    ],
    ids=lambda value: shorthand(value) if isinstance(value, Tiling) else f"{value.in_channels}g{value.group_width}",
)
def test_shared_memory_is_used_without_conflicts_and_as_much_as_the_cost_model_counts(
    problem: BlockProblem, tiling: Tiling
) -> None:
    traffic = Traffic()
    assert error_share(BlockCase(problem, tiling), 90, traffic) <= 1
    # Without tensor cores a convolution's rows are joined in registers, and their channels lie in one bank then.
    joined = tiling.conv == "fma" and tiling.rows > 1
    assert traffic.shared_wavefronts <= (1.25 if joined else 1.02) * traffic.shared_least
    # A tile reads whole pixels; what splits exchange is read by halves of sectors.
    assert traffic.global_sectors <= (1.05 if tiling.splits == 1 else 1.1) * traffic.global_bytes / 32
    counted = traffic.on_chip_bytes / traffic.programs
    assert 0.7 * counted <= cost_model.on_chip_bytes(problem, tiling, wgmma=True) <= 1.2 * counted
    issued = sum(count for name, count in traffic.instructions.items() if name != "mov") * 32 * tiling.num_warps
    assert (
        (0.6 if tiling.conv == "dense" else 0.75) * issued <= cost_model.issue_slots(problem, tiling) <= 1.25 * issued
    )


@pytest.mark.parametrize(
    ("problem", "tiling"),
    [
        # 45 columns in three tiles, each with rows that end in the second.
        (BlockProblem(3, 6, 15, 40, 80, 24, 3, 8, 1, "gelu", False, "bfloat16"), Tiling(64, 32, "mma", rows=4)),
        (
            BlockProblem(3, 9, 15, 40, 80, 24, 5, 8, 2, "relu", True, "float32"),
            Tiling(32, 32, "mma", rows=2, tiles_each=5),
        ),
        (
            BlockProblem(2, 6, 15, 24, 48, 24, 3, 1, 1, "silu", True, "bfloat16"),
            Tiling(64, 16, "diagonal", conv_stages=3, rows=4, tiles_each=3),
        ),
        (BlockProblem(2, 6, 15, 24, 48, 24, 3, 1, 1, "silu", True, "float16", 2), Tiling(32, 16, "fma", 2, rows=2)),
        (
            BlockProblem(2, 9, 15, 48, 80, 56, 3, 8, 2, "gelu", True, "float16"),
            Tiling(32, 16, "mma", rows=2, part=16, launches=3),
        ),
    ],
    ids=lambda value: shorthand(value) if isinstance(value, Tiling) else value.dtype,
)
@pytest.mark.slow
@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
def test_tiles_of_rows_with_offsets_of_32_and_64_bits(
    problem: BlockProblem, tiling: Tiling, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wide:
        monkeypatch.setattr(convfirst, "WIDE_ELEMENTS", 0)
        monkeypatch.setattr(layered, "WIDE_ELEMENTS", 0)
    for capability in (80, 90):
        assert error_share(BlockCase(problem, tiling), capability) <= 1


def test_a_stem(poisoned: None) -> None:
    weight = draw(STEM.out_channels, STEM.in_channels, STEM.kernel_size, STEM.kernel_size, fan_in=27)
    shape = (STEM.batch, STEM.in_channels, STEM.height, STEM.width)
    with emulated(90):
        check(ops.STEM, stem.pack, STEM, stem.tilings(STEM)[0], shape, [weight, draw(STEM.out_channels, seed=1)], CPU)


@pytest.fixture
def tuner_at_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tuner on CPU tensors: no CUDA device to make current, and one sample of the CPU's clock."""

    def seconds(runs: dict[Any, Any], *rest: object) -> dict[Any, float]:
        return {name: cpu_clock(run, 1) for name, run in runs.items()}

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(contest, "one_sample", seconds)
    monkeypatch.setattr(contest, "samples_in_turns", seconds)
    with emulated(90):
        yield


def test_the_tuner_compiles_side_by_side_checks_and_times(tuner_at_home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = BlockProblem(1, 3, 5, 16, 32, 16, 3, 8, 1, "relu", True, "float16")
    x, layers = make_operands(problem, seed=1, device=CPU)
    weights = [*vars(pack(layers, problem)).values(), x]
    task = Task(ops.BLOCK, problem, x, weights, layers)
    right, wrong = [Tiling(16, 16, "mma", num_stages=stages) for stages in (1, 2)]
    compile_together([(task, right), (task, wrong)])
    compiled = ops.convfirst.convfirst_kernel.device_caches[90][0]
    before = len(compiled)
    assert before >= 2
    launched = ops.BLOCK.launch

    def half_wrong(x: Tensor, weights: list[Tensor], problem: BlockProblem, tiling: Tiling) -> Tensor:
        out = launched(x, weights, problem, tiling)
        return out + 1 if tiling == wrong else out

    spoilt = replace(task, kernel=replace(ops.BLOCK, launch=half_wrong))
    with pytest.warns(UserWarning, match="computes .* wrong"):
        choice = tune.time_tilings(spoilt, [right, wrong])
    assert choice.tilings == (right,)
    assert len(choice.times_ms) == 1
    assert choice.layers_ms is not None
    # Nothing was left to compile.
    assert len(compiled) == before


# -- Bad input -------------------------------------------------------------------------------------------------------


def test_an_unknown_capability_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="capability=75 is none of 80, 89, 90"), emulated(75):
        pass


def test_outside_nothing_is_emulated() -> None:
    with emulated(90):
        assert ops.run_on_cpu()
    assert not ops.run_on_cpu()
