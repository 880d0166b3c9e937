"""Studies in an SQL database: Optuna's tables, ours beside them, and the Pareto front as a view."""

from studies.deployment import Deployment
from studies.store import Owner, StorageError, Store, StudySummary, displayed, guarded
from studies.tables import (
    BaselineLatency,
    BaselineTraining,
    BlockLatency,
    Candidate,
    CandidateState,
    CurvePoint,
    Device,
    Latency,
    LatencyStage,
    Profile,
    Retraining,
    Study,
)

__all__ = [
    "BaselineLatency",
    "BaselineTraining",
    "BlockLatency",
    "Candidate",
    "CandidateState",
    "CurvePoint",
    "Deployment",
    "Device",
    "Latency",
    "LatencyStage",
    "Owner",
    "Profile",
    "Retraining",
    "StorageError",
    "Store",
    "Study",
    "StudySummary",
    "displayed",
    "guarded",
]
