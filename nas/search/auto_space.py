"""`--space auto`: the rung of the ladder that fits a limit on the latency, or else the images (see
`search_spaces.ladder`).

With a limit, a few rungs' anchors are timed in the deployment, each where the last one's latency says that the limit
lies. Then some random networks of the rung found are timed, spread evenly over the MACs of many, and the rung is moved
until their median is nearest to the limit: about half of what a search proposes keeps it then. Rungs are a factor of
1.26 apart, so that an error of a tenth in a latency moves the choice by one of them at most.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from nas.config import LatencyConfig
from nas.errors import CandidateFailed, UsageError
from nas.latency.devices import anchor_must_run, check_device, indexed
from nas.latency.isolation import meter_for
from nas.latency.values import Latency
from nas.locks import device_lock
from nas.reporting import Note
from search_spaces import ArchSpec, SearchSpace, cost, ladder_space, load_space
from search_spaces.ladder import GROWTH, RUNG_STEP, TOP_RUNG, nearest_rung

# The rung whose anchor is timed first.
FIRST_RUNG = 4
# Random networks of a rung that are timed, and that they stand for.
TIMED, DRAWN = 12, 240
# Rungs whose random networks are timed at most.
MOST_ROUNDS = 6
# Distance of the share that keeps the limit from a half, from which on a rung is left for one that is not timed yet.
LOPSIDED = 0.3
# Widest interval of a latency, as a share of it: no more than from one rung to the next.
WIDEST = GROWTH**RUNG_STEP - 1
# A limit so many times above the latencies of the highest rung is no limit.
BEYOND = 10

# Measures networks' latencies.
Timer = Callable[[ArchSpec], Latency]


@dataclass(frozen=True)
class Choice:
    """A space that was chosen.

    Args:
        reason: the reason for it, as a line.
        classes: number of classes of the networks for which it was chosen.
        anchors_ms: latencies of the rungs' anchors that were timed, by rung; empty where none was.
        latencies_ms: latencies of random networks of the space, in ascending order; empty where none was timed.
    """

    space: SearchSpace
    reason: str
    anchors_ms: dict[float, float]
    latencies_ms: tuple[float, ...] = ()
    classes: int = 10


# -- By a limit on the latency ---------------------------------------------------------------------------------------


def for_limit(time: Timer, resolutions: tuple[int, ...], limit_ms: float) -> Choice:
    """The space of which about half of random networks keep a limit on the latency.

    Args:
        time: function that measures a network's latency.
        resolutions: the resolutions of the space in pixels.

    Raises:
        UsageError: no network is as fast, hardly any as slow, or the device is too noisy.
    """

    def timed_ms(arch: ArchSpec) -> float:
        latency = time(arch)
        if latency.interval_share > WIDEST:
            raise UsageError(
                f"--space auto: the device is too noisy to choose a rung: a latency of {latency.median_ms:.3g} ms is "
                f"known to {latency.interval_share:.0%} only; name a --space, or try again when the device is free"
            )
        return latency.median_ms

    rungs = _Rungs(resolutions)
    anchors_ms: dict[float, float] = {}
    rung = rungs.nearest(FIRST_RUNG)
    while rung not in anchors_ms:
        anchors_ms[rung] = timed_ms(rungs[rung].anchor())
        rung = rungs.nearest(round(_further(rung, anchors_ms[rung], limit_ms)))
    lowest, highest = rungs.nearest(0), float(TOP_RUNG)

    def refuse_impossible() -> None:
        least_ms = timed_ms(rungs[lowest].smallest())
        if least_ms > limit_ms:
            raise UsageError(
                f"--max-latency-ms {limit_ms:g}: the fastest network of the lowest rung ({rungs[lowest].name}) takes "
                f"{least_ms:.3g} ms here"
            )

    if rung == lowest and anchors_ms[rung] > limit_ms:
        refuse_impossible()
    if rung == highest and limit_ms > BEYOND * anchors_ms[rung]:
        raise UsageError(
            f"--max-latency-ms {limit_ms:g}: no limit to the highest rung ({rungs[highest].name}), whose networks take "
            f"about {anchors_ms[highest]:.3g} ms here; name a --space"
        )
    found: dict[float, tuple[float, ...]] = {}
    rung = rungs.nearest(_further(rung, anchors_ms[rung], limit_ms))
    # The rungs between which the one that is sought lies.
    fast, slow = lowest, highest
    while rung not in found and len(found) < MOST_ROUNDS:
        found[rung] = tuple(sorted(timed_ms(arch) for arch in typical(rungs[rung])))
        middle_ms = median(found[rung])
        fast, slow = (fast, min(slow, rung)) if middle_ms > limit_ms else (max(fast, rung), slow)
        wanted = rungs.nearest(_further(rung, middle_ms, limit_ms))
        lopsided = abs(_share(found[rung], limit_ms) - 0.5) > LOPSIDED
        # Where launches cost more than operations, latencies say little of how far the rung is.
        rung = (
            rungs.nearest((fast + slow) / 2) if lopsided and (wanted in found or not fast <= wanted <= slow) else wanted
        )
    best = min(found, key=lambda each: (abs(_share(found[each], limit_ms) - 0.5), each))
    if not _share(found[best], limit_ms):
        refuse_impossible()
    at_end = best in (lowest, highest)
    return Choice(rungs[best], _limit_reason(rungs[best], found[best], limit_ms, at_end), anchors_ms, found[best])


def _share(latencies_ms: Sequence[float], limit_ms: float) -> float:
    """The share of the latencies that keep a limit."""
    return sum(each <= limit_ms for each in latencies_ms) / len(latencies_ms)


def _further(rung: float, latency_ms: float, limit_ms: float) -> float:
    """The rung whose latencies are the limit, if latencies grow as MACs do."""
    return rung + math.log(limit_ms / latency_ms, GROWTH)


class _Rungs(dict[float, SearchSpace]):
    """The spaces of the rungs at some resolutions, made as they are needed."""

    def __init__(self, resolutions: tuple[int, ...]) -> None:
        self.resolutions = resolutions

    def __missing__(self, rung: float) -> SearchSpace:
        self[rung] = ladder_space(self.resolutions, rung)
        return self[rung]

    def nearest(self, rung: float) -> float:
        return nearest_rung(self.resolutions, rung)


def typical(space: SearchSpace) -> list[ArchSpec]:
    """Random networks that stand for all of a space: of many that are drawn, one from each of equal parts by MACs."""
    rng = random.Random(0)
    drawn = [space.sample(rng) for _ in range(DRAWN)]
    drawn.sort(key=lambda arch: cost(arch, space.default_resolution, 10).macs)
    share = DRAWN // TIMED
    return drawn[share // 2 :: share]


def _limit_reason(space: SearchSpace, latencies_ms: Sequence[float], limit_ms: float, at_end: bool) -> str:
    keeping = sum(each <= limit_ms for each in latencies_ms)
    line = (
        f"space {space.name}: {len(latencies_ms)} random networks of it take {latencies_ms[0]:.3g} to "
        f"{latencies_ms[-1]:.3g} ms here, {keeping} of them at most {limit_ms:g} ms"
    )
    return (
        f"{line}; the ladder ends with this rung" if at_end and not 0.25 < keeping / len(latencies_ms) < 0.75 else line
    )


@contextlib.contextmanager
def timer(config: LatencyConfig, note: Note) -> Iterator[Timer]:
    """Context in which networks are timed in a deployment, while no other process trains or measures on the device.

    Raises:
        UsageError: there is no such device here, or the engine does not run on it.
    """
    device = indexed(check_device(config, note))
    with device_lock(device).measuring(note):
        with anchor_must_run(config):
            meter = meter_for(config, load_space("small").anchor(), None)

        def time(arch: ArchSpec) -> Latency:
            try:
                return meter.measure_together([arch])[0].latency
            except CandidateFailed as error:
                raise UsageError(f"--space auto: {arch} cannot be timed ({error}); name a --space") from error

        try:
            yield time
        finally:
            meter.close()


# -- By the images ---------------------------------------------------------------------------------------------------

# Rungs for a thousand images of ten classes, and how many more for ten times as many images or classes. `small` lies
# between the rungs 3 and 4 and was made for the 16,000 images of digits, `imagenet` between 8 and 9.
FEW_IMAGES, RUNG_OF_FEW, RUNGS_BY_IMAGES, RUNGS_BY_CLASSES = 1000, 2.5, 1.5, 0.5
LOWEST_BY_IMAGES, HIGHEST_BY_IMAGES = 2, 9


def for_images(images: int, classes: int, resolutions: tuple[int, ...]) -> Choice:
    """The space that suits a number of training images and classes, where nothing limits the latency."""
    more = RUNGS_BY_IMAGES * math.log10(images / FEW_IMAGES) + RUNGS_BY_CLASSES * math.log10(classes / 10)
    wanted = min(max(round(RUNG_OF_FEW + more), LOWEST_BY_IMAGES), HIGHEST_BY_IMAGES)
    space = ladder_space(resolutions, nearest_rung(resolutions, wanted))
    reason = (
        f"space {space.name}: it suits {images:,} images of {classes:,} classes; with --max-latency-ms it would be one "
        "that fits"
    )
    return Choice(space, reason, {}, classes=classes)
