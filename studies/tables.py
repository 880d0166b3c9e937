"""Our tables. They stand beside Optuna's in the same database, refer to its studies and trials, and never alter them.

The migrations in `studies/migrations` make these tables, with some views and, on SQLite, the triggers that delete our
rows with Optuna's (foreign keys do it elsewhere; SQLite enforces those only for connections that ask, and Optuna's
dashboard does not). A test holds both descriptions together.
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


class Base(DeclarativeBase):
    type_annotation_map: ClassVar = {str: Text, float: Double, datetime: DateTime(timezone=True)}


# Optuna's tables, as far as ours refer to them.
Table("studies", Base.metadata, Column("study_id", Integer, primary_key=True))
Table("trials", Base.metadata, Column("trial_id", Integer, primary_key=True))


def now() -> datetime:
    return datetime.now(UTC)


class CandidateState(enum.StrEnum):
    COMPLETE = "complete"
    OVER_LIMIT = "over_limit"
    FAILED = "failed"


class LatencyStage(enum.StrEnum):
    """When a latency was measured: as its candidate was evaluated, or later, in turn with the rest of the front."""

    SEARCH = "search"
    FINAL = "final"


class Device(Base):
    """What latencies were measured on: one row per device and versions."""

    __tablename__ = "convfirst_devices"
    __table_args__ = (UniqueConstraint("kind", "name", "driver", "torch", "triton"),)

    device_id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(256))
    driver: Mapped[str] = mapped_column(String(256))
    torch: Mapped[str] = mapped_column(String(64))
    triton: Mapped[str] = mapped_column(String(64))


class Study(Base):
    """What a study remembers: its whole configuration, its anchor, and which process searches it now."""

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

    device: Mapped[Device] = relationship(lazy="joined")


class Candidate(Base):
    """One evaluated architecture: trained and timed, over a limit, or failed with a reason.

    Attributes:
        latency_seconds, train_seconds, total_seconds: what it cost; the first and the last with any waiting for another
            process on the device.
    """

    __tablename__ = "convfirst_candidates"
    __table_args__ = (
        # No architecture is completed twice in a study, whoever writes.
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
    finished_at: Mapped[datetime] = mapped_column(default=now)

    latencies: Mapped[list[Latency]] = relationship(
        cascade="all, delete-orphan", passive_deletes=True, order_by="Latency.latency_id"
    )
    curve: Mapped[list[CurvePoint]] = relationship(cascade="all, delete-orphan", passive_deletes=True)

    def latency_on(
        self, device_id: int, engine: str, dtype: str, batch_size: int, resolution: int, threads: int
    ) -> Latency | None:
        """The latency in one deployment: the final one if there is one, else the search's."""
        deployment = (device_id, engine, dtype, batch_size, resolution, threads)
        rows = [row for row in self.latencies if row.deployment == deployment]
        return min(rows, key=lambda row: row.stage != LatencyStage.FINAL, default=None)


class Latency(Base):
    """A candidate's latency in one deployment. `median_ms` is drift-corrected; the raw figures stand beside it.

    Attributes:
        interval_share: width of the 95 % confidence interval of the median, over the median.
        capped: the time cap was hit before that interval was narrow enough.
        throttled, sm_clock_mhz, temperature_c: of a CUDA device while it measured.
        over_limit: measured again it breaks the study's limit on the latency: it is not on the front.
    """

    __tablename__ = "convfirst_latencies"
    __table_args__ = (
        UniqueConstraint("trial_id", "device_id", "engine", "dtype", "batch_size", "resolution", "threads", "stage"),
    )

    latency_id: Mapped[int] = mapped_column(primary_key=True)
    trial_id: Mapped[int] = mapped_column(ForeignKey("convfirst_candidates.trial_id", ondelete="CASCADE"))
    device_id: Mapped[int] = mapped_column(ForeignKey("convfirst_devices.device_id"))
    engine: Mapped[str] = mapped_column(String(64))
    dtype: Mapped[str] = mapped_column(String(16))
    batch_size: Mapped[int]
    resolution: Mapped[int]
    threads: Mapped[int]
    # The database has the default too: a search begun before it was brought up to date goes on writing rows without.
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
    throttled: Mapped[bool | None]
    sm_clock_mhz: Mapped[float | None]
    temperature_c: Mapped[float | None]
    # As in `stage`, the default is for those who do not know it.
    over_limit: Mapped[bool] = mapped_column(default=False, server_default=false())
    measured_at: Mapped[datetime] = mapped_column(default=now)

    @property
    def deployment(self) -> tuple[int, str, str, int, int, int]:
        return self.device_id, self.engine, self.dtype, self.batch_size, self.resolution, self.threads


class CurvePoint(Base):
    """A point of a candidate's learning curve: averages over the steps since the point before."""

    __tablename__ = "convfirst_learning_curves"

    trial_id: Mapped[int] = mapped_column(
        ForeignKey("convfirst_candidates.trial_id", ondelete="CASCADE"), primary_key=True
    )
    step: Mapped[int] = mapped_column(primary_key=True)
    train_loss: Mapped[float]
    train_accuracy: Mapped[float]
    seconds: Mapped[float]


class Profile(Base):
    """What a device was measured to do at most in one dtype. No study's: it outlives them.

    Latencies of blocks were timed in turns with two yardsticks and are told as if these had taken the times that stand
    here (`nas.latency.yardsticks`).
    """

    __tablename__ = "convfirst_profiles"
    __table_args__ = (UniqueConstraint("device_id", "dtype", "threads"),)

    profile_id: Mapped[int] = mapped_column(primary_key=True)
    device_id: Mapped[int] = mapped_column(ForeignKey("convfirst_devices.device_id"))
    dtype: Mapped[str] = mapped_column(String(16))
    threads: Mapped[int]
    copy_bytes_per_s: Mapped[float]
    macs_per_s: Mapped[float]
    launch_seconds: Mapped[float]
    graph_launch_seconds: Mapped[float | None]
    network_yardstick_ms: Mapped[float]
    product_yardstick_ms: Mapped[float]
    interval_share: Mapped[float]
    throttled: Mapped[bool | None]
    measured_at: Mapped[datetime] = mapped_column(default=now)

    device: Mapped[Device] = relationship(lazy="joined")


class BlockLatency(Base):
    """The latency of a block or layer measured by itself, for all studies of the database.

    Attributes:
        kernels: digest of the fused kernels' sources; empty where no kernel of ours runs.
        shape: its problem as canonical JSON, of which `shape_id` is a hash.
        median_ms: of one run, without what a call of it costs beside (see `nas.latency.block_meter`).
    """

    __tablename__ = "convfirst_block_latencies"
    __table_args__ = (UniqueConstraint("device_id", "engine", "dtype", "batch_size", "threads", "kernels", "shape_id"),)

    block_latency_id: Mapped[int] = mapped_column(primary_key=True)
    device_id: Mapped[int] = mapped_column(ForeignKey("convfirst_devices.device_id"))
    engine: Mapped[str] = mapped_column(String(64))
    dtype: Mapped[str] = mapped_column(String(16))
    batch_size: Mapped[int]
    threads: Mapped[int]
    kernels: Mapped[str] = mapped_column(String(12), default="")
    shape_id: Mapped[str] = mapped_column(String(12))
    shape: Mapped[str]
    median_ms: Mapped[float]
    p20_ms: Mapped[float]
    p80_ms: Mapped[float]
    repeats: Mapped[int]
    interval_share: Mapped[float]
    capped: Mapped[bool]
    throttled: Mapped[bool | None]
    measured_at: Mapped[datetime] = mapped_column(default=now)


class BaselineTraining(Base):
    """A training of a network that a study's candidates are compared with, at one learning rate.

    Trained on the study's data, with its schedule but for the fields here. None of the sampler's business: it is no
    candidate, and has no trial of Optuna's.

    Attributes:
        name: of a timm model; "ConvFirst anchor"; or "trial 12", one of the study's own.
        resolution: pixels of the training images.
        kind: of `nas.validation.contenders.ContenderKind`.
        trial: the number of a study's own.
        params, macs: as it is deployed, of one image.
        classes: of the data.
        reason: why it failed.
        curve: JSON, a list of [step, train_loss, train_accuracy, seconds], averages as in `CurvePoint`.
    """

    __tablename__ = "convfirst_baseline_trainings"
    __table_args__ = (UniqueConstraint("study_id", "name", "resolution", "steps", "batch_size", "learning_rate"),)

    baseline_training_id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.study_id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(128))
    resolution: Mapped[int]
    steps: Mapped[int]
    batch_size: Mapped[int]
    learning_rate: Mapped[float]
    kind: Mapped[str] = mapped_column(String(16))
    summary: Mapped[str]
    trial: Mapped[int | None]
    params: Mapped[int] = mapped_column(BigInteger)
    macs: Mapped[int] = mapped_column(BigInteger)
    classes: Mapped[int]
    reason: Mapped[str | None]
    accuracy: Mapped[float | None]
    loss: Mapped[float | None]
    curve: Mapped[str | None]
    train_seconds: Mapped[float | None]
    finished_at: Mapped[datetime] = mapped_column(default=now)


class BaselineLatency(Base):
    """A baseline's latency in one deployment, or why it has none; fields as `Latency`'s.

    Attributes:
        median_ms: corrected by the device's yardsticks, as `BlockLatency`'s.
        measured_at: the same of all that were measured in turns with one another.
    """

    __tablename__ = "convfirst_baseline_latencies"
    __table_args__ = (
        UniqueConstraint("study_id", "name", "device_id", "engine", "dtype", "batch_size", "resolution", "threads"),
    )

    baseline_latency_id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.study_id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(128))
    device_id: Mapped[int] = mapped_column(ForeignKey("convfirst_devices.device_id"))
    engine: Mapped[str] = mapped_column(String(64))
    dtype: Mapped[str] = mapped_column(String(16))
    batch_size: Mapped[int]
    resolution: Mapped[int]
    threads: Mapped[int]
    reason: Mapped[str | None]
    median_ms: Mapped[float | None]
    p20_ms: Mapped[float | None]
    p80_ms: Mapped[float | None]
    repeats: Mapped[int | None]
    interval_share: Mapped[float | None]
    capped: Mapped[bool | None]
    throttled: Mapped[bool | None]
    measured_at: Mapped[datetime] = mapped_column(default=now)


class Retraining(Base):
    """A longer training of a candidate than the proxy's; the view `convfirst_retrained` has it beside the candidate.

    Attributes:
        data, data_fingerprint: what it was trained on, the study's own images or others.
        resolution: pixels of the training images.
        reason: why it failed.
        curve: JSON, a list of [step, train_loss, train_accuracy, seconds], averages as in `CurvePoint`.
    """

    __tablename__ = "convfirst_retrainings"
    __table_args__ = (
        UniqueConstraint("trial_id", "data_fingerprint", "resolution", "steps", "batch_size", "learning_rate", "seed"),
    )

    retraining_id: Mapped[int] = mapped_column(primary_key=True)
    trial_id: Mapped[int] = mapped_column(ForeignKey("convfirst_candidates.trial_id", ondelete="CASCADE"))
    data: Mapped[str]
    data_fingerprint: Mapped[str] = mapped_column(String(12))
    resolution: Mapped[int]
    steps: Mapped[int]
    batch_size: Mapped[int]
    learning_rate: Mapped[float]
    seed: Mapped[int] = mapped_column(BigInteger)
    reason: Mapped[str | None]
    accuracy: Mapped[float | None]
    loss: Mapped[float | None]
    curve: Mapped[str | None]
    train_seconds: Mapped[float | None]
    finished_at: Mapped[datetime] = mapped_column(default=now)
