"""Architectures side by side: `python -m nas.lab.paired ARCH ARCH ... --data photos`.

Each is trained with the same seeds on the same images, and timed in turns with the others. The command prints each
one's accuracy, its difference from the first one's by seed, both with 95 % intervals, and its latency. It shows what a
choice of a space is worth where two architectures differ in that choice alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from scipy import stats

from kernels.machine import cores
from nas.config import DataConfig, LatencyConfig, ProxyConfig
from nas.errors import CandidateFailed, UsageError
from nas.latency.devices import check_device
from nas.latency.isolation import meter_for
from nas.locks import device_lock
from nas.reporting import console_table
from nas.search.real_evaluator import train_candidate
from nas.training.data import load_all
from nas.training.pool import DataFiles
from nas.training.workers import Call, Workers
from search_spaces import ArchSpec, load_space

Result = dict[str, dict[str, float]]
CPU = LatencyConfig(device="cpu", engine="eager")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of some values, and half the width of its 95 % confidence interval; not a number for a single one."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    error = float(stats.sem(values))
    return float(np.mean(values)), error * float(stats.t.ppf(0.975, len(values) - 1))


def trained(
    archs: Sequence[ArchSpec], data: DataConfig, proxy: ProxyConfig, seeds: int, workers: int, out: Path | None
) -> Result:
    """Accuracies of architectures by their lines, and then by seed; those that a file holds are not trained again.

    Raises:
        UsageError: the data cannot be loaded, one cannot be trained, or the file holds what was trained in another way.
    """
    found: Result = {}
    how = {"data": data.source, "resolution": data.resolution, "steps": proxy.steps, "rate": proxy.learning_rate}
    if out is not None and out.exists():
        try:
            stored = json.loads(out.read_text())
            found, before = stored["accuracies"], stored["trained"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"--out {out}: holds no accuracies of an earlier run") from error
        if before != how:
            raise UsageError(f"--out {out}: holds accuracies of other trainings ({before}, now {how})")
    # Seeds in the outer loop, so that a run that is cut short has trained all architectures as often.
    missing = [(arch, seed) for seed in range(seeds) for arch in archs if str(seed) not in found.get(str(arch), {})]
    if not missing:
        return found
    sizes = sorted({arch.shown(data.resolution) for arch, _ in missing})
    with DataFiles() as files, Workers(workers, ["cpu"]) as pool, device_lock(check_device(CPU)).training():
        sources = {size: files.write(each) for size, each in load_all(data, sizes)}
        calls = [
            Call(train_candidate, (arch, sources[arch.shown(data.resolution)], proxy, seed, False, None, False))
            for arch, seed in missing
        ]
        with Progress() as progress, closing(pool.run(calls)) as results:
            bar = progress.add_task("training", total=len(calls))
            for done in results:
                arch, seed = missing[done.index]
                if isinstance(done.result, CandidateFailed):
                    raise UsageError(f"{arch}: {done.result}")
                found.setdefault(str(arch), {})[str(seed)] = done.result.accuracy
                if out is not None:
                    out.write_text(json.dumps({"trained": how, "accuracies": found}, indent=1) + "\n")
                progress.advance(bar)
    return found


def main(
    arch: Annotated[list[str], typer.Argument(help="Architectures, as their lines.")],
    data: Annotated[str, typer.Option(help="Images, as the search's --data.")] = "digits",
    resolution: Annotated[int, typer.Option(help="Pixels for architectures that have none of their own.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 200,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = ProxyConfig.learning_rate,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each architecture.")] = 5,
    workers: Annotated[int | None, typer.Option(min=1, help="Trainings at once (default: one for each core).")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file of accuracies, which are not trained again.")] = None,
) -> None:
    """Train architectures on a CPU with the same seeds, time them, and print their differences."""
    try:
        archs = list(dict.fromkeys(map(ArchSpec.parse, arch)))
        proxy = ProxyConfig(steps=steps, learning_rate=rate)
        found = trained(archs, DataConfig(data, resolution), proxy, seeds, workers or cores(), out)
        config = LatencyConfig(device="cpu", resolution=resolution)
        with (
            device_lock(check_device(config)).measuring(lambda line: print(line, file=sys.stderr)),
            closing(meter_for(config, load_space("small").anchor(), None)) as meter,
        ):
            latencies_ms = [each.median_ms for each in meter.measure_together(archs)]
    except (UsageError, CandidateFailed, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    table = console_table(
        f"{steps} steps of {proxy.batch_size}, learning rate {rate:g}, {seeds} seeds; {config.engine_label}",
        "accuracy", "less the first's", "latency ms", "architecture", text=("architecture",),
    )  # fmt: skip
    first = found[str(archs[0])]
    for each, latency_ms in zip(archs, latencies_ms, strict=True):
        own = found[str(each)]
        accuracies = [own[str(seed)] for seed in range(seeds)]
        differences = [own[str(seed)] - first[str(seed)] for seed in range(seeds)]
        less = "" if each == archs[0] else _percent(differences, sign="+")
        table.add_row(_percent(accuracies), less, f"{latency_ms:.4f}", str(each))
    Console(width=160, markup=False).print(table)


def _percent(values: Sequence[float], sign: str = "") -> str:
    mean, half = interval(values)
    return f"{100 * mean:{sign}.2f} +-{100 * half:.2f} %"


if __name__ == "__main__":
    typer.run(main)
