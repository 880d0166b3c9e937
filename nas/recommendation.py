"""Which network of a front to take, and why."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd

from nas.config import MAX_CONFIRM, MOST_TRAININGS, USUAL_CONFIRM
from nas.errors import UsageError
from nas.recorded import RecordedStudy, is_confirmed
from studies import TrainingStage, displayed

# So many times as many trainings halve the part of an interval that seeds explain.
HALVING = 4


@dataclass(frozen=True)
class Member:
    """A member of a front.

    Args:
        number: number of its trial.
        accuracy: accuracy as confirmed, or as searched where it is not confirmed.
        half: half the width of the accuracy's 95 % interval; None where it is not confirmed.
        latency_ms: latency in the study's own deployment.
        summary: the architecture as a line.
    """

    number: int
    accuracy: float
    half: float | None
    latency_ms: float
    summary: str

    def differs(self, other: Member) -> bool | None:
        """Whether two accuracies differ by more than their intervals explain; None where these are not known."""
        if self.half is None or other.half is None:
            return None
        return abs(self.accuracy - other.accuracy) > math.hypot(self.half, other.half)


@dataclass(frozen=True)
class Recommendation:
    """The network of a front to take.

    Args:
        chosen: the network.
        reason: why it is the one, a part of a sentence.
        faster, more_accurate: the members that are next to it; None where there is none.
    """

    chosen: Member
    reason: str
    faster: Member | None
    more_accurate: Member | None

    def lines(self) -> list[str]:
        """What it says to a user."""
        own = self.chosen
        lines = [f"recommended: trial {own.number}, {_accuracy(own)} at {own.latency_ms:.4g} ms; {self.reason}"]
        if self.faster is not None:
            lines.append(f"next faster: {self._beside(self.faster)}")
        if self.more_accurate is not None:
            lines.append(f"next more accurate: {self._beside(self.more_accurate)}")
        return lines

    def _beside(self, other: Member) -> str:
        """Another member, as it compares with the one that was chosen."""
        own = self.chosen
        points = 100 * (other.accuracy - own.accuracy)
        words = (
            f"trial {other.number}, {_accuracy(other)} at {other.latency_ms:.4g} ms, {points:+.1f} points for "
            f"{other.latency_ms / own.latency_ms:.2f} times the latency"
        )
        return words if own.differs(other) is not False else f"{words} (within their intervals)"

    def to_dict(self) -> dict[str, Any]:
        """The recommendation in plain values."""

        def plain(member: Member | None) -> dict[str, Any] | None:
            if member is None:
                return None
            return {"trial": member.number, "accuracy": member.accuracy, "interval": member.half,
                    "latency_ms": member.latency_ms, "arch": member.summary}  # fmt: skip

        return {
            "recommended": plain(self.chosen), "reason": self.reason, "next_faster": plain(self.faster),
            "next_more_accurate": plain(self.more_accurate),
        }  # fmt: skip


def recommend(
    recorded: RecordedStudy, max_latency_ms: float | None = None, front: pd.DataFrame | None = None
) -> Recommendation:
    """The network of a study's front to take: the most accurate one within a limit, or the knee where there is none.

    Args:
        max_latency_ms: limit on the latency (default: the study's own).
        front: the front, where it was read before.

    Raises:
        UsageError: the front is empty, or no member keeps the limit.
    """
    front = recorded.front() if front is None else front
    if front.empty:
        raise UsageError(f"--study {recorded.name}: its front is empty, there is nothing to recommend")
    members = members_of(front)
    limit_ms = recorded.config.limits.latency_ms if max_latency_ms is None else max_latency_ms
    if limit_ms is not None and members[0].latency_ms > limit_ms:
        raise UsageError(f"--max-latency-ms {limit_ms:g}: the fastest network takes {members[0].latency_ms:.4g} ms")
    return choose(members, limit_ms)


def members_of(front: pd.DataFrame) -> list[Member]:
    """The members of a front, fastest first.

    Args:
        front: rows of the view `pareto_front` in one deployment.
    """
    confirmed = is_confirmed(front)
    rows = front.sort_values(["latency_ms", "accuracy"]).to_dict("records")
    return [
        Member(
            int(row["number"]), float(row["accuracy"]),
            float(row["accuracy_high"] - row["accuracy_low"]) / 2 if confirmed else None,
            float(row["latency_ms"]), str(row["summary"]),
        )
        for row in rows
    ]  # fmt: skip


def choose(members: Sequence[Member], limit_ms: float | None) -> Recommendation:
    """The recommendation among the members of a front.

    Args:
        members: the members, fastest first, of which the fastest keeps the limit.
    """
    if limit_ms is not None:
        within = [member for member in members if member.latency_ms <= limit_ms]
        place = len(within) - 1
        reason = f"it is the most accurate network of the front within {limit_ms:g} ms"
    else:
        place, reason = _knee(members)
    slower = members[place + 1 :]
    return Recommendation(
        members[place], reason, members[place - 1] if place else None, slower[0] if slower else None
    )  # fmt: skip


def _knee(members: Sequence[Member]) -> tuple[int, str]:
    """The place of the knee, and why it is the one to take.

    The knee is the member farthest above the straight line from the fastest to the most accurate one, over the
    logarithm of the latency (Satopää et al., *Finding a "Kneedle" in a Haystack*, 2011).
    """
    logs = np.log2([member.latency_ms for member in members])
    accuracy = np.array([member.accuracy for member in members])
    last = len(members) - 1
    if last < 1:
        return 0, "it is the only network of the front"
    if np.ptp(logs) == 0 or np.ptp(accuracy) == 0:
        return last, "it is the most accurate network of the front"
    above = (accuracy - accuracy[0]) / np.ptp(accuracy) - (logs - logs[0]) / np.ptp(logs)
    place = int(np.argmax(above))
    if above[place] <= 0:
        return last, "it is the most accurate network of the front, which has no knee"
    slopes = 100 * np.diff(accuracy[[0, place, last]]) / np.diff(logs[[0, place, last]])
    return place, (
        f"it is the knee of the front: up to it, a doubling of the latency brings {slopes[0]:.1f} points, beyond it "
        f"{slopes[1]:.1f}"
    )


def directory_name(latency_ms: float, number: int) -> str:
    """The name of a candidate's directory, a Python identifier: `convfirst_0p8ms_t042` for trial 42 with 0.8 ms."""
    # The latency has two digits and never an exponent.
    shown = f"{Decimal(f'{latency_ms:.2g}'):f}".replace(".", "p")
    return f"convfirst_{shown}ms_t{number:03d}"


def commands(name: str, storage: str, chosen: Member) -> list[tuple[str, str]]:
    """What to do with a network, one after the other: what it is, and the command line that does it.

    Args:
        name: the study's name.
        storage: URL of the study database.
    """
    of_study = _of_study(name, storage)
    folder = f"exports/{directory_name(chosen.latency_ms, chosen.number)}"
    return [
        ("train it", f"python run_search.py train {of_study} --trial {chosen.number} --out exports"),
        # Of the directory that `train` leaves: exported again from the study, the network would have no such weights.
        ("export it", f"python run_search.py export {folder} --format onnx --normalise --softmax"),
        ("time it", f"python run_search.py bench {folder}"),
    ]


def advice(recorded: RecordedStudy, storage: str, max_latency_ms: float | None = None) -> list[str]:
    """Lines that say which network to take, and what to do with it.

    Args:
        storage: URL of the study database.
        max_latency_ms: limit on the latency (default: the study's own).

    Raises:
        UsageError: the front is empty, or no member keeps the limit.
    """
    found = recommend(recorded, max_latency_ms)
    doubt = doubt_line(recorded, storage)
    does = [f"{what}: {line}" for what, line in commands(recorded.name, storage, found.chosen)]
    return [*found.lines(), *([doubt] if doubt else []), *does]


def doubt_line(recorded: RecordedStudy, storage: str, front: pd.DataFrame | None = None) -> str | None:
    """What is to be said of a front whose accuracies are not confirmed, or are within their noise; None of any other.

    Args:
        storage: URL of the study database.
        front: the front, where it was read before.
    """
    front = recorded.front() if front is None else front
    if front.empty:
        return None
    members = members_of(front)
    again = f"python run_search.py confirm {_of_study(recorded.name, storage)}"
    if members[0].half is None:
        passes = max(recorded.passes(), 1.0)
        if USUAL_CONFIRM * passes < 1:
            # Of so short a search, the usual share is no training at all.
            again += f" --share {min(math.ceil(10 * len(members) / passes) / 10, MAX_CONFIRM):g}"
        if len(members) == 1:
            return (
                f"this accuracy is of the one training that chose the network, and flatters it; {again} trains it again"
            )
        return f"these accuracies are of one training each, and flatter the front; {again} trains its members again"
    if len(members) == 1 or members[-1].differs(members[0]):
        return None
    alike = f"all {len(members)} networks of the front are equally accurate within their intervals"
    best = members[-1]
    images = json.loads(recorded.row.images or "{}").get("val_images")
    trained = front["accuracy_trainings"].min() >= MOST_TRAININGS
    if trained or (images and best.half and _sampling_error(best.accuracy, images) ** 2 > best.half**2 / 2):
        # There are as many trainings of each as `confirm` makes, or they would not change this part.
        return f"{alike}; more {f'than {images:,} ' if images else ''}validation images would tell them apart"
    further = len(recorded.store.trainings.of_study(recorded.study_id, TrainingStage.CONFIRMATION))
    share = min(math.ceil(10 * HALVING * further / max(recorded.passes(), 1.0)) / 10, MAX_CONFIRM)
    return f"{alike}; further trainings would tell them apart ({again} --share {share:g})"


def _sampling_error(accuracy: float, images: int) -> float:
    """Half the width of the 95 % interval of an accuracy on so many images."""
    return 1.96 * math.sqrt(accuracy * (1 - accuracy) / images)


def _accuracy(member: Member) -> str:
    """An accuracy with its interval."""
    interval = "" if member.half is None else f" +-{100 * member.half:.1f}"
    return f"{100 * member.accuracy:.1f}{interval} %"


def _of_study(name: str, storage: str) -> str:
    """The flags that name a study."""
    return f"--storage {shlex.quote(displayed(storage))} --study {shlex.quote(name)}"
