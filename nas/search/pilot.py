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
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Protocol, runtime_checkable

import numpy as np
from scipy import stats

from nas.config import PILOT_BUDGET, ProxyConfig, SearchConfig
from nas.display.notes import duration
from nas.errors import CandidateFailed
from nas.search.auto_space import typical
from nas.training.proxy import ProxyResult
from nas.training.worker_count import gently
from nas.training.workers import Done
from search_spaces import ArchSpec, cost

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
# Steps of a training that only shows how fast steps are; on a GPU the first ones come before the capture of the others.
PROBE_STEPS, CUDA_PROBE_STEPS = 20, 200
# Networks of a pilot; a larger budget allows for more, one in so many candidates.
LEAST_NETWORKS, MOST_NETWORKS, CANDIDATES_A_NETWORK = 2, 8, 30
# Budget from which on noise is measured, too, by trainings with another seed.
SEEDS_BUDGET = 60
# Share of the time limit that a pilot may take, and that the trainings of the search may: the rest is for timing.
SHARE, TRAINING_SHARE = 0.1, 0.7
# With a time limit, a budget may be one that nobody expects to be met; so many candidates are to be.
WANTED_CANDIDATES = 200
# Share of the variance of a training's accuracy that is due to the network, below which more steps are taken, or the
# user is warned; and the number of networks that are needed to judge by it.
POOR_SHARE, TELLING_NETWORKS = 0.5, 4
# Probability with which half the rate has to be better.
SURE = 0.9
# Validation images that hardly tell anything.
FEW_VAL_IMAGES = 100


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
        devices: number of these devices.
    """

    train_images: int
    val_images: int

    @property
    def devices(self) -> int: ...

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
    """

    def __init__(self, config: SearchConfig, evaluator: Adjustable) -> None:
        self.config, self.evaluator = config, evaluator
        self.proxy = config.proxy
        self.seconds = 0.0
        self.step_seconds: float | None = None
        self.trainings = 0
        self.failures: list[str] = []

    def run(self) -> Pilot:
        """Choose the schedule of the search."""
        anchor = self.config.space.anchor()
        if self.evaluator.trains_on == "cuda" and "batch_size" in self.config.pilot:
            self._choose_batch(anchor)
        # How many trainings at once pay depends on the batch, and on how long they take.
        self.evaluator.adopt(replace(self.proxy, steps=self._usual()))
        self.step_seconds = self._step_seconds(anchor, self.proxy)
        if self.step_seconds is None:
            return self._blind(self._failing())
        # A batch that does not fit into memory is no reason to worry.
        self.failures.clear()
        wanted = self._usual()
        steps = max((rung for rung in RUNGS if rung <= wanted and self._affordable(rung)), default=RUNGS[0])
        if "steps" not in self.config.pilot:
            wanted = steps = self.config.proxy.steps
        self.proxy = replace(self.proxy, steps=steps)
        archs = self._networks()
        careful = self.config.budget >= SEEDS_BUDGET
        # A small budget pays for trainings of half the length only.
        tested = replace(self.proxy, steps=steps if careful else max(steps // 2, 1))
        rates = [tested.learning_rate] + [tested.learning_rate / 2] * ("learning_rate" in self.config.pilot)
        shorter = [replace(tested, steps=max(tested.steps // 2, 1), learning_rate=rate) for rate in rates]
        waves = [math.ceil(len(archs) * each / self.evaluator.workers) for each in (len(rates), 1 + careful)]
        if not self._has_time(waves[0] * shorter[0].steps + waves[1] * tested.steps):
            return self._blind("the time limit leaves too little time for it")
        by_rate = self._train([(arch, proxy, 0) for proxy in shorter for arch in archs], len(archs))
        best = self._better_rate(by_rate)
        tested = replace(tested, learning_rate=rates[best])
        full, *again = self._train([(arch, tested, seed) for seed in range(1 + careful) for arch in archs], len(archs))
        self.proxy = replace(self.proxy, learning_rate=rates[best])
        measured = self._measured(tested, by_rate[best], full, again[0] if again else [None] * len(archs))
        if measured is None:
            self.proxy = replace(self.config.proxy, steps=steps)
            if "learning_rate" in self.config.pilot:
                # A lower rate is less likely to fail.
                self.proxy = replace(self.proxy, learning_rate=min(rates) / 2)
            return self._blind(self._failing())
        if self._is_poor(measured) and "steps" in self.config.pilot:
            longer = [rung for rung in RUNGS if rung > steps and self._affordable(rung)]
            self.proxy = replace(self.proxy, steps=min(longer, default=steps))
        lines = [*self._lines(measured), *self._warnings(measured, wanted)]
        self.evaluator.adopt(self.proxy)
        return Pilot(self.proxy, measured, tuple(lines), self.seconds)

    # -- choices -----------------------------------------------------------------------------------------------------

    def _usual(self) -> int:
        """The rung that is nearest to one pass over the images, or more where a GPU does more in a second."""
        images = float(self.evaluator.train_images)
        if self.evaluator.trains_on == "cuda" and self.step_seconds:
            # Several candidates share a device.
            rate = self.evaluator.workers / self.evaluator.devices * self.proxy.batch_size / self.step_seconds
            images = max(images, BUSY_SECONDS * rate)
        passes = images / self.proxy.batch_size
        return min(RUNGS, key=lambda rung: abs(math.log(rung / max(1.0, passes))))

    def _networks(self) -> list[ArchSpec]:
        """Different networks that are spread over the operations of the space, and keep the limits on their size."""
        config, deployed = self.config, self.config.latency
        count = min(MOST_NETWORKS, max(LEAST_NETWORKS, config.budget // CANDIDATES_A_NETWORK))

        def possible(arch: ArchSpec) -> bool:
            counted = cost(arch, deployed.resolution, deployed.num_classes)
            excess = config.limits.excess(params=counted.params, macs=counted.macs)
            return not any(each > 0 for each in excess.values())

        typical_ones = {arch.arch_id: arch for arch in typical(config.space)}
        spread = [arch for arch in typical_ones.values() if possible(arch)] or [config.space.smallest()]
        places = np.linspace(0, len(spread) - 1, count + 2)[1:-1]
        return [spread[place] for place in dict.fromkeys(round(place) for place in places)]

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

    def _better_rate(self, by_rate: list[list[ProxyResult | None]]) -> int:
        """The place of the rate to take: the second, where it is more accurate than chance explains, or fails less."""
        if len(by_rate) == 1:
            return 0
        failed = [sum(each is None for each in results) for results in by_rate]
        if failed[0] != failed[1]:
            return int(failed[1] < failed[0])
        gains = np.array([two.accuracy - one.accuracy for one, two in zip(*by_rate, strict=True) if one and two])
        if len(gains) < 2:
            return 0
        error = gains.std(ddof=1) / math.sqrt(len(gains))
        return int(gains.mean() > stats.t.ppf(SURE, len(gains) - 1) * error)

    # -- trainings ---------------------------------------------------------------------------------------------------

    def _train(
        self, wanted: Sequence[tuple[ArchSpec, ProxyConfig, int]], size: int
    ) -> list[list[ProxyResult | None]]:  # fmt: skip
        """Train networks side by side: architecture, schedule and seed of each; None stands for one that failed.

        Args:
            size: the results come in lists of so many.
        """
        found: list[ProxyResult | None] = [None] * len(wanted)
        jobs = [PilotTraining(arch, proxy, self.config.seed + seed) for arch, proxy, seed in wanted]
        # Those with most to compute come first, so that no worker is left with one of them at the end.
        order = sorted(range(len(jobs)), key=lambda index: -(index % size))
        for done in self.evaluator.train_as([jobs[index] for index in order]):
            self.seconds += done.seconds
            self.trainings += 1
            if isinstance(done.result, CandidateFailed):
                self.failures.append(str(done.result))
            else:
                found[order[done.index]] = done.result
        return [found[begin : begin + size] for begin in range(0, len(found), size)]

    def _step_seconds(self, arch: ArchSpec, proxy: ProxyConfig) -> float | None:
        """Seconds of a step, with as many trainings at once as there are workers; None where none can be trained."""
        steps = CUDA_PROBE_STEPS if self.evaluator.trains_on == "cuda" else PROBE_STEPS
        jobs = [PilotTraining(arch, gently(proxy, steps), self.config.seed)] * self.evaluator.workers
        each = []
        for done in self.evaluator.train_as(jobs):
            if isinstance(done.result, CandidateFailed):
                self.failures.append(str(done.result))
            else:
                each.append(done.result.step_seconds)
        return fmean(each) if each else None

    def _has_time(self, steps: int) -> bool:
        """Whether a pilot of so many steps one after the other takes no more than its share of a time limit."""
        limit = self.config.time_limit_s
        return limit is None or steps * (self.step_seconds or 0.0) <= SHARE * limit

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
        limited = self.config.time_limit_s is not None
        candidates = min(self.config.budget, WANTED_CANDIDATES) if limited else self.config.budget
        trainings = candidates * (1 + self.config.confirm)
        return trainings * steps * (self.step_seconds or 0.0) / self.evaluator.workers

    def _affordable(self, steps: int) -> bool:
        limit = self.config.time_limit_s
        return self._search_seconds(steps) <= (AFFORDABLE_SECONDS if limit is None else TRAINING_SHARE * limit)

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

    def _is_poor(self, measured: Measured) -> bool:
        """Whether noise hides the networks: none of the spread is one, where that could be seen."""
        share = measured.share
        return (
            share is not None
            and share < POOR_SHARE
            and measured.networks >= TELLING_NETWORKS
            and not self._same(measured)
        )

    def _same(self, measured: Measured) -> bool:
        """Whether all trainings came to the same accuracy."""
        return measured.noise == measured.spread == 0.0

    def _warnings(self, measured: Measured, wanted: int) -> Iterator[str]:
        if self.failures:
            failed = f"{len(self.failures)} of {self.trainings} trainings of the pilot failed"
            yield f"warning: {failed} ({self.failures[-1]})"
        if wanted > self.proxy.steps:
            yield (
                f"{wanted} steps would suit {self.evaluator.train_images:,} images, but the search would take "
                f"{self._expected(wanted)}"
            )
        images = self.evaluator.val_images
        if images < FEW_VAL_IMAGES and (self._same(measured) or self._is_poor(measured)):
            # Of k right ones of n, (k + 1) / (n + 2) is expected of others (Laplace's rule of succession).
            expected = (measured.accuracy * images + 1) / (images + 2)
            error = math.sqrt(expected * (1 - expected) / images)
            yield (
                f"warning: one training hardly tells these networks apart: {images} validation images know an accuracy "
                f"to +-{100 * error:.0f} points only; more of them would help"
            )
        elif self._same(measured):
            yield (
                f"warning: all networks of the pilot are as accurate as each other ({measured.accuracy:.1%}); look at "
                "the images: one class may dominate, or the task may be too easy or too hard for this space"
            )
        elif self._is_poor(measured):
            longer = next((rung for rung in RUNGS if rung > self.proxy.steps), None)
            line = "warning: one training hardly tells these networks apart"
            if longer is None:
                yield f"{line}, and no longer schedule is known to; a larger --confirm tells the front's members apart"
            else:
                yield f"{line}; {longer} steps might, in {self._expected(longer)} (--proxy-steps {longer})"

    def _failing(self) -> str:
        return f"its trainings fail: {self.failures[-1]}"

    def _blind(self, why: str) -> Pilot:
        """What is taken where nothing can be measured."""
        line = f"{self._schedule()}; there was no pilot ({why})"
        if self.step_seconds:
            line += f"; trainings will take {self._expected(self.proxy.steps)}"
        self.evaluator.adopt(self.proxy)
        return Pilot(self.proxy, None, (line,), self.seconds)
