"""Whether the cost model ranks the best tilings first: `python -m kernels.exhaustive --rows 8`, on a GPU.

For some blocks of the benchmark every tiling is timed that fits, or so many drawn at random beside those that tuning
tries, and it is told at which rank the fastest stood and what the first few lose against it.
"""

from __future__ import annotations

import random
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from kernels import convfirst, cost_model, ops, tune
from kernels.benchmark import block_problem
from kernels.benchmark_rows import BLOCKS, Block
from kernels.inspect import shorthand
from kernels.tune import Choice, Task

# The goal: the best is among so many for 90 % of the shapes.
FIRST = 3


def ranks(choice: Choice, ranked: list[object]) -> tuple[int, float]:
    """Rank of the fastest tiling in the cost model's order, from 1; and time of the best of the first over its time."""
    first = [time for tiling, time in zip(choice.tilings, choice.times_ms, strict=True) if tiling in ranked[:FIRST]]
    return ranked.index(choice.tilings[0]) + 1, min(first, default=float("inf")) / choice.times_ms[0]


def time_all(row: Block, most: int, device: torch.device) -> tuple[Choice, list[object]]:
    """What `most` tilings of a block take, and all of them as the cost model ranks them."""
    layers = row.layers(torch.float16, device)
    problem = block_problem(row, layers, torch.float16)
    ranked: list[object] = list(cost_model.ranked(problem, tune.limits_of(device)))
    chosen = ranked[: tune.TRIED] + random.Random(0).sample(ranked[tune.TRIED :], min(most, len(ranked)) - tune.TRIED)
    x = torch.randn(row.input_shape, dtype=torch.float16, device=device).to(memory_format=torch.channels_last)
    scratch = x.new_empty(problem.scratch_elements, dtype=torch.float32)
    task = Task(ops.BLOCK, problem, x, [*vars(convfirst.pack(layers, problem)).values(), scratch], layers)
    tune.compile_together([(task, tiling) for tiling in chosen])
    return tune.time_tilings(task, chosen), ranked


def main(
    rows: Annotated[int, typer.Option(min=1, help="Blocks, the benchmark's first.")] = 8,
    most: Annotated[int, typer.Option(min=8, help="Tilings of each, all if there are no more.")] = 80,
) -> None:
    """Time many tilings of some blocks and print where the cost model had the fastest."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device here", param_hint="environment")
    table = Table("block", "tilings", "fastest", "ms", "its rank", f"best of first {FIRST} over it")
    hits = 0
    for row in BLOCKS[:rows]:
        choice, ranked = time_all(row, most, torch.device("cuda", torch.cuda.current_device()))
        rank, loss = ranks(choice, ranked)
        hits += rank <= FIRST
        best = shorthand(choice.tilings[0])
        table.add_row(row.name, str(len(choice.tilings)), best, f"{choice.times_ms[0]:.4f}", str(rank), f"{loss:.2f}")
    Console(width=120).print(table)
    typer.echo(f"the fastest was among the first {FIRST} for {hits} of {len(BLOCKS[:rows])} blocks; the goal is 90 %")


if __name__ == "__main__":
    typer.run(main)
