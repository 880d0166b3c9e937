"""The way of a launch through Triton's true launcher to a stub of CUDA's driver, in a child process of its own.

Once it is loaded, the stub is what everyone in a process takes for CUDA's driver.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, TypeAlias

import numpy as np
import pytest
import torch

from kernels import convfirst, fuse, head, mbconv, ops, packing, stem, tune
from kernels.head import HeadTiling
from kernels.lab.emulator import emulated
from kernels.lab.emulator import launch as emulated_launch
from kernels.lab.stub import Faults, Launch, NoCompiler, shared_faults, stub_driver
from kernels.mbconv import MBConvProblem
from kernels.problem import Tiling
from kernels.stem import StemTiling
from nas.child_process import ChildProcess
from search_spaces import load_space
from tests.kernels.cases import _WIDE as WIDE
from tests.kernels.cases import LAYERED_CASES, BlockCase, make_operands, new_scratch
from tests.kernels.test_other_kernels import HEAD, MBCONV, STEM, draw

pytestmark = pytest.mark.launch_path

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def faults() -> Iterator[Faults]:
    with shared_faults() as shared:
        yield shared


@pytest.fixture(scope="module")
def child(faults: Faults) -> Iterator[ChildProcess]:
    with ChildProcess({"OMP_NUM_THREADS": "1"}) as process:
        if why := process.call(missing):
            pytest.skip(f"{why}: nothing was launched through Triton's launcher")
        yield process


def missing() -> str | None:
    """The reason why nothing can be launched here."""
    try:
        with stub_driver():
            return None
    except NoCompiler as why:
        return str(why)


# -- Every argument, beside what the emulator is given -----------------------------------------------------------------

SIZES = {"*": 8, "i32": 4, "i64": 8}
# Triton's two pointers to scratch of its own, which these kernels do not use.
NO_SCRATCH = (0, 0)


def block(case: BlockCase) -> Prepared:
    x, layers = make_operands(case.problem, 1, CPU)
    weights, scratch = packing.pack(layers, case.problem), new_scratch(case.problem, case.tiling, CPU)
    return partial(convfirst.launch, x, weights, case.problem, case.tiling, scratch), (x, scratch)


def other(kernel: tune.Kernel, pack: Any, problem: Any, tiling: Any, shape: tuple[int, ...], *sizes: Any) -> Prepared:
    layers = [draw(*size).half() for size in sizes]
    x = draw(*shape).half().contiguous(memory_format=torch.channels_last)
    weights = pack(layers, problem)
    if isinstance(problem, MBConvProblem):
        weights = [*weights, new_scratch(problem, tiling, CPU)]
    return partial(kernel.launch, x, weights, problem, tiling), (x, *weights)


def head_of(pools: bool) -> Prepared:
    problem = replace(HEAD, activation="relu")
    sizes = [(136, 72, 1, 1), (136,), (10, 136), (10,)]
    return other(ops.HEAD, head.pack, problem, HeadTiling(pools, block_k=64), (3, 72, 49, 1), *sizes)


def network() -> Prepared:
    fused = fuse(load_space("small").anchor().build(10).eval(), torch.float16)
    x = draw(1, 3, 32, 32).half().contiguous(memory_format=torch.channels_last)
    return partial(fused, x), (x,)


# A function to launch, and some tensors that it is given.
Prepared: TypeAlias = tuple[Callable[[], object], tuple[torch.Tensor, ...]]
SPLIT = replace(WIDE, in_channels=64, hidden_channels=128, out_channels=64)
CASES: dict[str, Callable[[], Prepared]] = {
    "stem": lambda: other(ops.STEM, stem.pack, STEM, StemTiling(32), (2, 3, 13, 10), (24, 3, 3, 3), (24,)),
    "block": lambda: block(BlockCase(SPLIT, Tiling(16, 32, "mma"))),
    "block in three launches": lambda: block(LAYERED_CASES[0]),
    "hidden channels split": lambda: block(BlockCase(SPLIT, Tiling(16, 32, "mma", splits=4))),
    "output split": lambda: block(BlockCase(SPLIT, Tiling(16, 32, "mma", splits=2, out_splits=4))),
    "kept weights": lambda: block(BlockCase(replace(SPLIT, batch=6), Tiling(32, 32, "mma", rows=2, tiles_each=2))),
    "head that pools": lambda: head_of(True),
    "head": lambda: head_of(False),
    "mbconv": lambda: other(
        ops.MBCONV, mbconv.pack, MBCONV, Tiling(32, 32, "fma", splits=2), (2, 24, 7, 9),
        (96, 24, 1, 1), (96,), (96, 1, 3, 3), (96,), (40, 96, 1, 1), (40,),
    ),
    "network": network,
}  # fmt: skip


class Recording(emulated_launch._Launcher):
    """The emulator's launcher, which passes on what programs are given, and runs none."""

    launches: ClassVar[list[Launch]] = []
    programs: ClassVar[list[tuple[tuple[Any, ...], dict[str, int], int]]] = []

    def __init__(self, source: Any, metadata: Any) -> None:
        super().__init__(source, metadata)
        self.name = metadata.name
        kinds = [kind for kind in source.signature.values() if kind != "constexpr"]
        self.sizes = tuple(SIZES[kind if kind in SIZES else kind[0]] for kind in kinds) + (8, 8)

    def __call__(self, *args: Any) -> None:
        self.programs.clear()
        super().__call__(*args)
        places, arguments, shared = zip(*self.programs, strict=True)
        # All programs of a grid, each once.
        grid = tuple(max(axis) + 1 for axis in zip(*places, strict=True))
        assert sorted(places) == sorted(np.ndindex(*grid))
        values = tuple(arguments[0].values())
        self.launches.append(Launch(self.name, grid, self.code.threads, shared[0], values, self.sizes))  # type: ignore[arg-type]

    @classmethod
    def program(cls, code: Any, arguments: Any, memory: Any, shared_bytes: int, place: Any, traffic: Any) -> Any:
        cls.programs.append((tuple(map(int, place)), arguments, shared_bytes))
        return SimpleNamespace(run=lambda: None)


@contextlib.contextmanager
def same_memory(made: list[torch.Tensor]) -> Iterator[None]:
    """Launches get the memory that others got who were made with the same list, in the same order."""
    again = list(made)
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def give(allocate: Callable[..., torch.Tensor], *args: Any, **options: Any) -> torch.Tensor:
        fresh = allocate(*args, **options)
        if not again:
            made.append(fresh)
            return fresh
        kept = again.pop(0)
        assert (kept.shape, kept.stride(), kept.dtype) == (fresh.shape, fresh.stride(), fresh.dtype)
        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *args, **options: give(empty, *args, **options))
        patch.setattr(torch.Tensor, "new_empty", lambda *args, **options: give(new_empty, *args, **options))
        yield
    assert not again


def launch_twice(case: str, capability: int) -> tuple[list[Launch], list[Launch], list[int]]:
    """Launches as the emulator's programs get them and as the driver gets them, and addresses of tensors."""
    run, tensors = CASES[case]()
    made: list[torch.Tensor] = []
    Recording.launches.clear()
    with torch.inference_mode():
        with pytest.MonkeyPatch.context() as patch, emulated(capability), same_memory(made):
            patch.setattr(emulated_launch._Driver, "launcher_cls", Recording)
            patch.setattr(emulated_launch, "Program", Recording.program)
            run()
        with stub_driver(capability) as driver, same_memory(made):
            run()
            launched = driver.launches
    return list(Recording.launches), launched, [tensor.data_ptr() for tensor in (*tensors, *made)]


@pytest.mark.parametrize(
    ("case", "capability", "grids"),
    [
        ("stem", 90, [(3, 1, 1)]),
        ("block", 90, [(1, 1, 1)]),
        ("block in three launches", 90, [(1, 5, 1), (20, 1, 1), (10, 1, 1)]),
        ("hidden channels split", 90, [(1, 4, 1)]),
        ("hidden channels split", 80, [(1, 4, 1)]),
        ("output split", 90, [(1, 2, 4)]),
        ("kept weights", 90, [(2, 1, 1)]),
        ("head that pools", 90, [(3, 5, 1), (1, 1, 1)]),
        ("head", 90, [(3, 2, 1), (1, 5, 1), (1, 1, 1)]),
        ("mbconv", 90, [(8, 3, 1), (4, 2, 1)]),
        ("network", 90, None),
    ],
)
def test_the_driver_is_given_what_the_emulator_is(
    case: str, capability: int, grids: list[tuple[int, int, int]] | None, child: ChildProcess
) -> None:
    expected, launched, addresses = child.call(launch_twice, case, capability)
    assert [launch.grid for launch in launched] == (grids or [launch.grid for launch in expected])
    assert launched == expected
    assert launched[0].arguments[0] == addresses[0]
    for launch in launched:
        assert launch.arguments[-2:] == NO_SCRATCH
        assert launch.threads % 32 == 0


def test_a_stem_and_a_split_block_by_hand(child: ChildProcess) -> None:
    _, (launch,), (x, weight, bias, out) = child.call(launch_twice, "stem", 90)
    assert launch.arguments == (x, weight, bias, out, 70, 13, 10, 7, 5, *NO_SCRATCH)
    assert launch.sizes == (8,) * 4 + (4,) * 5 + (8, 8)
    _, (launch,), (x, scratch, out) = child.call(launch_twice, "hidden channels split", 90)
    assert (launch.arguments[0], launch.arguments[7], launch.arguments[8]) == (x, out, scratch)
    assert launch.arguments[10:] == (9, 3, 3, 3, 3, 9, 1, *NO_SCRATCH)


def test_a_network_launches_its_kernels_in_order(child: ChildProcess) -> None:
    _, launched, _ = child.call(launch_twice, "network", 90)
    kernels = [launch.kernel for launch in launched]
    assert kernels[0] == "stem_kernel"
    assert kernels[-2:] == ["pool_linear_kernel", "linear_kernel"]
    assert set(kernels[1:-2]) == {"convfirst_kernel", "conv_kernel", "product_kernel"}


# -- Faults ------------------------------------------------------------------------------------------------------------


def launch_linear() -> None:
    x, weight, bias = torch.zeros(1, 16).half(), torch.zeros(128, 128).half(), torch.zeros(128)
    head.linear(x, weight, bias, 8, "none", HeadTiling(False, 16, 16, 16))


def launch_with_faults() -> list[str]:
    """What launches do where the second fails, and after that."""
    outcomes = []

    def attempt() -> None:
        try:
            launch_linear()
            outcomes.append("launched")
        except RuntimeError as error:
            outcomes.append(str(error))

    with stub_driver() as driver:
        driver.faults.fail("stem_kernel")
        attempt()
        driver.faults.fail("linear_kernel", times=1, after=1)
        for _ in range(3):
            attempt()
        assert driver.faults.failed == 1
        driver.heal()
        attempt()
        driver.faults.fail(result="out of resources", times=1)
        attempt()
        attempt()
    return outcomes


@pytest.mark.fault
def test_a_fault_ends_the_context_and_a_refusal_does_not(child: ChildProcess) -> None:
    illegal = "Triton Error [CUDA]: an illegal memory access was encountered"
    refused = "Triton Error [CUDA]: too many resources requested for launch"
    assert child.call(launch_with_faults) == [
        "launched", "launched", illegal, illegal, "launched", refused, "launched",
    ]  # fmt: skip


def die_in_a_launch(result: str) -> tuple[int, int]:
    """How a process ends whose launch does this, and the number of launches that failed."""
    with stub_driver() as driver:
        launch_linear()
        driver.faults.fail("linear_kernel", result)
        if (process := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                launch_linear()
            os._exit(0)
        while result == "hang" and driver.faults.failed == 0:
            time.sleep(0.01)
        if result == "hang":
            # It is still there.
            assert os.waitpid(process, os.WNOHANG) == (0, 0)
            os.kill(process, signal.SIGTERM)
        _, status = os.waitpid(process, 0)
        failed = driver.faults.failed
        driver.heal()
        launch_linear()
    return os.waitstatus_to_exitcode(status), failed


@pytest.mark.fault
def test_a_launch_hangs_or_ends_its_process_and_another_is_told(child: ChildProcess) -> None:
    assert child.call(die_in_a_launch, "abort") == (-signal.SIGABRT, 1)
    assert child.call(die_in_a_launch, "hang") == (-signal.SIGTERM, 1)


def launch_alone() -> str:
    with stub_driver():
        try:
            launch_linear()
            return "launched"
        except RuntimeError as error:
            return str(error)


@pytest.mark.fault
def test_a_parent_without_a_driver_lets_launches_of_its_child_fail(child: ChildProcess, faults: Faults) -> None:
    faults.fail("linear_kernel", "out of resources", times=1)
    assert "too many resources" in child.call(launch_alone)
    assert faults.failed == 1
    assert child.call(launch_alone) == "launched"
