"""Two versions of the search in turns: `python -m nas.lab.versus REVISION` compares this one with an older commit.

Both evaluate the same networks (random sampling, one seed), each run in a new database. The command prints the seconds
of each run in all and of its trainings, the ratios of the medians, and how far the latencies of the same networks are
apart. With `--neighbours` this version also runs beside processes that keep a core busy each.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from nas.display.notes import duration
from nas.reporting import console_table
from studies import Store

ROOT = Path(__file__).parents[2]
SPENT = re.compile(r"^(\d+):(\d\d):(\d\d) in all: training (\d+):(\d\d):(\d\d) ", re.MULTILINE)


@dataclass(frozen=True)
class Run:
    """A search: its seconds in all and of training, and the latency in ms of each architecture, by arch_id."""

    seconds: float
    training: float
    latency_ms: dict[str, float]


def search(code: Path, folder: Path, name: str, budget: int, options: list[str]) -> Run:
    """Run a search with the code of a folder.

    Raises:
        SystemExit: it failed.
    """
    url = f"sqlite:///{folder.resolve() / name}.db"
    command = [sys.executable, str(code / "run_search.py"), "--budget", str(budget), "--sampler", "random"]
    # A pilot would give this version another schedule than an older one.
    command += ["--proxy-steps", "200"]
    begin = time.perf_counter()
    done = subprocess.run([*command, "--storage", url, *options], capture_output=True, text=True, cwd=folder)
    seconds = time.perf_counter() - begin
    spent = SPENT.search(done.stdout)
    if done.returncode or spent is None:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"status {done.returncode}"]
        raise SystemExit(f"the search of {code} failed: {said[-1]}")
    hours, minutes, rest = (int(part) for part in spent.groups()[3:])
    store = Store.open(url, create=False)
    assert store is not None
    rows = store.evaluations("convfirst")
    store.close()
    latency_ms = {str(row["arch_id"]): float(row["latency_ms"]) for row in rows.to_dict("records")}
    return Run(seconds, 3600 * hours + 60 * minutes + rest, latency_ms)


@contextlib.contextmanager
def revision(name: str, folder: Path) -> Iterator[Path]:
    """A folder with the code of a commit."""
    path = folder / "older"
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(path), name], check=True)
    try:
        yield path
    finally:
        subprocess.run([*git, "remove", "--force", str(path)], check=True)


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that keep a core busy each."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def apart(one: Run, other: Run) -> float:
    """Median difference between the latencies of the same networks in two runs, as a share."""
    shared = one.latency_ms.keys() & other.latency_ms.keys()
    return float(np.median([abs(other.latency_ms[key] / one.latency_ms[key] - 1) for key in shared]))


def main(
    older: Annotated[str, typer.Argument(help="Commit to compare with, as git names it.")],
    budget: Annotated[int, typer.Option(min=1, help="Candidates of each search.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Searches of each version.")] = 3,
    busy: Annotated[
        int,
        typer.Option("--neighbours", min=0, help="Processes that keep a core busy, for one more run in each round."),
    ] = 0,
    options: Annotated[str, typer.Option(help="Further options of this version's search, such as '--workers 4'.")] = "",
) -> None:
    """Print the seconds of both versions side by side."""
    names = ["older", "this"] + (["busy"] if busy else [])
    runs: dict[str, list[Run]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as made_in:
        folder = Path(made_in)
        with revision(older, folder) as code:
            for number in range(rounds):
                runs["older"].append(search(code, folder, f"older{number}", budget, []))
                runs["this"].append(search(ROOT, folder, f"this{number}", budget, options.split()))
                if busy:
                    with neighbours(busy):
                        runs["busy"].append(search(ROOT, folder, f"busy{number}", budget, options.split()))
                print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    table = console_table(
        f"{budget} candidates, {rounds} rounds", "search", "seconds", "of training", "seconds, ratio",
        "of training, ratio", "latencies", text=("search",),
    )  # fmt: skip
    titles = {"older": older, "this": "this version", "busy": f"this, {busy} busy neighbours"}
    base = {"older": "older", "this": "older", "busy": "this"}
    for name in names:
        ratio, trained = (
            [
                getattr(run, field) / getattr(first, field)
                for run, first in zip(runs[name], runs[base[name]], strict=True)
            ]
            for field in ("seconds", "training")
        )
        table.add_row(
            titles[name], " ".join(f"{run.seconds:.0f}" for run in runs[name]),
            " ".join(duration(run.training) for run in runs[name]),
            f"{median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})",
            f"{median(trained):.2f} ({min(trained):.2f} to {max(trained):.2f})",
            f"{median(apart(first, run) for run, first in zip(runs[name], runs[base[name]], strict=True)):.1%}",
        )  # fmt: skip
    Console(width=140, markup=False).print(table)
    print(
        "ratios: median (least to greatest) over the rounds, to the older version's run, of a busy one to the quiet one"
    )


if __name__ == "__main__":
    typer.run(main)
