"""Fused blocks and networks against Inductor and cuDNN, on this machine: `python -m kernels.lab.benchmark`.

An engine is one way to run a row: torch's eager mode, Inductor ("compiled"), or our kernels ("fused"). Every engine has
its batch norms folded and runs channels_last in inference mode, on CUDA in a CUDA graph; the engines of a row take
turns in one run. An engine is timed only after its output was compared with a float64 run. cuDNN searches for its best
algorithms (`torch.backends.cudnn.benchmark`), and so does Inductor (`kernels.peers`: max-autotune with frozen weights,
without its CUDA graphs, as the benchmark captures its own).

Rows are measured in a fixed order, the most telling first, and written at once to `results.jsonl`. A row that is there
for the same machine, versions and sources is not measured again: the same command goes on where the minutes were over.
"""

from __future__ import annotations

import copy
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import torch._inductor.config
import typer
from torch import Tensor, nn

from kernels import convfirst, cost_model, fuse, ops, packing, timing, tune
from kernels.compiling import Task
from kernels.lab import benchmark_machine, benchmark_report
from kernels.lab.benchmark_machine import MachineCeilings
from kernels.lab.benchmark_rows import Block, Network, Row, as_if_trained, count_macs, folded, rows
from kernels.lab.commands import Minutes, Out, current_gpu, deadline_after, fail, results_folder
from kernels.lab.inspect import shorthand
from kernels.lab.results import ResultFile
from kernels.network import moved_bytes
from kernels.peers import inductor_options
from kernels.problem import MAX_SPLITS, BlockProblem, Tiling

DTYPE_ON = {"cuda": torch.float16, "cpu": torch.float32}
KINDS = ("all", "blocks", "networks")
# Batches to rotate among. Where this many can be larger than twice the L2 together, no run finds its input in a cache.
FEWEST_INPUTS, MOST_INPUTS = 2, 8
# Seconds of sampling for all engines of a row, by kind of device.
ROW_SECONDS = {"cuda": 1.0, "cpu": 0.3}
# An output may be off by this many roundings of its dtype, times the root of the number of layers, which round in turn.
ROUNDINGS = 4
# The most that the fused form's error may be, over the error of torch's own layer-by-layer run.
ERROR_OVER_EAGER = 2
# Images at either end of a batch that are compared with the reference: a kernel's last tile is the likeliest to be off.
CHECKED_IMAGES = 2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Forward = Callable[[Tensor], Tensor]


# -- Engines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """One way to run a row, which is ready to run.

    Args:
        forward: function from (N, C, H, W), channels_last, to the output.
        notes: further facts worth recording, for JSON.
    """

    forward: Forward
    notes: dict[str, Any] = field(default_factory=dict)


class Unavailable(Exception):
    """The reason why an engine does not run on this device."""


@dataclass(frozen=True)
class Case:
    """A row with everything needed to measure it.

    Args:
        inputs: batches (N, C, H, W), channels_last, in the row's dtype.
        reference: function that computes the same layer by layer in float64.
        depth: number of layers that round their result, one after the other.
        macs: multiply-accumulates of a whole batch.
        engines: functions that make the engines, by name, eager first; they may compile and tune.
    """

    inputs: Sequence[Tensor]
    reference: Forward
    depth: int
    macs: int
    engines: dict[str, Callable[[], Engine]]


class LayerByLayer(nn.Module):
    """A block as torch runs it: the reference, the eager engine, and what Inductor compiles."""

    def __init__(self, layers: Sequence[Tensor], problem: BlockProblem) -> None:
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in layers)
        self.problem = problem

    def forward(self, x: Tensor) -> Tensor:
        return convfirst.layer_by_layer(x, list(self.layers), self.problem)


def random_inputs(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Random batches to rotate among; products of zeros would draw less power and so run faster."""
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    wanted = 2 * cache_bytes // (dtype.itemsize * math.prod(shape)) + 1
    rng = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(*shape, generator=rng, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(min(MOST_INPUTS, max(FEWEST_INPUTS, wanted)))
    ]


def _compiled(module: nn.Module, device: torch.device) -> Engine:
    # On a CPU, where the benchmark only tries itself out, as torch compiles by default.
    options = inductor_options(device) or None
    return Engine(torch.compile(module, fullgraph=True, dynamic=False, options=options))


def _require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable("needs CUDA")


def block_problem(row: Block, layers: Sequence[Tensor], dtype: torch.dtype) -> BlockProblem:
    """The problem of a block that may split its tiles as often as it likes."""
    return ops.with_splits(ops.block_problem(row.input_shape, dtype, layers, 1, row.activation, True), MAX_SPLITS)


def block_task(problem: BlockProblem, layers: Sequence[Tensor], x: Tensor) -> Task:
    """A task of the tuner for a block, with scratch of its own."""
    scratch = x.new_empty(problem.scratch_elements, dtype=torch.float32)
    return Task(ops.BLOCK, problem, x, [*vars(packing.pack(layers, problem)).values(), scratch], layers)


def block_case(row: Block, dtype: torch.dtype, device: torch.device) -> Case:
    layers = row.layers(dtype, device)
    problem = block_problem(row, layers, dtype)
    inputs = random_inputs(row.input_shape, dtype, device)
    plain = LayerByLayer(layers, problem).eval()

    def fused() -> Engine:
        """Our kernels, in one launch or three, even where the tuner prefers torch's layers."""
        _require_cuda(device)
        task = block_task(problem, layers, inputs[0])
        (choice,) = tune.tune([task])
        *weights, _ = task.weights
        tiling = choice.tilings[0]
        notes = {"tiling": asdict(tiling), "chosen": choice.tiling is not None, "tuner": choice.describe()}

        def forward(x: Tensor) -> Tensor:
            # A network lends its scratch; here it counts as the block's memory.
            scratch = x.new_empty(tiling.partial_bytes(problem) // 4, dtype=torch.float32)
            return ops.BLOCK.launch(x, [*weights, scratch], problem, tiling)

        return Engine(forward, notes)

    return Case(
        inputs, copy.deepcopy(plain).double(), len(layers) // 2, problem.macs,
        {"eager": lambda: Engine(plain), "fused": fused, "compiled": lambda: _compiled(plain, device)},
    )  # fmt: skip


def network_case(row: Network, dtype: torch.dtype, device: torch.device) -> Case:
    built = row.build()
    macs, depth = count_macs(built, row.resolution)
    model = as_if_trained(built.to(device), row.resolution)
    plain = folded(model).to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def fused() -> Engine:
        _require_cuda(device)
        network = fuse(model, dtype)
        notes: dict[str, Any] = {
            "tuning_seconds": network.prepare(row.batch, row.resolution),
            "not_fused": [str(status) for status in network.fusion if not status.fused],
        }
        modules = network.fused_modules
        notes["layer_by_layer"] = [
            name
            for name, problem in network.problems(row.batch, row.resolution).items()
            if tune.choose(modules[name].kernel, problem, device).tiling is None
        ]
        return Engine(network, notes)

    engines = {"eager": lambda: Engine(plain), "compiled": lambda: _compiled(plain, device)}
    if row.is_convfirst:
        engines["fused"] = fused
    inputs = random_inputs(row.input_shape, dtype, device)
    return Case(inputs, copy.deepcopy(model).double(), depth, row.batch * macs, engines)


# -- Measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """The measured times, error and memory of one engine.

    Args:
        median_ms, p20_ms, p80_ms: time of one forward pass; None if there is an error.
        relative_error: root mean square of the difference from float64, over that of the float64 output.
        workspace_bytes: most memory that a forward pass holds beyond weights and input, its output included.
        ready_seconds: time to compile, tune and run once.
        notes: the engine's notes, see `Engine`.
        error: reason for which the engine was not timed; None if it was.
    """

    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    relative_error: float | None = None
    workspace_bytes: int | None = None
    ready_seconds: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


class Passes:
    """A forward pass on each of the inputs in turn; on CUDA one graph of all of them.

    Launching a graph takes about as long as a small block runs, so a graph of one block would time the launch.
    """

    def __init__(self, forward: Forward, inputs: Sequence[Tensor]) -> None:
        self._forward, self._inputs = forward, inputs
        self._graph: torch.cuda.CUDAGraph | None = None
        self.outputs: list[Tensor] = []
        if inputs[0].device.type != "cuda":
            return
        with torch.inference_mode():
            self._graph, self.outputs = timing.captured(lambda: [forward(x) for x in inputs])

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            with torch.inference_mode():
                self.outputs = [self._forward(x) for x in self._inputs]

    def results(self) -> list[Tensor]:
        """Run once more into outputs filled with NaN, so that what a kernel leaves unwritten shows."""
        with torch.inference_mode():
            for output in self.outputs:
                output.fill_(math.nan)
        self()
        if self._graph is not None:
            torch.cuda.synchronize()
        return self.outputs


class DeviceLost(Exception):
    """An error that CUDA does not recover from: nothing runs any more in this process."""


def _one_line(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


def checked_images(batch: int) -> list[int]:
    """Indices of the images of a batch that are compared with the reference."""
    return sorted({*range(min(CHECKED_IMAGES, batch)), *range(max(0, batch - CHECKED_IMAGES), batch)})


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, over that of the expected output, which is float64."""
    return float((output.double() - expected).norm() / expected.norm())


def tolerance(dtype: torch.dtype, depth: int) -> float:
    """The relative error allowed after `depth` layers, each of which rounds its result independently."""
    return ROUNDINGS * torch.finfo(dtype).eps * math.sqrt(depth)


def wrong(name: str, error: float, eager_error: float | None, allowed: float) -> str | None:
    """The reason not to time an engine, if its relative error is too large.

    Args:
        eager_error: torch's own error, to which the fused form is compared; None if it is not known.
        allowed: the error allowed to all other engines.
    """
    if name == "fused" and eager_error is not None:
        allowed = ERROR_OVER_EAGER * eager_error
    # NaN compares as false.
    return None if error <= allowed else f"wrong result: relative error {error:.2g}, at most {allowed:.2g} is rounding"


def measure(case: Case, device: torch.device, seconds: float) -> dict[str, Measured]:
    """Check all engines of a case, and time the correct ones in turns.

    Args:
        seconds: duration of sampling, for all engines together.

    Raises:
        DeviceLost: nothing runs any more.
    """
    images = checked_images(len(case.inputs[0]))
    with torch.inference_mode():
        expected = case.reference(case.inputs[0][images].double())
    measured: dict[str, Measured] = {}
    ready: dict[str, Passes] = {}
    eager_error: float | None = None
    for name, make in case.engines.items():
        begin = time.perf_counter()
        try:
            engine = make()
            with torch.inference_mode():
                engine.forward(case.inputs[0])
                ready_seconds = time.perf_counter() - begin
                workspace = timing.peak_memory_bytes(partial(engine.forward, case.inputs[0]), device)
            passes = Passes(engine.forward, case.inputs)
            outputs = passes.results()
            error = relative_error(outputs[0][images], expected)
            if not all(output.isfinite().all() for output in outputs):
                error = math.nan
        # A compiler raises whatever its stages raise. One engine's failure is its own result.
        except Exception as failure:
            measured[name] = Measured(error=str(failure) if isinstance(failure, Unavailable) else _one_line(failure))
            _require_alive(device, f"{name}: {measured[name].error}")
            continue
        why = wrong(name, error, eager_error, tolerance(outputs[0].dtype, case.depth))
        if why is None:
            ready[name] = passes
        if name == "eager" and why is None:
            eager_error = error
        measured[name] = Measured(
            relative_error=None if math.isnan(error) else error, workspace_bytes=workspace,
            ready_seconds=ready_seconds, notes=engine.notes, error=why,
        )  # fmt: skip
    return {**measured, **_timed(measured, ready, len(case.inputs), device, seconds)}


def _timed(
    measured: dict[str, Measured], ready: dict[str, Passes], passes: int, device: torch.device, seconds: float
) -> dict[str, Measured]:
    """The engines that are ready, with their times."""
    if not ready:
        return {}
    samples = timing.time_interleaved(
        list(ready.values()), timing.clock_for(device), seconds, timing.MIN_SAMPLE_SECONDS[device.type]
    )
    quantiles = np.percentile(samples * (1e3 / passes), [20, 50, 80], axis=0)
    return {
        name: replace(measured[name], p20_ms=float(p20), median_ms=float(median), p80_ms=float(p80))
        for name, (p20, median, p80) in zip(ready, quantiles.T, strict=True)
    }


def _require_alive(device: torch.device, after: str) -> None:
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise DeviceLost(after) from error


def bounds(row: Block, tiling: Tiling | None, gpu: cost_model.GpuSpec) -> dict[str, Any]:
    """The times that a block's time is compared with, by the cost model.

    Args:
        tiling: the tiling whose terms are counted (default: the cost model's first).

    Returns:
        In milliseconds: the plain roofline; the bound of any kernel, and the name of the resource that sets it; the
        tiling's terms, and the name of the largest; and the sum of the rooflines layer by layer.
    """
    layers = row.layers(DTYPE_ON["cuda"], torch.device("meta"))
    problem = block_problem(row, layers, DTYPE_ON["cuda"])
    tiling = tiling or cost_model.ranked(problem, gpu)[0]
    name, seconds = cost_model.bound(problem, gpu)
    return {
        "roofline_ms": 1e3 * cost_model.roofline(problem, gpu),
        "bound_ms": 1e3 * seconds,
        "bound_term": name,
        "terms_ms": {name: 1e3 * value for name, value in cost_model.terms(problem, tiling, gpu).items()},
        "largest_term": cost_model.largest_term(problem, tiling, gpu)[0],
        "layers_roofline_ms": 1e3 * cost_model.layer_roofline(problem, gpu),
    }


def measured_row(row: Row, device: torch.device, ceilings: MachineCeilings) -> dict[str, Any]:
    """Measure a row, for JSON; running out of memory and the like is an `error` of the row.

    Raises:
        DeviceLost: nothing runs any more.
    """
    dtype = DTYPE_ON[device.type]
    try:
        case = block_case(row, dtype, device) if isinstance(row, Block) else network_case(row, dtype, device)
        engines = measure(case, device, ROW_SECONDS[device.type])
    except RuntimeError as error:
        _require_alive(device, _one_line(error))
        return {"error": _one_line(error)}
    as_json = {name: asdict(each) for name, each in engines.items()}
    result: dict[str, Any] = {"macs": case.macs, "contenders": as_json}
    if isinstance(row, Block) and device.type == "cuda":
        tiling = engines["fused"].notes.get("tiling")
        result |= bounds(row, Tiling(**tiling) if tiling else None, ceilings.gpu_spec())
    if isinstance(row, Network):
        for each in as_json.values():
            if each["median_ms"]:
                each["efficiency"] = case.macs / (each["median_ms"] / 1e3) / ceilings.product_macs
    return result


# -- Predictions -----------------------------------------------------------------------------------------------------


def predictions(gpu: cost_model.GpuSpec) -> list[dict[str, Any]]:
    """Predict the time of every row that has a fused engine by the cost model, in microseconds, without a GPU.

    Beside it stand the roofline, the bound and what sets it, and the largest term of the tiling that is predicted.

    A network's blocks are estimated one by one; its stem and head count by the bytes they move and by their launches.
    """
    predicted = []
    for row in rows("cuda", "all"):
        if isinstance(row, Block):
            problem = block_problem(row, row.layers(DTYPE_ON["cuda"], torch.device("meta")), DTYPE_ON["cuda"])
            tiling = cost_model.ranked(problem, gpu)[0]
            set_by, bound = cost_model.bound(problem, gpu)
            roofline = cost_model.roofline(problem, gpu)
            largest, _ = cost_model.largest_term(problem, tiling, gpu)
            estimate = cost_model.estimate(problem, tiling, gpu)
            layers = cost_model.layer_roofline(problem, gpu) + 3 * gpu.launch_seconds
            name, word = row.name, shorthand(tiling)
        elif row.is_convfirst:
            network = fuse(row.build(), DTYPE_ON["cuda"])
            problems = network.problems(row.batch, row.resolution)
            blocks = {name: problem for name, problem in problems.items() if isinstance(problem, BlockProblem)}
            rest = sum(moved_bytes(problem) for name, problem in problems.items() if name not in blocks)
            pairs = [(problem, cost_model.ranked(problem, gpu)[0]) for problem in blocks.values()]
            estimate = sum(cost_model.estimate(*pair, gpu) for pair in pairs)
            estimate += rest / gpu.dram_bytes + 3 * gpu.launch_seconds
            bound = sum(cost_model.bound(problem, gpu)[1] for problem in blocks.values()) + rest / gpu.dram_bytes
            roofline = sum(cost_model.roofline(problem, gpu) for problem in blocks.values()) + rest / gpu.dram_bytes
            layers = sum(cost_model.layer_roofline(problem, gpu) for problem in blocks.values())
            layers += 3 * len(blocks) * gpu.launch_seconds + 2 * rest / gpu.dram_bytes
            name, set_by, largest, word = row.name, "", "", f"{len(blocks)} blocks"
        else:
            continue
        predicted.append({
            "row": name, "roofline_us": 1e6 * roofline, "bound_us": 1e6 * bound, "set_by": set_by,
            "estimate_us": 1e6 * estimate, "largest": largest, "layers_us": 1e6 * layers, "tiling": word,
        })  # fmt: skip
    return predicted


# -- The run ---------------------------------------------------------------------------------------------------------


def _checked_device(name: str) -> torch.device:
    if name not in DTYPE_ON:
        fail(f"--device {name}: neither cuda nor cpu")
    if name == "cpu":
        return torch.device(name)
    return current_gpu("--device cuda: torch finds no CUDA device here; --device cpu runs the small version")


def _ceilings(results: ResultFile, device: torch.device) -> MachineCeilings:
    """The machine's ceilings, measured once for all rows that are compared."""
    known = results.find("machine", "limits")
    if known is None:
        ceilings = benchmark_machine.measure_ceilings(device)
        known = {"kind": "machine", "name": "limits", "date": benchmark_machine.now(), "limits": asdict(ceilings)}
        results.add(known)
    return MachineCeilings(**known["limits"])


@contextmanager
def _conditions(device: torch.device) -> Iterator[None]:
    """The settings under which all rows are measured."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        # More threads would be at the mercy of whatever else runs on the machine.
        torch.set_num_threads(1)
    try:
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True),
            # Inductor would print a page for every product that it tries.
            torch._inductor.config.patch(max_autotune_report_choices_stats=False, autotune_num_choices_displayed=0),
        ):
            yield
    finally:
        torch.set_num_threads(threads)


def _release(device: torch.device) -> None:
    """Free what the last row held."""
    # torch keeps compiled code per code object, up to a limit past which it silently falls back to eager.
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _run(
    wanted: Sequence[Row], results: ResultFile, device: torch.device, ceilings: MachineCeilings, deadline: float
) -> None:
    """Measure row after row, and write each at once.

    No row is begun that would end after the deadline if it took as long as the slowest of its kind so far; a row of the
    other kind may still fit.
    """
    slowest = {"block": 0.0, "network": 0.0}
    for row in wanted:
        begin = time.monotonic()
        if begin + slowest[row.kind] > deadline:
            continue
        _release(device)
        lost = False
        try:
            result = measured_row(row, device, ceilings)
        except DeviceLost as error:
            lost, result = True, {"error": f"the device was lost ({error})"}
        seconds = time.monotonic() - begin
        slowest[row.kind] = max(slowest[row.kind], seconds)
        head = {
            "kind": row.kind, "name": row.name, "date": benchmark_machine.now(), "commit": benchmark_machine.commit(),
            "clocks_after": benchmark_machine.clocks(device), "seconds": seconds, "row": asdict(row),
        }  # fmt: skip
        typer.echo(benchmark_report.line(results.add({**head, **result})))
        if lost:
            typer.echo("Nothing runs on the device any more: the same command goes on with the next row.", err=True)
            raise typer.Exit(1)


@app.command()
def main(
    minutes: Minutes = 8,
    device: Annotated[str, typer.Option(help="Device: cuda, or cpu for the small version.")] = "cuda",
    out: Out = None,
    only: Annotated[str, typer.Option(help="Rows to measure: blocks, networks or all.")] = "all",
    predict: Annotated[bool, typer.Option("--predict", help="Run nothing; print predictions for an H200.")] = False,
) -> None:
    """Measure the rows not measured yet, write results.jsonl, summary.json and plot.png, and print the tables."""
    if predict:
        titles = (
            "row", "roofline us", "bound us", "set by", "predicted us", "of roofline", "binds",
            "layer by layer at its floor us", "first tiling",
        )  # fmt: skip
        typer.echo(f"| {' | '.join(titles)} |")
        typer.echo(f"| {' | '.join(['---'] * len(titles))} |")
        for each in predictions(cost_model.H200):
            keys = ("roofline_us", "bound_us", "estimate_us", "layers_us")
            roofline, bound, predicted, layers = (f"{each[key]:.1f}" for key in keys)
            share = f"{each['roofline_us'] / each['estimate_us']:.0%}"
            cells = (
                each["row"], roofline, bound, each["set_by"], predicted, share, each["largest"], layers, each["tiling"],
            )  # fmt: skip
            typer.echo(f"| {' | '.join(cells)} |")
        return
    deadline = deadline_after(minutes)
    if only not in KINDS:
        fail(f"--only {only}: none of {', '.join(KINDS)}")
    where = _checked_device(device)
    identity = benchmark_machine.identity(where)
    folder = results_folder(out, identity["device"])
    results = ResultFile(folder / "results.jsonl", {"identity": identity}, ("kind", "name"))
    wanted = rows(device, only)
    provenance: dict[str, Any] = {
        **identity,
        "commit": benchmark_machine.commit(),
        "command": " ".join(["python -m kernels.lab.benchmark", *sys.argv[1:]]),
        "begin": benchmark_machine.now(),
        "clocks_before": benchmark_machine.clocks(where),
    }
    missing = [row for row in wanted if results.find(row.kind, row.name) is None]
    typer.echo(f"{len(wanted)} rows, {len(wanted) - len(missing)} of them measured before, {minutes:g} minutes")
    with _conditions(where):
        ceilings = _ceilings(results, where)
    try:
        with _conditions(where):
            _run(missing, results, where, ceilings, deadline)
    finally:
        # A run that was stopped has a report, too.
        left = [f"{row.kind} {row.name}" for row in wanted if results.find(row.kind, row.name) is None]
        provenance |= {
            "end": benchmark_machine.now(),
            "clocks_after": benchmark_machine.clocks(where),
            "limits": benchmark_machine.describe(ceilings),
            "left": left,
        }
        benchmark_report.write(folder, results.records, provenance)
    if left:
        typer.echo(f"{len(left)} rows left, the same command goes on with them: {'; '.join(left)}")


if __name__ == "__main__":
    app()
