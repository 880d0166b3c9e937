"""The ladder of search spaces on a device: `python -m nas.lab.ladder`.

For each limit, `--space auto` chooses a space, and random networks of it are timed, other ones than those by which it
was chosen. The command prints how many keep the limit, and what share of it the slowest of these uses. `--plot` draws
networks of all whole rungs, as MACs against latency.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib import colormaps
from matplotlib.colors import to_hex
from rich.console import Console
from rich.progress import track

from nas.config import LatencyConfig
from nas.display.charts import new_figure, plain_texts, write_figure
from nas.errors import UsageError
from nas.reporting import console_table
from nas.search import auto_space
from nas.search.auto_space import Timer, for_limit
from search_spaces import SearchSpace, cost, ladder_space
from search_spaces.ladder import RUNGS, nearest_rung, shown_resolutions
from search_spaces.space import middle


@dataclass(frozen=True)
class Timed:
    """Random networks of a space: MACs of an image and latency of each, in the order in which they were drawn."""

    space: SearchSpace
    macs: tuple[int, ...]
    latencies_ms: tuple[float, ...]


def timed(time: Timer, space: SearchSpace, networks: int, seed: int) -> Timed:
    """Draw networks of a space, and time them."""
    rng = random.Random(seed)
    archs = [space.sample(rng) for _ in range(networks)]
    return Timed(
        space,
        tuple(cost(arch, space.default_resolution, 10).macs for arch in archs),
        tuple(time(arch).median_ms for arch in archs),
    )


def use(found: Timed, limit_ms: float) -> tuple[float, float]:
    """The share of the networks that keep a limit, and the share of the limit that the slowest of these uses."""
    keeping = [each for each in found.latencies_ms if each <= limit_ms]
    return len(keeping) / len(found.latencies_ms), max(keeping, default=0.0) / limit_ms


def draw(found: Sequence[Timed], limits_ms: Sequence[float], title: str, path: Path) -> None:
    """Draw MACs against latency, a point a network and a colour a space, with a line at each limit."""
    with plain_texts():
        figure = new_figure(8, 5.5)
        axes = figure.subplots()
        colours = colormaps["viridis"](np.linspace(0, 0.92, len(found)))
        for each, colour in zip(found, colours, strict=True):
            axes.plot(
                each.latencies_ms, [macs / 1e6 for macs in each.macs], "o", ms=4, alpha=0.8, color=to_hex(colour),
                label=each.space.name.partition("@")[0],
            )  # fmt: skip
        for limit_ms in limits_ms:
            axes.axvline(limit_ms, color="#1b1f24", lw=0.8, ls=":")
        axes.set(
            xscale="log", yscale="log", xlabel="latency of one batch in ms", ylabel="MMACs of one image", title=title
        )
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right center", frameon=False)
        write_figure(figure, path, dpi=150)


def main(
    limits: Annotated[str, typer.Option(help="Comma-separated limits in ms.")] = "0.1,0.5,2,8",
    networks: Annotated[int, typer.Option(min=2, help="Random networks timed of each space.")] = 30,
    draws: Annotated[int, typer.Option(min=1, help="Times that so many networks are drawn for each limit.")] = 1,
    size: Annotated[int, typer.Option(min=16, max=256, help="Width and height of the user's images.")] = 32,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:N.")] = "auto",
    engine: Annotated[str, typer.Option(help="Engine (default: the device's).")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    seconds: Annotated[float, typer.Option(help="Time cap for each network, in seconds.")] = LatencyConfig.seconds,
    plot: Annotated[Path | None, typer.Option(help="Image file, in which networks of all rungs are drawn.")] = None,
    drawn: Annotated[int, typer.Option(min=1, help="Networks that are drawn of each whole rung.")] = 12,
) -> None:
    """Print how many random networks of the space that is chosen for a limit keep it."""
    resolutions = shown_resolutions(size)
    try:
        limits_ms = [float(each) for each in limits.split(",")]
        config = LatencyConfig(
            device=device, engine=engine, threads=threads, seconds=seconds, resolution=middle(resolutions)
        )
        table = console_table(
            f"{networks} random networks of {config.engine_label}, {threads} thread(s)", "limit ms", "space",
            "networks ms", "keep it", "the slowest of these uses", text=("space",),
        )  # fmt: skip
        with auto_space.timer(config, lambda line: print(line, file=sys.stderr)) as time:
            for limit_ms in limits_ms:
                space = for_limit(time, resolutions, limit_ms).space
                for seed in range(1, draws + 1):
                    found = timed(time, space, networks, seed)
                    keep, used = use(found, limit_ms)
                    ends = f"{min(found.latencies_ms):.3g} to {max(found.latencies_ms):.3g}"
                    table.add_row(f"{limit_ms:g}", space.name, ends, f"{keep:.0%}", f"{used:.0%}")
            Console(width=120, markup=False).print(table)
            if plot is not None:
                lowest = nearest_rung(resolutions, 0)
                spaces = [ladder_space(resolutions, rung) for rung in RUNGS if rung >= lowest and rung.is_integer()]
                shown = [timed(time, space, drawn, 0) for space in track(spaces, "rungs")]
                how = f"{config.engine_label}, {threads} thread(s)"
                title = f"random networks of all rungs for images of {size} pixels: {how}"
                draw(shown, limits_ms, title, plot)
    except (UsageError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
