"""How well blocks add up: `python -m nas.lab.blocks` times random networks of each space, and their parts alone.

The command prints each network's latency, the sum of its parts, and the error of the sum, as `analyze` computes them.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from nas.config import AUTO, LatencyConfig
from nas.display.notes import pixels
from nas.errors import UsageError
from nas.lab.options import Spaces
from nas.latency.block_meter import BlockMeter
from nas.latency.block_table import sum_errors_line
from nas.latency.devices import check_device
from nas.latency.parts import CALL_ID, arch_parts, network_shape, shape_id
from nas.locks import device_lock
from nas.reporting import console_table
from search_spaces import ArchSpec, load_space


def sums(archs: Sequence[ArchSpec], meter: BlockMeter) -> list[tuple[float, float]]:
    """The latency of each network in ms, and the sum of its parts' latencies and of what a call costs."""
    known: dict[str, float] = {}
    found = []
    for arch in track(archs, "timing", console=Console(stderr=True)):
        measured = meter.measure_archs([arch], known, whole=[arch])
        known |= {shape_id(each.shape): each.latency.median_ms for each in measured}
        parts_ms = [known[part.shape_id] for part in arch_parts(arch, meter.config)]
        found.append((known[shape_id(network_shape(str(arch), meter.config))], sum(parts_ms) + known[CALL_ID]))
    return found


def main(
    space: Spaces = None,
    networks: Annotated[int, typer.Option(min=1, help="Networks of each space, drawn with a fixed seed.")] = 15,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:N.")] = "auto",
    engine: Annotated[str, typer.Option(help="Engine: auto or a name.")] = AUTO,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Print how well the latencies of parts add up to those of networks."""
    try:
        spaces = [load_space(name) for name in space or ("small", "imagenet")]
        configs = [
            LatencyConfig(device=device, engine=engine, threads=threads, resolution=each.default_resolution)
            for each in spaces
        ]
        check_device(configs[0])
    except (UsageError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    for each, config in zip(spaces, configs, strict=True):
        rng = random.Random(0)
        archs = [each.sample(rng) for _ in range(networks)]
        with device_lock(torch.device(config.device)).measuring(lambda line: print(line, file=sys.stderr)):
            found = sums(archs, BlockMeter(config))
        where = f"{each.name}, {pixels(config.resolution, each)}, {config.engine_label}, {threads} thread(s)"
        table = console_table(where, "network ms", "sum ms", "error", "network", text=("network",))
        for arch, (network_ms, sum_ms) in zip(archs, found, strict=True):
            table.add_row(f"{network_ms:.4f}", f"{sum_ms:.4f}", f"{sum_ms / network_ms - 1:+.1%}", str(arch))
        Console(width=150, markup=False).print(table)
        print(sum_errors_line([sum_ms / network_ms - 1 for network_ms, sum_ms in found]), flush=True)


if __name__ == "__main__":
    typer.run(main)
