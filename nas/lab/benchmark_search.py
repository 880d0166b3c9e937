"""Searches side by side over many seeds, in minutes: `python -m nas.lab.benchmark_search --table FILE`.

Nothing is trained. A network of the table (`nas.lab.testbed`) has the accuracies, learning curves and latency that it
has there; those of others are guessed by trees that were fitted to the table, with the errors and the noise that it
shows (`nas.lab.world`). The sampler that models is of another family and sees other figures, so that it is not asked
for what it assumes. The command prints how well the trees guess networks that they were not shown.

A method is the name of a sampler, with `+stopping` behind it where trainings are given up early. With `model+timing`,
or `model+timing+stopping`, a candidate is trained only if by its latency as timed it is still expected to add most of
what it was proposed for; those that are not trained are no more than those that are, and cost no seconds here.

Searches with one seed are paired. A search is judged by the hypervolume of true accuracies: of all that it trained to
the end (`found`), of the front by the accuracies with which it searched (`unconfirmed`), and of the front that it
reports after its confirmation (`confirmed`). What a front claims beyond its true accuracies is its optimism. Seconds
are those of all trainings, on one core.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, TypeAlias

import numpy as np
import optuna
import typer
from optuna.study import StudyDirection
from optuna.trial import TrialState
from rich.console import Console
from scipy import stats

from nas import pareto
from nas.config import Sampler
from nas.display.charts import BLUE, DARK_GREY, GREY, INK, ORANGE, RED, Chart, Series, save_charts
from nas.display.notes import DEVIATION, PREDICTED, TIMED
from nas.lab.testbed import given_table
from nas.lab.world import SURPRISE, World
from nas.reporting import console_table
from nas.search.features import matrix
from nas.search.front_sampler import LATENCY, STARTUP_TRIALS, FrontModel, Memory
from nas.search.live_study import MAX_DUPLICATES
from nas.search.model import Scale
from nas.search.racing import Race
from nas.search.sampling import Proposal, Proposer, openers
from nas.search.stopper import Stopper
from search_spaces import ArchSpec, load_space

# Standard deviation of one timing as a share: docs/measurements.md.
TIMING_NOISE = 0.02
# Numbers of candidates after which a search is looked at.
LOOKS = (20, 25, 30, 40, 60, 80, 100, 150, 200)
# Candidates of a round, as of two workers.
ROUND = 4
SHARE = 0.2
STOPPING, TIMING = "+stopping", "+timing"
# Share of the hypervolume for which it was proposed that a candidate is to add by its latency as timed.
STILL_WORTH = 0.8
METHODS = ("model+stopping", "model", "tpe+stopping", "tpe", "random")
COLOURS = (RED, ORANGE, BLUE, GREY, INK, DARK_GREY)
DIRECTIONS = (StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE)
FIGURES = ("found", "unconfirmed", "confirmed", "optimism", "optimism as searched", "seconds")

Look: TypeAlias = dict[str, float]


@dataclass
class Searched:
    """What a search has evaluated so far.

    Args:
        archs: the networks that were trained to the end.
        points: true accuracy, accuracy as searched, latency as timed, and true latency of each.
        trained: number of all that were trained, those that were given up included.
        declined: number of those that were timed and not trained.
        seconds, passes: seconds of the trainings, and the number of whole trainings that they took together.
        reached, wrong: number of trainings under a rule that would have reached what they needed, and of those that
            were given up.
    """

    archs: list[ArchSpec] = field(default_factory=list)
    points: list[tuple[float, float, float, float]] = field(default_factory=list)
    trained: int = 0
    declined: int = 0
    seconds: float = 0.0
    passes: float = 0.0
    reached: int = 0
    wrong: int = 0


@dataclass(frozen=True)
class Method:
    """A way to search; `of` reads its name."""

    sampler: str
    timing: bool
    stopping: bool

    @classmethod
    def of(cls, name: str) -> Method:
        """Raises ValueError where there is no such method."""
        plain = name.removesuffix(STOPPING)
        sampler = plain.removesuffix(TIMING)
        if sampler not in list(Sampler) or (plain != sampler and sampler != Sampler.MODEL):
            raise ValueError(
                f"no such method; it is one of {', '.join(Sampler)}, {Sampler.MODEL}{TIMING}, and {STOPPING} may follow"
            )
        return cls(sampler, plain != sampler, name != plain)


def search(world: World, method: str, seed: int, looks: Sequence[int]) -> list[Look]:
    """Search with one method; returns what stands after each number of candidates.

    It proposes as a search of two workers does, which begins with the smallest network and the anchor, and never
    evaluates one twice; random search begins at random.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    how = Method.of(method)
    memory = Memory(world.space, world.resolution, world.classes, world.reference_ms)
    known: dict[str, int] = {}
    proposer = Proposer(
        world.space, how.sampler, seed, DIRECTIONS, [], memory if how.sampler == Sampler.MODEL else None, known
    )  # fmt: skip
    first = list(openers(world.space, how.sampler))
    stopper = Stopper(memory, world.steps) if how.stopping else None
    done = Searched()
    found = []
    for look_at in looks:
        while done.trained < look_at:
            count = min(ROUND, look_at - done.trained)
            proposals: list[Proposal] = []
            while len(proposals) < count:
                proposal = _proposed(proposer, known, first)
                may_decline = how.timing and done.declined < done.trained + len(proposals)
                if may_decline and _declined(proposer, memory, proposal, timed_ms(world, proposal.arch, seed)):
                    done.declined += 1
                else:
                    proposals.append(proposal)
            _train(world, proposer, proposals, stopper, seed, done)
        found.append(look(world, done, seed))
    return found


def _proposed(proposer: Proposer, known: dict[str, int], first: list[ArchSpec]) -> Proposal:
    """The next network that is not known."""
    duplicates = 0
    while True:
        if first:
            proposal = proposer.propose_this(first.pop(0))
        else:
            unseen = proposer.propose_unseen(known) if duplicates >= MAX_DUPLICATES else None
            proposal = unseen or proposer.propose()
        if known.setdefault(proposal.arch.arch_id, proposal.number) == proposal.number:
            return proposal
        duplicates += 1
        proposer.tell(proposal.number, None, TrialState.PRUNED, {})


def _declined(proposer: Proposer, memory: Memory, proposal: Proposal, own_ms: float) -> bool:
    """Whether a candidate is not worth a training by its latency as timed; then the sampler is told of that."""
    trials = [
        trial for trial in proposer.study.get_trials(deepcopy=False) if trial.params and trial.number != proposal.number
    ]
    if sum(trial.state == TrialState.COMPLETE for trial in trials) < STARTUP_TRIALS:
        return False
    model = FrontModel.of(memory, trials)
    expected, now = (float(model.improvement([proposal.arch], ms)[0]) for ms in (None, np.array([own_ms])))
    if now >= STILL_WORTH * expected:
        return False
    # As what breaks a limit on the latency, by nothing, it teaches the model of latencies, and that alone.
    proposer.tell(proposal.number, None, TrialState.PRUNED, {LATENCY: 1e-12}, {TIMED: own_ms})
    return True


def timed_ms(world: World, arch: ArchSpec, seed: int) -> float:
    """The latency of an architecture as timed: a network is timed once, whichever method comes to it, and when."""
    rng = np.random.default_rng([seed, int(arch.arch_id, 16)])
    return world.truth(arch)[1] * float(np.exp(TIMING_NOISE * rng.standard_normal()))


def _train(
    world: World, proposer: Proposer, proposals: Sequence[Proposal], stopper: Stopper | None,
    seed: int, done: Searched,
) -> None:  # fmt: skip
    """Time and train a round, and tell sampler and stopper of it."""
    archs = [proposal.arch for proposal in proposals]
    truths = [world.truth(arch) for arch in archs]
    timed = [timed_ms(world, arch, seed) for arch in archs]
    rules = stopper.rules(archs, timed) if stopper else [None] * len(archs)
    for proposal, (accuracy, latency_ms), own_ms, rule in zip(proposals, truths, timed, rules, strict=True):
        whole = world.train(proposal.arch, seed)
        result = whole if rule is None else whole.under(rule)
        if rule is not None and whole.accuracy >= rule.needed:
            done.reached += 1
            done.wrong += whole.under(replace(rule, ends=True)).stopped
        done.trained += 1
        done.seconds += result.seconds
        done.passes += result.curve[-1].step / world.steps
        if result.stopped and result.verdict:
            believed = {TIMED: own_ms, PREDICTED: result.verdict.predicted, DEVIATION: result.verdict.deviation}
            proposer.tell(proposal.number, None, TrialState.PRUNED, {}, believed)
            continue
        proposer.tell(proposal.number, [result.accuracy, own_ms], TrialState.COMPLETE, {})
        done.archs.append(proposal.arch)
        done.points.append((accuracy, result.accuracy, own_ms, latency_ms))
        if stopper:
            stopper.add(proposal.arch, result.accuracy, own_ms, result.curve)


def look(world: World, done: Searched, seed: int) -> Look:
    """The figures of a search that ends now and confirms its front."""
    accuracy, searched, timed, latency_ms = np.array(done.points).T
    features = matrix(done.archs, world.resolution, world.classes)
    race = Race(searched, timed, Scale.of(features)(features))
    trained, most, seconds = 0, round(SHARE * done.passes), done.seconds
    while chosen := race.next(min(ROUND, most - trained)) if trained < most else race.missing(1):
        for index in chosen:
            result = world.train(done.archs[index], seed, 1 + len(race.further[index]))
            race.add(index, result.accuracy)
            seconds += result.seconds
        trained += len(chosen)
    eligible = np.array(race.eligible())
    means = np.array([np.mean(race.further[index]) for index in eligible])
    members = eligible[pareto.front(means, timed[eligible])]
    lucky = pareto.front(searched, timed)
    volume = partial(pareto.hypervolume, reference_latency_ms=world.reference_ms)
    return {
        "found": volume(accuracy, latency_ms), "unconfirmed": volume(accuracy[lucky], latency_ms[lucky]),
        "confirmed": volume(accuracy[members], latency_ms[members]),
        # Of the same networks at the same latencies: what the accuracies alone claim too much.
        "optimism": volume(means, timed[eligible]) - volume(accuracy[members], timed[members]),
        "optimism as searched": volume(searched, timed) - volume(accuracy[lucky], timed[lucky]),
        "seconds": seconds, "searching seconds": done.seconds, "reached": done.reached, "wrong": done.wrong,
        "declined": done.declined,
    }  # fmt: skip


def main(
    table: Annotated[Path, typer.Option(help="Table of nas.lab.testbed.")],
    method: Annotated[
        list[str] | None, typer.Option(help=f"Method; may be repeated (default: {', '.join(METHODS)}).")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 50,
    trials: Annotated[int, typer.Option(min=4, help="Candidates of a search.")] = 200,
    surprise: Annotated[
        float, typer.Option(min=0, help="Share of the trees' error in latency that each network has of its own.")
    ] = SURPRISE,
    workers: Annotated[int, typer.Option(min=1, help="Searches at once.")] = 2,
    plot: Annotated[Path | None, typer.Option(help="PNG file for the curves.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures of every search.")] = None,
) -> None:
    """Compare ways to search over many seeds."""
    methods = method or list(METHODS)
    for name in methods:
        try:
            Method.of(name)
        except ValueError as error:
            raise SystemExit(f"--method {name}: {error}") from error
    console = Console()
    plan, networks = given_table(table)
    try:
        world = World(networks, load_space(plan.space), plan.resolution, plan.classes, surprise)
    except ValueError as error:
        raise SystemExit(f"--table {table}: {error}") from error
    console.print(
        f"in cross-validation the trees miss a network's accuracy by {100 * world.error:.1f} points and its latency by "
        f"{world.latency_error:.0%}; noise of a training {100 * world.noise:.1f} points, error of each network's own "
        f"{100 * world.own_error:.1f} points"
    )
    looks = sorted({count for count in LOOKS if count < trials} | {trials})
    found: dict[str, list[list[Look]]] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        for name in methods:
            found[name] = list(pool.map(partial(search, world, name, looks=looks), range(seeds)))
    for figure in FIGURES:
        lines = console_table(f"{figure}, mean of {seeds} seeds", "method", *map(str, looks), text=("method",))
        digits = 0 if figure == "seconds" else 4
        for name in methods:
            lines.add_row(name, *(f"{each:.{digits}f}" for each in _means(found, name, figure)))
        console.print(lines)
    for name in methods:
        if Method.of(name).timing:
            declined = _means(found, name, "declined")[-1]
            console.print(f"{name}: {declined:.0f} candidates timed and not trained, in the mean, next to {looks[-1]}")
    for line in [*reached(found, looks), *differences(found, looks), *savings(found, looks)]:
        console.print(line)
    if out is not None:
        out.write_text(json.dumps({"looks": looks, "runs": found}))
    if plot is not None:
        series = []
        for name, colour in zip(methods, COLOURS, strict=False):
            minutes = [each / 60 for each in _means(found, name, "seconds")]
            series.append(Series(name, minutes, _means(found, name, "confirmed"), colour))
        save_charts([Chart("minutes of training on one core", "hypervolume confirmed", series)], plot)


def _means(found: dict[str, list[list[Look]]], method: str, figure: str) -> list[float]:
    return [float(each) for each in np.mean([[one[figure] for one in run] for run in found[method]], axis=0)]


def reached(found: dict[str, list[list[Look]]], looks: Sequence[int]) -> list[str]:
    """Lines on the number of candidates after which a method confirms as much as others do in the end, in the mean."""
    lines = []
    for name in found:
        for other in found:
            if name == other:
                continue
            goal = _means(found, other, "confirmed")[-1]
            first = next((at for at, each in enumerate(_means(found, name, "confirmed")) if each >= goal), None)
            if first is not None and looks[first] < looks[-1]:
                pair = _interval([one[first]["confirmed"] - two[-1]["confirmed"]
                                  for one, two in zip(found[name], found[other], strict=True)])  # fmt: skip
                lines.append(f"{name} reaches after {looks[first]} what {other} confirms after {looks[-1]} ({pair})")
    return lines


def differences(found: dict[str, list[list[Look]]], looks: Sequence[int]) -> list[str]:
    """Lines on the paired differences between the first method and each other one, with 95 % intervals."""
    first, *others = found
    lines = []
    for other in others:
        pairs = list(zip(found[first], found[other], strict=True))
        for figure in ("found", "confirmed"):
            parts = [
                f"{_interval([one[at][figure] - two[at][figure] for one, two in pairs])} at {count}"
                for at, count in enumerate(looks)
            ]
            lines.append(f"{first} - {other}, {figure}: {', '.join(parts)}")
    return lines


def savings(found: dict[str, list[list[Look]]], looks: Sequence[int]) -> list[str]:
    """Lines on what early stopping saves and costs in the end, for methods that are there with it and without."""
    lines = []
    for name, runs in found.items():
        if not name.endswith(STOPPING):
            continue
        wrong, right = sum(run[-1]["wrong"] for run in runs), sum(run[-1]["reached"] for run in runs)
        line = f"{name}, {looks[-1]} candidates: {wrong:.0f} of {right:.0f} false stops ({wrong / max(right, 1):.1%})"
        if plain := found.get(name.removesuffix(STOPPING)):
            pairs = list(zip(runs, plain, strict=True))
            shares = [one[-1]["searching seconds"] / two[-1]["searching seconds"] for one, two in pairs]
            lost = [two[-1]["confirmed"] - one[-1]["confirmed"] for one, two in pairs]
            line += f", {_interval(shares)} of the search's seconds, {_interval(lost)} lost, {max(lost):.4f} at most"
        lines.append(line)
    return lines


def _interval(values: Sequence[float]) -> str:
    """The mean of values, with its 95 % interval."""
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else float("nan")
    return f"{np.mean(values):+.4f} ±{half:.4f}"


if __name__ == "__main__":
    typer.run(main)
