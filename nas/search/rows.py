"""Candidates and their latencies as rows of the database, and the figures that are derived from such rows."""

from __future__ import annotations

from dataclasses import asdict

from nas.config import Limits
from nas.display.notes import DEVIATION, PREDICTED, TIMED
from nas.errors import CandidateFailed
from nas.latency.values import Measurement, memory_mb
from nas.recorded import RecordedStudy
from nas.search.evaluation import Outcome
from nas.search.sampling import Proposal
from nas.training.pool import fill, storable
from search_spaces import ArchSpec
from studies import (
    Candidate,
    CandidateLatency,
    CandidateState,
    CandidateTraining,
    Deployment,
    LatencyStage,
    TrainingStage,
)


def candidate_row(recorded: RecordedStudy, proposal: Proposal, trial_id: int, outcome: Outcome) -> Candidate:
    """The row of a candidate, with its latency and learning curve."""
    row = Candidate(
        trial_id=trial_id, study_id=recorded.study_id, number=proposal.number, arch_id=proposal.arch.arch_id,
        arch=proposal.arch.to_json(), summary=str(proposal.arch), params=outcome.cost.params,
        macs=outcome.cost.macs, state=outcome.state, reason=outcome.reason, seed=recorded.config.seed,
        latency_seconds=outcome.latency_seconds, total_seconds=outcome.total_seconds, worker=outcome.worker,
        resolution=proposal.arch.resolution,
    )  # fmt: skip
    row.latencies, row.trainings = [], []
    if outcome.latency:
        row.latencies = [latency_row(trial_id, outcome.latency, recorded.deployment, LatencyStage.SEARCH)]
    if outcome.proxy:
        if not outcome.proxy.stopped:
            row.accuracy, row.loss = outcome.proxy.accuracy, outcome.proxy.loss
        if verdict := outcome.proxy.verdict:
            row.given_up_at, row.needed_accuracy = verdict.step, verdict.needed
            row.predicted_accuracy, row.predicted_deviation = verdict.predicted, verdict.deviation
        row.train_seconds, row.train_memory_bytes = outcome.proxy.seconds, outcome.proxy.train_memory_bytes
    # What failed before it was trained has no worker.
    if outcome.proxy or outcome.worker is not None:
        training = training_row(recorded, proposal.arch, TrainingStage.SEARCH, row.seed)
        fill(training, outcome.proxy or CandidateFailed(outcome.reason or ""))
        training.reason = outcome.reason
        row.trainings = [training]
    return row


def training_row(recorded: RecordedStudy, arch: ArchSpec, stage: TrainingStage, seed: int) -> CandidateTraining:
    """The row of a training at the study's own schedule, still without a result and without its candidate."""
    proxy, data = recorded.config.proxy, recorded.config.data
    return CandidateTraining(
        stage=stage, data=storable(data.source), data_fingerprint=recorded.row.data_fingerprint,
        resolution=arch.shown(data.resolution), steps=proxy.steps, batch_size=proxy.batch_size,
        learning_rate=proxy.learning_rate, seed=seed,
    )  # fmt: skip


def latency_row(
    trial_id: int, measured: Measurement, deployment: Deployment, stage: LatencyStage, limit_ms: float | None = None
) -> CandidateLatency:
    """The row of a measurement. The compiler's time is left out, as it is no property of the network.

    Args:
        limit_ms: limit on the latency in this deployment, if there is one.
    """
    return CandidateLatency(
        trial_id=trial_id, stage=stage, **deployment.as_columns(), **asdict(measured.latency),
        raw_median_ms=measured.raw_median_ms, anchor_median_ms=measured.anchor_median_ms,
        weight_bytes=measured.weight_bytes, workspace_bytes=measured.workspace_bytes,
        sm_clock_mhz=measured.sm_clock_mhz, temperature_c=measured.temperature_c,
        over_limit=limit_ms is not None and measured.median_ms > limit_ms,
    )  # fmt: skip


def searched_latency(row: Candidate) -> CandidateLatency | None:
    """The latency by which the search judged the candidate; it may have been measured again since."""
    return row.latencies[0] if row.latencies else None


def objectives(row: Candidate) -> list[float] | None:
    """Accuracy and latency in ms as the search measured them; None where the candidate is not complete."""
    latency = searched_latency(row)
    if row.state != CandidateState.COMPLETE or row.accuracy is None or latency is None:
        return None
    return [row.accuracy, latency.median_ms]


def further_accuracies(recorded: RecordedStudy) -> dict[str, list[float]]:
    """The accuracies of the trainings that confirmed candidates so far, by arch_id, in the order of their seeds."""
    archs = {candidate.trial_id: candidate.arch_id for candidate in recorded.candidates()}
    found: dict[str, list[float]] = {}
    stored = recorded.store.trainings.of_study(recorded.study_id, TrainingStage.CONFIRMATION)
    for training in sorted(stored, key=lambda each: (each.trial_id, each.seed)):
        if training.accuracy is not None:
            found.setdefault(archs[training.trial_id], []).append(training.accuracy)
    return found


def beliefs(row: Candidate) -> dict[str, float]:
    """What is believed of a candidate that was timed and not trained to the end, as attributes of its trial."""
    latency = searched_latency(row)
    if row.state != CandidateState.STOPPED or latency is None:
        return {}
    believed = {TIMED: latency.median_ms}
    if row.predicted_accuracy is not None and row.predicted_deviation is not None:
        believed |= {PREDICTED: row.predicted_accuracy, DEVIATION: row.predicted_deviation}
    return believed


def constraints(row: Candidate, limits: Limits) -> dict[str, float]:
    """Excess of a stored candidate over each limit, as `Limits.excess` counts it."""
    excess = limits.excess(params=row.params, macs=row.macs)
    if latency := searched_latency(row):
        excess |= limits.excess(latency_ms=latency.median_ms, memory_mb=memory_mb(latency))
    return excess
