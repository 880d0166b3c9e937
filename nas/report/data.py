"""What a report tells of a study, gathered from its database."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from optuna.trial import FrozenTrial, TrialState

import studies
from nas.config import LatencyConfig
from nas.display.notes import DUPLICATE_OF, REASON
from nas.display.plots import deployment_line
from nas.pareto import running_hypervolume
from nas.recorded import deployment_of
from nas.report.importance import Importances, importances
from search_spaces import ArchSpec
from studies import OBJECTIVES, Candidate, CandidateState, Deployment, Owner, Store

# Figures within a reason: losses, steps and excesses differ, and what went wrong is the same.
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?(?: ?%)?(?![\w])")
_SHOWN_TRIALS = 5
LIMITS = {
    "latency_ms": "latency at most {:g} ms", "params": "at most {:,} parameters", "macs": "at most {:,} MACs",
    "memory_mb": "memory at most {:g} MB",
}  # fmt: skip


@dataclass(frozen=True)
class Trouble:
    """Trials that came to nothing in one way.

    Args:
        what: became of them.
        reason: with its numbers left out, where they differ.
        numbers: of the trials, in order.
    """

    what: str
    reason: str
    numbers: tuple[int, ...]

    @property
    def shown(self) -> str:
        listed = ", ".join(map(str, self.numbers[:_SHOWN_TRIALS]))
        return listed + (", ..." if len(self.numbers) > _SHOWN_TRIALS else "")


@dataclass(frozen=True)
class Material:
    """All of it, of one moment as near as the database's separate answers allow.

    Args:
        name: of the study.
        row: what the study remembers, of which `config` is read.
        candidates: all that were evaluated, in order.
        course: a row a complete candidate of the study's own deployment: `number`, `accuracy`, `latency_ms`,
            `hypervolume` so far, and `seconds` that all candidates up to it took.
        spent: a row a candidate, with the seconds of `training`, `latency` and `all else`.
        evaluations, front: rows of the two views in the study's own deployment, the front fastest first.
        elsewhere: fronts in other deployments, each with what it was measured on.
        reference_ms: the latency up to which hypervolume is counted.
    """

    name: str
    row: studies.Study
    config: dict[str, Any]
    candidates: list[Candidate]
    course: pd.DataFrame
    spent: pd.DataFrame
    evaluations: pd.DataFrame
    front: pd.DataFrame
    elsewhere: list[tuple[str, pd.DataFrame]]
    reference_ms: float
    importances: list[Importances]
    troubles: list[Trouble]

    @property
    def deployment(self) -> str:
        return deployment_line(pd.Series({"device_name": self.row.device.name, **self.config["latency"]}))

    @property
    def complete(self) -> int:
        return len(self.course)

    @property
    def is_searched(self) -> bool:
        return self.row.owner is not None and Owner.parse(self.row.owner).may_live()


def gather(store: Store, name: str) -> Material:
    """What the database holds of a study, which must be there."""
    row = store.find_study(name)
    assert row is not None
    config = json.loads(row.config)
    deployment = deployment_of(LatencyConfig(**config["latency"]), row.device_id)
    reference_ms = config["limits"]["latency_ms"] or 2 * row.anchor_ms
    candidates = store.candidates(row.study_id)
    evaluations, front = store.evaluations(name), store.front(name)
    own = deployment.rows_of(front)
    others = front[~front.index.isin(own.index)]
    optuna_study = store.load_optuna_study(name)
    trials = optuna_study.get_trials(deepcopy=False)
    return Material(
        name=name,
        row=row,
        config=config,
        candidates=candidates,
        course=_course(candidates, deployment, reference_ms),
        spent=_spent(candidates),
        evaluations=deployment.rows_of(evaluations),
        front=own.reset_index(drop=True),
        elsewhere=[
            (deployment_line(members.iloc[0]), members)
            for _, members in others.groupby(Deployment.columns(), sort=False)
        ],
        reference_ms=reference_ms,
        importances=importances(optuna_study, [objective for _, objective in OBJECTIVES]),
        troubles=troubles(candidates, trials),
    )


def _course(candidates: Sequence[Candidate], deployment: Deployment, reference_ms: float) -> pd.DataFrame:
    rows: list[tuple[int, float, float, float]] = []
    seconds = 0.0
    for candidate in candidates:
        seconds += candidate.total_seconds
        latency = candidate.latency_in(deployment)
        if candidate.state == CandidateState.COMPLETE and candidate.accuracy is not None and latency is not None:
            rows.append((candidate.number, candidate.accuracy, latency.median_ms, seconds))
    found = pd.DataFrame(rows, columns=["number", "accuracy", "latency_ms", "seconds"])
    volumes = running_hypervolume(list(found["accuracy"]), list(found["latency_ms"]), reference_ms)
    return found.assign(hypervolume=volumes)


def _spent(candidates: Sequence[Candidate]) -> pd.DataFrame:
    rows = []
    for candidate in candidates:
        training, latency = candidate.train_seconds or 0.0, candidate.latency_seconds or 0.0
        rows.append((training, latency, max(0.0, candidate.total_seconds - training - latency)))
    return pd.DataFrame(rows, columns=["training", "latency", "all else"], dtype=float)


def troubles(candidates: Sequence[Candidate], trials: Sequence[FrozenTrial]) -> list[Trouble]:
    """What did not become a complete candidate, by reason, the most frequent first.

    Args:
        trials: Optuna's, among them those that were never evaluated: duplicates and the interrupted.
    """
    named = {CandidateState.FAILED: "failed", CandidateState.OVER_LIMIT: "over a limit"}
    found: list[tuple[int, str, str]] = []
    evaluated = set()
    for candidate in candidates:
        evaluated.add(candidate.number)
        if candidate.state in named:
            found.append((candidate.number, named[CandidateState(candidate.state)], candidate.reason or "not told"))
    for trial in trials:
        if trial.number in evaluated:
            continue
        if DUPLICATE_OF in trial.user_attrs:
            found.append((trial.number, "duplicate", "proposed again what was known: nothing was measured"))
        elif trial.state == TrialState.FAIL:
            found.append((trial.number, "interrupted", str(trial.user_attrs.get(REASON, "not told"))))
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for number, what, reason in found:
        groups.setdefault((what, _NUMBER.sub("…", reason)), []).append((number, reason))
    rows = []
    for (what, general), members in groups.items():
        words = Counter(reason for _, reason in members)
        reason = members[0][1] if len(words) == 1 else general
        rows.append(Trouble(what, reason, tuple(number for number, _ in members)))
    return sorted(rows, key=lambda trouble: -len(trouble.numbers))


def set_up(material: Material) -> str:
    """How the study was searched, as a paragraph."""
    row, config = material.row, material.config
    data, training, latency, device = config["data"], config["proxy"], config["latency"], row.device
    limits = [LIMITS[name].format(value) for name, value in config["limits"].items() if value is not None]
    driver = f", {device.driver}" if device.driver not in ("", "none") else ""
    versions = ", ".join(f"{name} {value}" for name, value in json.loads(row.versions).items() if value != "none")
    return (
        f"The space {config['space']['name']} was searched by {config['sampler']} with seed {config['seed']}; "
        f"candidates evaluated: {len(material.candidates)}, of which complete: {material.complete}. "
        f"Each was timed on {device.name} ({device.kind}{driver}) by the engine {latency['engine']} in "
        f"{latency['dtype']}: batch {latency['batch_size']}, {latency['resolution']}x{latency['resolution']} pixels, "
        f"{latency['num_classes']} classes, {latency['threads']} CPU thread(s), medians corrected for drift by an "
        f"anchor network ({ArchSpec.from_json(row.anchor)}) of {row.anchor_ms:.4g} ms. "
        f"It was trained on {data['source']} at {data['resolution']}x{data['resolution']} pixels (fingerprint "
        f"{row.data_fingerprint}) for {training['steps']} steps of {training['batch_size']} images with AdamW, "
        f"learning rate up to {training['learning_rate']:g}, weight decay {training['weight_decay']:g}, label "
        f"smoothing {training['label_smoothing']:g}, {training['threads']} thread(s). "
        f"Limits: {', '.join(limits) or 'none'}. Begun {row.created_at:%Y-%m-%d %H:%M} UTC. Versions: {versions}."
    )
