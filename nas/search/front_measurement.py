"""The measurement of a front, with which a search ends: its members are measured again, in turns with one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import pandas as pd

from nas.errors import CandidateFailed
from nas.latency.values import Measurement
from nas.recorded import RecordedStudy
from nas.search.rows import latency_row
from search_spaces import ArchSpec
from studies import Deployment, LatencyStage

Measure = Callable[[Sequence[ArchSpec]], list[Measurement]]

# Networks that are sampled in turns at most: all their weights and graphs are in memory together.
TOGETHER = 24
# A member that turns out slower may let other candidates join the front, which are then measured too, and so on.
MAX_ROUNDS = 5


@dataclass(frozen=True)
class FrontChanges:
    """The changes of a front that was measured again.

    Args:
        deployment: the deployment of the measurement.
        ratios: new latency / old latency of each candidate that was measured.
        left, joined: numbers of the trials that left and that joined the front.
        capped: number of measurements that the time cap ended.
        over_limit: numbers of the trials that turned out to break the study's limit on the latency.
        size: number of the front's members after the measurement.
        unmeasured: number of members that joined the front last and were not measured again.
    """

    deployment: Deployment
    ratios: tuple[float, ...]
    left: tuple[int, ...]
    joined: tuple[int, ...]
    capped: int
    over_limit: tuple[int, ...]
    size: int
    unmeasured: int

    def __str__(self) -> str:
        if len(self.ratios) == 1:
            words = [f"front measured again, one network: its latency moved by {self.ratios[0] - 1:+.1%}"]
        else:
            moved = f"{min(self.ratios) - 1:+.1%} to {max(self.ratios) - 1:+.1%}, median {median(self.ratios) - 1:+.1%}"
            words = [f"front measured again, {len(self.ratios)} networks in turns: latencies moved by {moved}"]
        words += [f"{_trials(self.left)} left it"] if self.left else []
        words += [f"{_trials(self.joined)} joined it"] if self.joined else []
        words += ["it stays as it was"] if not self.left and not self.joined else []
        words += [f"{_trials(self.over_limit)} broke the latency limit"] if self.over_limit else []
        words += [f"{self.unmeasured} of the front were not measured again"] if self.unmeasured else []
        words += [f"{self.capped} were ended by the time cap"] if self.capped else []
        return "; ".join(words)


def _trials(numbers: Sequence[int]) -> str:
    return f"trial{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def measure_front(
    recorded: RecordedStudy, deployment: Deployment, measure: Measure, *, again: bool = False,
    limit_ms: float | None = None, before: pd.DataFrame | None = None,
) -> FrontChanges | None:  # fmt: skip
    """Measure a front's members again, in turns with each other, and then those that join it, until none is left.

    Args:
        deployment: the front's deployment; a study may have a front in each of several deployments.
        measure: function that times several architectures in turns.
        again: whether to measure also where all members were measured already.
        limit_ms: the study's limit in this deployment; slower candidates leave the front.
        before: the front from which changes are counted (default: the current one).

    Returns:
        The changes; None where the front is empty, or all members were measured already.

    Raises:
        CandidateFailed: a member does not run, not even alone.
    """
    store, name = recorded.store, recorded.name
    front = deployment.rows_of(store.front(name))
    old = (front if before is None or before.empty else before).set_index("number")["latency_ms"]
    if front.empty or (not again and (front["latency_stage"] == LatencyStage.FINAL).all()):
        return None
    measurements: dict[int, Measurement] = {}
    searched_ms: dict[int, float] = {}
    lacking = front
    for _ in range(MAX_ROUNDS):
        rows = []
        for begin in range(0, len(lacking), TOGETHER):
            group = lacking.iloc[begin : begin + TOGETHER]
            measured = _in_turns(measure, [ArchSpec.from_json(text) for text in group["arch"]])
            for (_, row), result in zip(group.iterrows(), measured, strict=True):
                number = int(row["number"])
                measurements[number], searched_ms[number] = result, float(old.get(number, row["latency_ms"]))
                rows.append(latency_row(int(row["trial_id"]), result, deployment, LatencyStage.FINAL, limit_ms))
        store.add_latencies(recorded.study_id, rows)
        front = deployment.rows_of(store.front(name))
        lacking = front[~front["number"].isin(measurements.keys())]
        if lacking.empty:
            break
    now = set(front["number"])
    return FrontChanges(
        deployment=deployment,
        ratios=tuple(measurements[number].median_ms / searched_ms[number] for number in measurements),
        left=tuple(sorted(set(old.index) - now)),
        joined=tuple(sorted(now - set(old.index))),
        capped=sum(measured.latency.capped for measured in measurements.values()),
        over_limit=tuple(
            sorted(number for number, result in measurements.items() if limit_ms and result.median_ms > limit_ms)
        ),
        size=len(front),
        unmeasured=len(lacking),
    )


def _in_turns(measure: Measure, archs: Sequence[ArchSpec]) -> list[Measurement]:
    """Measure as many networks at once as run together: all their weights and graphs are in memory."""
    try:
        return measure(archs)
    except CandidateFailed:
        if len(archs) == 1:
            raise
    half = len(archs) // 2
    return _in_turns(measure, archs[:half]) + _in_turns(measure, archs[half:])
