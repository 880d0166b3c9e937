"""Candidates and their latencies as rows of the database, and what the rows say again later."""

from __future__ import annotations

from dataclasses import asdict

from nas.config import Limits
from nas.latency.values import Measurement
from nas.recorded import RecordedStudy
from nas.search.evaluation import Outcome
from nas.search.sampling import Proposal
from studies import Candidate, CandidateLatency, CandidateState, CurvePoint, Deployment, LatencyStage


def candidate_row(recorded: RecordedStudy, proposal: Proposal, trial_id: int, outcome: Outcome) -> Candidate:
    """A candidate with its latency and learning curve, as the database has it."""
    row = Candidate(
        trial_id=trial_id, study_id=recorded.study_id, number=proposal.number, arch_id=proposal.arch.arch_id,
        arch=proposal.arch.to_json(), summary=str(proposal.arch), params=outcome.cost.params,
        macs=outcome.cost.macs, state=outcome.state, reason=outcome.reason, seed=recorded.config.seed,
        latency_seconds=outcome.latency_seconds, total_seconds=outcome.total_seconds,
    )  # fmt: skip
    row.latencies, row.curve = [], []
    if outcome.latency:
        row.latencies = [latency_row(trial_id, outcome.latency, recorded.deployment, LatencyStage.SEARCH)]
    if outcome.proxy:
        row.accuracy, row.loss = outcome.proxy.accuracy, outcome.proxy.loss
        row.train_seconds, row.train_memory_bytes = outcome.proxy.seconds, outcome.proxy.train_memory_bytes
        row.curve = [CurvePoint(**asdict(point)) for point in outcome.proxy.curve]
    return row


def latency_row(
    trial_id: int, measured: Measurement, deployment: Deployment, stage: LatencyStage, limit_ms: float | None = None
) -> CandidateLatency:
    """A measurement as the database has it. How long a compiler took is left out: it is no property of the network."""
    return CandidateLatency(
        trial_id=trial_id, stage=stage, **deployment.as_columns(), **asdict(measured.latency),
        raw_median_ms=measured.raw_median_ms, anchor_median_ms=measured.anchor_median_ms,
        weight_bytes=measured.weight_bytes, workspace_bytes=measured.workspace_bytes,
        sm_clock_mhz=measured.sm_clock_mhz, temperature_c=measured.temperature_c,
        over_limit=limit_ms is not None and measured.median_ms > limit_ms,
    )  # fmt: skip


def searched_latency(row: Candidate) -> CandidateLatency | None:
    """The latency that the search measured, and judged the candidate by; it may have been measured again since."""
    return row.latencies[0] if row.latencies else None


def objectives(row: Candidate) -> list[float] | None:
    """Accuracy and latency in ms as the search measured them; None of a candidate that is not complete."""
    latency = searched_latency(row)
    if row.state != CandidateState.COMPLETE or row.accuracy is None or latency is None:
        return None
    return [row.accuracy, latency.median_ms]


def constraints(row: Candidate, limits: Limits) -> dict[str, float]:
    """Excess over each limit, as `Limits.excess` counts it, of a candidate that was stored."""
    found = limits.excess(params=row.params, macs=row.macs)
    if latency := searched_latency(row):
        found |= limits.excess(latency_ms=latency.median_ms, memory_mb=memory_mb(latency))
    return found


def memory_mb(latency: CandidateLatency) -> float:
    """Weights and peak workspace, in units of 10^6 bytes."""
    return (latency.weight_bytes + latency.workspace_bytes) / 1e6
