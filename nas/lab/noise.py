"""The noise of latencies: `python -m nas.lab.noise` measures the same networks several times.

Random networks of a space are measured one after the other, as a search does, and then all of them again, and again.
The command prints how far a network's latencies are apart, raw and drift-corrected, how often two networks change
places between rounds, and how many measurements ended at the time cap. `--out` keeps the latencies, and with
`--reference-ms` from an earlier run, which prints it, several runs are compared. With `--workers` networks are trained
between the rounds, as in a parallel search, and the processes that trained are there while latencies are measured.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nas.config import DataConfig, LatencyConfig, ProxyConfig
from nas.errors import UsageError
from nas.lab.options import Space
from nas.latency.devices import check_device
from nas.latency.isolation import meter_for
from nas.locks import device_lock
from nas.search.real_evaluator import train_candidate
from nas.training.data import load_all
from nas.training.pool import DataFiles
from nas.training.workers import Call, Workers
from search_spaces import load_space

# Steps of the trainings between two rounds: a few seconds.
STEPS = 50


def spread(latencies_ms: np.ndarray) -> np.ndarray:
    """The greatest latency of each network over its least, less 1: (rounds, networks) -> (networks,)."""
    apart: np.ndarray = latencies_ms.max(axis=0) / latencies_ms.min(axis=0) - 1
    return apart


def exchanges(latencies_ms: np.ndarray) -> tuple[int, int]:
    """Pairs of networks that change places between two rounds, and pairs in all, of latencies (rounds, networks)."""
    changed = total = 0
    for one, other in itertools.combinations(latencies_ms, 2):
        for a, b in itertools.combinations(range(latencies_ms.shape[1]), 2):
            changed += (one[a] < one[b]) != (other[a] < other[b])
            total += 1
    return changed, total


def main(
    networks: Annotated[int, typer.Option(min=2, help="Networks, drawn from the space with a fixed seed.")] = 10,
    rounds: Annotated[int, typer.Option(min=2, help="Measurements of each network.")] = 3,
    space: Space = "small",
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:N.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Time cap per measurement, in seconds.")] = LatencyConfig.seconds,
    reference_ms: Annotated[
        float | None, typer.Option(help="Latency of the anchor that an earlier run printed (default: measure it).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file of latencies; those of this run are added.")] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Worker processes that train before each round, as in a parallel search.")
    ] = 0,
) -> None:
    """Print how far repeated measurements of the same networks are apart."""
    try:
        loaded = load_space(space)
        config = LatencyConfig(device=device, seconds=seconds, resolution=loaded.default_resolution)
        where = check_device(config)
        runs = _earlier(out)
    except (UsageError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    rng = random.Random(0)
    archs = [loaded.sample(rng) for _ in range(networks)]
    lock = device_lock(where)
    with lock.measuring(lambda line: print(line, file=sys.stderr)):
        meter = meter_for(config, loaded.anchor(), reference_ms)
    measured: list[list[Any]] = []
    with DataFiles() as files, Workers(workers, [str(where)]) as pool:
        calls = []
        if workers:
            sizes = loaded.own_resolutions or (loaded.default_resolution,)
            paths = {size: files.write(data) for size, data in load_all(DataConfig(), sizes)}
            proxy = ProxyConfig(steps=STEPS)
            calls = [
                Call(
                    train_candidate, (arch, paths[arch.shown(loaded.default_resolution)], proxy, 0, False, None, False)
                )
                for arch in archs[: 2 * workers]
            ]
        for _ in track(range(rounds), "measuring"):
            with lock.training():
                # All of them end before anything is measured, and their processes stay.
                list(pool.run(calls))
            row = []
            for arch in archs:
                with lock.measuring():
                    row += meter.measure_together([arch])
            measured.append(row)
    reference_ms = meter.reference_ms
    meter.close()
    runs.append({
        "raw": [[result.raw_median_ms for result in row] for row in measured],
        "corrected": [[result.median_ms for result in row] for row in measured],
        "capped": sum(result.latency.capped for row in measured for result in row),
    })  # fmt: skip
    if out is not None:
        out.write_text(json.dumps(runs))
    console = Console(width=100)
    shares = [result.latency.interval_share for row in measured for result in row]
    counts = [result.latency.repeats for row in measured for result in row]
    table = Table("", "spread: median", "greatest", "places changed", title=f"{networks} networks, {rounds} rounds")
    for name in ("raw", "corrected"):
        latencies_ms = np.asarray(runs[-1][name])
        changed, total = exchanges(latencies_ms)
        table.add_row(
            name,
            f"{np.median(spread(latencies_ms)):.1%}",
            f"{spread(latencies_ms).max():.1%}",
            f"{changed} of {total} pairs",
        )
    if len(runs) > 1:
        for name in ("raw", "corrected"):
            medians = np.asarray([np.median(np.asarray(run[name]), axis=0) for run in runs])
            changed, total = exchanges(medians)
            table.add_row(
                f"{name}, medians of {len(runs)} runs", f"{np.median(spread(medians)):.1%}",
                f"{spread(medians).max():.1%}", f"{changed} of {total} pairs",
            )  # fmt: skip
    console.print(table)
    print(
        f"ended by the cap: {runs[-1]['capped']} of {networks * rounds}; interval {np.median(shares):.1%} of the "
        f"median (greatest {max(shares):.1%}), {np.median(counts):.0f} samples; anchor {reference_ms:.4f} ms"
    )


def _earlier(path: Path | None) -> list[dict[str, Any]]:
    """Read the runs that a file holds; none if there is no file yet.

    Raises:
        UsageError: the file holds something else, or cannot be made.
    """
    if path is None or not path.exists():
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"--out {path}: its folder does not exist")
        return []
    try:
        runs = json.loads(path.read_text())
        [(run["raw"], run["corrected"]) for run in runs]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"--out {path}: holds no figures of an earlier run") from error
    return list(runs)


if __name__ == "__main__":
    typer.run(main)
