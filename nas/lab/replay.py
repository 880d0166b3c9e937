"""Replay of a recorded study: `python -m nas.lab.replay sqlite:///studies/convfirst.db`.

A study of several workers needs their number (`--workers`), which is not stored: candidates are proposed in rounds.
Studies of several workers that were interrupted, or that timed candidates while others trained, cannot be replayed yet.

The command checks whether today's search does what an earlier version did. It searches the study again in a new
database, with an evaluator that replays the accuracies and latencies that the study holds. Today's search then has to
propose the same architectures, and to store the same columns with the same values, except points in time and durations.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from nas.config import DEFAULT_STUDY
from nas.display.notes import INTERRUPTED, REASON
from nas.errors import CandidateFailed
from nas.latency.device_profile import DeviceProfile
from nas.latency.values import Latency, Measurement, ShapeLatency
from nas.recorded import RecordedStudy
from nas.search import run
from nas.search.evaluation import OneByOne
from nas.training import curves
from nas.training.proxy import ProxyResult
from nas.training.stopping import Rules
from nas.training.workers import Done
from search_spaces import ArchSpec, Cost, cost
from studies import TRAINED, Candidate, CandidateLatency, CandidateState, Store

# Columns and attributes that differ from run to run though nothing else does.
TIMES = ("latency_seconds", "total_seconds", "finished_at", "created_at", "owner", "worker")
ATTRIBUTES_OF_TIME = ("seconds",)


class ReplayingEvaluator(OneByOne):
    """Evaluator that scores candidates as a recorded study did, and ends the program at an architecture that it lacks.

    Args:
        recorded: the study, whose candidates, block latencies and device profile are read at once.
        workers: number of workers that searched the study.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, recorded: RecordedStudy, workers: int = 1) -> None:
        self.recorded, self.workers = recorded, workers
        self.device, self.data_fingerprint = recorded.device, recorded.row.data_fingerprint
        self.candidates = {candidate.arch_id: candidate for candidate in recorded.candidates()}
        trials = recorded.store.load_optuna_study(recorded.name).get_trials(deepcopy=False)
        # The study was interrupted while these were evaluated, and so is the replay.
        self.interrupted = [t.user_attrs["arch_id"] for t in trials if t.user_attrs.get(REASON) == INTERRUPTED]
        config, device, devices = recorded.config.latency, asdict(recorded.device), recorded.store.devices
        self.stored_profile = devices.find_profile(device, config.dtype, config.threads)
        self.blocks = devices.block_latencies(
            device, config.engine_label, config.dtype, config.batch_size, config.threads
        )

    def anchor(self, references_ms: Sequence[float]) -> ShapeLatency:
        anchor_ms = self.recorded.row.anchor_ms
        return ShapeLatency("", Latency(anchor_ms, anchor_ms, anchor_ms, repeats=1))

    def start(self, anchor_ms: float) -> None:
        pass

    def cost(self, arch: ArchSpec) -> Cost:
        config = self.recorded.config.latency
        return cost(arch, config.resolution, config.num_classes)

    def measure(self, arch: ArchSpec) -> Measurement:
        if arch.arch_id in self.interrupted:
            self.interrupted.remove(arch.arch_id)
            raise KeyboardInterrupt
        candidate = self._candidate(arch)
        if not candidate.latencies:
            raise CandidateFailed(candidate.reason or "")
        return _measurement(candidate.latencies[0])

    def train_one(self, arch: ArchSpec) -> ProxyResult:
        candidate = self._candidate(arch)
        accuracy, loss = candidate.accuracy, candidate.loss
        if candidate.state == CandidateState.STOPPED:
            # Nobody knows what it would have come to; `train` sees to it that nobody asks.
            accuracy = loss = math.nan
        if accuracy is None or loss is None:
            raise CandidateFailed(candidate.reason or "")
        curve = curves.from_json(self.recorded.store.learning_curve(candidate.trial_id))
        seconds, memory_bytes = candidate.train_seconds or 0.0, candidate.train_memory_bytes or 0
        return ProxyResult(accuracy, loss, curve, seconds, memory_bytes)

    def train(
        self, archs: Sequence[ArchSpec], seeds: Sequence[int] | None = None, rules: Rules = None
    ) -> Generator[Done[ProxyResult]]:
        """Train under today's rules; those that were given up must be given up."""
        for done in super().train(archs, seeds, rules):
            arch = archs[done.index]
            candidate = self._candidate(arch)
            if candidate.state == CandidateState.STOPPED and isinstance(done.result, ProxyResult):
                if not done.result.stopped:
                    raise SystemExit(
                        f"different: today's search goes on with the training of {arch}, which the study gave up after "
                        f"{candidate.given_up_at} steps"
                    )
                # Shares of seconds are rounded.
                done = replace(done, result=replace(done.result, seconds=candidate.train_seconds or 0.0))
            yield done

    def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
        rows = [self._candidate(arch).latency_in(self.recorded.deployment) for arch in archs]
        return [_measurement(row) for row in rows if row is not None]

    def measure_blocks(
        self, archs: Sequence[ArchSpec], known: Mapping[str, float], references_ms: Sequence[float]
    ) -> list[ShapeLatency]:
        return [ShapeLatency(row.shape, Latency.of_row(row)) for key, row in self.blocks.items() if key not in known]

    def profile(self) -> DeviceProfile:
        assert self.stored_profile is not None
        names = DeviceProfile.__dataclass_fields__
        return DeviceProfile(**{name: getattr(self.stored_profile, name) for name in names})

    def determinism(self) -> str | None:
        return None

    def close(self) -> None:
        pass

    def _candidate(self, arch: ArchSpec) -> Candidate:
        if arch.arch_id not in self.candidates:
            raise SystemExit(f"different: today's search proposes {arch}, which the study does not hold")
        return self.candidates[arch.arch_id]


def _measurement(row: CandidateLatency) -> Measurement:
    return Measurement(
        Latency.of_row(row), row.raw_median_ms, row.anchor_median_ms, row.weight_bytes, row.workspace_bytes,
        row.sm_clock_mhz, row.temperature_c,
    )  # fmt: skip


def tables_of(recorded: RecordedStudy) -> dict[str, pd.DataFrame]:
    """The tables that a search stores, without row ids and times: trials, candidates, latencies, curves and views."""
    store = recorded.store
    candidates = [_columns(each) for each in recorded.candidates()]
    latencies = [{"number": each.number} | _columns(row) for each in recorded.candidates() for row in each.latencies]
    points = [
        {"number": each.number} | {name: value for name, value in asdict(point).items() if not _passes(name)}
        for each in recorded.candidates()
        for point in curves.from_json(store.learning_curve(each.trial_id))
    ]
    trials = [
        {
            "number": trial.number, "state": trial.state.name, "params": trial.params, "constraints": trial.constraints,
            "objectives": trial.values,  # noqa: PD011
            "attributes": {k: v for k, v in trial.user_attrs.items() if k not in ATTRIBUTES_OF_TIME},
        }
        for trial in store.load_optuna_study(recorded.name).get_trials(deepcopy=False)
    ]  # fmt: skip
    views = {"evaluations": recorded.evaluations(), "front": recorded.front()}
    return {
        "trials": pd.DataFrame(trials), "candidates": pd.DataFrame(candidates), "latencies": pd.DataFrame(latencies),
        "curves": pd.DataFrame(points),
        **{name: view.drop(columns=[c for c in view if _passes(str(c))]) for name, view in views.items()},
    }  # fmt: skip


def _columns(row: Any) -> dict[str, Any]:
    names = row.__table__.columns.keys()
    return {name: getattr(row, name) for name in names if not _passes(name)}


def _passes(column: str) -> bool:
    return (
        column in TIMES
        or column.startswith("confirmed")
        or column.endswith(("_at", "trial_id", "study_id", "device_id", "latency_id"))
    )


def main(
    storage: Annotated[str, typer.Argument(help="SQLAlchemy URL of the database that holds the recorded study.")],
    study: Annotated[str, typer.Option(help="Name of the recorded study.")] = DEFAULT_STUDY,
    workers: Annotated[int, typer.Option(min=1, help="Number of workers that searched it.")] = 1,
) -> None:
    """Search a recorded study again from its own figures, and say whether proposals and stored columns are the same."""
    store = Store.open(storage, create=False)
    if store is None:
        raise typer.BadParameter(f"{storage}: holds no studies", param_hint="STORAGE")
    recorded = RecordedStudy.open(store, study)
    before = tables_of(recorded)
    states = [candidate.state for candidate in recorded.candidates()]
    trained, stopped = sum(state in TRAINED for state in states), states.count(CandidateState.STOPPED)
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'replayed.db'}"
        evaluator = ReplayingEvaluator(recorded, workers)
        for _ in range(len(evaluator.interrupted) + 1):
            with contextlib.suppress(KeyboardInterrupt):
                run(replace(recorded.config, budget=trained, storage=url, confirm=0), evaluator)
        again = Store.open(url, create=False)
        assert again is not None
        after = tables_of(RecordedStudy.open(again, study))
        again.close()
    # What was confirmed was trained with other seeds, whose results cannot be replayed.
    compared = [name for name in before if name != "front" or recorded.row.confirmed_at is None]
    differing = [name for name in compared if not _same(before[name], after[name])]
    for name in differing:
        print(f"{name}: {len(before[name])} rows of {list(before[name])}")
        print(f"  now {len(after[name])} rows of {list(after[name])}")
        if before[name].shape == after[name].shape and list(before[name]) == list(after[name]):
            print(before[name].reset_index(drop=True).compare(after[name].reset_index(drop=True)).head().to_string())
    counts = f"{trained} candidates, " + (f"{stopped} of them given up, " if stopped else "")
    print(f"{counts}{len(before['trials'])} trials: " + ("different" if differing else "the same"))
    raise typer.Exit(bool(differing))


def _same(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    return list(one) == list(other) and one.reset_index(drop=True).equals(other.reset_index(drop=True))


if __name__ == "__main__":
    typer.run(main)
