"""The engines side by side: `python -m nas.lab.engines` times random networks of each space in all of them, in turns.

The command prints each engine's latencies, how long a network takes until it can be timed, and how far the engines
agree on the ranking: Kendall's tau of every two, with bootstrap intervals over the networks.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track

from kernels.timing import median_interval, sample_until
from nas.config import LatencyConfig
from nas.display.notes import pixels
from nas.errors import CandidateFailed, UsageError
from nas.lab.options import Spaces
from nas.latency.devices import check_device
from nas.latency.engines import ENGINES, deploy, runs_on
from nas.latency.meter import LatencyMeter, cpu_threads, in_turn
from nas.locks import device_lock
from nas.reporting import console_table
from nas.validation.ranking import rankings
from search_spaces import ArchSpec, SearchSpace, load_space

# Samples are shorter than a search's: all engines take their turn in each round.
MIN_SAMPLE_SECONDS = 2e-3


@dataclass(frozen=True)
class Times:
    """Figures of networks in engines, (networks, engines) each; nan where an engine refuses a network.

    Args:
        latencies_ms: median latencies.
        interval_shares: widths of the medians' 95 % confidence intervals, over the medians.
        ready_seconds: seconds from a network to its first run.
    """

    latencies_ms: np.ndarray
    interval_shares: np.ndarray
    ready_seconds: np.ndarray


def times(archs: Sequence[ArchSpec], configs: Sequence[LatencyConfig]) -> Times:
    """Time networks in deployments that differ in the engine alone, each network in turns in all of them."""
    latencies_ms, interval_shares, ready_seconds = (np.full((len(archs), len(configs)), np.nan) for _ in range(3))
    meters = [LatencyMeter(config, archs[0].build(config.num_classes), reference_ms=1.0) for config in configs]
    for row, arch in enumerate(track(archs, "timing", console=Console(stderr=True))):
        runs, columns = list[Callable[[], None]](), list[int]()
        for column, (meter, config) in enumerate(zip(meters, configs, strict=True)):
            network = arch.build(config.num_classes)
            begin = time.perf_counter()
            try:
                with cpu_threads(config.threads):
                    images = meter.images(arch.shown(config.resolution))
                    run = in_turn(meter.forwards(deploy(network, config, images[0]), images))
                    run()
            except CandidateFailed:
                continue
            ready_seconds[row, column] = time.perf_counter() - begin
            runs.append(run)
            columns.append(column)
        if not runs:
            continue
        precision = replace(meters[0].precision, cap_seconds=meters[0].precision.cap_seconds * len(runs))
        with cpu_threads(configs[0].threads):
            sampled = sample_until(
                runs, meters[0].clock, MIN_SAMPLE_SECONDS, precision, lambda seconds: list(seconds.T)
            )
        latencies_ms[row, columns] = 1e3 * np.median(sampled.seconds, axis=0)
        interval_shares[row, columns] = sampled.interval_shares
    return Times(latencies_ms, interval_shares, ready_seconds)


def main(
    space: Spaces = None,
    networks: Annotated[int, typer.Option(min=4, help="Networks of each space, drawn with a fixed seed.")] = 30,
    engines: Annotated[
        str | None, typer.Option(help="Comma-separated engines (default: all that run on the device).")
    ] = None,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    seconds: Annotated[float, typer.Option(help="Time cap for each engine and network, in seconds.")] = 1.0,
) -> None:
    """Print latencies, times to get ready, and rank correlations of all engines."""
    try:
        base = LatencyConfig(device=device, threads=threads, seconds=seconds)
        where = torch.device(base.device)
        names = engines.split(",") if engines else [name for name, each in ENGINES.items() if runs_on(each, where)]
        for name in list(names):
            try:
                check_device(replace(base, engine=name))
            except UsageError as error:
                if engines:
                    raise
                print(f"left out: {error}", file=sys.stderr)
                names.remove(name)
        spaces = [load_space(name) for name in space or ("small", "imagenet")]
    except (UsageError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    console = Console(width=120, markup=False)
    for each in spaces:
        rng = random.Random(0)
        archs = [each.sample(rng) for _ in range(networks)]
        configs = [replace(base, engine=name, resolution=each.default_resolution) for name in names]
        with device_lock(where).measuring(lambda line: print(line, file=sys.stderr)):
            found = times(archs, configs)
        _print(console, each, configs, found)


def _print(console: Console, space: SearchSpace, configs: Sequence[LatencyConfig], found: Times) -> None:
    first, latencies_ms = configs[0], found.latencies_ms
    shown = pixels(first.resolution, space)
    where = f"{len(latencies_ms)} networks of {space.name}, {shown}, {first.threads} thread(s)"
    table = console_table(
        where, "engine", "fastest ms", "median ms", "slowest ms", "interval", "speed", "ready s", text=("engine",)
    )
    for index, config in enumerate(configs):
        own, shares = latencies_ms[:, index], found.interval_shares[:, index]
        table.add_row(
            config.engine_label, f"{np.nanmin(own):.4f}", f"{np.nanmedian(own):.4f}", f"{np.nanmax(own):.4f}",
            f"{np.nanmedian(shares):.1%} (at most {np.nanmax(shares):.1%})", _speed(latencies_ms[:, 0], own),
            f"{np.nanmedian(found.ready_seconds[:, index]):.3f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "interval: width of the 95 % interval of a network's latency, median and greatest; "
        f"speed: median ratio to {first.engine} (95 % interval); ready: median seconds from a network to its first run"
    )
    assert first.precision is not None
    if wide := int((found.interval_shares > first.precision).any(axis=1).sum()):
        console.print(f"ended by the time cap, with an interval of more than {first.precision:.0%}: {wide} networks")
    ranks = console_table("Kendall's tau (95 % intervals)", "", *(config.engine for config in configs), text=("",))
    for index, config in enumerate(configs):
        ranks.add_row(config.engine, *(_tau(latencies_ms[:, index], latencies_ms[:, k]) for k in range(index)))
    console.print(ranks)


def _speed(first_ms: np.ndarray, own_ms: np.ndarray) -> str:
    ratios = first_ms / own_ms
    low, high = median_interval(ratios[~np.isnan(ratios)])
    return f"{np.nanmedian(ratios):.2f} ({low:.2f} to {high:.2f})"


def _tau(one: np.ndarray, other: np.ndarray) -> str:
    both = ~(np.isnan(one) | np.isnan(other))
    found = rankings({"": list(one[both])}, list(other[both]), list(other[both]))
    return str(next(each.kendall for each in found if each.band == "all"))


if __name__ == "__main__":
    typer.run(main)
