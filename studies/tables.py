"""Our tables. They stand beside Optuna's in the same database, refer to its studies and trials, and never alter them.

The migrations in `studies/migrations` make these tables, with two views and, on SQLite, the triggers that delete our
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
    """One evaluated architecture: trained and timed, over a limit, or failed with a reason."""

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

    latencies: Mapped[list[Latency]] = relationship(cascade="all, delete-orphan", passive_deletes=True)
    curve: Mapped[list[CurvePoint]] = relationship(cascade="all, delete-orphan", passive_deletes=True)


class Latency(Base):
    """A candidate's latency in one deployment. `median_ms` is drift-corrected; the raw figures stand beside it."""

    __tablename__ = "convfirst_latencies"
    __table_args__ = (
        UniqueConstraint("trial_id", "device_id", "engine", "dtype", "batch_size", "resolution", "threads"),
    )

    latency_id: Mapped[int] = mapped_column(primary_key=True)
    trial_id: Mapped[int] = mapped_column(ForeignKey("convfirst_candidates.trial_id", ondelete="CASCADE"))
    device_id: Mapped[int] = mapped_column(ForeignKey("convfirst_devices.device_id"))
    engine: Mapped[str] = mapped_column(String(64))
    dtype: Mapped[str] = mapped_column(String(16))
    batch_size: Mapped[int]
    resolution: Mapped[int]
    threads: Mapped[int]
    median_ms: Mapped[float]
    p20_ms: Mapped[float]
    p80_ms: Mapped[float]
    repeats: Mapped[int]
    raw_median_ms: Mapped[float]
    anchor_median_ms: Mapped[float]
    weight_bytes: Mapped[int] = mapped_column(BigInteger)
    workspace_bytes: Mapped[int] = mapped_column(BigInteger)
    measured_at: Mapped[datetime] = mapped_column(default=now)


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
