"""Blocks to hold the fused kernels against a float64 reference: pairwise-covering, made by fixed seeds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

import pytest
import torch
from torch import Tensor

from kernels.convfirst import ACTIVATE, pooled
from kernels.cost_model import GPU_SPECS
from kernels.problem import ACTIVATIONS, BlockProblem, Splittable, Tiling, conv_forms, unsupported

# Compiling takes seconds a kernel: the older GPUs are for the slow tier.
CAPABILITIES = [pytest.param(each, marks=[] if each == 90 else [pytest.mark.slow]) for each in GPU_SPECS]

AXES: dict[str, tuple[object, ...]] = {
    "batch": (1, 3),
    "height": (1, 7, 13),
    "width": (1, 7, 13),
    "channels": (8, 24, 40, 64, 72),
    "out": ("same", 8, 24, 40, 64, 72),
    "residual": (False, True),
    "kernel_size": (3, 5, 7),
    "group_width": (1, 8, 16, 32, "full"),
    "stride": (1, 2),
    "activation": ACTIVATIONS,
    "dtype": ("float16", "bfloat16", "float32"),
    "expansion": (1.0, 1.5, 2.0, 4.0),
    "block_m": (16, 32, 64),
    "block_e": (16, 32),
    "splits": (1, 2),
    "form": (0, 1),
    "rows": (1, 2, 4),
}
AT_LEAST = 80
EACH_VALUE = 4

Case = dict[str, object]


@dataclass(frozen=True)
class BlockCase:
    problem: BlockProblem
    tiling: Tiling

    def __str__(self) -> str:
        p, t = self.problem, self.tiling
        layered = "-layered" if t.launches > 1 else ""
        return (
            f"{p.batch}x{p.height}x{p.width}-{p.in_channels}-{p.hidden_channels}-{p.out_channels}-k{p.kernel_size}"
            f"g{p.group_width}s{p.stride}-{p.activation}-{p.dtype}{'-residual' if p.residual else ''}"
            f"-m{t.block_m}e{t.block_e}{t.conv}x{t.splits}r{t.rows}t{t.tiles_each}{layered}"
        )


def block_case(case: Case) -> BlockCase | None:
    """The problem and tiling that the axes' values name; None where they contradict each other."""
    channels: int = case["channels"]  # type: ignore[assignment]
    group: int = channels if case["group_width"] == "full" else case["group_width"]  # type: ignore[assignment]
    if channels % group or (case["group_width"] == "full" and channels in AXES["group_width"]):
        return None
    out: int = case["out"] if isinstance(case["out"], int) else channels
    if case["out"] == channels:
        return None
    hidden = int(channels * case["expansion"]) // 8 * 8  # type: ignore[operator]
    problem = BlockProblem(
        case["batch"], case["height"], case["width"], channels, hidden, out, case["kernel_size"], group,
        case["stride"], case["activation"], case["residual"], case["dtype"], case["splits"],
    )  # type: ignore[arg-type] # fmt: skip
    forms = conv_forms(problem)
    if case["form"] and len(forms) == 1:
        return None
    tiling = Tiling(
        case["block_m"], case["block_e"], forms[case["form"]], case["splits"], rows=case["rows"]
    )  # type: ignore[arg-type, index] # fmt: skip
    assert unsupported(problem) is None, unsupported(problem)
    return BlockCase(problem, tiling) if tiling.fits(problem) else None


def _pairs(case: Case) -> set[tuple[tuple[str, object], ...]]:
    return set(itertools.combinations(case.items(), 2))


def _cost(case: Case) -> float:
    """About proportional to the interpreter's time."""
    built = block_case(case)
    assert built is not None
    problem, tiling = built.problem, built.tiling
    return tiling.programs(problem) * (problem.kernel_size**2 + 4 * problem.hidden_channels / tiling.block_e)


def covering_cases(seed: int = 0) -> list[BlockCase]:
    """Cases in which every possible pair of two axes' values occurs, and each value `EACH_VALUE` times."""
    rng = random.Random(seed)

    def draw(fixed: Case) -> Case | None:
        for _ in range(200):
            case = {name: fixed.get(name, rng.choice(values)) for name, values in AXES.items()}
            if block_case(case) is not None:
                return case
        return None

    uncovered = {
        ((a, value_a), (b, value_b))
        for (a, values_a), (b, values_b) in itertools.combinations(AXES.items(), 2)
        for value_a in values_a
        for value_b in values_b
    }
    chosen: list[Case] = []
    while uncovered:
        pair = min(uncovered, key=str)
        drawn = [case for case in (draw(dict(pair)) for _ in range(12)) if case is not None]
        if not drawn:
            # The two values contradict each other.
            uncovered.discard(pair)
            continue

        best = max(drawn, key=lambda case: len(_pairs(case) & uncovered) / sqrt(300 + _cost(case)))
        uncovered -= _pairs(best)
        chosen.append(best)
    # Shortcuts in which both shapes change are made of three axes.
    for out, stride in itertools.product(("same", 8, 72), (1, 2)):
        chosen += [each for _ in range(EACH_VALUE // 2) if (each := draw(dict(out=out, stride=stride, residual=True)))]
    while len(chosen) < AT_LEAST + len(AXES):
        more = draw({})
        chosen += [more] if more is not None and more not in chosen else []
    return [built for built in map(block_case, chosen) if built is not None]


# Wider than the axes: several parts of channels, chunks of a full convolution, a split of more than two.
_WIDE = BlockProblem(1, 3, 3, 160, 320, 160, 3, 8, 1, "silu", True, "float16", max_splits=4)


def _square(channels: int, hidden: int, group_width: int) -> BlockProblem:
    return replace(
        _WIDE, in_channels=channels, hidden_channels=hidden, out_channels=channels, group_width=group_width
    )  # fmt: skip


WIDE_CASES = [
    BlockCase(_square(16, 32, 8), Tiling(16, 16, "mma", num_warps=8)),
    BlockCase(_square(16, 32, 8), Tiling(32, 16, "mma", num_warps=8, rows=2)),
    BlockCase(_WIDE, Tiling(16, 32, "mma", 4)),
    BlockCase(_WIDE, Tiling(16, 64, "mma", part=64)),
    BlockCase(replace(_WIDE, in_channels=320, hidden_channels=320), Tiling(16, 128, "mma")),
    BlockCase(replace(_WIDE, out_channels=512, stride=2), Tiling(16, 32, "mma")),
    BlockCase(replace(_WIDE, group_width=160, dtype="bfloat16"), Tiling(16, 32, "dense", dense_block=64)),
    BlockCase(_square(8, 64, 1), Tiling(16, 16, "fma", 4)),
    BlockCase(_square(64, 128, 8), Tiling(16, 32, "mma", out_splits=4)),
    BlockCase(_square(128, 256, 1), Tiling(16, 64, "diagonal", 2, out_splits=2)),
    BlockCase(replace(_square(64, 64, 8), out_channels=512, residual=False), Tiling(16, 32, "mma", out_splits=4)),
    BlockCase(replace(_square(64, 64, 16), out_channels=24), Tiling(16, 32, "mma", 2, out_splits=2)),
    BlockCase(_square(24, 96, 24), Tiling(16, 32, "mma")),
    BlockCase(_square(40, 40, 4), Tiling(16, 32, "mma")),
    BlockCase(replace(_square(96, 96, 8), batch=2), Tiling(32, 32, "mma", rows=2, tiles_each=2)),
    BlockCase(replace(_square(24, 72, 1), height=7, kernel_size=5), Tiling(16, 16, "fma", tiles_each=3)),
    BlockCase(replace(_square(40, 80, 1), batch=9), Tiling(32, 64, "diagonal", rows=2, tiles_each=2, part=64)),
    BlockCase(replace(_square(16, 32, 16), height=9, width=17, stride=2), Tiling(128, 32, "mma", rows=8)),
    # Columns in pairs, of which the last of an odd row has one; two spans of columns; parts of 32 channels.
    BlockCase(replace(_square(40, 80, 8), batch=5, height=7, width=7), Tiling(128, 16, "pairs", rows=4)),
    BlockCase(replace(_square(16, 32, 2), width=17, kernel_size=7), Tiling(64, 16, "pairs", rows=2, tiles_each=2)),
    BlockCase(replace(_square(24, 48, 8), height=5, width=9, activation="gelu"), Tiling(64, 16, "pairs", rows=2)),
    BlockCase(
        replace(_square(64, 64, 4), width=34, kernel_size=5, dtype="bfloat16"),
        Tiling(256, 32, "pairs", rows=4, part=32),
    ),
]


# Each layer in a launch of its own: every form, awkward sizes, several slices of channels.
LAYERED_CASES = [
    BlockCase(problem, Tiling(block_m, 16, form, rows=rows, part=part, conv_stages=stages, launches=3))
    for problem, block_m, form, rows, part, stages in (
        (_WIDE, 16, "mma", 1, 32, 1),
        (replace(_square(40, 80, 8), batch=2, height=7, width=5), 32, "mma", 2, 16, 3),
        (replace(_square(24, 24, 1), height=13, activation="gelu"), 16, "fma", 1, 16, 1),
        (replace(_square(64, 256, 1), width=17, dtype="bfloat16"), 64, "diagonal", 4, 64, 1),
        (replace(_square(96, 144, 32), stride=2, out_channels=136, activation="relu"), 16, "mma", 1, 32, 1),
        (replace(_square(72, 104, 1), height=9, kernel_size=5, activation="hard_swish"), 32, "fma", 2, 16, 1),
        (replace(_square(32, 128, 16), out_channels=200, residual=False, kernel_size=7), 16, "mma", 1, 32, 1),
        (replace(_square(64, 64, 8), dtype="float32", height=5, width=9), 16, "mma", 1, 64, 1),
        (replace(_square(64, 64, 8), batch=2, height=5, width=19), 64, "pairs", 2, 32, 1),
        # Enough pixels for the larger products.
        (replace(_square(16, 128, 8), batch=3, height=48, width=48), 64, "mma", 4, 16, 1),
    )
]


def make_operands(problem: BlockProblem, seed: int, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Input (N, C, H, W), channels_last, and layers, in the problem's dtype, of about unit variance throughout."""
    rng = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, problem.dtype)

    def draw(*shape: int, fan_in: int = 1) -> Tensor:
        return (torch.randn(shape, generator=rng, dtype=torch.float64) / sqrt(fan_in)).to(device, dtype)

    channels, hidden, out = problem.in_channels, problem.hidden_channels, problem.out_channels
    group, size = problem.group_width, problem.kernel_size
    layers = [
        draw(channels, group, size, size, fan_in=group * size * size), draw(channels),
        draw(hidden, channels, 1, 1, fan_in=channels), draw(hidden),
        draw(out, hidden, 1, 1, fan_in=hidden), draw(out),
    ]  # fmt: skip
    x = draw(problem.batch, channels, problem.height, problem.width)
    return x.contiguous(memory_format=torch.channels_last), layers


def new_scratch(problem: Splittable, tiling: Tiling, device: torch.device) -> Tensor:
    """What split tiles need of the caller."""
    return torch.empty(tiling.partial_bytes(problem) // 4, dtype=torch.float32, device=device)


UNIT_ROUNDOFF = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24}
ACCUMULATION = 2**-24
# Largest slope of an activation, and error of the kernels' tanh against 1 (PTX: tanh.approx.f32, 2^-11).
SLOPE = 1.13
TANH_ERROR = 2**-10


def error_bound(x: Tensor, layers: Sequence[Tensor], problem: BlockProblem) -> Tensor:
    """The most that rounding can make of each output, to first order, from accumulation depth and dtype.

    (N, C', H', W'), float64.

    One rounding of y, of h and of the output to the dtype; every sum of n terms in float32, n of its roundoffs of the
    terms' magnitudes; all carried through the layers' magnitudes.
    """
    conv2d = torch.nn.functional.conv2d
    x, layers = x.double().cpu(), [layer.double().cpu() for layer in layers]
    conv, conv_bias, expand, expand_bias, project, project_bias = layers
    unit, groups = UNIT_ROUNDOFF[problem.dtype], problem.in_channels // problem.group_width
    place = dict(stride=problem.stride, padding=problem.kernel_size // 2, groups=groups)

    def depth(terms: int) -> float:
        return (terms + 2) * ACCUMULATION

    y = conv2d(x, conv, conv_bias, **place)  # type: ignore[arg-type]
    y_magnitude = conv2d(x.abs(), conv.abs(), conv_bias.abs(), **place)  # type: ignore[arg-type]
    y_error = unit * y.abs() + depth(problem.kernel_size**2 * problem.group_width) * y_magnitude
    before = conv2d(y, expand, expand_bias)
    before_error = conv2d(y_error, expand.abs()) + depth(problem.in_channels) * conv2d(
        y.abs(), expand.abs(), expand_bias.abs()
    )
    h = ACTIVATE[problem.activation](before)
    inexact = problem.dtype != "float32" and problem.activation in ("silu", "gelu")
    h_error = SLOPE * before_error + unit * h.abs() + (TANH_ERROR if inexact else 4 * ACCUMULATION) * before.abs()
    out = conv2d(h, project, project_bias)
    magnitude = conv2d(h.abs(), project.abs(), project_bias.abs())
    shortcut, added = (pooled(each, problem) if problem.residual else torch.zeros_like(out) for each in (x, x.abs()))
    # Of a stride of 2, four pixels are summed.
    error = conv2d(h_error, project.abs()) + depth(problem.hidden_channels + 4) * (magnitude + added)
    return error + unit * (out + shortcut).abs()
