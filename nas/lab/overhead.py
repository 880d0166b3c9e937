"""The time of a trial that is neither training nor timing: `python -m nas.lab.overhead --trials 200 --trials 2000`.

The real search loop runs on a real SQLite file, with an evaluator that invents accuracy and latency at once.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from nas.config import SearchConfig
from nas.lab.invented import FakeEvaluator
from nas.lab.options import Space
from nas.search.loop import Event, Silent, run
from search_spaces import load_space


class _Stopwatch(Silent):
    def __init__(self) -> None:
        self.marks = [time.perf_counter()]

    def candidate(self, event: Event) -> None:
        self.marks.append(time.perf_counter())


def main(
    trials: Annotated[
        list[int] | None, typer.Option(help="Trials of a study; may be given several times (default: 200 and 2000).")
    ] = None,
    sampler: Annotated[str, typer.Option(help="Sampler: tpe, nsga2 or random.")] = "tpe",
    space: Space = "small",
) -> None:
    """Print milliseconds per trial that are neither training nor timing, over all trials and over the last tenth."""
    for count in trials or [200, 2000]:
        with tempfile.TemporaryDirectory() as folder:
            watch = _Stopwatch()
            config = SearchConfig(
                budget=count, storage=f"sqlite:///{Path(folder) / 'study.db'}", space=load_space(space), sampler=sampler
            )
            run(config, FakeEvaluator(build=True), watch)
        gaps = [1e3 * (end - begin) for begin, end in zip(watch.marks, watch.marks[1:], strict=False)]
        tail = gaps[-max(1, len(gaps) // 10) :]
        print(
            f"{count} complete, {len(gaps)} evaluated: {statistics.mean(gaps):.1f} ms a trial, "
            f"{statistics.mean(tail):.1f} ms over the last tenth",
            flush=True,
        )


if __name__ == "__main__":
    typer.run(main)
