"""Whether the cost model ranks the best tilings first: `python -m kernels.lab.exhaustive --rows 8`, on a GPU.

For some blocks of the benchmark every tiling is timed that fits, or so many drawn at random beside those that tuning
tries, and it is told at which rank the fastest stood and what the first few lose against it.

All times are kept, a line a block, so that the same command goes on where it was stopped, and so that a change of the
cost model can be held against them where there is no GPU: `python -m kernels.lab.exhaustive --times tilings.jsonl`.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from kernels import convfirst, cost_model, ops, tune
from kernels.cost_model import Limits
from kernels.lab import benchmark_machine
from kernels.lab.benchmark import Results, block_problem, new_folder
from kernels.lab.benchmark_rows import BLOCKS, Block
from kernels.lab.inspect import shorthand
from kernels.problem import BlockProblem, Tiling
from kernels.tune import Choice, Task

# The goal: the best is among so many for 90 % of the shapes.
FIRST = 3
KIND = "tilings"
COLUMNS = ("block", "tilings", "fastest", "ms", "counted", "its rank", f"best of first {FIRST} over it", "correlation")


def ranks(choice: Choice, ranked: Sequence[object]) -> tuple[int | None, float]:
    """Rank of the fastest tiling in the cost model's order, from 1, None if it is not there; and time of the best of
    the first over its time."""
    first = [time for tiling, time in zip(choice.tilings, choice.times_ms, strict=True) if tiling in ranked[:FIRST]]
    fastest = choice.tilings[0]
    rank = ranked.index(fastest) + 1 if fastest in ranked else None
    return rank, min(first, default=float("inf")) / choice.times_ms[0]


def time_all(row: Block, most: int, device: torch.device) -> tuple[BlockProblem, Choice]:
    """What `most` tilings of a block take: those that tuning tries, and others drawn at random."""
    layers = row.layers(torch.float16, device)
    problem = block_problem(row, layers, torch.float16)
    ranked = cost_model.ranked(problem, tune.limits_of(device))
    chosen, others = ranked[: tune.TRIED], ranked[tune.TRIED :]
    drawn = random.Random(0).sample(others, max(0, min(most - len(chosen), len(others))))
    x = torch.randn(row.input_shape, dtype=torch.float16, device=device).to(memory_format=torch.channels_last)
    scratch = x.new_empty(problem.scratch_elements, dtype=torch.float32)
    task = Task(ops.BLOCK, problem, x, [*vars(convfirst.pack(layers, problem)).values(), scratch], layers)
    tune.compile_together([(task, tiling) for tiling in (*chosen, *drawn)])
    return problem, tune.time_tilings(task, [*chosen, *drawn])


def record_of(row: Block, problem: BlockProblem, choice: Choice, limits: Limits) -> dict[str, Any]:
    """A line of the results."""
    return {
        "kind": KIND, "name": row.name, "date": benchmark_machine.now(), "commit": benchmark_machine.commit(),
        "limits": asdict(limits), "problem": asdict(problem), "tilings": [asdict(each) for each in choice.tilings],
        "times_ms": choice.times_ms, "layers_ms": choice.layers_ms,
    }  # fmt: skip


def compared(record: dict[str, Any]) -> tuple[tuple[str, ...], bool]:
    """A row of the table, and whether the fastest is among the first, by the cost model as it is now."""
    problem, limits = BlockProblem(**record["problem"]), Limits(**record["limits"])
    ranked = cost_model.ranked(problem, limits)
    tilings = tuple(Tiling(**each) for each in record["tilings"])
    times_ms = tuple(map(float, record["times_ms"]))
    rank, loss = ranks(Choice(tilings, "tuned", times_ms, record["layers_ms"]), ranked)
    counted = [1e3 * cost_model.estimate(problem, tiling, limits) for tiling in tilings]
    cells = (
        record["name"], str(len(tilings)), shorthand(tilings[0]), f"{times_ms[0]:.4f}", f"{counted[0]:.4f}",
        str(rank or "not offered"), f"{loss:.2f}", f"{spearmanr(counted, times_ms).statistic:.2f}",
    )  # fmt: skip
    return cells, rank is not None and rank <= FIRST


def report(records: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(*COLUMNS)
    rows = list(map(compared, records))
    for cells, _ in rows:
        table.add_row(*cells)
    Console(width=160).print(table)
    hits = sum(hit for _, hit in rows)
    typer.echo(f"the fastest was among the first {FIRST} for {hits} of {len(rows)} blocks; the goal is 90 %")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of times, the last of each block and device.

    Raises:
        ValueError: it holds none.
    """
    found = {}
    for line in path.read_text().splitlines():
        # A run that was killed leaves half a line.
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and record.get("kind") == KIND:
                found[record["identity"]["device"], record["name"]] = record
    if not found:
        raise ValueError("no times of tilings in it")
    yield from found.values()


def main(
    rows: Annotated[int, typer.Option(min=1, help="Blocks, the benchmark's first.")] = 8,
    most: Annotated[int, typer.Option(min=8, help="Tilings of each, all if there are no more.")] = 80,
    minutes: Annotated[float, typer.Option(min=0.1, help="After so many no block is begun.")] = 8,
    out: Annotated[
        Path | None, typer.Option(help="Folder of tilings.jsonl; by default docs/benchmarks/<device>.")
    ] = None,
    times: Annotated[Path | None, typer.Option(help="Time nothing: a tilings.jsonl of before, of any machine.")] = None,
) -> None:
    """Time many tilings of some blocks and print where the cost model had the fastest."""
    if times is not None:
        try:
            records = list(read(times))
            report(records)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise typer.BadParameter(f"{times}: {error}", param_hint="--times") from error
        return
    if not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device here", param_hint="environment")
    deadline = time.monotonic() + 60 * minutes
    device = torch.device("cuda", torch.cuda.current_device())
    identity = benchmark_machine.identity(device)
    results = Results(new_folder(out, identity["device"]) / "tilings.jsonl", identity)
    for row in BLOCKS[:rows]:
        if results.find(KIND, row.name) is not None:
            continue
        if time.monotonic() > deadline:
            typer.echo(f"from {row.name} on blocks are left: the same command goes on with them")
            break
        problem, choice = time_all(row, most, device)
        if not choice.tilings:
            typer.echo(f"{row.name}: no tiling runs")
            continue
        results.add(record_of(row, problem, choice, tune.limits_of(device)))
        typer.echo(f"{row.name}: {shorthand(choice.tilings[0])}, {choice.times_ms[0]:.4f} ms")
    report([record for record in results.records if record["kind"] == KIND])


if __name__ == "__main__":
    typer.run(main)
