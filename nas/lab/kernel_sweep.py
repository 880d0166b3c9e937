"""Compile the fused blocks of whole search spaces, without a GPU: `python -m nas.lab.kernel_sweep --space imagenet`.

For every block that a space can sample, at each batch size, the tilings that would be tuned are compiled for each GPU,
and what the compiler made of them is written at once, a line of JSON a block. With `--run` each is also run on a few
pixels by the emulator (`kernels.lab.emulator`), and held against float64. The same command goes on where it was
stopped.
"""

from __future__ import annotations

import contextlib
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
from kernels.device_functions import INTERPRETED
from kernels.lab import emulator
from kernels.lab.emulator import EmulationError, rehearse
from kernels.lab.inspect import SHARED_LIMIT_BYTES, block_statics
from kernels.problem import MAX_SPLITS, BlockProblem, Tiling, unsupported
from search_spaces import SearchSpace, load_space
from search_spaces.arch import STEM_STRIDE, BlockSpec

BUILT_IN = ("small", "imagenet")
# Root mean square of an error that a few roundings of the dtype come to, and no wrong tap does.
ROUNDINGS = {"float16": 1.5e-3, "bfloat16": 1.2e-2}


def block_specs(space: SearchSpace) -> Iterator[tuple[int, BlockSpec]]:
    """Every block that a space can sample, with the resolution of its input; some come more than once."""
    # Channels and total stride with which a network may enter the stage.
    entries = {(width, STEM_STRIDE) for width in space.stem_width}
    for stage in space.stages:
        leaving = set()
        shapes = product(stage.kernel_size, stage.group_width, stage.expansion)
        choices = list(product(stage.width, stage.stride, shapes))
        for (channels, reached), (width, stride, (kernel_size, group_width, expansion)) in product(entries, choices):
            size = -(-space.resolution // reached)
            if channels % group_width == 0:
                yield size, BlockSpec(channels, width, kernel_size, group_width, expansion, stride)
            if max(stage.blocks) > 1 and width % group_width == 0:
                yield -(-size // stride), BlockSpec(width, width, kernel_size, group_width, expansion, 1)
            leaving.add((width, reached * stride))
        entries = leaving


def problems(space: SearchSpace, batch: int, dtype: str) -> list[BlockProblem]:
    """The distinct supported problems of a space, with and without splits, in a fixed order."""
    found = {
        ops.with_splits(
            BlockProblem(
                batch,
                size,
                size,
                block.in_channels,
                block.expanded_channels,
                block.out_channels,
                block.kernel_size,
                block.group_width,
                block.stride,
                activation,
                block.residual,
                dtype,
            ),
            most,
        )
        for size, block in block_specs(space)
        for activation in space.activation
        for most in (1, MAX_SPLITS)
    }
    return sorted((problem for problem in found if unsupported(problem) is None), key=str)


def sweep_tilings(problem: BlockProblem, capability: int, run: bool) -> dict[str, Any]:
    """A line of the results: what the compiler made of the tilings that would be tuned.

    Many problems share kernels, as batch and resolution are no part of them; Triton's cache has those at once.

    Args:
        run: whether what was compiled is also run.
    """
    # One emulation keeps a core busy; several processes are at it.
    torch.set_num_threads(1)
    found = []
    for tiling in tune.tried(ops.BLOCK, problem, cost_model.LIMITS[capability]):
        row: dict[str, Any] = {"tiling": asdict(tiling), "statics": None}
        try:
            statics = block_statics(problem, tiling, capability)
        except Exception as error:
            # Whatever the compiler raises is a finding.
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
            row["complaints"] = [f"does not compile: {message}"]
        else:
            row |= {"statics": asdict(statics), "complaints": statics.complaints(capability, problem.dtype)}
            if run:
                row["complaints"] += _emulated_complaints(problem, tiling, capability)
        found.append(row)
    sources = sources_digest(run)
    return {"problem": asdict(problem), "capability": capability, "sources": sources, "tilings": found}


@functools.cache
def sources_digest(run: bool) -> str:
    """Of what a line depends on."""
    files = sorted(Path(emulator.__file__).parent.glob("*.py")) if run else []
    return tune.sources_digest() + hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12] * run


def _emulated_complaints(problem: BlockProblem, tiling: Tiling, capability: int) -> list[str]:
    try:
        error = rehearse(problem, tiling, capability)
    except Exception as told:
        # One that does not fit is complained of already.
        if not isinstance(told, EmulationError) and not tune.refuses(told):
            raise
        return [f"does not run: {told}"]
    return [] if error <= ROUNDINGS[problem.dtype] else [f"computes wrong, off by {error:.2g}"]


def main(
    space: Annotated[list[str] | None, typer.Option(help="Name or TOML file; both built-in ones by default.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="1 and 128 by default.")] = None,
    capability: Annotated[list[int] | None, typer.Option(help="80, 89 or 90; 90 by default.")] = None,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "float16",
    limit: Annotated[int | None, typer.Option(min=1, help="So many blocks at most, drawn at random.")] = None,
    run: Annotated[bool, typer.Option("--run", help="Also run what was compiled, emulated.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes that compile.")] = 2,
    out: Annotated[Path, typer.Option(help="Results, one line of JSON each; appended to.")] = Path("sweep.jsonl"),
) -> None:
    """Compile, write a line for each, and print what there is to complain of."""
    if INTERPRETED:
        raise typer.BadParameter("the compiler cannot run under TRITON_INTERPRET=1; unset it", param_hint="environment")
    capabilities = capability or [90]
    if unknown := set(capabilities) - set(SHARED_LIMIT_BYTES):
        known = ", ".join(map(str, SHARED_LIMIT_BYTES))
        raise typer.BadParameter(f"{unknown.pop()} is none of {known}", param_hint="--capability")
    try:
        spaces = [load_space(name) for name in space or BUILT_IN]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--space") from error
    jobs = {
        _key(asdict(problem), number, sources_digest(run)): (problem, number, run)
        for each, images, number in product(spaces, batch or [1, 128], capabilities)
        for problem in problems(each, images, dtype)
    }
    rows = {}
    for line in out.read_text().splitlines() if out.exists() else ():
        # A run that was killed leaves half a line.
        with contextlib.suppress(json.JSONDecodeError, KeyError):
            row = json.loads(line)
            if (key := _key(row["problem"], row["capability"], row["sources"])) in jobs:
                rows[key] = row
    left = sorted(set(jobs) - set(rows))
    random.Random(0).shuffle(left)
    typer.echo(f"{len(jobs)} blocks, {len(rows)} known, {len(left)} left")
    left = left[:limit]
    with ProcessPoolExecutor(workers) as pool, Progress() as progress, out.open("a") as file:
        bar = progress.add_task("compiling", total=len(left))
        if out.read_text()[-1:] not in ("", "\n"):
            file.write("\n")
        futures = {pool.submit(sweep_tilings, *jobs[key]): key for key in left}
        for future in as_completed(futures):
            rows[futures[future]] = row = future.result()
            file.write(json.dumps(row) + "\n")
            file.flush()
            progress.advance(bar)
    every = [compiled for row in rows.values() for compiled in row["tilings"]]
    first = [row["tilings"][0] for row in rows.values()]
    for name, compiled in (("first tilings", first), ("tilings", every)):
        clean = sum(not each["complaints"] for each in compiled)
        typer.echo(f"{clean} of {len(compiled)} {name} have nothing to complain of")
    complaints = Counter(_kind(complaint) for each in every for complaint in each["complaints"])
    for complaint, count in complaints.most_common():
        typer.echo(f"{count:6} {complaint}")


def _key(problem: dict[str, Any], capability: int, sources: str) -> str:
    return json.dumps([problem, capability, sources], sort_keys=True)


def _kind(complaint: str) -> str:
    """A complaint without its numbers."""
    return " ".join(word for word in complaint.split(",")[0].split() if not word.isdigit())


if __name__ == "__main__":
    typer.run(main)
