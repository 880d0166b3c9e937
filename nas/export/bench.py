"""The timing of exported networks on this machine: all formats that run here, in turns with one another."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from kernels.ceilings import ceiling_runs, rate
from kernels.device_info import DeviceInfo
from kernels.peers import cudnn_search
from nas.config import LatencyConfig, cuda_or_warning, installed_runtime
from nas.errors import FETCH, CandidateFailed, UsageError, is_pointer, memory_may_run_out, message_line
from nas.export.directories import COMPILED, FUSED, ONNX, PROGRAM, SECTION, Exported
from nas.export.formats import program_file
from nas.latency.devices import check_device, require_triton
from nas.latency.engines import ENGINES, InRuntime, deploy, runs_on
from nas.latency.launches import arch_launches_line
from nas.latency.meter import cpu_threads
from nas.latency.onnx_graph import quiet
from nas.latency.roofline import Machine
from nas.latency.runtimes import OnnxRuntime, require
from nas.latency.values import Latency
from nas.latency.yardsticks import Timed, Yardsticks
from nas.locks import device_lock
from nas.reporting import Note, console_table
from search_spaces import ArchSpec, cost

# What runs a file of the directory, in words.
PACKAGES = {COMPILED: "AOTInductor", FUSED: "torch.export, fused"}

Forwards = list[Callable[[], object]]


@dataclass(frozen=True)
class Row:
    """The latency of one format of a network.

    Args:
        what: the name of an engine, or of what runs a file.
        dtype: the data type of the computation.
        latency: the latency; None where the format does not run here.
        reason: the reason why it does not run.
        recorded_ms: the latency that the directory records, if it is that of the same deployment.
        launches: a line that says that launches bind the latency, if they do.
    """

    network: str
    what: str
    dtype: str
    latency: Latency | None
    reason: str | None = None
    recorded_ms: float | None = None
    launches: str | None = None


# A row, its forward passes (None where the format does not run), and the MACs of each pass.
Prepared = tuple[Row, Forwards | None, int]


def bench(
    folders: Sequence[tuple[Path, Exported]], config: LatencyConfig, note: Note = lambda line: None,
    resolution: int | None = None,
) -> list[Row]:  # fmt: skip
    """Latencies of all formats of some exported networks, sampled in turns with each other and the yardsticks.

    On the device and in the deployment of the first network's search, they are corrected as that search corrected its
    own: as if its anchor took as long now as then. Elsewhere they are not corrected.

    Formats that a directory lacks and that take seconds to make are made in a temporary folder. Networks without
    weights get random ones, as latencies do not depend on them.

    Args:
        folders: each directory, and the network that was read from it.
        config: the deployment; its resolution does not matter.
        note: function that takes lines on the progress.
        resolution: width and height of the images in pixels (default: each network's own).

    Raises:
        UsageError: the device does not exist here.
    """
    device = check_device(replace(config, engine="eager"), note)
    lock = device_lock(device)
    with tempfile.TemporaryDirectory() as aside, lock.measuring(note), cpu_threads(config.threads):
        yardsticks = Yardsticks(config)
        prepared: list[Prepared] = []
        for index, (folder, network) in enumerate(folders):
            note(f"{network.name}: getting ready")
            work = Path(aside) / str(index)
            work.mkdir()
            own = replace(config, resolution=resolution or network.resolution)
            prepared += _Formats(folder, network, own, yardsticks, work).ready()
        timed = [Timed(forwards, macs) for _, forwards, macs in prepared if forwards is not None]
        first = folders[0][1]
        anchor = _Anchor.of(first, replace(config, resolution=resolution or first.resolution), yardsticks)
        note(f"measuring {len(timed)} in turns")
        latencies = yardsticks.time([*timed, *([anchor.timed] if anchor else [])])
        # On a CPU nothing is launched.
        limits = _limits(device, config, yardsticks) if device.type == "cuda" else None
    factor = anchor.recorded_ms / latencies[-1].median_ms if anchor else 1.0
    times = iter(latencies)
    rows = [row if forwards is None else replace(row, latency=next(times).scaled(factor))
            for row, forwards, _ in prepared]  # fmt: skip
    return rows if limits is None else _with_launches(rows, folders, config, resolution, limits)


def _limits(device: torch.device, config: LatencyConfig, yardsticks: Yardsticks) -> dict[str, float]:
    """The device's limits by name, see `kernels.ceilings`."""
    runs = ceiling_runs(device, getattr(torch, config.dtype))
    latencies = yardsticks.time([Timed([each.run], each.macs) for each in runs.values()])
    return {name: rate(name, runs[name], of.median_ms / 1e3) for name, of in zip(runs, latencies, strict=True)}


def _with_launches(
    rows: Sequence[Row], folders: Sequence[tuple[Path, Exported]], config: LatencyConfig, resolution: int | None,
    limits: Mapping[str, float],
) -> list[Row]:  # fmt: skip
    """The rows, of which each network's fastest engine says whether launches bind it."""
    machine = Machine(limits["product_macs"], limits["copy_bytes"])
    found = list(rows)
    for _, network in folders:
        own = [(row.latency.median_ms, index) for index, row in enumerate(rows)
               if row.network == network.name and row.what in ENGINES and row.latency is not None]  # fmt: skip
        if not own:
            continue
        latency_ms, index = min(own)
        deployed = replace(
            config, engine=rows[index].what, resolution=resolution or network.resolution,
            num_classes=network.num_classes,
        )  # fmt: skip
        arch = replace(network.arch, resolution=None)
        line = arch_launches_line("its", arch, deployed, machine, limits["graph_launch_seconds"], latency_ms)
        found[index] = replace(rows[index], launches=line)
    return found


@dataclass(frozen=True)
class _Anchor:
    """The anchor network, by which the search corrected its latencies."""

    timed: Timed
    recorded_ms: float

    @classmethod
    def of(cls, network: Exported, config: LatencyConfig, yardsticks: Yardsticks) -> _Anchor | None:
        """The anchor of a network's search; None where that measured on another device or in another deployment."""
        deployment = network.deployment
        if not _same(config, deployment) or network.config[SECTION]["latency"]["device"] != asdict(
            DeviceInfo.of(torch.device(config.device))
        ):
            return None
        anchor = network.config[SECTION]["latency"]["anchor"]
        arch = ArchSpec.from_json(json.dumps(anchor["arch_spec"]))
        size = arch.shown(deployment.resolution)
        inputs = yardsticks.meter.random_inputs((deployment.batch_size, 3, size, size))
        with quiet():
            module = deploy(arch.build(deployment.num_classes), deployment, inputs[0])
        macs = deployment.batch_size * cost(arch, size, deployment.num_classes).macs
        return cls(Timed(yardsticks.meter.forwards(module, inputs), macs), float(anchor["median_ms"]))


def _same(one: LatencyConfig, other: LatencyConfig) -> bool:
    """Whether two deployments are the same but for the engine and the precision of the measurement; a runtime must be
    of the version that is installed."""
    changed = replace(one, engine=other.engine, runtime=other.runtime, precision=other.precision, seconds=other.seconds)
    return changed == other and other.runtime == installed_runtime(other.engine)


def device_here(device: str) -> str:
    """The device of an exported deployment if it exists here, else the one in its place."""
    if device.partition(":")[0] != "cuda":
        return device
    if not cuda_or_warning():
        return "cpu"
    return device if (torch.device(device).index or 0) < torch.cuda.device_count() else "cuda"


class _Formats:
    """Prepares the formats of one network for timing."""

    def __init__(
        self, folder: Path, network: Exported, config: LatencyConfig, yardsticks: Yardsticks, work: Path
    ) -> None:
        self.folder, self.network, self.config, self.work = folder, network, config, work
        self.meter = yardsticks.meter
        self.device = torch.device(config.device)
        self.model = network.build()
        size = config.resolution
        self.inputs = self.meter.random_inputs((config.batch_size, 3, size, size))
        # At a resolution that is asked for, whatever its own is.
        arch = replace(network.arch, resolution=None)
        self.macs = config.batch_size * cost(arch, size, network.num_classes).macs
        # A file works at one resolution only.
        self.files_fit = size == network.resolution

    def ready(self) -> list[Prepared]:
        """A row for each format, with its forward passes or the reason why it has none."""
        prepared: list[Prepared] = []
        engines = [
            name
            for name, engine in ENGINES.items()
            if runs_on(engine, self.device) and self.config.dtype in engine.dtypes
        ]
        attempts: list[tuple[str, str, Callable[[], Forwards]]] = [
            (name, self.config.dtype, partial(self._engine, name)) for name in engines
        ]
        # `formats.write_programs` compiles for this dtype.
        self.compiled_dtype = self.config.dtype if self.device.type == "cuda" else "float32"
        attempts.append(("torch.export", "float32", self._program))
        if self.files_fit:
            for name in (COMPILED, FUSED):
                if (self.folder / name).exists():
                    attempts.append((PACKAGES[name], self.compiled_dtype, partial(self._package, name)))
        # On CUDA, ONNX Runtime's sessions are apart from torch's streams and graphs.
        if self.device.type == "cpu" and self.files_fit and (self.folder / ONNX).exists():
            attempts.append((ONNX, "float32", self._onnx))
        for what, dtype, make in attempts:
            row = Row(self.network.name, what, dtype, None, recorded_ms=self._recorded_ms(what))
            try:
                with memory_may_run_out(), quiet():
                    prepared.append((row, make(), self.macs))
            except (CandidateFailed, UsageError) as error:
                prepared.append((replace(row, reason=str(error)), None, 0))
            except Exception as error:
                # What an engine of ours raises here is a bug; a file may be damaged, or made for another machine.
                if what in ENGINES:
                    raise
                prepared.append((replace(row, reason=message_line(error)), None, 0))
        return prepared

    def _recorded_ms(self, what: str) -> float | None:
        deployment = self.network.deployment
        if what != deployment.engine or not _same(self.config, deployment):
            return None
        return float(self.network.config[SECTION]["latency"]["median_ms"])

    def _engine(self, name: str) -> Forwards:
        config = replace(self.config, engine=name, num_classes=self.network.num_classes)
        require_triton(name, self.device)
        require(name, config.dtype)
        return self.meter.forwards(deploy(self.model, config, self.inputs[0]), self.inputs)

    def _written(self, name: str) -> Path | None:
        """A file of the directory; None where it lacks the file, or where that is for another resolution.

        Raises:
            UsageError: the file was not fetched.
        """
        path = self.folder / name
        if not (self.files_fit and path.exists()):
            return None
        if is_pointer(path):
            raise UsageError(f"{name}: {FETCH}")
        return path

    def _program(self) -> Forwards:
        path = self._written(PROGRAM) or program_file(self.model, self.config.resolution, self.work / PROGRAM)
        module = torch.export.load(path).module().to(self.device)
        return self._checked(module, [x.float() for x in self.inputs])

    def _package(self, name: str) -> Forwards:
        path = self._written(name)
        assert path is not None, "`ready` looks for it"
        if name == FUSED:
            import kernels.ops  # noqa: F401  registers its operators

            module: nn.Module = torch.export.load(path).module()
        else:
            # With more threads it asks CUDA whether its last run has ended, which a graph's capture does not allow.
            on_cuda = self.device.type == "cuda"
            module = _Called(torch._inductor.aoti_load_package(str(path), run_single_threaded=on_cuda))
        return self._checked(module, [x.to(getattr(torch, self.compiled_dtype)) for x in self.inputs])

    def _checked(self, module: nn.Module, inputs: Sequence[Tensor]) -> Forwards:
        with torch.inference_mode(), cudnn_search(self.device):
            module(inputs[0])
        return self.meter.forwards(module, inputs)

    def _onnx(self) -> Forwards:
        path = self._written(ONNX)
        assert path is not None
        return self.meter.forwards(InRuntime(OnnxRuntime(path.read_bytes(), self.config.threads)), self.inputs)


class _Called(nn.Module):
    """A module whose forward pass is a function."""

    def __init__(self, called: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.called = called

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x)


def tables(rows: Sequence[Row], where: str) -> list[Table]:
    """A table for each network, the fastest format first, which fits into 80 columns."""
    network_tables = []
    for network in dict.fromkeys(row.network for row in rows):
        headers = ("format", "dtype", "latency ms", "p20 to p80", "recorded ms")
        table = console_table(f"{network}, {where}", *headers, text=headers[:2])
        timed = [(row, row.latency) for row in rows if row.network == network and row.latency is not None]
        for row, latency in sorted(timed, key=lambda pair: pair[1].median_ms):
            table.add_row(
                row.what, row.dtype, f"{latency.median_ms:.4f}", f"{latency.p20_ms:.4f} to {latency.p80_ms:.4f}",
                "" if row.recorded_ms is None else f"{row.recorded_ms:.4f}",
            )  # fmt: skip
        network_tables.append(table)
    return network_tables


def remarks(rows: Sequence[Row]) -> list[str]:
    """A line for each format that does not run here, and for each whose latency is doubtful."""
    lines = [f"{row.network}, {row.what}: left out ({row.reason})" for row in rows if row.latency is None]
    for row in rows:
        if row.latency is not None and (row.latency.capped or row.latency.throttled):
            why = "on a throttling GPU" if row.latency.throttled else "ended by the time cap"
            lines.append(f"{row.network}, {row.what}: {why}")
    return lines + [f"{row.network}, {row.what}: {row.launches}" for row in rows if row.launches is not None]
