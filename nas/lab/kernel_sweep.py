"""Compile the fused blocks of whole search spaces, without a GPU: `python -m nas.lab.kernel_sweep --space imagenet`.

For every block that a space can sample, at each batch size, the tilings that tuning would try are compiled for each
GPU, and what the compiler made of them is written at once, a line of JSON for each block. With `--run` the emulator
(`kernels.lab.emulator`) also runs each on a few pixels, and the result is compared with float64. The same command goes
on where it was stopped.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

from kernels import cost_model, ops, tune
from kernels.compiling import refuses
from kernels.lab import emulator
from kernels.lab.commands import capability_option, fail, known_capabilities
from kernels.lab.emulator import EmulationError, rehearse
from kernels.lab.inspect import block_statics
from kernels.lab.results import ResultFile
from kernels.problem import MAX_SPLITS, BlockProblem, Tiling, unsupported
from search_spaces import SearchSpace, load_space
from search_spaces.arch import BlockSpec

BUILT_IN = ("small", "imagenet")
# Root mean square of an error that a few roundings of the dtype explain, and that any wrong tap exceeds.
ROUNDINGS = {"float16": 1.5e-3, "bfloat16": 1.2e-2}


def block_specs(space: SearchSpace) -> Iterator[tuple[int, BlockSpec]]:
    """Yield every block that a space can sample, with the resolution of its input, some more than once."""
    for resolution in space.resolution:
        yield from _blocks_at(space, resolution)


def _blocks_at(space: SearchSpace, resolution: int) -> Iterator[tuple[int, BlockSpec]]:
    # Channels and total stride at the entry of the stage.
    entries = set(product(space.stem_width, space.stem_stride))
    for stage in space.stages:
        leaving = set()
        shapes = product(stage.kernel_size, stage.group_width, stage.expansion)
        choices = list(product(stage.width, stage.stride, shapes))
        for (channels, reached), (width, stride, (kernel_size, group_width, expansion)) in product(entries, choices):
            size = -(-resolution // reached)
            if channels % group_width == 0:
                for shortcut in space.shortcut:
                    yield size, BlockSpec(channels, width, kernel_size, group_width, expansion, stride, shortcut)
            if max(stage.blocks) > 1 and width % group_width == 0:
                yield -(-size // stride), BlockSpec(width, width, kernel_size, group_width, expansion, 1)
            leaving.add((width, reached * stride))
        entries = leaving


def problems(space: SearchSpace, batch: int, dtype: str) -> list[BlockProblem]:
    """The distinct supported problems of a space's blocks, with and without splits, in a fixed order."""
    distinct = {
        ops.with_splits(
            BlockProblem(
                batch, size, size, block.in_channels, block.expanded_channels, block.out_channels, block.kernel_size,
                block.group_width, block.stride, activation, block.residual, dtype,
            ), most
        )
        for size, block in block_specs(space)
        for activation in space.activation
        for most in (1, MAX_SPLITS)
    }  # fmt: skip
    return sorted((problem for problem in distinct if unsupported(problem) is None), key=str)


def sweep_tilings(problem: BlockProblem, capability: int, run: bool) -> dict[str, Any]:
    """Compile the tilings that tuning would try, and return a line of the results.

    Many problems share kernels, which do not depend on batch and resolution; Triton's cache holds those already.

    Args:
        run: whether to run the kernels in the emulator, too.
    """
    # One emulation keeps a core busy, and several processes run.
    torch.set_num_threads(1)
    rows = []
    for tiling in tune.tried(ops.BLOCK, problem, cost_model.GPU_SPECS[capability]):
        row: dict[str, Any] = {"tiling": asdict(tiling), "statics": None}
        try:
            statics = block_statics(problem, tiling, capability)
        except Exception as error:
            # Whatever the compiler raises is a result.
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
            row["complaints"] = [f"does not compile: {message}"]
        else:
            row |= {"statics": asdict(statics), "complaints": statics.complaints(capability, problem.dtype)}
            if run:
                row["complaints"] += _emulated_complaints(problem, tiling, capability)
        rows.append(row)
    return {"problem": asdict(problem), "capability": capability, "tilings": rows}


@functools.cache
def sources_digest(run: bool) -> str:
    """A digest of the sources that a line of the results depends on: with `run` also the emulator's."""
    files = sorted(Path(emulator.__file__).parent.glob("*.py")) if run else []
    return tune.sources_digest() + hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12] * run


def _emulated_complaints(problem: BlockProblem, tiling: Tiling, capability: int) -> list[str]:
    try:
        error = rehearse(problem, tiling, capability)
    except Exception as failure:
        # A kernel that does not fit has a complaint already.
        if not isinstance(failure, EmulationError) and not refuses(failure):
            raise
        return [f"does not run: {failure}"]
    return [] if error <= ROUNDINGS[problem.dtype] else [f"computes wrong, off by {error:.2g}"]


def main(
    space: Annotated[list[str] | None, typer.Option(help="Name or TOML file (default: both built-in spaces).")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images per batch (default: 1 and 128).")] = None,
    capability: Annotated[list[int] | None, capability_option("90")] = None,
    dtype: Annotated[str, typer.Option(help="Data type: float16 or bfloat16.")] = "float16",
    limit: Annotated[int | None, typer.Option(min=1, help="Compile at most this many blocks, drawn at random.")] = None,
    run: Annotated[bool, typer.Option("--run", help="Also run the kernels in the emulator.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes that compile.")] = 2,
    out: Annotated[Path, typer.Option(help="File of results, a line of JSON each; appended to.")] = Path("sweep.jsonl"),
) -> None:
    """Compile the blocks of search spaces, write a line for each, and count the complaints."""
    capabilities = known_capabilities(capability or [90])
    try:
        spaces = [load_space(name) for name in space or BUILT_IN]
    except ValueError as error:
        fail(f"--space {error}")
    results = ResultFile(out, {"sources": sources_digest(run)}, ("problem", "capability"))
    # A problem may belong to several spaces.
    jobs = dict.fromkeys(
        (problem, number)
        for each, images, number in product(spaces, batch or [1, 128], capabilities)
        for problem in problems(each, images, dtype)
    )
    rows = {job: results.find(asdict(job[0]), job[1]) for job in jobs}
    left = [job for job, row in rows.items() if row is None]
    left.sort(key=lambda job: json.dumps([asdict(job[0]), job[1]], sort_keys=True))
    random.Random(0).shuffle(left)
    typer.echo(f"{len(jobs)} blocks, {len(jobs) - len(left)} known, {len(left)} left")
    left = left[:limit]
    with ProcessPoolExecutor(workers) as pool, Progress() as progress:
        bar = progress.add_task("compiling", total=len(left))
        futures = {pool.submit(sweep_tilings, *job, run): job for job in left}
        for future in as_completed(futures):
            rows[futures[future]] = results.add(future.result())
            progress.advance(bar)
    swept = [row["tilings"] for row in rows.values() if row is not None]
    every = [compiled for tilings in swept for compiled in tilings]
    for name, compiled in (("first tilings", [tilings[0] for tilings in swept]), ("tilings", every)):
        clean = sum(not each["complaints"] for each in compiled)
        typer.echo(f"{clean} of {len(compiled)} {name} have nothing to complain of")
    complaints = Counter(_kind(complaint) for each in every for complaint in each["complaints"])
    for complaint, count in complaints.most_common():
        typer.echo(f"{count:6} {complaint}")


def _kind(complaint: str) -> str:
    """A complaint without its numbers."""
    return " ".join(word for word in complaint.split(",")[0].split() if not word.isdigit())


if __name__ == "__main__":
    typer.run(main)
