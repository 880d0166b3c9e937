"""Contenders: baselines and a study's own networks, trained and measured alike.

`nas.validation.baselines` stores their trainings and latencies; this module reads and judges them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from nas.latency.values import Latency
from nas.recorded import RecordedStudy
from studies import BaselineLatency, BaselineTraining

# Shares of accuracy that decide whether a training has converged, see `convergence`.
MOST_GAIN = 0.02
ABOVE_CHANCE = 0.25


class ContenderKind(StrEnum):
    TIMM = "timm"
    # A ConvFirst network that nobody searched for: the middle of the space.
    DEFAULT = "default"
    FOUND = "found"


@dataclass(frozen=True, slots=True)
class Contender:
    """A network with the best of its trainings, and its latency.

    Args:
        name: name of a timm model, "ConvFirst anchor", or "trial 12".
        summary: text form of the architecture, or the name of the timm model.
        trial: number of the trial of one of the study's own networks; None for others.
        accuracy: accuracy of the best training on held-out images.
        latency: latency in the study's deployment, in which only resolution and engine vary.
        engine: engine of the study, or the best standard one for networks that are not ours.
        resolution: width and height of the images of training and deployment, in pixels.
        learning_rate, steps, batch_size: settings of the best training.
        rates: number of learning rates that were tried.
        converged, reason: whether the training has converged, and the reason in words; see `convergence`.
    """

    name: str
    kind: ContenderKind
    summary: str
    trial: int | None
    params: int
    macs: int
    accuracy: float
    latency: Latency
    engine: str
    resolution: int
    learning_rate: float
    steps: int
    batch_size: int
    rates: int
    converged: bool
    reason: str

    @property
    def training(self) -> str:
        """The best training and its state, in words."""
        of_rates = f"the best of {self.rates}" if self.rates > 1 else "the only one"
        state = "converged" if self.converged else "not converged"
        return (
            f"{self.steps} steps of {self.batch_size} images at learning rate {self.learning_rate:g}, {of_rates}; "
            f"{state}: {self.reason}"
        )


def convergence(
    accuracies: Mapping[float, float], learning_rate: float, half: float | None, chance: float
) -> tuple[bool, str]:
    """Whether a training has converged, and the reason in words.

    It has converged where doubling the steps gained at most `MOST_GAIN`, which is what another seed may give; where
    the accuracy is past `ABOVE_CHANCE` of the way from chance to 1, as a network that has learnt nothing gains nothing
    either; and where no learning rate that was not tried looks better: the best one lies between others, or is ahead
    of its neighbour by no more than `MOST_GAIN`. A loss that flattens shows nothing here: the schedule ends at a rate
    of 0.

    Args:
        accuracies: accuracy at the end of the whole schedule, by learning rate, of the trainings that did not fail.
        learning_rate: the best of these rates.
        half: accuracy at the end of half the schedule at that rate; None where that training is missing.
        chance: accuracy of guessing.
    """
    accuracy = accuracies[learning_rate]
    if accuracy < chance + ABOVE_CHANCE * (1 - chance):
        return False, f"it is hardly above chance ({chance:.0%})"
    if half is None:
        return False, "there is no shorter training to hold it against"
    gain = accuracy - half
    if gain > MOST_GAIN:
        return False, f"doubling the steps still gained {100 * gain:.1f} points"
    rates = sorted(accuracies)
    if len(rates) > 1 and learning_rate in (rates[0], rates[-1]):
        lowest = learning_rate == rates[0]
        ahead = accuracy - accuracies[rates[1] if lowest else rates[-2]]
        if ahead > MOST_GAIN:
            return False, f"a {'lower' if lowest else 'higher'} learning rate than those tried may do better"
    return True, f"doubling the steps gained {100 * gain:+.1f} points"


def contenders(recorded: RecordedStudy) -> list[Contender]:
    """The baselines of a study and its own networks beside them, fastest first; empty if nothing was compared.

    All are comparable: each has its best training on the longest schedule that any of them was trained on, and the
    latency that was measured last, in turns with the others.
    """
    trainings = [row for row in recorded.store.baselines.trainings(recorded.study_id) if row.accuracy is not None]
    steps = max((row.steps for row in trainings), default=0)
    by_network: dict[tuple[str, int], list[BaselineTraining]] = {}
    for row in trainings:
        by_network.setdefault((row.name, row.resolution), []).append(row)
    compared = []
    for latency in _last_measured(recorded):
        rows = by_network.get((latency.name, latency.resolution), [])
        if latency.median_ms is not None and any(row.steps == steps for row in rows):
            compared.append(_contender(rows, steps, latency))
    return sorted(compared, key=lambda each: (each.latency.median_ms, each.name))


def _last_measured(recorded: RecordedStudy) -> list[BaselineLatency]:
    """The latencies of the last measurement, in which networks were timed in turns with one another."""
    rows = [row for row in recorded.store.baselines.latencies(recorded.study_id) if row.resolution]
    last = max((row.measured_at for row in rows), default=None)
    return [row for row in rows if row.measured_at == last]


def _contender(rows: Sequence[BaselineTraining], steps: int, latency: BaselineLatency) -> Contender:
    accuracies = {(row.steps, row.learning_rate): row.accuracy for row in rows if row.accuracy is not None}
    best = best_training([row for row in rows if row.steps == steps])
    wholes = {rate: accuracy for (count, rate), accuracy in accuracies.items() if count == steps}
    half = accuracies.get((steps // 2, best.learning_rate))
    converged, reason = convergence(wholes, best.learning_rate, half, 1 / best.classes)
    return Contender(
        name=best.name, kind=ContenderKind(best.kind), summary=best.summary, trial=best.trial, params=best.params,
        macs=best.macs, accuracy=wholes[best.learning_rate], latency=Latency.of_row(latency), engine=latency.engine,
        resolution=best.resolution, learning_rate=best.learning_rate, steps=steps, batch_size=best.batch_size,
        rates=len(wholes), converged=converged, reason=reason,
    )  # fmt: skip


def failures(recorded: RecordedStudy) -> list[str]:
    """A line for each baseline that has no accuracy or no latency, with the reason."""
    trainings = recorded.store.baselines.trainings(recorded.study_id)
    trained = {(row.name, row.resolution) for row in trainings if row.accuracy is not None}
    names = {name for name, _ in trained}
    lines = {
        row.name: f"{row.name}: {row.reason}"
        for row in recorded.store.baselines.latencies(recorded.study_id)
        # A row without a resolution says that none was suitable, but the network may have run at another since.
        if row.reason and not (row.resolution == 0 and row.name in names)
    }
    for row in trainings:
        if row.reason is not None and (row.name, row.resolution) not in trained:
            lines[row.name] = f"{row.name}, trained at {row.learning_rate:g}: {row.reason}"
    return list(lines.values())


def best_training(rows: Sequence[BaselineTraining]) -> BaselineTraining:
    """The most accurate training; the one of the lowest learning rate where several are equal."""
    return max(rows, key=lambda row: (-1.0 if row.accuracy is None else row.accuracy, -row.learning_rate))
