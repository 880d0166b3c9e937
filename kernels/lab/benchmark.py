"""Fused blocks and networks against Inductor and cuDNN, on this machine: `python -m kernels.lab.benchmark`.

Every contender has its batch norms folded, runs channels_last in inference mode and, on CUDA, in a CUDA graph; those of
a row take turns in one run. None is timed before its output was held against a float64 run. cuDNN searches for its
best algorithms (`torch.backends.cudnn.benchmark`), and Inductor for its own (`mode="max-autotune"`; without its CUDA
graphs, as ours are there already).

Rows are measured in the order of telling and written at once to `results.jsonl`. A row that is there for the same
machine, versions and sources is not measured again, so that the same command goes on where the minutes were over.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import torch
import torch._inductor.config
import typer
from torch import Tensor, nn

from kernels import convfirst, cost_model, fuse, ops, timing, tune
from kernels.lab import benchmark_machine, benchmark_report
from kernels.lab.benchmark_machine import MachineLimits
from kernels.lab.benchmark_rows import Block, Network, Row, as_if_trained, count_macs, folded, rows
from kernels.lab.inspect import shorthand
from kernels.network import moved_bytes
from kernels.problem import MAX_SPLITS, BlockProblem, Tiling

DTYPES = {"cuda": torch.float16, "cpu": torch.float32}
KINDS = ("all", "blocks", "networks")
# Together larger than twice the L2 where that takes no more than so many: none finds its input in a cache.
FEWEST_INPUTS, MOST_INPUTS = 2, 8
# Of sampling a row's contenders; each kind of device.
ROW_SECONDS = {"cuda": 1.0, "cpu": 0.3}
# An output may be off by so many roundings of its dtype, times the root of the layers that round one after the other.
ROUNDINGS = 4
# The fused form's error over that of torch's own layer by layer run.
ERROR_OVER_EAGER = 2
# At either end of a batch, that are held against the reference: a kernel's last tile is the likeliest to be wrong.
CHECKED_IMAGES = 2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Forward = Callable[[Tensor], Tensor]


# -- Contenders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One way to run a row, ready to run.

    Args:
        forward: output of an input (N, C, H, W), channels_last.
        notes: what else there is to say, for JSON.
    """

    forward: Forward
    notes: dict[str, Any] = field(default_factory=dict)


class Unavailable(Exception):
    """Why a contender has no place on this device."""


@dataclass(frozen=True)
class Case:
    """A row with everything it takes to measure it.

    Args:
        inputs: batches (N, C, H, W), channels_last, in the row's dtype.
        reference: the same function layer by layer in float64.
        depth: layers that round their result, one after the other.
        macs: multiply-accumulates of a whole batch.
        contenders: makes each, eager first; it may compile and tune.
    """

    inputs: Sequence[Tensor]
    reference: Forward
    depth: int
    macs: int
    contenders: dict[str, Callable[[], Contender]]


class LayerByLayer(nn.Module):
    """A block as torch runs it: the reference, the eager contender, and what Inductor compiles."""

    def __init__(self, layers: Sequence[Tensor], problem: BlockProblem) -> None:
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in layers)
        self.problem = problem

    def forward(self, x: Tensor) -> Tensor:
        return convfirst.layer_by_layer(x, list(self.layers), self.problem)


def random_inputs(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Batches to rotate among. Never zeros: products of zeros draw less power and so run faster."""
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    wanted = 2 * cache_bytes // (dtype.itemsize * math.prod(shape)) + 1
    rng = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(*shape, generator=rng, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(min(MOST_INPUTS, max(FEWEST_INPUTS, wanted)))
    ]


def _compiled(module: nn.Module) -> Contender:
    return Contender(torch.compile(module, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False))


def _require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable("needs CUDA")


def block_problem(row: Block, layers: Sequence[Tensor], dtype: torch.dtype) -> BlockProblem:
    """A block that may split its tiles as it likes."""
    return ops.with_splits(ops.block_problem(row.input_shape, dtype, layers, 1, row.activation, True), MAX_SPLITS)


def block_case(row: Block, dtype: torch.dtype, device: torch.device) -> Case:
    layers = row.layers(dtype, device)
    problem = block_problem(row, layers, dtype)
    inputs = random_inputs(row.input_shape, dtype, device)
    plain = LayerByLayer(layers, problem).eval()

    def fused() -> Contender:
        """Our kernels, in one launch or three, also where the tuner would rather run torch's layer by layer."""
        _require_cuda(device)
        weights = list(vars(convfirst.pack(layers, problem)).values())
        scratch = inputs[0].new_empty(problem.scratch_elements, dtype=torch.float32)
        (choice,) = tune.tune([tune.Task(ops.BLOCK, problem, inputs[0], [*weights, scratch], layers)])
        tiling = choice.tilings[0]
        notes = {"tiling": asdict(tiling), "chosen": choice.tiling is not None, "tuner": choice.describe()}

        def forward(x: Tensor) -> Tensor:
            # In a network it is lent; here it counts as the block's.
            scratch = x.new_empty(tiling.partial_bytes(problem) // 4, dtype=torch.float32)
            return ops.BLOCK.launch(x, [*weights, scratch], problem, tiling)

        return Contender(forward, notes)

    return Case(
        inputs, copy.deepcopy(plain).double(), len(layers) // 2, problem.macs,
        {"eager": lambda: Contender(plain), "fused": fused, "compiled": lambda: _compiled(plain)},
    )  # fmt: skip


def network_case(row: Network, dtype: torch.dtype, device: torch.device) -> Case:
    built = row.build()
    macs, depth = count_macs(built, row.resolution)
    model = as_if_trained(built.to(device), row.resolution)
    plain = folded(model).to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def fused() -> Contender:
        _require_cuda(device)
        network = fuse(model, dtype)
        notes: dict[str, Any] = {
            "tuning_seconds": network.prepare(row.batch, row.resolution),
            "not_fused": [str(part) for part in network.parts if not part.fused],
        }
        modules = network.fused_modules
        notes["layer_by_layer"] = [
            name
            for name, problem in network.problems(row.batch, row.resolution).items()
            if tune.choose(modules[name].kernel, problem, device).tiling is None
        ]
        return Contender(network, notes)

    contenders = {"eager": lambda: Contender(plain), "compiled": lambda: _compiled(plain)}
    if row.is_convfirst:
        contenders["fused"] = fused
    inputs = random_inputs(row.input_shape, dtype, device)
    return Case(inputs, copy.deepcopy(model).double(), depth, row.batch * macs, contenders)


# -- Measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What was found about one contender; where `error` says why, it has no times.

    Args:
        median_ms, p20_ms, p80_ms: of one forward pass.
        relative_error: root mean square of the difference from float64, over that of the float64 output.
        workspace_bytes: most memory that a forward pass holds beyond weights and input, its output included.
        ready_seconds: to compile, tune and run once.
        notes: see `Contender`.
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

    One graph, for launching it takes about as long as a small block does, and no block is a network of its own.
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
        """Outputs of one more run, poisoned before: what a kernel leaves unwritten is NaN, not an old value."""
        with torch.inference_mode():
            for output in self.outputs:
                output.fill_(math.nan)
        self()
        if self._graph is not None:
            torch.cuda.synchronize()
        return self.outputs


class DeviceLost(Exception):
    """After an error that CUDA does not recover from nothing runs any more in this process."""


def _one_line(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


def checked_images(batch: int) -> list[int]:
    """The images of a batch that are held against the reference."""
    return sorted({*range(min(CHECKED_IMAGES, batch)), *range(max(0, batch - CHECKED_IMAGES), batch)})


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what is expected, which is float64."""
    return float((found.double() - expected).norm() / expected.norm())


def tolerance(dtype: torch.dtype, depth: int) -> float:
    """The relative error allowed to `depth` layers, each of which rounds its result independently."""
    return ROUNDINGS * torch.finfo(dtype).eps * math.sqrt(depth)


def wrong(name: str, error: float, eager_error: float | None, allowed: float) -> str | None:
    """Why a contender's relative error is too large to time it; None where it is not.

    Args:
        eager_error: torch's own, which the fused form is held against; None where it is not known.
        allowed: to all others.
    """
    if name == "fused" and eager_error is not None:
        allowed = ERROR_OVER_EAGER * eager_error
    # NaN is no less than anything.
    return None if error <= allowed else f"wrong result: relative error {error:.2g}, at most {allowed:.2g} is rounding"


def measure(case: Case, device: torch.device, seconds: float) -> dict[str, Measured]:
    """Check all contenders of a case, and time those that are right, in turns.

    Raises:
        DeviceLost: nothing runs any more.
    """
    images = checked_images(len(case.inputs[0]))
    with torch.inference_mode():
        expected = case.reference(case.inputs[0][images].double())
    found: dict[str, Measured] = {}
    ready: dict[str, Passes] = {}
    eager_error: float | None = None
    for name, make in case.contenders.items():
        begin = time.perf_counter()
        try:
            contender = make()
            with torch.inference_mode():
                contender.forward(case.inputs[0])
                ready_seconds = time.perf_counter() - begin
                workspace = timing.peak_memory_bytes(partial(contender.forward, case.inputs[0]), device)
            passes = Passes(contender.forward, case.inputs)
            outputs = passes.results()
            error = relative_error(outputs[0][images], expected)
            if not all(output.isfinite().all() for output in outputs):
                error = math.nan
        # A compiler raises whatever its stages raise. One contender's failure is its own result.
        except Exception as failure:
            found[name] = Measured(error=str(failure) if isinstance(failure, Unavailable) else _one_line(failure))
            _require_alive(device, f"{name}: {found[name].error}")
            continue
        why = wrong(name, error, eager_error, tolerance(outputs[0].dtype, case.depth))
        if why is None:
            ready[name] = passes
        if name == "eager" and why is None:
            eager_error = error
        found[name] = Measured(
            relative_error=None if math.isnan(error) else error, workspace_bytes=workspace,
            ready_seconds=ready_seconds, notes=contender.notes, error=why,
        )  # fmt: skip
    return {**found, **_timed(found, ready, len(case.inputs), device, seconds)}


def _timed(
    found: dict[str, Measured], ready: dict[str, Passes], passes: int, device: torch.device, seconds: float
) -> dict[str, Measured]:
    if not ready:
        return {}
    samples = timing.time_interleaved(
        list(ready.values()), timing.clock_for(device), seconds, timing.MIN_SAMPLE_SECONDS[device.type]
    )
    quantiles = np.percentile(samples * (1e3 / passes), [20, 50, 80], axis=0)
    return {
        name: Measured(**{**vars(found[name]), "p20_ms": float(p20), "median_ms": float(median), "p80_ms": float(p80)})
        for name, (p20, median, p80) in zip(ready, quantiles.T, strict=True)
    }


def _require_alive(device: torch.device, after: str) -> None:
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise DeviceLost(after) from error


def bounds(row: Block, tiling: Tiling | None, limits: cost_model.Limits) -> dict[str, Any]:
    """What a block's time is held against; the terms are those of the tiling, or of the cost model's first.

    Returns:
        In milliseconds: each counted term, the largest of them and its name, the plain roofline, and the sum of the
        rooflines layer by layer.
    """
    layers = row.layers(DTYPES["cuda"], torch.device("meta"))
    problem = block_problem(row, layers, DTYPES["cuda"])
    tiling = tiling or cost_model.ranked(problem, limits)[0]
    term, seconds = cost_model.bound(problem, tiling, limits)
    return {
        "bound_ms": 1e3 * seconds,
        "bound_term": term,
        "terms_ms": {name: 1e3 * value for name, value in cost_model.terms(problem, tiling, limits).items()},
        "roofline_ms": 1e3 * cost_model.roofline(problem, limits),
        "layers_roofline_ms": 1e3 * cost_model.layer_roofline(problem, limits),
    }


def measured_row(row: Row, device: torch.device, limits: MachineLimits) -> dict[str, Any]:
    """A row's result, for JSON. Out of memory and the like is an `error` of the row.

    Raises:
        DeviceLost: nothing runs any more.
    """
    dtype = DTYPES[device.type]
    try:
        case = block_case(row, dtype, device) if isinstance(row, Block) else network_case(row, dtype, device)
        contenders = measure(case, device, ROW_SECONDS[device.type])
    except RuntimeError as error:
        _require_alive(device, _one_line(error))
        return {"error": _one_line(error)}
    each_found = {name: asdict(each) for name, each in contenders.items()}
    result: dict[str, Any] = {"macs": case.macs, "contenders": each_found}
    if isinstance(row, Block) and device.type == "cuda":
        tiling = contenders["fused"].notes.get("tiling")
        result |= bounds(row, Tiling(**tiling) if tiling else None, limits.counting())
    if isinstance(row, Network):
        for each in each_found.values():
            if each["median_ms"]:
                each["efficiency"] = case.macs / (each["median_ms"] / 1e3) / limits.product_macs
    return result


# -- Predictions -----------------------------------------------------------------------------------------------------


def predictions(limits: cost_model.Limits) -> list[dict[str, Any]]:
    """What the cost model expects of every row that has a fused contender, counted, on any machine; microseconds.

    A network's blocks are estimated one by one; its stem and head are taken at the bytes they move and their launches.
    """
    found = []
    for row in rows("cuda", "all"):
        if isinstance(row, Block):
            problem = block_problem(row, row.layers(DTYPES["cuda"], torch.device("meta")), DTYPES["cuda"])
            tiling = cost_model.ranked(problem, limits)[0]
            term, bound = cost_model.bound(problem, tiling, limits)
            estimate = cost_model.estimate(problem, tiling, limits)
            layers = cost_model.layer_roofline(problem, limits) + 3 * limits.launch_seconds
            name, word = row.name, shorthand(tiling)
        elif row.is_convfirst:
            network = fuse(row.build(), DTYPES["cuda"])
            problems = network.problems(row.batch, row.resolution)
            blocks = {name: problem for name, problem in problems.items() if isinstance(problem, BlockProblem)}
            rest = sum(moved_bytes(problem) for name, problem in problems.items() if name not in blocks)
            pairs = [(problem, cost_model.ranked(problem, limits)[0]) for problem in blocks.values()]
            estimate = sum(cost_model.estimate(*pair, limits) for pair in pairs)
            estimate += rest / limits.dram_bytes + 3 * limits.launch_seconds
            bound = sum(cost_model.bound(*pair, limits)[1] for pair in pairs) + rest / limits.dram_bytes
            layers = sum(cost_model.layer_roofline(problem, limits) for problem in blocks.values())
            layers += 3 * len(blocks) * limits.launch_seconds + 2 * rest / limits.dram_bytes
            name, term, word = row.name, "", f"{len(blocks)} blocks"
        else:
            continue
        found.append({
            "row": name, "estimate_us": 1e6 * estimate, "bound_us": 1e6 * bound, "binds": term,
            "layers_us": 1e6 * layers, "tiling": word,
        })  # fmt: skip
    return found


# -- Results on disk -------------------------------------------------------------------------------------------------


class Results:
    """A file of JSON lines, one a row, that several runs add to.

    Args:
        path: need not exist yet.
        identity: what rows must share to be compared; others stay in the file and are not read.
    """

    def __init__(self, path: Path, identity: dict[str, str]) -> None:
        self.path, self.identity = path, identity
        self.records: list[dict[str, Any]] = []
        for line in path.read_text().splitlines() if path.exists() else ():
            # A run that was killed leaves half a line.
            with suppress(json.JSONDecodeError):
                record = json.loads(line)
                if record.get("identity") == identity:
                    self.records.append(record)

    def find(self, kind: str, name: str) -> dict[str, Any] | None:
        return next((each for each in self.records if (each["kind"], each["name"]) == (kind, name)), None)

    def add(self, record: dict[str, Any]) -> None:
        record = {**record, "identity": self.identity}
        # After half a line a new one begins; empty lines are skipped when read.
        begun = self.path.exists() and not self.path.read_text().endswith("\n")
        with self.path.open("a") as file:
            file.write(("\n" if begun else "") + json.dumps(record) + "\n")
        self.records.append(record)


# -- The run ---------------------------------------------------------------------------------------------------------


def _fail(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(2)


def _checked_device(name: str) -> torch.device:
    if name not in DTYPES:
        _fail(f"--device {name}: neither cuda nor cpu")
    if name == "cuda" and not torch.cuda.is_available():
        _fail("--device cuda: torch finds no CUDA device here; --device cpu runs the small version")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def new_folder(out: Path | None, device_name: str) -> Path:
    """Where results go, made if need be: by default a folder of the device's own under docs/benchmarks."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in device_name.lower()).split())
    folder = out or Path(__file__).parents[2] / "docs" / "benchmarks" / slug
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _fail(f"--out {folder}: {error.strerror}")
    if not os.access(folder, os.W_OK):
        _fail(f"--out {folder}: not writable")
    return folder


def _limits(results: Results, device: torch.device) -> MachineLimits:
    """The machine's own limits, measured once for all rows that are compared."""
    known = results.find("machine", "limits")
    if known is None:
        limits = benchmark_machine.measure_limits(device)
        known = {"kind": "machine", "name": "limits", "date": benchmark_machine.now(), "limits": asdict(limits)}
        results.add(known)
    return MachineLimits(**known["limits"])


@contextmanager
def _conditions(device: torch.device) -> Iterator[None]:
    """Under which all rows are measured."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        # More would be at the mercy of whatever else runs on the machine.
        torch.set_num_threads(1)
    try:
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True),
            # It would print a page for every product that Inductor tries.
            torch._inductor.config.patch(max_autotune_report_choices_stats=False, autotune_num_choices_displayed=0),
        ):
            yield
    finally:
        torch.set_num_threads(threads)


def _release(device: torch.device) -> None:
    """Let go of what the last row held."""
    # Compiled code is kept per code object, up to a limit past which torch falls back to eager without a word.
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _run(wanted: Sequence[Row], results: Results, device: torch.device, limits: MachineLimits, deadline: float) -> None:
    """Measure row after row, each written at once.

    None is begun that would end after the deadline if it took as long as the slowest of its kind has taken so far; a
    row of the other kind may still fit.
    """
    slowest = {"block": 0.0, "network": 0.0}
    for row in wanted:
        begin = time.monotonic()
        if begin + slowest[row.kind] > deadline:
            continue
        _release(device)
        lost = False
        try:
            result = measured_row(row, device, limits)
        except DeviceLost as error:
            lost, result = True, {"error": f"the device was lost ({error})"}
        seconds = time.monotonic() - begin
        slowest[row.kind] = max(slowest[row.kind], seconds)
        head = {
            "kind": row.kind, "name": row.name, "date": benchmark_machine.now(), "commit": benchmark_machine.commit(),
            "clocks_after": benchmark_machine.clocks(device), "seconds": seconds, "row": asdict(row),
        }  # fmt: skip
        results.add({**head, **result})
        typer.echo(benchmark_report.line(results.records[-1]))
        if lost:
            typer.echo("nothing runs on the device any more: the same command goes on with the next row", err=True)
            raise typer.Exit(1)


@app.command()
def main(
    minutes: Annotated[float, typer.Option(help="After so many no row is begun.")] = 8,
    device: Annotated[str, typer.Option(help="cuda, or cpu for the small version.")] = "cuda",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; by default docs/benchmarks/<device>.")
    ] = None,
    only: Annotated[str, typer.Option(help="blocks, networks or all.")] = "all",
    predict: Annotated[bool, typer.Option("--predict", help="Run nothing: print what is counted for an H200.")] = False,
) -> None:
    """Measure what is not measured yet; write results.jsonl, summary.json and plot.png, and print the tables."""
    if predict:
        typer.echo("| row | predicted us | bound us | binds | layer by layer at its floor us | first tiling |")
        typer.echo("| --- | --- | --- | --- | --- | --- |")
        for each in predictions(cost_model.H200):
            times = [f"{each[key]:.1f}" for key in ("estimate_us", "bound_us", "layers_us")]
            cells = (each["row"], *times[:2], each["binds"], times[2], each["tiling"])
            typer.echo(f"| {' | '.join(cells)} |")
        return
    deadline = time.monotonic() + 60 * minutes
    if not 0 < minutes < math.inf:
        _fail(f"--minutes {minutes:g}: not a positive number")
    if only not in KINDS:
        _fail(f"--only {only}: none of {', '.join(KINDS)}")
    where = _checked_device(device)
    identity = benchmark_machine.identity(where)
    folder = new_folder(out, identity["device"])
    results = Results(folder / "results.jsonl", identity)
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
        limits = _limits(results, where)
    try:
        with _conditions(where):
            _run(missing, results, where, limits, deadline)
    finally:
        # Of a run that was stopped, too.
        left = [f"{row.kind} {row.name}" for row in wanted if results.find(row.kind, row.name) is None]
        provenance |= {
            "end": benchmark_machine.now(),
            "clocks_after": benchmark_machine.clocks(where),
            "limits": benchmark_machine.describe(limits),
            "left": left,
        }
        benchmark_report.write(folder, results.records, provenance)
    if left:
        typer.echo(f"{len(left)} rows left, the same command goes on with them: {'; '.join(left)}")


if __name__ == "__main__":
    app()
