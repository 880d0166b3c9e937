"""Our tables. They stand beside Optuna's in the same database, refer to its studies and trials, and never alter them.

The migrations in `studies/migrations` make these tables. They also make some views and, on SQLite, the triggers that
delete our rows with Optuna's. (Elsewhere foreign keys do that; SQLite enforces them only for connections that ask for
it, and Optuna's dashboard does not.) A test checks that classes and migrations agree.
"""

from __future__ import annotations

import enum
from datetime import UTC, datetime
from typing import ClassVar

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from studies.deployment import Deployment


class Base(DeclarativeBase):
    type_annotation_map: ClassVar = {str: Text, float: Double, datetime: DateTime(timezone=True)}


# Optuna's tables, as far as ours refer to them.
Table("studies", Base.metadata, Column("study_id", Integer, primary_key=True))
Table("trials", Base.metadata, Column("trial_id", Integer, primary_key=True))


def now() -> datetime:
    return datetime.now(UTC)


class CandidateState(enum.StrEnum):
    """How the evaluation of a candidate ended.

    `STOPPED` is one whose training was given up, as it would hardly have reached the front.
    """

    COMPLETE = "complete"
    STOPPED = "stopped"
    OVER_LIMIT = "over_limit"
    FAILED = "failed"


# The states of candidates that were trained, and that count for the budget.
TRAINED = (CandidateState.COMPLETE, CandidateState.STOPPED)


class TrainingStage(enum.StrEnum):
    """What a candidate was trained for: to be chosen, to have its accuracy confirmed with another seed, or longer."""

    SEARCH = "search"
    CONFIRMATION = "confirmation"
    RETRAINING = "retraining"


class LatencyStage(enum.StrEnum):
    """When a latency was measured: when its candidate was evaluated, or later, in turn with the rest of the front."""

    SEARCH = "search"
    FINAL = "final"


class Device(Base):
    """A device that latencies were measured on: one row for each combination of device and versions."""

    __tablename__ = "convfirst_devices"
    __table_args__ = (UniqueConstraint("kind", "name", "driver", "torch", "triton"),)

    device_id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(256))
    driver: Mapped[str] = mapped_column(String(256))
    torch: Mapped[str] = mapped_column(String(64))
    triton: Mapped[str] = mapped_column(String(64))


class OnDevice:
    """Columns of every measurement on a device.

    Attributes:
        throttled: whether a CUDA device was throttled while it measured.
    """

    device_id: Mapped[int] = mapped_column(ForeignKey("convfirst_devices.device_id"))
    dtype: Mapped[str] = mapped_column(String(16))
    threads: Mapped[int]
    throttled: Mapped[bool | None]
    measured_at: Mapped[datetime] = mapped_column(default=now)


class InDeployment(OnDevice):
    """Columns of every latency: a measurement on a device, and the rest of the deployment that it holds for."""

    engine: Mapped[str] = mapped_column(String(64))
    batch_size: Mapped[int]


class Training:
    """Columns of every training.

    Attributes:
        resolution: pixels of the training images.
        steps: length of the whole schedule.
        reason: why the training failed.
        curve: JSON, a list of points as `nas.training.curves` writes them.
    """

    resolution: Mapped[int]
    steps: Mapped[int]
    batch_size: Mapped[int]
    learning_rate: Mapped[float]
    reason: Mapped[str | None]
    accuracy: Mapped[float | None]
    loss: Mapped[float | None]
    curve: Mapped[str | None]
    train_seconds: Mapped[float | None]
    finished_at: Mapped[datetime] = mapped_column(default=now)


class Study(Base):
    """A study: its whole configuration, its anchor, and the process that searches it now.

    Attributes:
        study_id: the id of Optuna's study, which has the name.
        owner: an `ownership.Owner` as text.
        confirmed_at: when the accuracies of the front were confirmed; None if they are not, or no longer.
        confirmed_in: the deployment whose front was confirmed, as `Deployment.key` writes it.
        pilot: JSON, what the pilot measured and why the schedule was chosen; None where there was no pilot.
        images: JSON, the names of the classes, how images are normalised, their number; None in older studies.
    """

    __tablename__ = "convfirst_studies"

    study_id: Mapped[int] = mapped_column(ForeignKey("studies.study_id", ondelete="CASCADE"), primary_key=True)
    config: Mapped[str]
    data_fingerprint: Mapped[str]
    versions: Mapped[str]
    device_id: Mapped[int] = mapped_column(ForeignKey("convfirst_devices.device_id"))
    anchor: Mapped[str]
    anchor_ms: Mapped[float]
    created_at: Mapped[datetime] = mapped_column(default=now)
    owner: Mapped[str | None]
    confirmed_at: Mapped[datetime | None]
    confirmed_in: Mapped[str | None]
    pilot: Mapped[str | None]
    images: Mapped[str | None]

    device: Mapped[Device] = relationship(lazy="joined")


class Candidate(Base):
    """One evaluated architecture: trained and timed, or not, with a reason.

    Attributes:
        seed, accuracy, loss, train_seconds, train_memory_bytes: those of the training by which the search judged it.
        latency_seconds, train_seconds, total_seconds: the time that the evaluation took; the first and the last include
            any waiting for another process on the device.
        worker: number of the worker that trained it, from 0; None where none did, or an older version.
        resolution: the architecture's own resolution in pixels; None where it has none.
        confirmed_accuracy, confirmed_low, confirmed_high: mean of the trainings with other seeds, and the ends of its
            95 % interval; None where there are none.
        confirmed_trainings: number of these trainings.
        given_up_at: number of steps after which the training was given up, or would have been, as some are trained to
            the end all the same; None where it was not.
        predicted_accuracy, predicted_deviation: accuracy that was expected then, and its standard deviation.
        needed_accuracy: accuracy that it would hardly have reached.
    """

    __tablename__ = "convfirst_candidates"
    __table_args__ = (
        # No architecture is completed twice in a study, whichever process writes.
        Index(
            "convfirst_candidates_once", "study_id", "arch_id", unique=True,
            sqlite_where=Column("state") == "complete", postgresql_where=Column("state") == "complete",
        ),
    )  # fmt: skip

    trial_id: Mapped[int] = mapped_column(ForeignKey("trials.trial_id", ondelete="CASCADE"), primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.study_id", ondelete="CASCADE"))
    number: Mapped[int]
    arch_id: Mapped[str] = mapped_column(String(12))
    arch: Mapped[str]
    summary: Mapped[str]
    params: Mapped[int] = mapped_column(BigInteger)
    macs: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None]
    seed: Mapped[int] = mapped_column(BigInteger)
    accuracy: Mapped[float | None]
    loss: Mapped[float | None]
    train_seconds: Mapped[float | None]
    train_memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    latency_seconds: Mapped[float | None]
    total_seconds: Mapped[float]
    worker: Mapped[int | None]
    resolution: Mapped[int | None]
    confirmed_accuracy: Mapped[float | None]
    confirmed_low: Mapped[float | None]
    confirmed_high: Mapped[float | None]
    confirmed_trainings: Mapped[int | None]
    given_up_at: Mapped[int | None]
    predicted_accuracy: Mapped[float | None]
    predicted_deviation: Mapped[float | None]
    needed_accuracy: Mapped[float | None]
    finished_at: Mapped[datetime] = mapped_column(default=now)

    latencies: Mapped[list[CandidateLatency]] = relationship(
        cascade="all, delete-orphan", passive_deletes=True, order_by="CandidateLatency.latency_id"
    )
    trainings: Mapped[list[CandidateTraining]] = relationship(
        cascade="all, delete-orphan", passive_deletes=True, order_by="CandidateTraining.training_id"
    )

    def latency_in(self, deployment: Deployment) -> CandidateLatency | None:
        """The latency in one deployment: the final one if there is one, else the search's."""
        rows = [row for row in self.latencies if Deployment.of(row) == deployment]
        return min(rows, key=lambda row: row.stage != LatencyStage.FINAL, default=None)


class CandidateLatency(InDeployment, Base):
    """A candidate's latency in one deployment. `median_ms` is drift-corrected; the raw figures stand beside it.

    Attributes:
        interval_share: width of the 95 % confidence interval of the median, divided by the median.
        capped: whether the time cap was hit before that interval was narrow enough.
        sm_clock_mhz, temperature_c: state of a CUDA device while it measured.
        over_limit: whether the candidate, measured again, breaks the study's limit on the latency, and so is not on the
            front.
    """

    __tablename__ = "convfirst_latencies"
    __table_args__ = (
        UniqueConstraint("trial_id", "device_id", "engine", "dtype", "batch_size", "resolution", "threads", "stage"),
    )

    latency_id: Mapped[int] = mapped_column(primary_key=True)
    trial_id: Mapped[int] = mapped_column(ForeignKey("convfirst_candidates.trial_id", ondelete="CASCADE"))
    resolution: Mapped[int]
    # The database has this default and that of `over_limit` too, so plain SQL may write rows without them.
    stage: Mapped[str] = mapped_column(String(16), default=LatencyStage.SEARCH, server_default=LatencyStage.SEARCH)
    median_ms: Mapped[float]
    p20_ms: Mapped[float]
    p80_ms: Mapped[float]
    repeats: Mapped[int]
    interval_share: Mapped[float | None]
    capped: Mapped[bool | None]
    raw_median_ms: Mapped[float]
    anchor_median_ms: Mapped[float]
    weight_bytes: Mapped[int] = mapped_column(BigInteger)
    workspace_bytes: Mapped[int] = mapped_column(BigInteger)
    sm_clock_mhz: Mapped[float | None]
    temperature_c: Mapped[float | None]
    over_limit: Mapped[bool] = mapped_column(default=False, server_default=false())


class CandidateTraining(Training, Base):
    """A training of a candidate: the search's, one that confirms its accuracy, or a longer one.

    The view `convfirst_retrained` shows the longer ones beside their candidates.

    Attributes:
        stage: a `TrainingStage`.
        data, data_fingerprint: the images that it was trained on: the study's own or others.
        host: name of the machine that trained it; None where an older version did.
        test_accuracy: accuracy on the images of the data's `test` folder; None where there is none, or for a training
            of the search, which must not know them.
    """

    __tablename__ = "convfirst_trainings"
    __table_args__ = (
        UniqueConstraint(
            "trial_id", "stage", "data_fingerprint", "resolution", "steps", "batch_size", "learning_rate", "seed"
        ),
    )

    training_id: Mapped[int] = mapped_column(primary_key=True)
    trial_id: Mapped[int] = mapped_column(ForeignKey("convfirst_candidates.trial_id", ondelete="CASCADE"))
    stage: Mapped[str] = mapped_column(String(16))
    data: Mapped[str]
    data_fingerprint: Mapped[str] = mapped_column(String(12))
    seed: Mapped[int] = mapped_column(BigInteger)
    host: Mapped[str | None]
    test_accuracy: Mapped[float | None]


class Profile(OnDevice, Base):
    """The measured limits of a device in one dtype. A profile belongs to no study, and outlives them.

    Blocks were timed in turns with two yardsticks, and their latencies are corrected as if the yardsticks had taken the
    times that stand here (`nas.latency.yardsticks`).
    """

    __tablename__ = "convfirst_profiles"
    __table_args__ = (UniqueConstraint("device_id", "dtype", "threads"),)

    profile_id: Mapped[int] = mapped_column(primary_key=True)
    copy_bytes_per_s: Mapped[float]
    macs_per_s: Mapped[float]
    launch_seconds: Mapped[float]
    graph_launch_seconds: Mapped[float | None]
    network_yardstick_ms: Mapped[float]
    product_yardstick_ms: Mapped[float]
    interval_share: Mapped[float]

    device: Mapped[Device] = relationship(lazy="joined")


class BlockLatency(InDeployment, Base):
    """The latency of a block or layer measured by itself, for all studies of the database.

    Attributes:
        kernels: digest of the fused kernels' sources; empty where no kernel of ours runs.
        shape: the block's problem as canonical JSON, of which `shape_id` is a hash.
        median_ms: time of one run, without the overhead of a call (see `nas.latency.block_meter`).
    """

    __tablename__ = "convfirst_block_latencies"
    __table_args__ = (UniqueConstraint("device_id", "engine", "dtype", "batch_size", "threads", "kernels", "shape_id"),)

    block_latency_id: Mapped[int] = mapped_column(primary_key=True)
    kernels: Mapped[str] = mapped_column(String(12), default="")
    shape_id: Mapped[str] = mapped_column(String(12))
    shape: Mapped[str]
    median_ms: Mapped[float]
    p20_ms: Mapped[float]
    p80_ms: Mapped[float]
    repeats: Mapped[int]
    interval_share: Mapped[float]
    capped: Mapped[bool]


class BaselineTraining(Training, Base):
    """A training of a network that a study's candidates are compared with, at one learning rate.

    The network is trained on the study's data and with its schedule, but for the columns here. It is no candidate and
    has no trial of Optuna's, so the sampler does not learn of it.

    Attributes:
        name: name of a timm model; "ConvFirst anchor"; or "trial 12", one of the study's own.
        kind: a value of `nas.validation.contenders.ContenderKind`.
        trial: number of the trial, if the network is the study's own.
        params, macs: size of the deployed network, for one image.
        classes: number of the data's classes.
    """

    __tablename__ = "convfirst_baseline_trainings"
    __table_args__ = (UniqueConstraint("study_id", "name", "resolution", "steps", "batch_size", "learning_rate"),)

    baseline_training_id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.study_id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(128))
    kind: Mapped[str] = mapped_column(String(16))
    summary: Mapped[str]
    trial: Mapped[int | None]
    params: Mapped[int] = mapped_column(BigInteger)
    macs: Mapped[int] = mapped_column(BigInteger)
    classes: Mapped[int]


class BaselineLatency(InDeployment, Base):
    """A baseline's latency in one deployment, or the reason why it has none. The columns are like those of
    `CandidateLatency`.

    Attributes:
        median_ms: corrected by the device's yardsticks, as in `BlockLatency`.
        measured_at: the same time for all networks that were measured in turns with one another.
    """

    __tablename__ = "convfirst_baseline_latencies"
    __table_args__ = (
        UniqueConstraint("study_id", "name", "device_id", "engine", "dtype", "batch_size", "resolution", "threads"),
    )

    baseline_latency_id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.study_id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(128))
    resolution: Mapped[int]
    reason: Mapped[str | None]
    median_ms: Mapped[float | None]
    p20_ms: Mapped[float | None]
    p80_ms: Mapped[float | None]
    repeats: Mapped[int | None]
    interval_share: Mapped[float | None]
    capped: Mapped[bool | None]
