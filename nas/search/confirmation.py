"""The confirmation of a front: its likely members are trained again with other seeds, and their means stand for them.

The accuracy by which a search chose a candidate is one noisy draw, and on the front stand those whose draw was lucky.
So the front that counts is that of means over further trainings, without the one that chose.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd

from nas.errors import CandidateFailed
from nas.recorded import RecordedStudy
from nas.search.features import matrix
from nas.search.model import Scale
from nas.search.racing import Race
from nas.search.rows import training_row
from nas.training.pool import fill
from nas.training.proxy import ProxyResult
from nas.training.workers import Done
from search_spaces import ArchSpec
from studies import CandidateTraining, Confirmed, Owner, TrainingStage

# Of a long study, most candidates are far from the front.
MOST_RACING = 400
# What takes the place of a candidate among the rows, the result of its training, and the seconds that it took; and what
# trains architectures, each with the seed that stands at its place.
Step: TypeAlias = Callable[[int, ProxyResult | CandidateFailed, float], None]
Train: TypeAlias = Callable[[Sequence[ArchSpec], Sequence[int]], Generator[Done[ProxyResult]]]


@dataclass(frozen=True)
class Confirmation:
    """The result of a confirmation.

    Args:
        trainings: number of all further trainings of the study's candidates.
        candidates: number of the candidates whose accuracy is confirmed.
        decided: whether every candidate is known to be on the front or off it.
        confirmed: whether the front is the confirmed one now; it is not where likely members were not trained again.
        noise: standard deviation of the accuracy of one training; None where too few show it.
    """

    trainings: int
    candidates: int
    decided: bool
    confirmed: bool
    noise: float | None

    def __str__(self) -> str:
        trained = f"{self.trainings} training{'s' if self.trainings != 1 else ''} with other seeds"
        if not self.confirmed:
            return (
                f"the front is not confirmed: some of its likely members were not trained again ({trained}); the "
                "command confirm goes on"
            )
        open_ = "" if self.decided else "; some places are within the noise (a larger --share of confirm decides them)"
        scatter = "" if self.noise is None else f", which scatter by {100 * self.noise:.1f} points"
        return f"{self.candidates} networks confirmed by {trained}{scatter}{open_}"


class Confirmer:
    """Trains the likely members of a study's front again.

    Args:
        owner: the process that holds the study.
        train: function that trains.
        images: number of validation images.
        batch: number of trainings that are chosen at once; the choice of the next ones waits for all of them.

    Attributes:
        trainings: number of all further trainings of the study's candidates.
    """

    def __init__(self, recorded: RecordedStudy, owner: Owner, train: Train, images: int, batch: int) -> None:
        self.recorded, self.owner, self.train, self.images, self.batch = recorded, owner, train, images, batch
        rows = recorded.evaluations()
        self.rows = nearest_to_front(rows[~rows["latency_over_limit"].astype(bool)])
        self.archs = [ArchSpec.from_json(text) for text in self.rows["arch"]]
        deployed = recorded.config.latency
        points = np.zeros((0, 1))
        if self.archs:
            features = matrix(self.archs, deployed.resolution, deployed.num_classes)
            points = Scale.of(features)(features)
        self.race = Race(self.rows["accuracy"].to_numpy(float), self.rows["latency_ms"].to_numpy(float), points)
        self.stored: dict[tuple[int, int], CandidateTraining] = {
            (row.trial_id, row.seed): row
            for row in recorded.store.trainings.of_study(recorded.study_id, TrainingStage.CONFIRMATION)
        }
        # Number of all further trainings, those of an interrupted confirmation included.
        self.trainings = len(self.stored)
        # What an earlier confirmation used is known from the start. What one that was interrupted has trained is met
        # again on the way, so that it leads to the same choices as if it had not been interrupted.
        for index, count in enumerate(self.rows["confirmed_trainings"].fillna(0).astype(int)):
            while len(self.race.further[index]) < count and self._key(index) in self.stored:
                self.race.add(index, self.stored[self._key(index)].accuracy)

    @property
    def likely(self) -> int:
        """Number of candidates that are more likely on the front than not."""
        return int((self.race.membership() >= 0.5).sum()) if self.archs else 0

    def run(
        self, most: int, is_late: Callable[[], bool] = lambda: False,
        step: Step = lambda index, result, seconds: None,
    ) -> Confirmation:  # fmt: skip
        """Train until the front is decided or `most` trainings are there, then store the confirmed accuracies.

        Args:
            most: number of all further trainings of the study's candidates, earlier ones included; where it does not
                suffice to train each likely member once, those that are missing are trained all the same.
            is_late: function that says whether no more may be begun.
            step: function that is called after each training.

        Raises:
            studies.StorageError: the study was deleted or taken over meanwhile.
        """
        while self.archs and (chosen := self._chosen(most - self._count())):
            lacking = [index for index in chosen if self._key(index) not in self.stored]
            if lacking and is_late():
                break
            self._train(lacking, step)
            keys = [self._key(index) for index in chosen]
            for index, key in zip(chosen, keys, strict=True):
                self.race.add(index, self.stored[key].accuracy)
        eligible = self.race.eligible() if self.archs else []
        self.recorded.store.confirm(self.recorded.study_id, self.owner, self.recorded.deployment, [
            Confirmed(int(self.rows["trial_id"][index]), *self.race.interval(index, self.images),
                      len(self.race.further[index]))
            for index in eligible
        ])  # fmt: skip
        decided = bool(eligible) and self.race.decided()
        return Confirmation(self._count(), len(eligible), decided, bool(eligible), self.race.measured_noise)

    def _chosen(self, left: int) -> list[int]:
        """The candidates to train next, where so many trainings are left."""
        return self.race.next(min(self.batch, left)) if left > 0 else self.race.missing(self.batch)

    def _count(self) -> int:
        return sum(self.race.trained(index) for index in range(len(self.archs)))

    def _key(self, index: int) -> tuple[int, int]:
        """Trial and seed of a candidate's next training; all candidates have the same seeds in the same order."""
        return int(self.rows["trial_id"][index]), self.recorded.config.seed + 1 + self.race.trained(index)

    def _train(self, indices: Sequence[int], step: Step) -> None:
        """Train candidates once more, and store the results."""
        if not indices:
            return
        keys = [self._key(index) for index in indices]
        with closing(self.train([self.archs[index] for index in indices], [seed for _, seed in keys])) as results:
            for done in results:
                self.recorded.store.ownership.require(self.recorded.study_id, self.owner)
                index, (trial_id, seed) = indices[done.index], keys[done.index]
                row = training_row(self.recorded, self.archs[index], TrainingStage.CONFIRMATION, seed)
                row.trial_id = trial_id
                fill(row, done.result)
                self.recorded.store.trainings.add(row)
                self.stored[trial_id, seed] = row
                self.trainings += 1
                step(index, done.result, done.seconds)
        if missing := [key for key in keys if key not in self.stored]:
            raise RuntimeError(f"{len(missing)} trainings ended without a result")


def trainings_of_share(share: float, passes: float) -> int:
    """The number of trainings that may confirm a front.

    Args:
        share: as a share of the search's.
        passes: number of whole trainings that the search's took together.
    """
    # A fifth of 55 is 11, whatever binary fractions make of it.
    return int(share * passes + 1e-9)


def nearest_to_front(rows: pd.DataFrame) -> pd.DataFrame:
    """The candidates that may be on the front: at most `MOST_RACING`, whose accuracy lacks least to be on it.

    Args:
        rows: rows of the view `convfirst_evaluations`, in the order of their trials.
    """
    ordered = rows.sort_values("latency_ms", kind="stable")
    lacks = ordered["accuracy"].cummax() - ordered["accuracy"]
    nearest = lacks.sort_values(kind="stable").index[:MOST_RACING]
    return rows.loc[rows.index.isin(nearest)].reset_index(drop=True)
