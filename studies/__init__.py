"""Studies in an SQL database: Optuna's tables, ours beside them, and the Pareto front as a view."""

from studies.store import Owner, StorageError, Store, StudySummary, displayed, guarded
from studies.tables import Candidate, CandidateState, CurvePoint, Device, Latency, Study

__all__ = [
    "Candidate",
    "CandidateState",
    "CurvePoint",
    "Device",
    "Latency",
    "Owner",
    "StorageError",
    "Store",
    "Study",
    "StudySummary",
    "displayed",
    "guarded",
]
