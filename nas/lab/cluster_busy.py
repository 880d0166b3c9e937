"""How busy a search keeps many workers: `python -m nas.lab.cluster_busy` starts 64 of them in a Ray cluster of its own.

An evaluation sleeps, and does not import torch; its results are invented. The search is the real one, with TPE and an
SQLite database. The command prints the share of the time in which workers slept, from the end of the first evaluation
of the first round to the end of the last, and what the search's own process did meanwhile.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from nas.cluster.connection import connect, disconnect
from nas.cluster.pool import ClusterPool
from nas.config import SearchConfig
from nas.errors import CandidateFailed
from nas.lab.calls import sleep
from nas.lab.invented import FakeEvaluator
from nas.search import run
from nas.search.loop import Event, Silent
from nas.training.proxy import ProxyResult
from nas.training.stopping import Rules
from nas.training.workers import Call, Done
from search_spaces import ArchSpec


@dataclass
class Sleeping(FakeEvaluator):
    """Evaluator whose trainings are sleeps in the workers of a cluster.

    Attributes:
        slept: the times at which each began and ended.
    """

    pool: ClusterPool
    seconds: float
    slept: list[tuple[float, float]] = field(default_factory=list)
    build: bool = False

    apart = True

    @property
    def workers(self) -> int:  # type: ignore[override]
        return self.pool.count

    @property
    def round_size(self) -> int:
        return self.pool.count

    def train(
        self, archs: Sequence[ArchSpec], seeds: Sequence[int] | None = None, rules: Rules = None
    ) -> Generator[Done[ProxyResult]]:
        for done in self.pool.run([Call(sleep, (self.seconds,))] * len(archs)):
            result: ProxyResult | CandidateFailed
            if isinstance(done.result, CandidateFailed):
                result = done.result
            else:
                self.slept.append(done.result)
                # Candidates that fail would be made up for at the end, where few workers have something to do.
                result = ProxyResult(0.5 + 0.01 * (self.cost(archs[done.index]).macs % 40), 1.0, (), self.seconds, 0)
            yield Done(done.index, done.worker, done.seconds, result)

    def close(self) -> None:
        self.pool.close()


class Watch(Silent):
    """Takes the processor's time of this process after each candidate."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def candidate(self, event: Event) -> None:
        self.marks.append(time.process_time())


def start_all(pool: ClusterPool) -> None:
    """Have all workers' processes started, which takes Ray some time, before the search begins."""
    for _ in range(20):
        slept = [done.result for done in pool.run([Call(sleep, (2.0,))] * pool.count)]
        began = [each[0] for each in slept if not isinstance(each, CandidateFailed)]
        if began and max(began) - min(began) < 1.0:
            return


def busy(slept: Sequence[tuple[float, float]], workers: int) -> float:
    """Share of the workers' time in which they slept, once the first of them had done so."""
    begin, end = min(ended for _, ended in slept), max(ended for _, ended in slept)
    inside = sum(max(0.0, ended - max(began, begin)) for began, ended in slept)
    return inside / (workers * (end - begin))


def main(
    workers: Annotated[int, typer.Option(min=1, help="Number of workers.")] = 64,
    candidates: Annotated[int, typer.Option(min=2, help="Candidates of the search.")] = 640,
    seconds: Annotated[float, typer.Option(min=0, help="Seconds of each evaluation.")] = 15.0,
    sampler: Annotated[str, typer.Option(help="Sampler: model, tpe, nsga2 or random.")] = "model",
) -> None:
    """Print how busy the workers were, and the milliseconds of the search's process for each candidate."""
    ray: Any = connect(None, cpus=workers)
    try:
        pool = ClusterPool(ray, workers, "cpu", threads=1, locked=False)
        start_all(pool)
        evaluator, watch = Sleeping(pool, seconds), Watch()
        with tempfile.TemporaryDirectory() as folder:
            url = f"sqlite:///{Path(folder) / 'study.db'}"
            result = run(SearchConfig(budget=candidates, storage=url, sampler=sampler, confirm=0), evaluator, watch)
    finally:
        disconnect(ray)
    later = watch.marks[min(workers, len(watch.marks) - 2) :]
    print(
        f"{workers} workers, {candidates} candidates of {seconds:g} s: {busy(evaluator.slept, workers):.1%} busy after "
        f"the first; {result.shares.total:.0f} s in all; {1e3 * (later[-1] - later[0]) / (len(later) - 1):.0f} ms of "
        "the search's processor time a candidate"
    )


if __name__ == "__main__":
    typer.run(main)
