"""The notes of all trials and the files of the front's members, which the dashboard shows beside its own figures."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from nas import pareto
from nas.display import notes
from nas.display.efficiency_plots import plot_efficiency_gap
from nas.display.study_plots import plot_learning_curve
from nas.latency.analysis import from_table
from nas.latency.block_table import BlockTable
from nas.recorded import RecordedStudy
from nas.training import curves
from search_spaces import ArchSpec
from search_spaces.timm_config import timm_config
from studies import CandidateState, Store, TrainingStage
from studies.display import Artifact, Artifacts, update_notes

# Greatest number of members of a front that have files: drawing those of one takes a good part of a second.
MOST_MEMBERS = 40


def show(recorded: RecordedStudy, folder: Path) -> int:
    """Bring a study's notes and the files of its front's members up to date; return how many files were made.

    Nothing is measured. A user's own edits of notes are kept.

    Args:
        folder: folder of the files.
    """
    _write_notes(recorded)
    front = recorded.front()
    if front.empty:
        return 0
    table = BlockTable(recorded.store, recorded.device, recorded.config.latency)
    artifacts = Artifacts(recorded.store.optuna_storage, recorded.study_id, folder)
    front = front.iloc[pareto.evenly_spaced(len(front), MOST_MEMBERS)]
    made = 0
    for _, row in front.iterrows():
        made += sum(artifacts.attach(int(row["trial_id"]), each) for each in _artifacts(recorded.store, row, table))
    artifacts.keep_only({int(trial_id) for trial_id in front["trial_id"]})
    return made


def _write_notes(recorded: RecordedStudy) -> None:
    bodies: dict[int | None, str] = {None: notes.study_note(recorded)}
    candidates = recorded.candidates()
    stored = []
    if any(candidate.state == CandidateState.STOPPED for candidate in candidates):
        stored = recorded.store.trainings.of_study(recorded.study_id, TrainingStage.SEARCH)
    curves_of = {training.trial_id: training.curve for training in stored}
    for candidate in candidates:
        latency, curve = candidate.latency_in(recorded.deployment), curves_of.get(candidate.trial_id)
        bodies[candidate.trial_id] = notes.trial_note(candidate, latency, recorded.config, curve)
    for trial in recorded.store.load_optuna_study(recorded.name).get_trials(deepcopy=False):
        first = trial.user_attrs.get(notes.DUPLICATE_OF)
        if first is not None:
            bodies[trial._trial_id] = notes.duplicate_note(ArchSpec.parse(trial.user_attrs["arch"]), first)
    update_notes(recorded.store.optuna_storage, recorded.study_id, bodies)


def _artifacts(store: Store, row: pd.Series, table: BlockTable) -> list[Artifact]:
    """The files of a member of the front.

    Args:
        row: row of the view `pareto_front`.
    """
    config, arch, number = table.config, ArchSpec.from_json(row["arch"]), int(row["number"])
    prefix = f"t{number:04d}"
    ours = {"arch": str(arch), "arch_id": arch.arch_id}
    as_json = json.dumps(
        timm_config(arch, config.num_classes, arch.shown(config.resolution), convfirst=ours), indent=2
    ).encode()
    artifacts = [Artifact(f"{prefix}_config.json", _stamp(as_json.decode()), lambda: as_json)]
    curve = curves.from_json(store.learning_curve(int(row["trial_id"])))
    # The curve is that of the training by which the search chose it.
    accuracy = float(row["searched_accuracy"])
    title = f"trial {number}: {arch}"
    if curve:
        artifacts.append(Artifact(
            f"{prefix}_learning_curve.png", _stamp(len(curve), accuracy),
            _drawn(lambda path: plot_learning_curve(curve, accuracy, title, path)),
        ))  # fmt: skip
    latency_ms = float(row["latency_ms"])
    efficiency = from_table(table, arch, f"trial {number}", latency_ms)
    if efficiency is not None:
        artifacts.append(Artifact(
            f"{prefix}_efficiency_gap.png", _stamp(latency_ms, [part.seconds for part in efficiency.rows]),
            _drawn(lambda path: plot_efficiency_gap([efficiency], path)),
        ))  # fmt: skip
    return artifacts


def _stamp(*values: object) -> str:
    """A digest of the values from which a file is made."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _drawn(draw: Callable[[Path], None]) -> Callable[[], bytes]:
    """A function that returns the bytes of the PNG that `draw` makes."""

    def make() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "figure.png"
            draw(path)
            return path.read_bytes()

    return make
