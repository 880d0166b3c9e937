"""Stem, head and MBConv against float64 references: on a GPU as compiled, elsewhere under Triton's interpreter."""

from __future__ import annotations

import random
from dataclasses import replace
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import cost_model, head, mbconv, ops, stem
from kernels.head import HeadProblem, HeadTiling
from kernels.mbconv import MBConvProblem
from kernels.problem import BlockProblem, Tiling
from kernels.stem import StemProblem, StemTiling
from kernels.tune import Kernel
from tests.kernels.cases import new_scratch

# Root mean square of the error over that of the output: a few roundings of the dtype, far below any wrong tap.
TOLERANCE = {"float32": 1e-6, "float16": 1.5e-3, "bfloat16": 1.2e-2}


def draw(*shape: int, fan_in: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / sqrt(fan_in)


def relative_error(out: Tensor, exact: Tensor) -> float:
    assert bool(out.isfinite().all())
    return float((out.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def check(
    kernel: Kernel, pack: Any, problem: Any, tiling: Any, shape: tuple[int, ...], layers: list[Tensor],
    device: torch.device,
) -> None:  # fmt: skip
    dtype = getattr(torch, problem.dtype)
    layers = [layer.to(device, dtype) for layer in layers]
    x = draw(*shape, seed=9).to(device, dtype).contiguous(memory_format=torch.channels_last)
    exact = kernel.layer_by_layer(x.double(), [layer.double() for layer in layers], problem)
    weights = pack(layers, problem)
    if isinstance(problem, MBConvProblem):
        weights = [*weights, new_scratch(problem, tiling, device)]
    out = kernel.launch(x, weights, problem, tiling)
    assert out.shape == exact.shape
    assert relative_error(out, exact) < TOLERANCE[problem.dtype]


STEM = StemProblem(2, 13, 10, 3, 24, 3, 2, "silu", "float16")


@pytest.mark.kernels
@pytest.mark.parametrize(
    "problem",
    [
        STEM,
        replace(STEM, dtype="float32", activation="gelu"),
        replace(STEM, dtype="bfloat16", stride=1, activation="hard_swish"),
        replace(STEM, kernel_size=5, in_channels=1, out_channels=8, activation="relu"),
        replace(STEM, kernel_size=7, in_channels=4, out_channels=40, activation="none"),
        replace(STEM, height=1, width=1, batch=1, out_channels=160),
    ],
    ids=str,
)
def test_stem(problem: StemProblem, kernel_device: torch.device, poisoned: None) -> None:
    weight = draw(problem.out_channels, problem.in_channels, problem.kernel_size, problem.kernel_size, fan_in=27)
    layers = [weight, draw(problem.out_channels, seed=1)]
    shape = (problem.batch, problem.in_channels, problem.height, problem.width)
    assert stem.unsupported(problem) is None
    for tiling in {StemTiling(32), stem.tilings(problem)[0]}:
        check(ops.STEM, stem.pack, problem, tiling, shape, layers, kernel_device)


HEAD = HeadProblem(3, 49, 72, 136, 10, "silu", "float16")


@pytest.mark.kernels
@pytest.mark.parametrize("pools", [True, False])
@pytest.mark.parametrize(
    "problem",
    [
        HEAD,
        replace(HEAD, dtype="float32", activation="gelu", pixels=1),
        replace(HEAD, dtype="bfloat16", activation="relu", classes=9, batch=1),
        replace(HEAD, activation="hard_swish", pixels=33, batch=17, classes=130),
        replace(HEAD, activation="none", in_channels=8, features=8),
        replace(HEAD, activation="none", features=0),
        replace(HEAD, activation="none", features=0, batch=17, classes=130, dtype="bfloat16"),
    ],
    ids=str,
)
def test_head(problem: HeadProblem, pools: bool, kernel_device: torch.device, poisoned: None) -> None:
    inputs, layers = problem.in_channels, []
    if problem.features:
        layers = [draw(problem.features, inputs, 1, 1, fan_in=inputs), draw(problem.features, seed=1)]
        inputs = problem.features
    layers += [draw(problem.classes, inputs, fan_in=inputs, seed=2), draw(problem.classes, seed=3)]
    shape = (problem.batch, problem.in_channels, problem.pixels, 1)
    assert head.unsupported(problem) is None
    assert head.tilings(problem)
    check(ops.HEAD, head.pack, problem, HeadTiling(pools, block_k=64), shape, layers, kernel_device)


MBCONV = MBConvProblem(2, 7, 9, 24, 96, 40, 3, 1, 1, "silu", True, False, "float16", max_splits=2)


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("problem", "tiling"),
    [
        (MBCONV, Tiling(32, 32, "fma")),
        (MBCONV, Tiling(64, 32, "fma", rows=4)),
        (replace(MBCONV, stride=2, kernel_size=5), Tiling(32, 16, "diagonal", rows=2)),
        (replace(MBCONV, group_width=8), Tiling(64, 32, "mma", splits=2, rows=4)),
        (MBCONV, Tiling(16, 32, "diagonal", splits=2)),
        (replace(MBCONV, stride=2, kernel_size=5, activation="gelu", dtype="float32"), Tiling(16, 16, "fma")),
        (replace(MBCONV, stride=2, kernel_size=7, dtype="bfloat16", activation="relu"), Tiling(16, 16, "diagonal")),
        (replace(MBCONV, out_channels=24, residual=True, group_width=8), Tiling(32, 32, "mma")),
        (replace(MBCONV, group_width=32, activation="hard_swish", height=1, width=1), Tiling(16, 32, "mma", splits=2)),
        (replace(MBCONV, in_channels=96, expands=False), Tiling(32, 64, "fma")),
        (replace(MBCONV, in_channels=96, out_channels=96, expands=False, residual=True), Tiling(32, 32, "diagonal")),
        (replace(MBCONV, out_channels=160, hidden_channels=72), Tiling(16, 32, "fma", part=64)),
    ],
    ids=str,
)
def test_mbconv(problem: MBConvProblem, tiling: Tiling, kernel_device: torch.device, poisoned: None) -> None:
    hidden, into, out = problem.hidden_channels, problem.in_channels, problem.out_channels
    group, size = problem.group_width, problem.kernel_size
    layers = [
        draw(hidden, into, 1, 1, fan_in=into), draw(hidden, seed=1),
        draw(hidden, group, size, size, fan_in=group * size * size, seed=2), draw(hidden, seed=3),
        draw(out, hidden, 1, 1, fan_in=hidden, seed=4), draw(out, seed=5),
    ]  # fmt: skip
    assert mbconv.unsupported(problem) is None
    assert tiling.fits(problem)
    shape = (problem.batch, into, problem.height, problem.width)
    check(ops.MBCONV, mbconv.pack, problem, tiling, shape, layers if problem.expands else layers[2:], kernel_device)


@pytest.mark.slow
def test_every_supported_problem_has_tilings_and_none_takes_more_splits_than_there_is_scratch_for() -> None:
    rng = random.Random(0)
    for hidden in range(8, 2600, 8):
        batch, dtype = rng.choice([1, 3, 128]), rng.choice(["float16", "float32"])
        out = rng.randrange(8, 520, 8)
        most = rng.choice([1, 2, 8, 32])
        wide = replace(
            MBCONV, batch=batch, hidden_channels=hidden, out_channels=out, dtype=dtype, max_splits=most
        )  # fmt: skip
        found = mbconv.tilings(wide)
        assert found
        assert all(tiling.splits <= most for tiling in found), wide
    for _ in range(60):
        channels, batch = rng.randrange(8, 520, 8), rng.choice([1, 3, 128])
        dtype, kernel_size = rng.choice(["float16", "float32"]), rng.choice([3, 5, 7])
        group = rng.choice([1, 8, channels])
        hidden = rng.randrange(1, 9) * channels
        block = BlockProblem(
            batch, 14, 14, channels, hidden, channels, kernel_size, group, 1, "silu", True, dtype,
            rng.choice([1, 2, 8, 32]),
        )  # fmt: skip
        for gpu in cost_model.GPU_SPECS.values():
            ranked = cost_model.ranked(block, gpu)
            assert ranked, block
            assert all(tiling.splits <= block.max_splits for tiling in ranked), block
        assert stem.tilings(replace(STEM, batch=batch, out_channels=min(channels, 256), dtype=dtype))
        assert head.tilings(replace(HEAD, batch=batch, in_channels=channels, dtype=dtype))


@pytest.mark.parametrize(
    ("module", "problem", "changes", "told"),
    [
        (stem, STEM, dict(kernel_size=2), "kernel_size=2"),
        (stem, STEM, dict(in_channels=64), "in_channels=64"),
        (stem, STEM, dict(out_channels=12), "out_channels=12"),
        (stem, STEM, dict(stride=4), "stride=4"),
        (stem, STEM, dict(activation="tanh"), "activation='tanh'"),
        (stem, STEM, dict(width=0), "width=0"),
        (head, HEAD, dict(classes=0), "classes=0"),
        (head, HEAD, dict(features=12), "features=12"),
        (head, HEAD, dict(dtype="int8"), "dtype='int8'"),
        (mbconv, MBCONV, dict(hidden_channels=12), "hidden_channels=12"),
        (mbconv, MBCONV, dict(group_width=3), "group_width=3"),
        (mbconv, MBCONV, dict(out_channels=1024), "out_channels=1024"),
        (mbconv, MBCONV, dict(kernel_size=1), "kernel_size=1"),
        (mbconv, MBCONV, dict(stride=3), "stride=3"),
    ],
)
def test_what_is_not_supported_is_named(module: Any, problem: Any, changes: dict[str, object], told: str) -> None:
    assert module.unsupported(problem) is None
    why = module.unsupported(replace(problem, **changes))
    assert why is not None
    assert told in why
