"""The way of a launch through Triton's true launcher to a stub of CUDA's driver, in a child process of its own.

Once it is loaded, the stub is what everyone in a process takes for CUDA's driver.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, TypeAlias

import numpy as np
import pytest
import torch
from torch import nn

from kernels import compiling, contest, convfirst, fuse, head, mbconv, ops, packing, stem, timing, tune
from kernels.compiling import Kernel, warming_up
from kernels.cost_model import GPU_SPECS
from kernels.head import HeadTiling
from kernels.lab.emulator import emulated
from kernels.lab.emulator import launch as emulated_launch
from kernels.lab.inspect import Statics, read_statics
from kernels.lab.stub import (
    CaptureError,
    Faults,
    Launch,
    NoCompiler,
    StubCuda,
    shared_faults,
    stub_cuda,
    stub_driver,
)
from kernels.lab.stub.driver import build_library
from kernels.mbconv import MBConvProblem
from kernels.problem import Tiling
from kernels.stem import StemTiling
from nas.child_process import ChildProcess
from nas.config import LatencyConfig
from nas.latency.meter import LatencyMeter
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
def child(faults: Faults, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChildProcess]:
    environment = {"OMP_NUM_THREADS": "1", "CONVFIRST_CACHE": str(tmp_path_factory.mktemp("cache"))}
    with ChildProcess(environment) as process:
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


def other(kernel: Kernel, pack: Any, problem: Any, tiling: Any, shape: tuple[int, ...], *sizes: Any) -> Prepared:
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


# -- Captures, on a device that is not there ---------------------------------------------------------------------------


@contextlib.contextmanager
def stubbed() -> Iterator[StubCuda]:
    """A stub device on which tuning takes what kernels return for right, and times one tiling of each."""
    with pytest.MonkeyPatch.context() as patch, stub_driver() as driver, stub_cuda(driver) as cuda:
        patch.setattr(contest, "is_wrong", lambda output, expected: False)
        patch.setattr(tune, "TRIED", 1)
        patch.setattr(tune, "_chosen", {})
        yield cuda


def anchor() -> nn.Module:
    return load_space("small").anchor().build(10).eval()


def graph_a_network() -> tuple[list[Launch], list[Launch], list[str], int, str]:
    """Launches of an eager call and of a graph, what the graph holds beside, its replays, and its output's device."""
    with stubbed() as cuda:
        fused = fuse(anchor(), torch.float16).to("cuda")
        graph = fused.graph(1, 32)
        captured = cuda.graphs[-1]
        x = torch.randn(1, 3, 32, 32, dtype=torch.float16, device="cuda").contiguous(memory_format=torch.channels_last)
        cuda.driver.clear()
        with torch.inference_mode():
            fused(x)
        eager = cuda.driver.launches
        # The graph keeps the weights.
        del fused
        gc.collect()
        graph(x)
        out = graph.replay()
        assert torch.cuda.current_stream() is cuda.default_stream
        return eager, captured.launches, captured.operations, captured.replays, str(out.device)


def test_a_network_is_tuned_captured_and_replayed(child: ChildProcess) -> None:
    eager, captured, operations, replays, device = child.call(graph_a_network)
    assert len(captured) == 11
    for one, other in zip(eager, captured, strict=True):
        assert (one.stream, bool(other.stream)) == (0, True)
        assert replace(one, arguments=(), stream=0) == replace(other, arguments=(), stream=0)
        integers = [index for index, size in enumerate(one.sizes) if size == 4]
        assert [one.arguments[index] for index in integers] == [other.arguments[index] for index in integers]
    assert {launch.stream for launch in captured} == {captured[0].stream}
    # Nothing of torch's runs in it.
    assert operations == []
    assert (replays, device) == (2, "cuda:0")


def measure() -> tuple[float, float, list[tuple[int, int]]]:
    """Medians in ms of a network and of the anchor in turns with it; launches and first input of their graphs."""
    config = LatencyConfig(device="cuda", engine="fused", dtype="float16", seconds=1.0)
    with stubbed() as cuda:
        meter = LatencyMeter(config, anchor(), 1.0, state=lambda device: None)
        (measured,) = meter.measure_together([load_space("small").smallest().build(10).eval()])
        graphs = [graph for graph in cuda.graphs if len({launch.kernel for launch in graph.launches}) > 2]
        assert all(graph.captured and graph.replays for graph in graphs)
        return (
            measured.raw_median_ms, measured.anchor_median_ms,
            [(len(graph.launches), graph.launches[0].arguments[0]) for graph in graphs],
        )  # fmt: skip


def test_a_latency_is_that_of_replays_on_inputs_in_turn(child: ChildProcess) -> None:
    network_ms, anchor_ms, graphs = child.call(measure)
    launches = [count for count, _ in graphs]
    assert launches == [11] * 4 + [6] * 4
    # An input of its own for each graph, and the same four for both networks.
    inputs = [address for _, address in graphs]
    assert len(set(inputs)) == 4
    assert inputs[:4] == inputs[4:]
    # The device takes a microsecond a launch.
    assert (network_ms, anchor_ms) == pytest.approx((0.006, 0.011))


def contend() -> tuple[list[tuple[int, int]], list[int], int, int]:
    """Tune a network, three tilings each: of each contest the launches and the waits; the tilings of each problem; the
    captures; and the kernels that stay loaded beyond those that run."""
    found = []
    with stubbed() as cuda, pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        # Nothing was tuned before.
        patch.setenv("CONVFIRST_CACHE", folder)
        patch.setattr(tune, "TRIED", 3)
        # Each check waits for its result.
        patch.setattr(contest, "is_wrong", lambda output, expected: output.sum().item() is None)
        held = contest.hold

        def counted(*arguments: Any) -> contest.Result:
            launches, waits = cuda.driver.total, cuda.waits
            result = held(*arguments)
            found.append((cuda.driver.total - launches, cuda.waits - waits))
            return result

        patch.setattr(contest, "hold", counted)
        fused = fuse(anchor(), torch.float16).to("cuda")
        tasks = [task for task in fused.tasks(1, 32) if task.kernel.name == "convfirst"]
        compiling.forget_all_but(())
        choices = tune.tune(tasks)
        tried = [len(choice.tilings) for choice in choices]
        running = [compiling.kernels_of(partial(task.kernel.launch, task.x, task.weights, task.problem, choice.tiling))
                   for task, choice in zip(tasks, choices, strict=True)]  # fmt: skip
        kept = {id(kernel) for kernels in running for kernel in kernels}
        loaded = {id(kernel) for kernel in compiling.loaded_kernels()}
        return found, tried, len(cuda.graphs), len(loaded - kept)


def test_a_contest_has_one_capture_and_waits_once_for_each_tiling_sample_and_replay(child: ChildProcess) -> None:
    contests, tried, captures, lost = child.call(contend)
    assert captures == len(contests) == len(tried) > 2
    for (launches, waits), count in zip(contests, tried, strict=True):
        assert 2 <= count <= 3
        # torch.cuda.graph waits once before it begins.
        assert waits == count + 1 + 1 + contest.WARMUP_REPLAYS + contest.REPLAYS
        # A check, a sample, and a call before the capture; three times as many where a tiling has three launches.
        calls = 1 + contest.CALLS + 2 * (1 + contest.MAX_CALLS)
        assert launches <= 3 * calls * count
    # What lost is not held in memory.
    assert lost == 0


class NotTheSame:
    """A function that does something else in its capture than in the calls before."""

    def __init__(self, before: Callable[[], object], captured: Callable[[], object]) -> None:
        self.functions = [before] * timing.CALLS_BEFORE_CAPTURE + [captured]

    def __call__(self) -> object:
        return self.functions.pop(0)()


def linear(outputs: int = 8, warm: bool = False) -> object:
    """Launch a kernel, which is another for each number of outputs; or compile it only."""
    x, weight, bias = (torch.zeros(shape, device="cuda") for shape in ((1, 16), (128, 128), (128,)))
    tiling = HeadTiling(False, 16, 16, 16)
    with warming_up() if warm else contextlib.nullcontext():
        return head.linear(x.half(), weight.half(), bias, outputs, "none", tiling)


def elsewhere() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        linear()


BAD: dict[str, tuple[Callable[[torch.Tensor], object], str]] = {
    "item": (lambda x: x.sum().item(), "_local_scalar_dense waits"),
    "truth": (lambda x: bool(x[0] > 0), "waits"),
    "a size that depends on values": (lambda x: x.nonzero(), "nonzero waits"),
    "to the CPU": (lambda x: x.to("cpu"), "copies between CPU and GPU"),
    "into the CPU's memory": (lambda x: torch.empty(4).copy_(x), "copies between CPU and GPU"),
    "from the CPU": (lambda x: x + torch.ones(4).to(x.device), "copies between CPU and GPU"),
    "a constant": (lambda x: torch.tensor([1.0, 2.0], device=x.device), "copies between CPU and GPU"),
    "pinned memory": (lambda x: torch.empty(4, pin_memory=True), "pinned memory"),
    "synchronisation": (lambda x: torch.cuda.synchronize(), "synchronize waits"),
    "a compilation": (lambda x: NotTheSame(linear, partial(linear, 24)), "linear_kernel is compiled"),
    "a kernel's loading": (lambda x: NotTheSame(partial(linear, 40, True), partial(linear, 40)), "_kernel is loaded"),
    "another stream": (lambda x: elsewhere(), "another stream"),
}


def capture_badly(inference: bool) -> dict[str, str]:
    """Why each bad function was refused; afterwards the same stream is current, and a good function is captured."""
    refusals = {}
    with torch.inference_mode(inference), stubbed() as cuda:
        linear()
        x = torch.ones(4, device="cuda")
        for name, (function, _) in BAD.items():
            made = function(x) if name in ("a compilation", "a kernel's loading") else partial(function, x)
            try:
                timing.captured(made)  # type: ignore[arg-type]
                refusals[name] = "was captured"
            except CaptureError as error:
                refusals[name] = str(error.__cause__)
            assert torch.cuda.current_stream() is cuda.default_stream
            graph, _ = timing.captured(lambda: (linear(), x.add_(1)))
            assert len(graph.launches) == 1
            assert "aten::add_.Tensor" in graph.operations
    return refusals


@pytest.mark.parametrize("inference", [True, False])
def test_what_a_graph_does_not_hold_is_refused_in_a_capture(inference: bool, child: ChildProcess) -> None:
    refusals = child.call(capture_badly, inference)
    assert refusals.keys() == BAD.keys()
    for name, (_, told) in BAD.items():
        assert told in refusals[name], name


def replay_without_input() -> str:
    with stubbed():
        inputs = [torch.ones(4, device="cuda")]
        graph, _ = timing.captured(lambda: inputs[0] + 1)
        graph.replay()
        inputs.clear()
        try:
            graph.replay()
        except RuntimeError as error:
            return str(error)
        return "replayed"


def test_a_graph_whose_input_is_freed_is_not_replayed(child: ChildProcess) -> None:
    assert "has been freed" in child.call(replay_without_input)


# -- What the driver refuses -------------------------------------------------------------------------------------------


def launch_linear_on(device: torch.device, grid: tuple[int, int] = (1, 1)) -> Any:
    """Launch a kernel, whose compiled form is returned."""
    x, weight, bias, out = (torch.zeros(shape, device=device) for shape in ((1, 16), (128, 128), (128,), (1, 8)))
    constants = (16, 128, 8, "none", 16, 16, 16, 3, False)
    return head.linear_kernel[grid](x.half(), weight.half(), bias, out.half(), 1, *constants, num_warps=4)


def facts_of_linear(device: torch.device) -> tuple[int, int, int]:
    """Registers and spills of a thread, and threads, as the driver read them."""
    kernel = launch_linear_on(device)
    return kernel.n_regs, kernel.n_spills, kernel.n_max_threads


def stub_facts(capability: int) -> tuple[int, int, int]:
    with stub_driver(capability):
        return facts_of_linear(CPU)


def statics_of_linear() -> Statics:
    with stub_driver(90):
        return read_statics(launch_linear_on(CPU))


def refusals() -> list[str]:
    """What the driver says of a kernel for another GPU, of too large a grid, and of too much shared memory."""
    told = []

    def attempt(run: Callable[[], object]) -> None:
        try:
            run()
            told.append("launched")
        except RuntimeError as error:
            told.append(str(error))

    with stub_driver(90):
        kernel = launch_linear_on(CPU)
        metadata = kernel.packed_metadata
        attempt(lambda: launch_linear_on(CPU, (1, 65536)))
        attempt(lambda: launch_linear_on(CPU, (1, 65535)))
        kernel.packed_metadata = (*metadata[:2], 48 * 1024 + 1)
        attempt(lambda: launch_linear_on(CPU))
        kernel.packed_metadata = metadata
    with stub_driver(80) as driver:
        attempt(lambda: driver.utils.load_binary(kernel.name, kernel.kernel, kernel.metadata.shared, driver.ordinal))
    return told


def test_what_hardware_cannot_do_is_refused(child: ChildProcess) -> None:
    words = ["invalid argument", "launched", "invalid argument", "no kernel image"]
    for told, word in zip(child.call(refusals), words, strict=True):
        assert word in told


def test_facts_of_a_kernel_are_read_from_its_machine_code(child: ChildProcess) -> None:
    registers, spills, threads = child.call(stub_facts, 90)
    # NVIDIA's own tool reads the same.
    statics = child.call(statics_of_linear)
    assert (registers, 4 * spills, threads) == (statics.registers, statics.stack_bytes, 128)


@pytest.mark.gpu
def test_the_true_driver_reads_the_same_facts(child: ChildProcess) -> None:
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor not in GPU_SPECS:
        pytest.skip(f"the stub driver does not know compute capability {major}.{minor}")
    assert facts_of_linear(torch.device("cuda")) == child.call(stub_facts, 10 * major + minor)


@pytest.mark.gpu
def test_cuda_too_refuses_to_wait_in_a_capture_and_leaves_its_stream_current() -> None:
    x, before = torch.ones(4, device="cuda"), torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        timing.captured(lambda: x.sum().item())
    assert torch.cuda.current_stream() == before
    timing.captured(lambda: x + 1)[0].replay()
    torch.cuda.synchronize()


def test_bad_input_is_named(monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    with pytest.raises(ValueError, match="capability=75 is none of 80, 89, 90"), stub_driver(75):
        pass
    with pytest.raises(ValueError, match="result='nonsense' is none of hang, abort"):
        faults.fail(result="nonsense")
    monkeypatch.setenv("CC", "/no/such/compiler")
    with pytest.raises(NoCompiler, match="CC=/no/such/compiler does not run"):
        build_library()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoCompiler, match="neither gcc nor clang"):
        build_library()


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
