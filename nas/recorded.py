"""A study as the database holds it, with its configuration, deployment and device as typed values."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kernels.device_info import DeviceInfo
from nas.config import LatencyConfig, SearchConfig
from nas.errors import UsageError, of_this_version
from nas.pareto import hypervolume
from search_spaces import ArchSpec
from studies import TRAINED, Candidate, CandidateState, Deployment, Store, Study, displayed
from studies.tables import Device


def deployment_of(config: LatencyConfig, device_id: int) -> Deployment:
    """The deployment that a configuration describes on a device of the database."""
    return Deployment(
        device_id, config.engine_label, config.dtype, config.batch_size, config.resolution, config.threads
    )


def device_info(row: Device) -> DeviceInfo:
    """The device that a row of the database describes."""
    return DeviceInfo(row.kind, row.name, row.driver, row.torch, row.triton)


def not_there(store: Store, name: str) -> UsageError:
    """The refusal of a study that a database does not have."""
    known = ", ".join(row.name for row in store.summaries()) or "none"
    return UsageError(f"--study {name}: not in {displayed(str(store.engine.url))} (there: {known})")


def is_confirmed(front: pd.DataFrame) -> bool:
    """Whether the accuracies of rows of `pareto_front` are confirmed ones."""
    return bool(len(front)) and bool((front["confirmed"] == 1).all())


@dataclass(frozen=True)
class Hypervolumes:
    """Hypervolumes of a study's front, in 0..1; see `RecordedStudy.reference_latency_ms`.

    Args:
        searched: that of all complete candidates by the accuracies of the search.
        confirmed: that of the front by its confirmed accuracies; None where they are not confirmed.
    """

    searched: float
    confirmed: float | None

    @property
    def optimism(self) -> float | None:
        """By how much the search overrates its front; None where nothing is confirmed."""
        return None if self.confirmed is None else self.searched - self.confirmed


@dataclass(frozen=True)
class RecordedStudy:
    """A study with its settings; `RecordedStudy.open` reads it, and refuses what this version does not know.

    Args:
        store: the database.
        name: the study's name.
        row: the study's own row, from whose texts the other fields are made.
        config: the study's configuration, with default values in the fields that a study does not store.
        anchor: the anchor network.
        device: the device of the search.
        deployment: the deployment of the search; the study may hold latencies in others, too.
    """

    store: Store
    name: str
    row: Study
    config: SearchConfig
    anchor: ArchSpec
    device: DeviceInfo
    deployment: Deployment

    @classmethod
    def find(cls, store: Store, name: str) -> RecordedStudy | None:
        """The study of that name; None where the database has none.

        Raises:
            UsageError: another version of the program wrote it, with fields that this one does not know.
            studies.StorageError: another program made the study of that name.
        """
        row = store.find_study(name)
        if row is None:
            return None
        with of_this_version(name):
            config = SearchConfig.of_identity(json.loads(row.config), study=name)
            anchor = ArchSpec.from_json(row.anchor)
        return cls(
            store, name, row, config, anchor, device_info(row.device), deployment_of(config.latency, row.device_id)
        )

    @classmethod
    def open(cls, store: Store, name: str) -> RecordedStudy:
        """The study of that name, which must exist.

        Raises:
            UsageError: the database has no such study, or another version of the program wrote it.
            studies.StorageError: another program made the study of that name.
        """
        recorded = cls.find(store, name)
        if recorded is None:
            raise not_there(store, name)
        return recorded

    @property
    def study_id(self) -> int:
        return self.row.study_id

    @property
    def pilot_lines(self) -> tuple[str, ...]:
        """What the study's pilot chose and found, in words; empty where there was none."""
        return tuple(json.loads(self.row.pilot)["lines"]) if self.row.pilot else ()

    @property
    def identity(self) -> dict[str, Any]:
        """The configuration as it is stored, in plain JSON values."""
        identity: dict[str, Any] = json.loads(self.row.config)
        return identity

    @property
    def reference_latency_ms(self) -> float:
        """The hypervolume's reference: the latency limit, or else twice the anchor's latency.

        This choice favours fast networks: docs/measurements.md shows how a comparison of samplers depends on it.
        """
        return self.config.limits.latency_ms or 2 * self.row.anchor_ms

    def check_images(self, source: str, fingerprint: str) -> None:
        """Refuse images that are not those of the search.

        Args:
            source: name of the images, or their folder, which need not be where it was.

        Raises:
            UsageError: the study has another fingerprint.
        """
        if fingerprint != self.row.data_fingerprint:
            reason = f"holds other images than when --study {self.name} was begun"
            raise UsageError(f"--data {source}: {reason}")

    def candidates(self) -> list[Candidate]:
        """All evaluated candidates, in the order of their trials."""
        return self.store.candidates(self.study_id)

    def passes(self) -> float:
        """Number of whole trainings that all of the search's took together."""
        whole = self.config.proxy.steps
        # Steps are summed up, not shares of them, whose sum depends on their order.
        steps = sum(
            whole if each.state == CandidateState.COMPLETE else each.given_up_at or 0
            for each in self.candidates()
            if each.state in TRAINED
        )
        return steps / whole

    def front(self) -> pd.DataFrame:
        """The rows of the view `pareto_front` in the study's own deployment, fastest first."""
        return self.deployment.rows_of(self.store.front(self.name))

    def hypervolumes(self) -> Hypervolumes:
        """The hypervolumes of the front in the study's own deployment, with the latest latencies."""
        rows, front = self.evaluations(), self.front()
        rows = rows[~rows["latency_over_limit"].astype(bool)]

        def volume(points: pd.DataFrame) -> float:
            return hypervolume(list(points["accuracy"]), list(points["latency_ms"]), self.reference_latency_ms)

        return Hypervolumes(volume(rows), volume(front) if is_confirmed(front) else None)

    def evaluations(self) -> pd.DataFrame:
        """The complete rows of the view `convfirst_evaluations` in the study's own deployment, by trial number."""
        return self.deployment.rows_of(self.store.evaluations(self.name))
