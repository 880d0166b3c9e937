"""The time of a trial that is neither training nor timing: `python -m nas.lab.overhead --trials 200 --trials 2000`.

The real search loop runs on a real database, with an evaluator that invents accuracy and latency at once and builds the
networks. To look at the end of a long study takes minutes: `--trials 10000 --drawn 9000 --open` draws the first 9,000
complete candidates at random and does not build them, then asks the sampler for the others, and last times the commands
that open the study. TPE proposes known architectures, too, and a study of 10,000 that it has proposed holds some 24,500
trials; `--trials 10000 --drawn 10000 --again 0.8 --open` makes one of as many in a third of the time. The processor's
time stands beside the time, which other work on the machine prolongs.
"""

from __future__ import annotations

import functools
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import psutil
import typer

from nas.config import SearchConfig
from nas.lab.invented import FakeEvaluator
from nas.lab.options import Space
from nas.search import sampling
from nas.search.live_study import LiveStudy
from nas.search.loop import Event, Silent, run
from nas.search.sampling import Proposer
from nas.search.trials import Trials
from search_spaces import ArchSpec, load_space
from studies import Store
from studies.ownership import Ownership

# By its path: with -m, Python would also import what lies in the folder that the user stands in.
SCRIPT = Path(__file__).parents[2] / "run_search.py"
# Number of times that each command that opens the study is timed.
OPENINGS = 3
# The methods whose time is told apart.
PARTS: dict[str, tuple[tuple[type, str], ...]] = {
    "sampler": ((Proposer, "propose"), (Proposer, "propose_unseen"), (Proposer, "tell")),
    "stopper": ((LiveStudy, "rules"),),
    "Optuna's tables": ((Trials, "begin"), (Trials, "add_duplicate"), (Trials, "finish")),
    "our tables": ((Store, "add_candidate"), (Ownership, "require")),
    "networks": ((ArchSpec, "build"),),
}


class _Stopwatch(Silent):
    """Takes the time after each candidate.

    Args:
        drawn: number of complete candidates after which networks are built and the sampler is asked.
        again: share of what is drawn until then that was drawn before.

    Attributes:
        marks: pairs of the time and the processor's time, in seconds, at the beginning and after each candidate.
        spent: seconds in each of `PARTS`, and the number of proposals under the name "proposals", over the last tenth.
    """

    def __init__(self, evaluator: FakeEvaluator, drawn: int, again: float = 0.0) -> None:
        self.evaluator, self.drawn, self.again = evaluator, drawn, again
        self.marks: list[tuple[float, float]] = []
        self.spent: Counter[str] = Counter()
        self.tail_begin = 0
        self.complete = 0

    def begin(self, complete: int, budget: int) -> None:
        self.mark()

    def candidate(self, event: Event) -> None:
        self.complete = event.complete
        self.evaluator.build = event.complete >= self.drawn
        self.mark()
        if not self.tail_begin and event.complete >= event.budget - max(1, event.budget // 10):
            self.tail_begin = len(self.marks) - 1
            self.spent.clear()

    def mark(self) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context in which the parts are timed and the first candidates are drawn at random."""
        with ExitStack() as patches:
            for part, methods in PARTS.items():
                for owner, name in methods:
                    patches.enter_context(mock.patch.object(owner, name, self._timed(part, getattr(owner, name))))
            original = sampling.make_sampler
            rng, seeds = random.Random(0), list[int]()

            def make(name: str, seed: int, *arguments: Any) -> Any:
                self.spent["proposals"] += 1
                if self.complete >= self.drawn:
                    return original(name, seed, *arguments)
                if seeds and rng.random() < self.again:
                    # What it drew with that seed, the sampler draws once more.
                    seed = rng.choice(seeds)
                seeds.append(seed)
                return original("random", seed, *arguments[:1])

            patches.enter_context(mock.patch.object(sampling, "make_sampler", make))
            yield

    def _timed(self, part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*arguments, **named)
            finally:
                self.spent[part] += time.perf_counter() - begin  # type: ignore[assignment]

        return call

    def __str__(self) -> str:
        walls, cpus = ([1e3 * (b - a) for a, b in pairwise(each)] for each in zip(*self.marks, strict=True))
        tail = len(walls) - self.tail_begin
        parts = ", ".join(f"{part} {1e3 * self.spent[part] / tail:.1f}" for part in PARTS)
        return (
            f"{self.complete} complete, {len(walls)} evaluated: {statistics.mean(walls):.1f} ms each; over the last "
            f"tenth {statistics.mean(walls[-tail:]):.1f} ms, {statistics.mean(cpus[-tail:]):.1f} of the processor, "
            f"with {self.spent['proposals'] / tail:.1f} proposals each ({parts})"
        )


def time_opening(storage: str, folder: Path) -> dict[str, tuple[float, float]]:
    """Time and processor's time, in seconds, until each command that opens the study has ended, or answers.

    Args:
        folder: folder for the report.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    taken = {}
    for command in (["pareto"], ["report", "--out", str(folder / "report")]):
        begin, used = time.perf_counter(), _used_by_children()
        subprocess.run(
            [sys.executable, SCRIPT, *command, "--storage", storage], check=True, stdout=subprocess.DEVNULL
        )  # fmt: skip
        taken[command[0]] = time.perf_counter() - begin, _used_by_children() - used
    begin = time.perf_counter()
    line = [sys.executable, "-u", str(SCRIPT), "dashboard", "--storage", storage]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = next(line for line in process.stdout if "http://" in line).split()[1]
        for page in ("dashboard/studies/1", "api/studies/1"):
            urllib.request.urlopen(url + page).read()
        used_by_it = psutil.Process(process.pid).cpu_times()
        taken["dashboard"] = time.perf_counter() - begin, used_by_it.user + used_by_it.system
        process.terminate()
    return taken


def _used_by_children() -> float:
    """The processor's time of all processes that this one started and that have ended, in seconds."""
    used = psutil.Process().cpu_times()
    return float(used.children_user + used.children_system)


def opening_line(times: Sequence[Mapping[str, tuple[float, float]]]) -> str:
    """The ranges of what `time_opening` returned several times, in a line."""
    parts = []
    for command in times[0]:
        walls, cpus = zip(*(each[command] for each in times), strict=True)
        parts.append(
            f"{command} {min(walls):.1f} to {max(walls):.1f} s, {min(cpus):.1f} to {max(cpus):.1f} of the processor"
        )
    return f"opened {len(times)} times: {'; '.join(parts)}"


def main(
    trials: Annotated[
        list[int] | None,
        typer.Option(help="Complete candidates of a study; may be given several times (default: 200 and 2000)."),
    ] = None,
    sampler: Annotated[str, typer.Option(help="Sampler: model, tpe, nsga2 or random.")] = "model",
    space: Space = "small",
    storage: Annotated[
        str, typer.Option(help="URL of an empty database, for one study (default: an SQLite file for each).")
    ] = "",
    drawn: Annotated[int, typer.Option(help="Complete candidates that are drawn at random before the others.")] = 0,
    again: Annotated[float, typer.Option(help="Share of what is drawn that was drawn before, 0 to 1.")] = 0.0,
    open: Annotated[bool, typer.Option("--open", help="Time the commands that open the study, too.")] = False,
) -> None:
    """Print milliseconds per candidate that are neither training nor timing, over all and over the last tenth."""
    for count in trials or [200, 2000]:
        with tempfile.TemporaryDirectory() as folder:
            url = storage or f"sqlite:///{Path(folder) / 'study.db'}"
            config = SearchConfig(budget=count, storage=url, space=load_space(space), sampler=sampler, confirm=0)
            evaluator = FakeEvaluator(build=drawn == 0)
            watch = _Stopwatch(evaluator, drawn, again)
            with watch.watching():
                run(config, evaluator, watch)
            print(watch, flush=True)
            if open:
                print(opening_line([time_opening(url, Path(folder)) for _ in range(OPENINGS)]), flush=True)


if __name__ == "__main__":
    typer.run(main)
