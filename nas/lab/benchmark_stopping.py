"""Early stopping, replayed over many orders: `python -m nas.lab.benchmark_stopping --study URL#NAME`.

Nothing is trained. The trainings of stored studies, or of tables of `nas.lab.testbed`, are taken in random orders, in
rounds of four, as a search would make them; the rule gives some up by their learning curves, and knows the complete
ones of earlier rounds only. The command prints which share of the training's seconds was spent, how much hypervolume
was lost by the accuracies of the search, and which share of the trainings that would have been on the front of their
time was given up. Intervals are of 95 %, over the means of the studies and tables, as the orders of one say nothing of
others; of a single one there is none.

Studies must have been searched with `--no-early-stopping`, or have given nothing up: what a training that was given up
would have come to is not known, and those that are left are the ones with which a rule is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from scipy import stats

from nas.lab.testbed import given_table, stored_study
from nas.pareto import hypervolume
from nas.reporting import console_table
from nas.search.front_sampler import Memory
from nas.search.stopper import LEAST_CHANCE, Stopper
from nas.training import curves
from nas.training.curves import CurvePoint
from nas.training.proxy import ProxyResult
from search_spaces import ArchSpec, SearchSpace, load_space
from studies import CandidateState, TrainingStage

ROUND = 4
CHANCES = (0.02, LEAST_CHANCE, 0.1, 0.2)


@dataclass(frozen=True)
class Trainings:
    """The complete trainings of a study or table.

    Args:
        name: the name of where they come from.
        steps: length of their schedule.
        most_ms: latency up to which hypervolume counts.
        rows: architecture, latency in ms and result of each.
    """

    name: str
    space: SearchSpace
    resolution: int
    classes: int
    steps: int
    most_ms: float
    rows: tuple[tuple[ArchSpec, float, ProxyResult], ...]

    def memory(self) -> Memory:
        return Memory(self.space, self.resolution, self.classes, self.most_ms)


@dataclass(frozen=True)
class Replayed:
    """What a replay came to.

    Args:
        share: share of the training's seconds that was spent.
        lost: hypervolume that was lost.
        reached, wrong: number of trainings that would have reached what they needed, and of those that were given up.
    """

    share: float
    lost: float
    reached: int
    wrong: int


def of_study(named: str) -> Trainings:
    """The trainings of a stored study, in its own deployment.

    Args:
        named: URL and name, with a # between them.

    Raises:
        SystemExit: some of its trainings were given up.
    """
    with stored_study(named) as recorded:
        stored = recorded.store.trainings.of_study(recorded.study_id, TrainingStage.SEARCH)
        by_trial = {row.trial_id: row.curve for row in stored}
        rows = []
        candidates = recorded.candidates()
        if given_up := sum(each.state == CandidateState.STOPPED for each in candidates):
            raise SystemExit(
                f"--study {named}: {given_up} of its trainings were given up, and their ends are not known; use one "
                "that was searched with --no-early-stopping"
            )
        for each in candidates:
            latency = each.latency_in(recorded.deployment)
            if latency is not None and each.accuracy is not None:
                curve = curves.from_json(by_trial.get(each.trial_id))
                result = ProxyResult(each.accuracy, each.loss or 0.0, curve, each.train_seconds or 0.0, 0)
                rows.append((ArchSpec.from_json(each.arch), latency.median_ms, result))
        config = recorded.config
        return Trainings(
            named, config.space, config.latency.resolution, config.latency.num_classes, config.proxy.steps,
            recorded.reference_latency_ms, tuple(rows),
        )  # fmt: skip


def of_table(path: Path) -> Trainings:
    """The first short trainings of a table's networks; hypervolume counts up to twice the median latency."""
    plan, networks = given_table(path)
    rows = []
    for network in networks:
        first = network.short[0] if network.short else None
        if first is not None and first.accuracy is not None:
            curve = tuple(CurvePoint(int(step), loss, accuracy, 0.0) for step, loss, accuracy, *_ in first.curve)
            result = ProxyResult(first.accuracy, first.loss or 0.0, curve, first.seconds, 0)
            rows.append((network.arch, network.latency_ms, result))
    most_ms = 2 * float(np.median([latency_ms for _, latency_ms, _ in rows]))
    space = load_space(plan.space)
    return Trainings(str(path), space, plan.resolution, plan.classes, plan.steps, most_ms, tuple(rows))


def replay(trainings: Trainings, chance: float, seed: int) -> Replayed:
    """Take the trainings in a random order under the rule.

    Args:
        chance: probability of reaching what it needs, below which a training is given up.
    """
    order = np.random.default_rng(seed).permutation(len(trainings.rows))
    stopper = Stopper(trainings.memory(), trainings.steps, chance=chance)
    complete: list[int] = []
    spent = whole = 0.0
    reached = wrong = 0
    for begin in range(0, len(order), ROUND):
        batch = order[begin : begin + ROUND]
        rows = [trainings.rows[index] for index in batch]
        rules = stopper.rules([arch for arch, _, _ in rows], [latency_ms for _, latency_ms, _ in rows])
        for index, (arch, latency_ms, result), rule in zip(batch, rows, rules, strict=True):
            ruled = result if rule is None else result.under(rule)
            # Those that are trained to the end to check the rule cost what they cost; here all can be checked.
            if rule is not None and result.accuracy >= rule.needed:
                reached += 1
                wrong += result.under(replace(rule, ends=True)).stopped
            whole += result.seconds
            spent += ruled.seconds
            if not ruled.stopped:
                complete.append(int(index))
                stopper.add(arch, result.accuracy, latency_ms, result.curve)
    accuracy = [result.accuracy for _, _, result in trainings.rows]
    latency = [latency_ms for _, latency_ms, _ in trainings.rows]
    everything = hypervolume(accuracy, latency, trainings.most_ms)
    found = hypervolume([accuracy[each] for each in complete], [latency[each] for each in complete], trainings.most_ms)
    return Replayed(spent / whole if whole else 1.0, everything - found, reached, wrong)


def main(
    table: Annotated[list[Path] | None, typer.Option(help="Table of nas.lab.testbed; may be repeated.")] = None,
    study: Annotated[list[str] | None, typer.Option(help="URL#NAME of a stored study; may be repeated.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of orders of each.")] = 50,
    workers: Annotated[int, typer.Option(min=1, help="Replays at once.")] = 2,
) -> None:
    """Replay early stopping over many orders."""
    console = Console()
    sources = [*map(of_table, table or ()), *map(of_study, study or ())]
    if not sources:
        raise SystemExit("--study or --table: name at least one")
    lines = console_table(
        f"{sum(len(each.rows) for each in sources)} trainings, {seeds} orders of each of {len(sources)}",
        "given up below", "seconds", "lost", "worst", "false stops", text=("given up below",),
    )  # fmt: skip
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        for chance in dict.fromkeys(sorted(CHANCES)):
            by_source = [list(pool.map(partial(replay, each, chance), range(seeds))) for each in sources]
            runs = [run for each in by_source for run in each]
            reached, wrong = sum(run.reached for run in runs), sum(run.wrong for run in runs)
            lines.add_row(
                f"{chance:.0%}" + (" (default)" if chance == LEAST_CHANCE else ""),
                _interval([float(np.mean([run.share for run in each])) for each in by_source]),
                _interval([float(np.mean([run.lost for run in each])) for each in by_source]),
                f"{max(run.lost for run in runs):.4f}", f"{wrong} of {reached} ({wrong / max(1, reached):.1%})",
            )  # fmt: skip
    console.print(lines)


def _interval(means: Sequence[float]) -> str:
    """The mean of the means of studies and tables, with its 95 % interval where there are several."""
    if len(means) == 1:
        return f"{means[0]:.4f}"
    return f"{np.mean(means):.4f} ±{stats.t.ppf(0.975, len(means) - 1) * stats.sem(means):.4f}"


if __name__ == "__main__":
    typer.run(main)
