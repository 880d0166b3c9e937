"""Samplers side by side over many seeds, in minutes: `python -m nas.lab.benchmark_search --study URL#NAME`.

Nothing is trained. Accuracy and latency of any architecture are those of a forest of trees that was fitted to networks
that were trained: those of tables of `nas.lab.testbed`, or of stored studies. The sampler that models is of another
family, so that it is not asked for what it assumes. What the trees do not explain, beyond the noise of one training, is
added as an error that each architecture has of its own; each training adds noise, and each timing, too. The command
prints how well the trees guess networks that they were not shown.

A search is judged by the hypervolume of the true accuracies of what it evaluated (`found`), and by that of the front
that it reports after its confirmation (`confirmed`), whose optimism is told apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import optuna
import typer
from optuna.study import StudyDirection
from optuna.trial import TrialState
from rich.console import Console
from scipy import stats

from nas import pareto
from nas.config import Sampler
from nas.display.charts import BLUE, GREY, ORANGE, RED, Chart, Series, save_charts
from nas.lab.testbed import read_table, stored_study
from nas.reporting import console_table
from nas.search.features import matrix
from nas.search.front_sampler import Memory
from nas.search.model import Scale
from nas.search.racing import Race
from nas.search.sampling import Proposer
from search_spaces import ArchSpec, SearchSpace, load_space

TREES, LEAF, FOLDS = 150, 2, 5
# Standard deviation of one training in accuracy, and of one timing as a share: docs/measurements.md.
NOISE, TIMING_NOISE = 0.025, 0.02
# Numbers of candidates after which a search is looked at.
LOOKS = (20, 40, 60, 100, 200)
SHARE = 0.2
COLOURS = {Sampler.MODEL: RED, Sampler.TPE: BLUE, Sampler.NSGA2: ORANGE, Sampler.RANDOM: GREY}
DIRECTIONS = (StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE)


@dataclass(frozen=True)
class Known:
    """A network that was trained and timed."""

    arch: ArchSpec
    accuracy: float
    latency_ms: float


def known_networks(tables: Sequence[Path], studies: Sequence[str]) -> list[Known]:
    """The networks of tables and of stored studies, each once.

    Args:
        studies: each as URL and name, with a # between them; of each, the rows of its own deployment.
    """
    found: dict[str, Known] = {}
    deployments: dict[str, str] = {}
    for path in tables:
        for network in read_table(path):
            if network.short and network.short[0].accuracy is not None:
                known = Known(network.arch, network.short[0].accuracy, network.latency_ms)
                found.setdefault(network.arch.arch_id, known)
    for each in studies:
        with stored_study(each) as recorded:
            deployed = recorded.config.latency
            deployments[each] = f"{deployed.engine}, {deployed.dtype}, batch {deployed.batch_size}"
            if len(set(deployments.values())) > 1:
                raise SystemExit(f"--study {each}: latencies of {deployments[each]}, those before are of others")
            for row in recorded.evaluations().to_dict("records"):
                arch = ArchSpec.from_json(row["arch"])
                found.setdefault(arch.arch_id, Known(arch, row["accuracy"], row["latency_ms"]))
    return list(found.values())


class World:
    """Accuracy and latency of any architecture, as trees guess them.

    Attributes:
        error, latency_error: root mean square of the trees' errors in cross-validation, in accuracy, and in the
            logarithm of the latency.
        own_error: standard deviation of the error that each architecture has of its own.
        reference_ms: latency up to which hypervolume counts, twice the anchor's.
    """

    def __init__(self, known: Sequence[Known], space: SearchSpace, resolution: int, classes: int) -> None:
        from sklearn.ensemble import ExtraTreesRegressor
        from sklearn.model_selection import cross_val_predict

        self.space, self.resolution, self.classes = space, resolution, classes
        features = matrix([each.arch for each in known], resolution, classes)
        accuracy = np.array([each.accuracy for each in known])
        logs = np.log([each.latency_ms for each in known])
        trees = ExtraTreesRegressor(TREES, min_samples_leaf=LEAF, random_state=0)
        of_latency = ExtraTreesRegressor(TREES, random_state=0)
        self.error = float(np.sqrt(np.mean((cross_val_predict(trees, features, accuracy, cv=FOLDS) - accuracy) ** 2)))
        missed = cross_val_predict(of_latency, features, logs, cv=FOLDS) - logs
        self.latency_error = float(np.sqrt(np.mean(missed**2)))
        self.own_error = float(np.sqrt(max(self.error**2 - NOISE**2, 0)))
        self.accuracy_trees, self.latency_trees = trees.fit(features, accuracy), of_latency.fit(features, logs)
        self.cache: dict[str, tuple[float, float]] = {}
        self.reference_ms = 2 * self.truth(space.anchor())[1]

    def truth(self, arch: ArchSpec) -> tuple[float, float]:
        """Accuracy and latency in ms, without the noise of measuring them."""
        if arch.arch_id not in self.cache:
            features = matrix([arch], self.resolution, self.classes)
            accuracy = float(self.accuracy_trees.predict(features)[0]) + self.own_error * _own_normal(arch)
            latency_ms = float(np.exp(self.latency_trees.predict(features)[0]))
            self.cache[arch.arch_id] = float(np.clip(accuracy, 0.01, 0.99)), latency_ms
        return self.cache[arch.arch_id]


def _own_normal(arch: ArchSpec) -> float:
    """A standard normal number that belongs to an architecture."""
    digest = hashlib.sha256(arch.arch_id.encode()).digest()
    return float(stats.norm.ppf((int.from_bytes(digest[:6], "big") + 0.5) / 2**48))


def search(world: World, sampler: str, seed: int, count: int) -> list[dict[str, float]]:
    """Search with one sampler; returns what stands after each number of candidates of `LOOKS`.

    It proposes as a search of one worker does, which begins with the smallest network and the anchor, and never
    evaluates one twice; random search begins at random.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    memory = Memory(world.space, world.resolution, world.classes, world.reference_ms)
    known: dict[str, int] = {}
    proposer = Proposer(
        world.space, sampler, seed, DIRECTIONS, [], memory if sampler == Sampler.MODEL else None, known
    )  # fmt: skip
    openers = [] if sampler == Sampler.RANDOM else [world.space.smallest(), world.space.anchor()]
    rng = np.random.default_rng(seed)
    archs: list[ArchSpec] = []
    points: list[tuple[float, float, float]] = []
    looks = []
    duplicates = 0
    while len(archs) < count:
        if openers:
            proposal = proposer.propose_this(openers.pop(0))
        else:
            unseen = proposer.propose_unseen(known) if duplicates > 1 else None
            proposal = unseen or proposer.propose()
        if known.setdefault(proposal.arch.arch_id, proposal.number) != proposal.number:
            duplicates += 1
            proposer.tell(proposal.number, None, TrialState.PRUNED, {})
            continue
        duplicates = 0
        accuracy, latency_ms = world.truth(proposal.arch)
        searched = accuracy + NOISE * rng.standard_normal()
        proposer.tell(
            proposal.number, [searched, latency_ms * np.exp(TIMING_NOISE * rng.standard_normal())],
            TrialState.COMPLETE, {},
        )  # fmt: skip
        archs.append(proposal.arch)
        points.append((accuracy, searched, latency_ms))
        if len(archs) in LOOKS:
            looks.append(look(world, archs, np.array(points), seed))
    return looks


def look(world: World, archs: Sequence[ArchSpec], points: np.ndarray, seed: int) -> dict[str, float]:
    """Hypervolumes of a search: found, as searched, as confirmed, and of the confirmed front's true accuracies.

    Args:
        points: true accuracy, accuracy as searched, and latency of each architecture, (n, 3).
    """
    accuracy, searched, latency_ms = points.T
    features = matrix(archs, world.resolution, world.classes)
    race = Race(searched, latency_ms, Scale.of(features)(features))
    rng = np.random.default_rng(seed)
    trained, most = 0, int(SHARE * len(archs))
    while chosen := race.next(min(4, most - trained)) if trained < most else race.missing(1):
        for index in chosen:
            race.add(index, float(accuracy[index] + NOISE * rng.standard_normal()))
        trained += len(chosen)
    eligible = np.array(race.eligible())
    means = np.array([np.mean(race.further[index]) for index in eligible])
    members = eligible[pareto.front(means, latency_ms[eligible])]
    volume = partial(pareto.hypervolume, reference_latency_ms=world.reference_ms)
    reported = volume(means, latency_ms[eligible])
    true = volume(accuracy[members], latency_ms[members])
    return {
        "found": volume(accuracy, latency_ms), "confirmed": true, "optimism": reported - true,
        "optimism as searched": volume(searched, latency_ms) - volume(accuracy, latency_ms),
    }  # fmt: skip


def main(
    table: Annotated[list[Path] | None, typer.Option(help="Table of nas.lab.testbed; may be repeated.")] = None,
    study: Annotated[list[str] | None, typer.Option(help="URL#NAME of a stored study; may be repeated.")] = None,
    sampler: Annotated[list[str] | None, typer.Option(help="Sampler; may be repeated (default: all).")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 50,
    trials: Annotated[int, typer.Option(help="Candidates of a search.")] = 200,
    space: Annotated[str, typer.Option(help="Search space.")] = "small",
    resolution: Annotated[int, typer.Option(help="Width and height of the images, in pixels.")] = 32,
    classes: Annotated[int, typer.Option(help="Number of classes.")] = 10,
    workers: Annotated[int, typer.Option(help="Searches at once.")] = 2,
    plot: Annotated[Path | None, typer.Option(help="PNG file for the curves.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures of every search.")] = None,
) -> None:
    """Compare samplers over many seeds."""
    console = Console()
    known = known_networks(table or (), study or ())
    world = World(known, load_space(space), resolution, classes)
    console.print(
        f"{len(known)} networks; in cross-validation the trees miss a training by {100 * world.error:.1f} points and a "
        f"latency by {world.latency_error:.0%}; noise of a training {100 * NOISE:.1f} points, error of each network's "
        f"own {100 * world.own_error:.1f} points"
    )
    samplers = sampler or list(Sampler)
    looks = [count for count in LOOKS if count <= trials]
    found: dict[str, list[list[dict[str, float]]]] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        for name in samplers:
            found[name] = list(pool.map(partial(search, world, name, count=looks[-1]), range(seeds)))
    for figure in ("found", "confirmed", "optimism", "optimism as searched"):
        lines = console_table(f"{figure}, mean of {seeds} seeds", "sampler", *map(str, looks), text=("sampler",))
        for name, runs in found.items():
            values = np.array([[each[figure] for each in run] for run in runs])
            lines.add_row(name, *(f"{mean:.4f}" for mean in values.mean(0)))
        console.print(lines)
    for line in differences(found, looks):
        console.print(line)
    if out is not None:
        out.write_text(json.dumps({"looks": looks, "runs": found}))
    if plot is not None:
        series = [
            Series(name, looks, [float(np.mean([run[at]["found"] for run in runs])) for at in range(len(looks))],
                   COLOURS[Sampler(name)])
            for name, runs in found.items()
        ]  # fmt: skip
        save_charts([Chart("candidates", "hypervolume found", series)], plot)


def differences(found: dict[str, list[list[dict[str, float]]]], looks: Sequence[int]) -> list[str]:
    """Lines on the paired differences between the first sampler and each other one, with 95 % intervals."""
    first, *others = found
    lines = []
    for other in others:
        for figure in ("found", "confirmed"):
            parts = []
            for at, count in enumerate(looks):
                pairs = [one[at][figure] - two[at][figure] for one, two in zip(found[first], found[other], strict=True)]
                half = float(stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(pairs)) if len(pairs) > 1 else np.nan
                parts.append(f"{np.mean(pairs):+.4f} ±{half:.4f} at {count}")
            lines.append(f"{first} - {other}, {figure}: {', '.join(parts)}")
    return lines


if __name__ == "__main__":
    typer.run(main)
