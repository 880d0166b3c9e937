"""The kernels of a whole search, without a GPU: `python -m nas.lab.soak --budget 200 --compilers 1 --compilers 2`.

The default sampler proposes candidates as in a search, and their kernels are compiled for real by as many processes as
asked for, into an empty cache. A child process then tunes them and captures their networks, as for a measurement, but
on a GPU that is not there (`kernels.lab.stub`): kernels are loaded and launched, and do not run. Accuracies and
latencies are invented, and a training takes as long as is said.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console

from kernels.cost_model import GPU_SPECS
from kernels.tune import Target
from nas.config import LatencyConfig, SearchConfig
from nas.lab.invented import FakeEvaluator
from nas.lab.options import Space
from nas.lab.stubbed import CAPABILITY, on_stub, rehearse
from nas.latency.compile_ahead import Compilers
from nas.latency.isolation import LIFETIME, Apart
from nas.latency.values import Measurement
from nas.reporting import console_table
from nas.search.evaluation import round_of
from nas.search.loop import Silent, run
from nas.search.sampling import first_archs
from nas.training.proxy import ProxyResult
from search_spaces import ArchSpec, load_space

MIB = 2**20
# Where Triton and this project keep what they keep.
CACHES = ("TRITON_CACHE_DIR", "CONVFIRST_CACHE")


class SoakingEvaluator(FakeEvaluator):
    """Evaluator whose candidates are compiled, tuned and captured on a GPU that is not there.

    Args:
        compilers: number of processes that compile.
        training_s: seconds that each training takes.

    Attributes:
        held_seconds: time in which the lock of a real device would be held.
        measured: number of candidates.
        child_bytes: the most memory that a child process held.
    """

    workers = 4
    compiles = True

    def __init__(self, config: LatencyConfig, compilers: int, training_s: float) -> None:
        super().__init__()
        self.config, self.training_s = config, training_s
        target = Target("a stub", GPU_SPECS[CAPABILITY], CAPABILITY, searches=False)
        self.compilers = Compilers(config, target, compilers)
        self.meter = Apart(config)
        self.held_seconds, self.measured, self.child_bytes = 0.0, 0, 0

    @property
    def round_size(self) -> int:
        return round_of(self.workers)

    def foresee(self, archs: Sequence[ArchSpec]) -> None:
        self.compilers.foresee(archs)

    def measure(self, arch: ArchSpec) -> Measurement:
        self.compilers.ready([arch])
        begin = time.perf_counter()
        with on_stub():
            held = self.meter.call([arch], rehearse, arch, self.config)
        self.held_seconds += time.perf_counter() - begin
        self.child_bytes = max(self.child_bytes, held)
        self.measured += 1
        if self.measured % LIFETIME == 0:
            self.meter.close()
        return super().measure(arch)

    def train_one(self, arch: ArchSpec) -> ProxyResult:
        time.sleep(self.training_s)
        return super().train_one(arch)

    def close(self) -> None:
        self.meter.close()
        self.compilers.close()


@dataclass(frozen=True)
class Soaked:
    """The result of a search without a GPU."""

    compilers: int
    candidates: int
    launches: int
    kernels: int
    cpu_seconds: float
    seconds: float
    waited_seconds: float
    held_seconds: float
    first_bytes: int
    last_bytes: int
    child_bytes: int


def soak(config: SearchConfig, deployed: LatencyConfig, compilers: int, training_s: float, cache: Path) -> Soaked:
    """Search, and return what the kernels took."""
    process = psutil.Process()
    evaluator = SoakingEvaluator(deployed, compilers, training_s)
    watch = _Memory()
    begin = time.perf_counter()
    evaluator.foresee([config.space.anchor(), *first_archs(config)])
    try:
        run(config, evaluator, watch)
    finally:
        evaluator.close()
    return Soaked(
        compilers, evaluator.measured, evaluator.compilers.kernels, len(list(cache.rglob("*.cubin"))),
        evaluator.compilers.cpu_seconds, time.perf_counter() - begin, evaluator.compilers.waited_seconds,
        evaluator.held_seconds, watch.first_bytes, int(process.memory_info().rss), evaluator.child_bytes,
    )  # fmt: skip


class _Memory(Silent):
    """Notes the memory of this process when the search begins."""

    first_bytes = 0

    def begin(self, complete: int, budget: int) -> None:
        self.first_bytes = int(psutil.Process().memory_info().rss)


def main(
    budget: Annotated[int, typer.Option(min=1, help="Number of candidates.")] = 200,
    compilers: Annotated[
        list[int] | None,
        typer.Option(help="Number of processes that compile; may be given several times (default: 1 and 2)."),
    ] = None,
    sampler: Annotated[str, typer.Option(help="Sampler: model, tpe, nsga2 or random.")] = "model",
    space: Space = "small",
    latency_batch: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 1,
    latency_resolution: Annotated[int, typer.Option(min=8, help="Width and height of the images in pixels.")] = 32,
    training_s: Annotated[float, typer.Option(min=0, help="Duration of each training in seconds.")] = 0.5,
    out: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    """Print what the kernels of a search take: their number, time and memory."""
    deployed = LatencyConfig(
        device="cuda", engine="fused", dtype="float16", batch_size=latency_batch, resolution=latency_resolution
    )
    rows = []
    for count in compilers or [1, 2]:
        with tempfile.TemporaryDirectory() as folder:
            before = {name: os.environ.get(name) for name in CACHES}
            os.environ.update({name: str(Path(folder) / name.lower()) for name in CACHES})
            try:
                config = SearchConfig(
                    budget=budget, storage=f"sqlite:///{Path(folder) / 'study.db'}", space=load_space(space),
                    sampler=sampler, confirm=0,
                )  # fmt: skip
                rows.append(soak(config, deployed, count, training_s, Path(folder)))
            finally:
                for name, value in before.items():
                    if value is None:
                        del os.environ[name]
                    else:
                        os.environ[name] = value
        _print(rows[-1:], sampler)
        if out is not None:
            out.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if len(rows) > 1:
        _print(rows, sampler)


def _print(rows: Sequence[Soaked], sampler: str) -> None:
    table = console_table(
        f"Kernels of a search by sampler {sampler}, without a GPU",
        "compilers", "candidates", "launches", "kernels", "CPU s", "s each", "wall s", "waited s", "lock held s",
        "MiB at first", "at last", "most in a child",
    )  # fmt: skip
    for row in rows:
        each = row.cpu_seconds / max(1, row.kernels)
        table.add_row(
            *map(str, (row.compilers, row.candidates, row.launches, row.kernels)),
            f"{row.cpu_seconds:.0f}",
            f"{each:.2f}",
            f"{row.seconds:.0f}",
            f"{row.waited_seconds:.0f}",
            f"{row.held_seconds:.1f}",
            *(f"{size / MIB:.0f}" for size in (row.first_bytes, row.last_bytes, row.child_bytes)),
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
