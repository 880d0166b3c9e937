"""The pilot: when a study begins, a few short trainings say which schedule lets its candidates be told apart.

How long a candidate has to be trained depends on the images. Too short, and small networks lead that later fall behind;
and whatever the length, two networks can only be told apart if they differ by more than two trainings of one network
do. A pilot that may cost a tenth of the search cannot find out all of that by itself: eight networks do not say how a
ranking would change with eight times as many steps. So the length is a rule's (about one pass over the images, or on a
GPU what keeps it busy for a second, as far as the user can wait), and the pilot finds the rate, checks the length by
what it measures, and says what is to be expected (docs/measurements.md, "A schedule that suits the data").
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Protocol, runtime_checkable

import numpy as np
from scipy import stats

from nas.config import PILOT_BUDGET, ProxyConfig, SearchConfig
from nas.display.notes import duration
from nas.errors import CandidateFailed
from nas.reporting import Note
from nas.search.auto_space import typical
from nas.training.proxy import ProxyResult
from nas.training.worker_count import gently
from nas.training.workers import Done
from search_spaces import ArchSpec

# The lengths of schedules that there are, in steps.
RUNGS = (200, 400, 800, 1600, 3200)
# Batches that are tried on a GPU.
CUDA_BATCHES = (32, 128, 512)
# A larger batch has to train so many times as many images in a second.
WORTH_A_BATCH = 1.3
# Seconds for which a candidate keeps a GPU busy.
BUSY_SECONDS = 1.0
# Seconds that a search may take where the user does not say it.
AFFORDABLE_SECONDS = 2 * 3600.0
# Steps of a training that only shows how fast steps are.
PROBE_STEPS = 20
# Networks of a pilot; a larger budget allows for more, one in so many candidates.
LEAST_NETWORKS, MOST_NETWORKS, CANDIDATES_A_NETWORK = 2, 8, 25
# Budget from which on noise is measured, too, by trainings with another seed.
SEEDS_BUDGET = 50
# Share of the time limit that a pilot may take.
SHARE = 0.1
# Share of the variance of a training's accuracy that is due to the network; below the first, one rung more is taken,
# below the second, the user is warned.
GOOD_SHARE, POOR_SHARE = 0.7, 0.5


@dataclass(frozen=True)
class PilotTraining:
    """A training of a pilot."""

    arch: ArchSpec
    proxy: ProxyConfig
    seed: int


@runtime_checkable
class Adjustable(Protocol):
    """An evaluator whose schedule can be chosen: it trains networks by several, and adopts one.

    Attributes:
        train_images: number of training images.
        val_images: number of validation images.
        trains_on: kind of the devices that train, `cpu` or `cuda`.
    """

    train_images: int
    val_images: int

    @property
    def trains_on(self) -> str: ...

    @property
    def workers(self) -> int: ...

    def train_as(self, trainings: Sequence[PilotTraining]) -> Generator[Done[ProxyResult]]:
        """Train networks side by side, each by a schedule of its own, and yield each when it ends."""
        ...

    def adopt(self, proxy: ProxyConfig) -> None:
        """Train candidates by this schedule from now on."""
        ...


@dataclass(frozen=True)
class Measured:
    """What a pilot measured of a schedule.

    Args:
        networks: number of networks that were trained.
        accuracy: mean of their accuracies.
        noise: standard deviation of two trainings of one network; None where each was trained once.
        spread: standard deviation between networks, without that noise; None where the noise is not known.
        agreement: Kendall's tau between accuracies after half as many steps and after all; None for fewer than three
            networks.
        seconds: mean duration of a training.
    """

    steps: int
    batch_size: int
    learning_rate: float
    networks: int
    accuracy: float
    noise: float | None
    spread: float | None
    agreement: float | None
    seconds: float

    @property
    def share(self) -> float | None:
        """The share of the variance of a training's accuracy that is due to the network; None if not known."""
        if self.noise is None or self.spread is None:
            return None
        total = self.spread**2 + self.noise**2
        return self.spread**2 / total if total else 0.0


@dataclass(frozen=True)
class Pilot:
    """The result of a pilot.

    Args:
        proxy: the schedule that was chosen.
        measured: what was measured, of the schedule itself or a shorter one; None where no training succeeded.
        lines: what it chose and what is to be expected, for the user; warnings come last.
        seconds: time that the pilot's trainings took, those at the same time added up.
    """

    proxy: ProxyConfig
    measured: Measured | None
    lines: tuple[str, ...]
    seconds: float

    def to_json(self) -> str:
        """What the study keeps of it."""
        return json.dumps({
            "measured": None if self.measured is None else asdict(self.measured), "lines": self.lines,
            "seconds": round(self.seconds, 2),
        })  # fmt: skip


def wants_pilot(config: SearchConfig) -> bool:
    """Whether a new study begins with a pilot."""
    return bool(config.pilot) and config.budget >= PILOT_BUDGET


class Piloting:
    """A pilot on its way.

    Args:
        config: the search, whose `pilot` names what is to be chosen.
        evaluator: what trains.
        note: function that receives a line for the user.
    """

    def __init__(self, config: SearchConfig, evaluator: Adjustable, note: Note) -> None:
        self.config, self.evaluator, self.note = config, evaluator, note
        self.proxy = config.proxy
        self.seconds = 0.0
        self.failures: list[str] = []

    def run(self) -> Pilot:
        """Choose the schedule of the search."""
        anchor = self.config.space.anchor()
        if self.evaluator.trains_on == "cuda" and "batch_size" in self.config.pilot:
            self._choose_batch(anchor)
        self.step_seconds = self._step_seconds(anchor, self.proxy)
        if self.step_seconds is None:
            return self._blind()
        wanted = self._usual()
        steps = max((rung for rung in RUNGS if rung <= wanted and self._affordable(rung)), default=RUNGS[0])
        self.proxy = replace(self.proxy, steps=steps)
        archs = self._networks()
        careful = self.config.budget >= SEEDS_BUDGET
        # A small budget pays for trainings of half the length only.
        tested = replace(self.proxy, steps=steps if careful else max(steps // 2, 1))
        if not self._has_time(len(archs) * (1 + 2 * careful) * tested.steps):
            return self._blind(steps)
        shorter = self._train(archs, replace(tested, steps=max(tested.steps // 2, 1)), 0)
        if "learning_rate" in self.config.pilot:
            tested, shorter = self._choose_rate(archs, tested, shorter)
        full = self._train(archs, tested, 0)
        again = self._train(archs, tested, 1) if careful else [None] * len(archs)
        self.proxy = replace(tested, steps=steps)
        measured = self._measured(tested, shorter, full, again)
        if measured is None:
            return self._blind(steps)
        longer = next((rung for rung in RUNGS if rung > steps), None)
        warnings = []
        if wanted > steps:
            warnings.append(
                f"{wanted} steps would suit {self.evaluator.train_images:,} images, but the search would take "
                f"{self._expected(wanted)}"
            )
        share = measured.share
        if share is not None and share < GOOD_SHARE and longer is not None and self._affordable(longer):
            self.proxy = replace(self.proxy, steps=longer)
        if share is not None and share < POOR_SHARE:
            warnings.append(self._poor(measured))
        self.evaluator.adopt(self.proxy)
        return Pilot(self.proxy, measured, (*self._lines(measured), *warnings), self.seconds)

    # -- choices -----------------------------------------------------------------------------------------------------

    def _usual(self) -> int:
        """The rung that is nearest to one pass over the images, or more where a GPU does more in a second."""
        images = float(self.evaluator.train_images)
        if self.evaluator.trains_on == "cuda" and self.step_seconds:
            images = max(images, BUSY_SECONDS * self.proxy.batch_size / self.step_seconds)
        passes = images / self.proxy.batch_size
        return min(RUNGS, key=lambda rung: abs(math.log(rung / max(1.0, passes))))

    def _networks(self) -> list[ArchSpec]:
        """Networks that are spread over the operations of the space."""
        count = min(MOST_NETWORKS, max(LEAST_NETWORKS, self.config.budget // CANDIDATES_A_NETWORK))
        spread = typical(self.config.space)
        return [spread[round(place)] for place in np.linspace(0, len(spread) - 1, count + 2)[1:-1]]

    def _choose_batch(self, anchor: ArchSpec) -> None:
        """Take the batch from which on larger ones train hardly more images in a second."""
        best, rate = self.proxy, 0.0
        for size in CUDA_BATCHES:
            # The usual scaling of AdamW's rate.
            scaled = replace(
                self.proxy, batch_size=size,
                learning_rate=self.proxy.learning_rate * math.sqrt(size / self.proxy.batch_size)
                if "learning_rate" in self.config.pilot else self.proxy.learning_rate,
            )  # fmt: skip
            seconds = self._step_seconds(anchor, scaled)
            if seconds is None or size / seconds < WORTH_A_BATCH * rate or size > self.evaluator.train_images:
                break
            best, rate = scaled, size / seconds
        self.proxy = best

    def _choose_rate(
        self, archs: Sequence[ArchSpec], tested: ProxyConfig, shorter: list[ProxyResult | None]
    ) -> tuple[ProxyConfig, list[ProxyResult | None]]:
        """Half the rate, where short trainings are more accurate by it than chance explains."""
        lower = replace(tested, learning_rate=tested.learning_rate / 2)
        found = self._train(archs, replace(lower, steps=max(tested.steps // 2, 1)), 0)
        pairs = [(one.accuracy, other.accuracy) for one, other in zip(shorter, found, strict=True) if one and other]
        if sum(each is None for each in shorter) > sum(each is None for each in found):
            return lower, found
        gains = np.array([other - one for one, other in pairs])
        if len(gains) > 1 and gains.mean() > gains.std(ddof=1) / math.sqrt(len(gains)):
            return lower, found
        return tested, shorter

    # -- trainings ---------------------------------------------------------------------------------------------------

    def _train(self, archs: Sequence[ArchSpec], proxy: ProxyConfig, seed: int) -> list[ProxyResult | None]:
        """Train networks by a schedule; None stands for one that failed."""
        found: list[ProxyResult | None] = [None] * len(archs)
        seed += self.config.seed
        # Those with most to compute come first, so that no worker is left with one of them at the end.
        jobs = [PilotTraining(arch, proxy, seed) for arch in reversed(archs)]
        for done in self.evaluator.train_as(jobs):
            self.seconds += done.seconds
            if isinstance(done.result, CandidateFailed):
                self.failures.append(str(done.result))
            else:
                found[len(archs) - 1 - done.index] = done.result
        return found

    def _step_seconds(self, arch: ArchSpec, proxy: ProxyConfig) -> float | None:
        """Seconds of a step, with as many trainings at once as there are workers; None where none can be trained."""
        jobs = [PilotTraining(arch, gently(proxy, PROBE_STEPS), self.config.seed)] * self.evaluator.workers
        each = []
        for done in self.evaluator.train_as(jobs):
            if isinstance(done.result, CandidateFailed):
                self.failures.append(str(done.result))
            else:
                first, last = done.result.curve[0], done.result.curve[-1]
                each.append((last.seconds - first.seconds) / max(1, last.step - first.step))
        return fmean(each) if each else None

    def _has_time(self, steps: int) -> bool:
        """Whether a pilot of so many steps in all takes no more than its share of a time limit."""
        limit = self.config.time_limit_s
        return limit is None or steps * (self.step_seconds or 0.0) / self.evaluator.workers <= SHARE * limit

    def _measured(
        self, proxy: ProxyConfig, shorter: Sequence[ProxyResult | None], full: Sequence[ProxyResult | None],
        again: Sequence[ProxyResult | None],
    ) -> Measured | None:  # fmt: skip
        """What the trainings of a schedule say; None where all failed."""
        trained = [each for each in full if each]
        if not trained:
            return None
        pairs = np.array([(one.accuracy, two.accuracy) for one, two in zip(full, again, strict=True) if one and two])
        noise = spread = None
        if len(pairs) > 1:
            noise = float(np.sqrt(np.mean((pairs[:, 0] - pairs[:, 1]) ** 2) / 2))
            spread = float(np.sqrt(max(0.0, np.var(pairs.mean(1), ddof=1) - noise**2 / 2)))
        both = [(one.accuracy, two.accuracy) for one, two in zip(shorter, full, strict=True) if one and two]
        tau = float(stats.kendalltau(*zip(*both, strict=True)).statistic) if len(both) > 2 else math.nan
        return Measured(
            proxy.steps, proxy.batch_size, proxy.learning_rate, len(trained), fmean(each.accuracy for each in trained),
            noise, spread, None if math.isnan(tau) else tau, fmean(each.seconds for each in trained),
        )  # fmt: skip

    # -- words -------------------------------------------------------------------------------------------------------

    def _search_seconds(self, steps: int) -> float:
        """Seconds of the search's trainings, if its networks are like the anchor."""
        trainings = self.config.budget * (1 + self.config.confirm)
        return trainings * steps * (self.step_seconds or 0.0) / self.evaluator.workers

    def _affordable(self, steps: int) -> bool:
        return self._search_seconds(steps) <= (self.config.time_limit_s or AFFORDABLE_SECONDS)

    def _expected(self, steps: int) -> str:
        return f"about {duration(self._search_seconds(steps))}"

    def _schedule(self) -> str:
        passes = self.proxy.steps * self.proxy.batch_size / self.evaluator.train_images
        return (
            f"schedule of a candidate: {self.proxy.steps} steps of {self.proxy.batch_size} images at a rate of up to "
            f"{self.proxy.learning_rate:g}, {passes:.2g} passes over the training images"
        )

    def _lines(self, measured: Measured) -> tuple[str, str]:
        found = f"pilot of {measured.networks} networks, {measured.steps} steps: accuracy {measured.accuracy:.1%}"
        if measured.noise is not None and measured.spread is not None:
            found += (
                f", noise between seeds {100 * measured.noise:.1f} points, spread between networks "
                f"{100 * measured.spread:.1f} points"
            )
        if measured.agreement is not None:
            found += f", tau to half as many steps {measured.agreement:.2f}"
        trainings = self._expected(self.proxy.steps)
        return f"{self._schedule()}; trainings will take {trainings}, less what is stopped early", found

    def _poor(self, measured: Measured) -> str:
        error = math.sqrt(measured.accuracy * (1 - measured.accuracy) / self.evaluator.val_images)
        line = "warning: one training hardly tells these networks apart"
        if error > (measured.noise or 0.0) / 2:
            return (
                f"{line}: {self.evaluator.val_images:,} validation images know an accuracy to +-{100 * error:.1f} "
                "points only; more of them would"
            )
        longer = next((rung for rung in RUNGS if rung > self.proxy.steps), None)
        if longer is not None:
            return f"{line}; {longer} steps might, in {self._expected(longer)} (--proxy-steps {longer})"
        return f"{line}, and no longer schedule is known to; a larger --confirm tells the front's members apart"

    def _blind(self, steps: int | None = None) -> Pilot:
        """What is taken where nothing can be measured."""
        if steps is not None:
            self.proxy = replace(self.proxy, steps=steps)
        why = self.failures[-1] if self.failures else "the time limit leaves too little time for it"
        self.evaluator.adopt(self.proxy)
        return Pilot(self.proxy, None, (f"{self._schedule()}; there was no pilot ({why})",), self.seconds)
