"""Rows for the tests of the study database."""

from __future__ import annotations

from typing import Any

from sqlalchemy import text

from studies import (
    BaselineLatency,
    BaselineTraining,
    BlockLatency,
    Candidate,
    CandidateLatency,
    CandidateState,
    CandidateTraining,
    LatencyStage,
    Owner,
    Profile,
    Store,
    Study,
    TrainingStage,
)

DEVICE = dict(kind="cpu", name="a CPU", driver="d", torch="2.11.0", triton="3.6.0")
OTHER_DEVICE = DEVICE | dict(name="a GPU", kind="cuda")
OURS = {
    "convfirst_alembic_version", "convfirst_baseline_latencies", "convfirst_baseline_trainings",
    "convfirst_block_latencies", "convfirst_candidates", "convfirst_devices",
    "convfirst_latencies", "convfirst_profiles", "convfirst_studies", "convfirst_trainings",
}  # fmt: skip


def make_study(store: Store, name: str = "one", device: dict[str, str] = DEVICE) -> Study:
    return store.create_study(
        name, config='{"latency": {"engine": "eager"}}', data_fingerprint="f", versions="{}", device=device,
        anchor="{}", anchor_ms=1.0,
    )  # fmt: skip


def make_latency(median_ms: float, **fields: Any) -> CandidateLatency:
    return CandidateLatency(
        median_ms=median_ms, p20_ms=median_ms, p80_ms=median_ms, repeats=10, raw_median_ms=median_ms,
        anchor_median_ms=1.0, weight_bytes=2**40, workspace_bytes=5, **fields,
    )  # fmt: skip


def measured_again(candidate: Candidate, median_ms: float, **changes: Any) -> CandidateLatency:
    """The final latency of a candidate in the deployment of its first."""
    first = candidate.latencies[0]
    deployment = {name: getattr(first, name) for name in ("engine", "dtype", "batch_size", "resolution", "threads")}
    fields = deployment | dict(trial_id=candidate.trial_id, device_id=first.device_id, stage=LatencyStage.FINAL)
    return make_latency(median_ms, **(fields | changes))


def make_profile(**changes: Any) -> Profile:
    fields = dict(
        dtype="float32", threads=1, copy_bytes_per_s=1e12, macs_per_s=4e15, launch_seconds=1e-6,
        network_yardstick_ms=0.5, product_yardstick_ms=0.7, interval_share=0.01,
    )  # fmt: skip
    return Profile(**(fields | changes))


def make_block(shape_id: str, median_ms: float = 1.0, **changes: Any) -> BlockLatency:
    fields = dict(
        engine="eager", dtype="float32", batch_size=1, threads=1, shape_id=shape_id, shape="{}", median_ms=median_ms,
        p20_ms=median_ms, p80_ms=median_ms, repeats=10, interval_share=0.01, capped=False,
    )  # fmt: skip
    return BlockLatency(**(fields | changes))


def make_training(name: str, **changes: Any) -> BaselineTraining:
    fields = dict(
        name=name, resolution=128, steps=800, batch_size=32, learning_rate=1e-3, kind="timm", summary=name,
        params=10**10, macs=10**12, classes=10, accuracy=0.5, loss=1.0, curve="[]", train_seconds=1.0,
    )  # fmt: skip
    return BaselineTraining(**(fields | changes))


def make_baseline_latency(name: str, median_ms: float | None, **changes: Any) -> BaselineLatency:
    fields = dict(
        name=name, engine="eager", dtype="float32", batch_size=1, resolution=128, threads=1, median_ms=median_ms,
        p20_ms=median_ms, p80_ms=median_ms, repeats=10, interval_share=0.01, capped=False,
    )  # fmt: skip
    return BaselineLatency(**(fields | changes))


def make_candidate_training(candidate: Candidate, accuracy: float | None, **changes: Any) -> CandidateTraining:
    fields = dict(
        trial_id=candidate.trial_id, stage=TrainingStage.RETRAINING, data="digits", data_fingerprint="f", resolution=32,
        steps=800, batch_size=32,
        learning_rate=8e-3, seed=0, accuracy=accuracy, loss=1.0, train_seconds=2.0,
    )  # fmt: skip
    return CandidateTraining(**(fields | changes))


def make_candidate(
    study: Study, trial_id: int, number: int, accuracy: float | None, latency_ms: float | None, **changes: Any
) -> Candidate:
    """Complete unless `changes` say otherwise."""
    deployment = dict(
        device_id=study.device_id, engine="eager", dtype="float32", batch_size=1, resolution=32, threads=1
    )
    deployment |= {key: changes.pop(key) for key in list(changes) if key in deployment}
    candidate = Candidate(
        trial_id=trial_id, study_id=study.study_id, number=number, arch=f"arch {number}", summary=f"summary {number}",
        **{
            "arch_id": f"id{number}", "params": 10**10, "macs": 10**12, "state": CandidateState.COMPLETE,
            "seed": 2**32 - 1,
            "total_seconds": 1.0, "accuracy": accuracy, **changes,
        },
    )  # fmt: skip
    if latency_ms is not None:
        candidate.latencies = [make_latency(latency_ms, **deployment)]
    if accuracy is not None:
        changes = dict(stage=TrainingStage.SEARCH, steps=200, curve="[[1, 1.0, 0.5, 1.0], [2, 1.0, 0.5, 1.0]]")
        candidate.trainings = [make_candidate_training(candidate, accuracy, **changes)]
    return candidate


def add(store: Store, study: Study, accuracy: float | None, latency_ms: float | None, **changes: Any) -> Candidate:
    """A candidate with a trial of Optuna's."""
    trial_id = store.optuna_storage.create_new_trial(study.study_id)
    number = store.optuna_storage.get_trial_number_from_id(trial_id)
    candidate = make_candidate(study, trial_id, number, accuracy, latency_ms, **changes)
    me = Owner.me()
    store.ownership.claim(study.study_id, me)
    store.add_candidate(candidate, me)
    return candidate


def counts(store: Store) -> dict[str, int]:
    with store.engine.connect() as connection:
        return {
            name: connection.execute(text(f"SELECT COUNT(*) FROM {name}")).scalar_one()
            for name in sorted(OURS - {"convfirst_alembic_version"})
        }
