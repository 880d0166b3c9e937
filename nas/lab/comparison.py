"""Comparison of samplers at equal time: `python -m nas.lab.comparison --sampler tpe --sampler random --seeds 3`.

For each seed the samplers search side by side, each with one thread of its own, so that disturbances of the machine
meet them alike. They take turns at the device: none trains while another measures, which costs all of them the same.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from nas.config import Sampler
from nas.pareto import hypervolume
from studies import Store

UNLIMITED = 1_000_000
# By its path: with -m, Python would also import what lies in the folder that the user stands in.
SCRIPT = Path(__file__).parents[2] / "run_search.py"
# Latency references of the hypervolumes, as multiples of the anchor's latency; the search itself reports 2.
REFERENCES = (1.0, 2.0, 4.0)
# The length of all trainings.
STEPS = 200


def search(folder: Path, sampler: str, seed: int, seconds: int) -> subprocess.Popen[bytes]:
    """Start a search in a process of its own, with a database of its own."""
    name = f"{sampler}{seed}"
    command = [sys.executable, SCRIPT, "--budget", UNLIMITED, "--time-limit", seconds, "--threads", 1, "--confirm", 0]
    # A pilot would choose by the time that there is, and what is stopped early counts for nothing here.
    command += ["--proxy-steps", STEPS, "--no-early-stopping"]
    command += ["--sampler", sampler, "--seed", seed, "--study", name, "--storage", url(folder, name)]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen([str(part) for part in command], stdout=log, stderr=subprocess.STDOUT)


def url(folder: Path, name: str) -> str:
    """The URL of a search's database."""
    return f"sqlite:///{folder.resolve() / name}.db"


def hypervolumes(folder: Path, name: str) -> tuple[int, list[float]]:
    """Count the complete candidates of a study, and compute its hypervolume at each reference."""
    store = Store.open(url(folder, name), create=False)
    study = store.find_study(name) if store else None
    if store is None or study is None:
        raise SystemExit(f"{name}: the search did not begin; see {folder / name}.log")
    rows = store.evaluations(name)
    accuracy, latency_ms, anchor_ms = rows["accuracy"].to_numpy(), rows["latency_ms"].to_numpy(), study.anchor_ms
    store.close()
    return len(rows), [hypervolume(accuracy, latency_ms, k * anchor_ms) for k in REFERENCES]


def main(
    folder: Annotated[Path, typer.Option(help="New folder for the databases and logs.")],
    sampler: Annotated[
        list[str] | None, typer.Option(help="Sampler; may be given several times (default: tpe and random).")
    ] = None,
    seconds: Annotated[int, typer.Option(min=1, help="Time of each search, in seconds.")] = 480,
    seeds: Annotated[int, typer.Option(min=1, help="Searches of each sampler, with seeds 0 and up.")] = 3,
) -> None:
    """Search with each sampler for the same time, and print the hypervolumes side by side."""
    samplers = sampler or ["tpe", "random"]
    if unknown := set(samplers) - set(Sampler):
        raise typer.BadParameter(f"{unknown.pop()} is none of {', '.join(Sampler)}", param_hint="--sampler")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise typer.BadParameter(f"{folder}: {error.strerror}", param_hint="--folder") from None
    for seed in range(seeds):
        running = [search(folder, each, seed, seconds) for each in samplers]
        try:
            for process, each in zip(running, samplers, strict=True):
                if process.wait():
                    raise SystemExit(f"{each}{seed}: the search failed; see {folder / f'{each}{seed}.log'}")
        finally:
            for process in running:
                process.terminate()
    table = Table("sampler", "seed", "candidates", *(f"up to {k:g} x anchor" for k in REFERENCES))
    for each in samplers:
        results = [hypervolumes(folder, f"{each}{seed}") for seed in range(seeds)]
        for seed, (count, volumes) in enumerate(results):
            table.add_row(each, str(seed), str(count), *(f"{volume:.4f}" for volume in volumes))
        columns = zip(*(volumes for _, volumes in results), strict=True)
        table.add_row(each, "mean", "", *(f"{mean(column):.4f}" for column in columns), end_section=True)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
