"""Longer trainings of a study's front and of some dominated candidates, to check the ranking by the proxy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table

from nas import pareto
from nas.config import is_mirrored
from nas.errors import CandidateFailed, UsageError, of_this_version
from nas.latency.devices import check_device
from nas.recorded import RecordedStudy
from nas.reporting import Note, console_table
from nas.training.data import ImageData
from nas.training.pool import Trainer, TrainingJob, fill, storable
from nas.training.proxy import ProxyResult
from nas.validation.config import LONG, RetrainConfig
from nas.validation.contenders import ContenderKind
from nas.validation.networks import NetworkSpec
from nas.validation.ranking import Coefficient, Ranking, gain, rankings
from search_spaces import ArchSpec
from studies import CandidateTraining, TrainingStage

PROXY, PARAMS, MACS = "proxy accuracy", "params", "MACs"


@dataclass(frozen=True)
class Retrained:
    """The results of longer trainings with the same data and schedule.

    Args:
        rows: rows of the view `convfirst_retrained`, one per candidate, fastest first, with `on_front` (the
            study's) and `on_retrained_front`, among these candidates only.
        rankings: rank correlations with the longer training's accuracy, of the proxy's accuracy, parameters and MACs.
        gains: difference between the proxy's tau and that of each rival over all networks, by the rival's name.
        failed: a line for each training that failed.
        set_up: data and schedule of the trainings, in words.
    """

    rows: pd.DataFrame
    rankings: list[Ranking]
    gains: dict[str, Coefficient]
    failed: list[str]
    set_up: str


def retrain(recorded: RecordedStudy, config: RetrainConfig, note: Note = lambda line: None) -> Retrained:
    """Train the chosen candidates that were not trained yet, store the results, and compare the rankings.

    Raises:
        UsageError: there are no candidates, the study's device is not here, or the data are missing or have changed.
        studies.StorageError: the study was deleted meanwhile.
    """
    run = _Run(recorded, config, note)
    with run.trainer as trainer:
        trainer.data_file(run.anchor_resolution)
        lacking = run.lacking()
        note(f"{len(run.chosen)} networks, {len(lacking)} to be trained: {run.set_up}")
        trainer.train(lacking, run.write)
        return run.result()


class _Run:
    """The checked settings, chosen candidates and trainings of one call of `retrain`."""

    def __init__(self, recorded: RecordedStudy, config: RetrainConfig, note: Note) -> None:
        self.recorded, self.store, self.config = recorded, recorded.store, config
        searched = recorded.config
        proxy, self.seed = searched.proxy, searched.seed
        own = replace(searched.data, data_dir=config.data_dir, download=config.download)
        self.proxy = replace(proxy, steps=config.steps or LONG * proxy.steps)
        # Other images are mirrored as they would be in a search, unless the study's user decided.
        self.data = replace(
            own, source=config.data or own.source, resolution=config.resolution or own.resolution,
            to_rgb=own.to_rgb or config.to_rgb, mirror=None if own.mirror == is_mirrored(own.source) else own.mirror,
        )  # fmt: skip
        self.is_own = self.data.source == own.source and config.resolution in (None, own.resolution)
        self.anchor_resolution = config.resolution or recorded.anchor.shown(own.resolution)
        device = check_device(replace(searched.latency, engine="eager"))
        # As many images as the search had, which needed them at all resolutions.
        largest = max(searched.space.own_resolutions, default=0)
        self.trainer = Trainer(self.data, self.proxy, device, self.seed, config.workers, note, self._check, largest)
        self.fingerprint = ""

    def _check(self, data: ImageData) -> None:
        # At all resolutions the images are the same; the anchor's, which come first, stand for them.
        if data.train_images.shape[-1] != self.anchor_resolution:
            return
        self.fingerprint = data.fingerprint
        if self.is_own:
            self.recorded.check_images(self.data.source, data.fingerprint)

    @property
    def set_up(self) -> str:
        at = f"{self.data.resolution}x{self.data.resolution}"
        if self.recorded.config.space.own_resolutions and self.config.resolution is None:
            at = "each network's own resolution"
        return (
            f"{self.proxy.steps} steps of {self.proxy.batch_size} images of {self.data.source} at {at}, "
            f"learning rate {self.proxy.learning_rate:g}"
        )

    @cached_property
    def chosen(self) -> pd.DataFrame:
        """Rows of the view `convfirst_evaluations`: those of the front, and some of the others."""
        rows = self.recorded.evaluations()
        if rows.empty:
            raise UsageError(f"--study {self.recorded.name}: has no complete candidate")
        front = self.recorded.front().sort_values("accuracy", ascending=False)
        on_front = rows["trial_id"].isin(front["trial_id"])
        best = rows[rows["trial_id"].isin(front["trial_id"].head(self.config.top or len(rows)))]
        others = rows[~on_front & ~rows["latency_over_limit"].astype(bool)]
        picked = spread_over(list(others["latency_ms"]), self.config.dominated)
        if len(picked) < self.config.dominated:
            self.trainer.note(f"only {len(picked)} candidates are not on the front")
        return pd.concat([best, others.iloc[picked]])

    @cached_property
    def trial_ids(self) -> dict[str, int]:
        """The trial_id of each chosen network, by the network's name."""
        return {network.name: trial_id for trial_id, network in self.networks.items()}

    def lacking(self) -> list[TrainingJob]:
        """The missing trainings, and those that failed: memory may have run out because another process used it."""
        done = {row.trial_id for row in self._of_this_kind() if row.accuracy is not None}
        return [
            TrainingJob(network, self.proxy.steps, self.proxy.learning_rate)
            for trial_id, network in self.networks.items()
            if trial_id not in done
        ]

    @cached_property
    def networks(self) -> dict[int, NetworkSpec]:
        """The chosen networks, by trial_id.

        Raises:
            UsageError: another version of the program wrote a candidate.
        """
        with of_this_version(self.recorded.name):
            return {int(row["trial_id"]): self._network(row) for _, row in self.chosen.iterrows()}

    def _network(self, row: pd.Series) -> NetworkSpec:
        arch = ArchSpec.from_json(str(row["arch"]))
        return NetworkSpec(
            f"trial {row['number']}", ContenderKind.FOUND, int(row["number"]), arch,
            self.recorded.config.latency.engine, self.config.resolution or arch.shown(self.data.resolution),
            int(row["params"]), int(row["macs"]),
        )  # fmt: skip

    def _kind(self) -> dict[str, Any]:
        """The columns that distinguish these trainings from others, with their values, but for the resolution."""
        return {
            "data_fingerprint": self.fingerprint, "steps": self.proxy.steps, "batch_size": self.proxy.batch_size,
            "learning_rate": self.proxy.learning_rate, "seed": self.seed,
        }  # fmt: skip

    def _of_this_kind(self) -> list[CandidateTraining]:
        kind = self._kind()
        return [
            row
            for row in self.store.trainings.of_study(self.recorded.study_id, TrainingStage.RETRAINING)
            if row.trial_id in self.networks
            and row.resolution == self.networks[row.trial_id].resolution
            and all(getattr(row, key) == value for key, value in kind.items())
        ]

    def write(self, job: TrainingJob, result: ProxyResult | CandidateFailed) -> str:
        row = CandidateTraining(
            trial_id=self.trial_ids[job.network.name], stage=TrainingStage.RETRAINING, data=storable(self.data.source),
            resolution=job.network.resolution, **self._kind(),
        )  # fmt: skip
        worth = fill(row, result)
        self.store.trainings.add(row)
        return f"{job.network.name}: {worth}"

    def result(self) -> Retrained:
        """The trainings of the chosen networks, and how well the predictors rank them."""
        rows = self.store.trainings.retrained(self.recorded.name)
        for key, value in self._kind().items():
            column = "retrained_" + key.removeprefix("data_")
            rows = rows[rows[column] == value]
        rows = self.recorded.deployment.rows_of(rows)
        sizes = rows["trial_id"].map({trial_id: network.resolution for trial_id, network in self.networks.items()})
        # Of trials that were not chosen there is no size.
        rows = rows[rows["retrained_resolution"] == sizes].sort_values(["latency_ms", "number"])
        latency_ms, accuracy = list(rows["latency_ms"]), list(rows["retrained_accuracy"])
        rows = rows.assign(
            on_front=rows["trial_id"].isin(self.recorded.front()["trial_id"]),
            on_retrained_front=undominated(accuracy, latency_ms),
        )
        predictors = {PROXY: list(rows["accuracy"]), PARAMS: list(rows["params"]), MACS: list(rows["macs"])}
        rows_of_kind = self._of_this_kind()
        failed = [f"{self.networks[row.trial_id].name}: {row.reason}" for row in rows_of_kind if row.reason is not None]
        ranked = rankings(predictors, accuracy, latency_ms)
        gains = {rival: gain(predictors[PROXY], predictors[rival], accuracy) for rival in (PARAMS, MACS)}
        return Retrained(rows, ranked, gains, failed, self.set_up)


def spread_over(latencies_ms: Sequence[float], count: int) -> list[int]:
    """At most `count` indices of candidates, spread evenly over the logarithm of the latency."""
    if count >= len(latencies_ms):
        return list(range(len(latencies_ms)))
    logs = np.log(np.asarray(latencies_ms, dtype=float))
    left = list(range(len(logs)))
    picked = []
    for target in np.linspace(logs.min(), logs.max(), count):
        nearest = min(left, key=lambda index: (abs(logs[index] - target), index))
        picked.append(nearest)
        left.remove(nearest)
    return sorted(picked)


def undominated(accuracy: Sequence[float], latency_ms: Sequence[float]) -> list[bool]:
    """For each network, whether it is on the front: no other is better in one objective and as good in the other."""
    members = set(pareto.front(accuracy, latency_ms))
    return [index in members for index in range(len(accuracy))]


# -- For the terminal --------------------------------------------------------------------------------------------------


def tables(found: Retrained, title: str) -> list[Table]:
    """A table of the networks and one of the rankings, which fit into 80 columns."""
    networks = console_table(
        title, "trial", "latency ms", "proxy", "longer", "front was", "front is", "params k", "MMACs"
    )
    for row in found.rows.to_dict("records"):
        networks.add_row(
            str(row["number"]), f"{row['latency_ms']:.4f}", f"{row['accuracy']:.1%}",
            f"{row['retrained_accuracy']:.1%}", "yes" if row["on_front"] else "",
            "yes" if row["on_retrained_front"] else "", f"{row['params'] / 1e3:,.0f}", f"{row['macs'] / 1e6:,.1f}",
        )  # fmt: skip
    ranks = console_table(
        "Ranking of the longer trainings (95 % intervals)", "networks", "count", "by", "Kendall's tau",
        "Spearman's rho", text=("networks", "by", "Kendall's tau", "Spearman's rho"),
    )  # fmt: skip
    for each in found.rankings:
        ranks.add_row(each.band, str(each.count), each.predictor, str(each.kendall), str(each.spearman))
    return [networks, ranks]


def remarks(found: Retrained) -> list[str]:
    """Lines that say which trainings failed, how the front changed, and what the rankings show."""
    rows = found.rows
    overall = {each.predictor: each.kendall for each in found.rankings if each.band == "all"}
    lines = list(found.failed)
    if rows.empty:
        return [*lines, "No network was trained."]
    left = [str(number) for number in rows[rows["on_front"] & ~rows["on_retrained_front"]]["number"]]
    joined = [str(number) for number in rows[~rows["on_front"] & rows["on_retrained_front"]]["number"]]
    moved = [f"{which} {'trial' if len(numbers) == 1 else 'trials'} {', '.join(numbers)}"
             for which, numbers in (("left by", left), ("joined by", joined)) if numbers]  # fmt: skip
    lines.append("The front among these " + (f"is {' and '.join(moved)}." if moved else "stays as it was."))
    if np.isnan(overall[PROXY].value):
        return [*lines, "The accuracies do not vary: nothing can be said of the ranking."]
    for rival, gained in found.gains.items():
        if np.isnan(gained.value):
            continue
        how = "better than" if gained.low > 0 else "worse than" if gained.high < 0 else "neither better nor worse than"
        taus = f"{overall[PROXY].value:+.2f} to {overall[rival].value:+.2f}"
        lines.append(f"The proxy ranks {how} {rival} alone: tau {taus}, a difference of {gained}.")
    return lines
