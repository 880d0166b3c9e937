"""A check that the cost model ranks the best tilings first: `python -m kernels.lab.exhaustive --rows 8`, on a GPU.

For some blocks of the benchmark it times every tiling that fits, or those that tuning tries and others drawn at random.
It prints the rank at which the cost model had the fastest one, and how much slower the best of the first few is.

All times are written to tilings.jsonl, a line for each block, so that the same command goes on where it was stopped. A
change of the cost model can be compared with them where there is no GPU:
`python -m kernels.lab.exhaustive --times tilings.jsonl`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from kernels import cost_model, tune
from kernels.compiling import compile_together
from kernels.cost_model import GpuSpec
from kernels.lab import benchmark_machine
from kernels.lab.benchmark import block_problem, block_task
from kernels.lab.benchmark_rows import BLOCKS, Block
from kernels.lab.commands import Minutes, Out, current_gpu, deadline_after, fail, results_folder
from kernels.lab.inspect import shorthand
from kernels.lab.results import ResultFile, read_lines
from kernels.problem import BlockProblem, Tiling
from kernels.tune import Choice

# The goal is that the best tiling is among this many first ones for 90 % of the blocks.
FIRST = 3
KIND = "tilings"
COLUMNS = (
    "block", "tilings", "fastest", "ms", "predicted", "its rank", f"best of first {FIRST} over it", "correlation",
)  # fmt: skip


def ranks(choice: Choice, ranked: Sequence[object]) -> tuple[int | None, float]:
    """Compare measured times with the cost model's order.

    Returns:
        The rank of the fastest tiling, from 1, or None if the cost model does not offer it; and the time of the best of
        the first `FIRST` tilings over the fastest one's.
    """
    first = [time for tiling, time in zip(choice.tilings, choice.times_ms, strict=True) if tiling in ranked[:FIRST]]
    fastest = choice.tilings[0]
    rank = ranked.index(fastest) + 1 if fastest in ranked else None
    return rank, min(first, default=float("inf")) / choice.times_ms[0]


def time_all(row: Block, most: int, device: torch.device) -> tuple[BlockProblem, Choice]:
    """Time at most `most` tilings of a block: those that tuning tries, and others drawn at random."""
    layers = row.layers(torch.float16, device)
    problem = block_problem(row, layers, torch.float16)
    ranked = cost_model.ranked(problem, tune.gpu_spec(device))
    chosen, others = ranked[: tune.TRIED], ranked[tune.TRIED :]
    drawn = random.Random(0).sample(others, max(0, min(most - len(chosen), len(others))))
    x = torch.randn(row.input_shape, dtype=torch.float16, device=device).to(memory_format=torch.channels_last)
    task = block_task(problem, layers, x)
    compile_together([(task, tiling) for tiling in (*chosen, *drawn)])
    return problem, tune.time_tilings(task, [*chosen, *drawn])


def record_of(row: Block, problem: BlockProblem, choice: Choice, gpu: GpuSpec) -> dict[str, Any]:
    """A line of tilings.jsonl."""
    return {
        "kind": KIND, "name": row.name, "date": benchmark_machine.now(), "commit": benchmark_machine.commit(),
        "limits": asdict(gpu), "problem": asdict(problem), "tilings": [asdict(each) for each in choice.tilings],
        "times_ms": choice.times_ms, "layers_ms": choice.layers_ms,
    }  # fmt: skip


def compared(record: dict[str, Any]) -> tuple[tuple[str, ...], bool]:
    """A row of the table, and whether the fastest tiling is among the first of the cost model as it is now."""
    problem, gpu = BlockProblem(**record["problem"]), GpuSpec(**record["limits"])
    ranked = cost_model.ranked(problem, gpu)
    tilings = tuple(Tiling(**each) for each in record["tilings"])
    times_ms = tuple(map(float, record["times_ms"]))
    rank, loss = ranks(Choice(tilings, "tuned", times_ms, record["layers_ms"]), ranked)
    predicted = [1e3 * cost_model.estimate(problem, tiling, gpu) for tiling in tilings]
    cells = (
        record["name"], str(len(tilings)), shorthand(tilings[0]), f"{times_ms[0]:.4f}", f"{predicted[0]:.4f}",
        str(rank or "not offered"), f"{loss:.2f}", f"{spearmanr(predicted, times_ms).statistic:.2f}",
    )  # fmt: skip
    return cells, rank is not None and rank <= FIRST


def report(records: Sequence[dict[str, Any]]) -> None:
    """Print the table of all blocks, and how often the goal was met."""
    table = Table(*COLUMNS)
    rows = list(map(compared, records))
    for cells, _ in rows:
        table.add_row(*cells)
    Console(width=160).print(table)
    hits = sum(hit for _, hit in rows)
    typer.echo(f"the fastest was among the first {FIRST} for {hits} of {len(rows)} blocks; the goal is 90 %")


def read(path: Path) -> list[dict[str, Any]]:
    """Read a file of times, and keep the last line of each block and device.

    Raises:
        ValueError: the file holds no times.
    """
    records = (record for record in read_lines(path) if record.get("kind") == KIND)
    if not (last := {(record["identity"]["device"], record["name"]): record for record in records}):
        raise ValueError("no times of tilings in it")
    return list(last.values())


def main(
    rows: Annotated[int, typer.Option(min=1, help="Time this many blocks, the benchmark's first.")] = 8,
    most: Annotated[int, typer.Option(min=8, help="Time at most this many tilings of each block.")] = 80,
    minutes: Minutes = 8,
    out: Out = None,
    times: Annotated[
        Path | None, typer.Option(help="Time nothing; read an earlier tilings.jsonl, from any machine.")
    ] = None,
) -> None:
    """Time many tilings of some blocks, and print where the cost model ranked the fastest."""
    if times is not None:
        try:
            report(read(times))
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"--times {times}: {error}")
        return
    deadline = deadline_after(minutes)
    device = current_gpu()
    identity = benchmark_machine.identity(device)
    results = ResultFile(
        results_folder(out, identity["device"]) / "tilings.jsonl", {"identity": identity}, ("kind", "name")
    )
    for row in BLOCKS[:rows]:
        if results.find(KIND, row.name) is not None:
            continue
        if time.monotonic() > deadline:
            typer.echo(f"The minutes are over before {row.name}: the same command goes on from there.")
            break
        problem, choice = time_all(row, most, device)
        if not choice.tilings:
            typer.echo(f"{row.name}: no tiling runs")
            continue
        results.add(record_of(row, problem, choice, tune.gpu_spec(device)))
        typer.echo(f"{row.name}: {shorthand(choice.tilings[0])}, {choice.times_ms[0]:.4f} ms")
    report(results.records)


if __name__ == "__main__":
    typer.run(main)
