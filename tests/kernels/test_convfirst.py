"""The fused block against a float64 reference: on a GPU as compiled, elsewhere under Triton's interpreter."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch

from kernels.convfirst import launch, layer_by_layer, pooled
from kernels.packing import BlockWeights, pack
from kernels.problem import PAIR, BlockProblem, Tiling, parts, unsupported
from tests.kernels.cases import (
    AT_LEAST,
    AXES,
    EACH_VALUE,
    LAYERED_CASES,
    WIDE_CASES,
    BlockCase,
    covering_cases,
    error_bound,
    make_operands,
    new_scratch,
)

CASES = covering_cases()


def test_the_cases_cover_every_value_often_and_are_reproducible() -> None:
    assert len(CASES) >= AT_LEAST
    assert [str(case) for case in CASES] == [str(case) for case in covering_cases()]
    problems, tilings = [case.problem for case in CASES], [case.tiling for case in CASES]
    for name in ("batch", "height", "width", "kernel_size", "stride", "activation", "dtype"):
        counted = Counter(getattr(problem, name) for problem in problems)
        assert set(counted) == set(AXES[name])
        assert min(counted.values()) >= EACH_VALUE, (name, counted)
    widths = Counter(problem.in_channels for problem in problems)
    assert set(widths) == set(AXES["channels"])
    assert min(widths.values()) >= EACH_VALUE
    groups = Counter(
        "full" if problem.group_width == problem.in_channels else problem.group_width for problem in problems
    )
    assert all(groups[value] >= EACH_VALUE for value in (1, 8, 16, 32, "full")), groups
    forms = Counter(tiling.conv for tiling in tilings)
    assert all(forms[form] >= EACH_VALUE for form in ("mma", "diagonal", "fma", "dense")), forms
    # Pairs need more columns than most of these have.
    assert sum(case.tiling.conv == "pairs" for case in (*CASES, *WIDE_CASES)) >= EACH_VALUE
    assert Counter(tiling.splits for tiling in tilings)[2] >= EACH_VALUE
    by_rows = Counter((tiling.rows > 1, tiling.conv) for tiling in tilings)
    assert all(by_rows[True, form] >= EACH_VALUE for form in ("mma", "diagonal", "fma")), by_rows
    # Shortcuts by stride, and to more, fewer and equal channels.
    wider = Counter(
        (problem.stride, (problem.out_channels > problem.in_channels) - (problem.out_channels < problem.in_channels))
        for problem in problems
        if problem.residual
    )
    assert all(wider[stride, sign] >= EACH_VALUE for stride in (1, 2) for sign in (-1, 0, 1)), wider
    # A sample of pairs, read from the problems themselves.
    for kernel_size, dtype in itertools.product(AXES["kernel_size"], AXES["dtype"]):
        assert any(problem.kernel_size == kernel_size and problem.dtype == dtype for problem in problems)


@pytest.mark.parametrize("out_channels", [16, 8, 24])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_shortcut_is_the_mean_of_the_pixels_that_there_are(stride: int, out_channels: int) -> None:
    problem = BlockProblem(2, 5, 6, 16, 32, out_channels, 3, 8, stride, "relu", True, "float32")
    x = torch.randn(2, 16, 5, 6, generator=torch.Generator().manual_seed(0))
    added = pooled(x, problem)
    assert added.shape == (2, out_channels, problem.out_height, problem.out_width)
    for image, channel, row, column in itertools.product(range(2), range(out_channels), range(3), range(3)):
        patch = (
            x[image, channel, stride * row :, stride * column :][:stride, :stride] if channel < 16 else x.new_zeros(1)
        )
        torch.testing.assert_close(added[image, channel, row, column], patch.mean())
    elements = x[:, : min(16, out_channels)].numel()
    assert problem.shortcut_elements == elements
    assert replace(problem, residual=False).shortcut_elements == 0


@pytest.mark.kernels
@pytest.mark.parametrize("case", [*CASES, *WIDE_CASES, *LAYERED_CASES], ids=str)
def test_numerics(case: BlockCase, kernel_device: torch.device, poisoned: None) -> None:
    problem = case.problem
    x, layers = make_operands(problem, seed=1, device=kernel_device)
    out = launch(x, pack(layers, problem), problem, case.tiling, new_scratch(problem, case.tiling, kernel_device))
    assert out.shape == (problem.batch, problem.out_channels, problem.out_height, problem.out_width)
    assert out.is_contiguous(memory_format=torch.channels_last)
    exact = layer_by_layer(x.double(), [layer.double() for layer in layers], problem).cpu()
    error = (out.double().cpu() - exact).abs()
    excess = error / error_bound(x, layers, problem)
    # Within what rounding can do; NaN fails the comparison.
    assert bool((excess <= 1).all()), f"{excess.max():.3g} of the bound"


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_error_is_at_most_twice_that_of_torch_layer_by_layer(
    dtype: str, kernel_device: torch.device, poisoned: None
) -> None:
    problem = BlockProblem(2, 9, 11, 64, 256, 64, 3, 8, 1, "silu", True, dtype)
    x, layers = make_operands(problem, seed=2, device=kernel_device)
    exact = layer_by_layer(x.double(), [layer.double() for layer in layers], problem)
    fused = launch(x, pack(layers, problem), problem, Tiling(32, 32, "mma"), x)
    layered = layer_by_layer(x, layers, problem)
    own, torchs = ((each.double() - exact).square().mean().sqrt() for each in (fused, layered))
    assert own <= 2 * torchs


@pytest.mark.kernels
def test_splits_leave_the_counters_at_zero_and_give_the_same_each_time(
    kernel_device: torch.device, poisoned: None
) -> None:
    problem = BlockProblem(1, 7, 7, 64, 128, 64, 3, 8, 1, "relu", True, "float16", max_splits=8)
    x, layers = make_operands(problem, seed=3, device=kernel_device)
    weights = pack(layers, problem)
    tiling = Tiling(16, 16, "mma", splits=8)
    scratch = new_scratch(problem, tiling, kernel_device)
    once, again, more = (launch(x, weights, problem, tiling, scratch) for _ in range(3))
    assert torch.equal(once, again)
    assert torch.equal(once, more)


@pytest.mark.kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "hard_swish"])
def test_output_is_non_finite_wherever_the_reference_is(
    activation: str, value: float, kernel_device: torch.device
) -> None:
    problem = BlockProblem(1, 7, 7, 24, 48, 24, 3, 8, 1, activation, True, "float16")
    x, layers = make_operands(problem, seed=4, device=kernel_device)
    x[0, 3, 2, 5] = value
    # On the CPU: a fast Fourier transform, which cuDNN might choose, would spread it.
    exact = layer_by_layer(x.double().cpu(), [layer.double().cpu() for layer in layers], problem)
    out = launch(x, pack(layers, problem), problem, Tiling(32, 16, "mma"), x).cpu()
    assert not exact.isfinite().all()
    assert not out[~exact.isfinite()].isfinite().any()
    # Far away nothing is touched.
    assert out[0, :, 5:, :2].isfinite().all()


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    problem = BlockProblem(1100, 176, 176, 64, 64, 64, 3, 8, 1, "relu", True, "float16")
    device = torch.device("cuda")
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("less than 12 GiB of GPU memory are free: 64-bit offsets were not tested")
    small = replace(problem, batch=1)
    x, layers = make_operands(small, seed=5, device=device)
    weights = pack(layers, small)
    tiling = Tiling(128, 64, "mma")
    many = x.expand(problem.batch, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    out = launch(many, weights, problem, tiling, x)
    assert torch.equal(out[-1:], launch(x, weights, small, tiling, x))


@pytest.mark.parametrize("channels", range(8, 520, 8))
@pytest.mark.parametrize("largest", [64, 128])
def test_parts_are_powers_of_two_that_waste_little(channels: int, largest: int) -> None:
    found = parts(channels, largest=largest)
    assert all(part & (part - 1) == 0 and 16 <= part <= largest for part in found)
    assert sum(found) == sum(parts(channels)) >= channels
    if channels >= 64:
        assert sum(found) <= 1.25 * channels


PROBLEM = BlockProblem(1, 7, 7, 64, 256, 64, 3, 8, 1, "silu", True, "float16")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(batch=0), "batch=0"),
        (dict(height=0), "height=0"),
        (dict(in_channels=60, residual=False), "in_channels=60"),
        (dict(hidden_channels=100), "hidden_channels=100"),
        (dict(out_channels=0, residual=False), "out_channels=0"),
        (dict(in_channels=520, hidden_channels=1040, residual=False), "in_channels=520"),
        (dict(out_channels=640, residual=False), "out_channels=640"),
        (dict(hidden_channels=1024), "expansion=16"),
        (dict(hidden_channels=32), "expansion=0.5"),
        (dict(kernel_size=4), "kernel_size=4"),
        (dict(kernel_size=9), "kernel_size=9"),
        (dict(group_width=24), "group_width=24"),
        (dict(in_channels=24, hidden_channels=96, group_width=16, residual=False), "group_width=16"),
        (dict(stride=3), "stride=3"),
        (dict(activation="tanh"), "activation='tanh'"),
        (dict(dtype="float64"), "dtype='float64'"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, object], told: str) -> None:
    assert unsupported(PROBLEM) is None
    why = unsupported(replace(PROBLEM, **changes))  # type: ignore[arg-type]
    assert why is not None
    assert told in why


def test_packed_weights_hold_every_weight_once() -> None:
    problem = replace(PROBLEM, in_channels=40, out_channels=24, hidden_channels=72, residual=False)
    _, layers = make_operands(problem, seed=6, device=torch.device("cpu"))
    packed: BlockWeights = pack(layers, problem)
    for name, layer in zip(vars(packed), layers, strict=False):
        held, given = getattr(packed, name).double(), layer.double()
        # Those of the convolution are packed for products of one column, and of two.
        times = 1 + PAIR if name == "conv" else 1
        assert held.abs().sum() == pytest.approx(times * given.abs().sum().item(), rel=1e-9), name
        assert held.count_nonzero() == times * given.count_nonzero(), name
