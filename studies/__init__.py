"""Studies in an SQL database: Optuna's tables, ours beside them, and Pareto fronts as views.

This room imports none of the others (nas, search_spaces, kernels), and only this room imports sqlalchemy and alembic.
"""

from studies.deployment import Deployment
from studies.errors import StorageError, guarded
from studies.opening import OBJECTIVES, check_free, check_writable, displayed
from studies.ownership import Owner, check_claimable
from studies.reconnecting import keep_connecting
from studies.store import Confirmed, Store
from studies.tables import (
    TRAINED,
    BaselineLatency,
    BaselineTraining,
    BlockLatency,
    Candidate,
    CandidateLatency,
    CandidateState,
    CandidateTraining,
    LatencyStage,
    Profile,
    Study,
    TrainingStage,
)

__all__ = [
    "OBJECTIVES",
    "TRAINED",
    "BaselineLatency",
    "BaselineTraining",
    "BlockLatency",
    "Candidate",
    "CandidateLatency",
    "CandidateState",
    "CandidateTraining",
    "Confirmed",
    "Deployment",
    "LatencyStage",
    "Owner",
    "Profile",
    "StorageError",
    "Store",
    "Study",
    "TrainingStage",
    "check_claimable",
    "check_free",
    "check_writable",
    "displayed",
    "guarded",
    "keep_connecting",
]
