"""Measuring candidates of a finished study again: its front, in turns with one another, or all of them elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import pandas as pd

import studies
from kernels.timing import DeviceInfo
from nas import profile
from nas.config import LatencyConfig, moved
from nas.errors import CandidateFailed, UsageError
from nas.evaluate import check_device
from nas.isolation import meter_for
from nas.latency import Latency
from nas.locks import device_lock
from search_spaces import ArchSpec
from studies import CandidateState, LatencyStage, Owner, Store

Measure = Callable[[Sequence[ArchSpec]], list[Latency]]

# Networks that are sampled in turns: all their weights and graphs are in memory together.
TOGETHER = 24
# A member that turns out slower may let others in, which are then measured too, and so on.
MAX_ROUNDS = 5


@dataclass(frozen=True)
class Changes:
    """What measuring the front again has changed.

    Args:
        ratios: new over old latency of each candidate that was measured.
        left, joined: numbers of the trials that are no longer, or newly, on the front.
        capped: how many ended at the time cap.
        size: of the front now.
        config, device_id: the deployment.
    """

    ratios: tuple[float, ...]
    left: tuple[int, ...]
    joined: tuple[int, ...]
    capped: int
    size: int
    config: LatencyConfig
    device_id: int

    def __str__(self) -> str:
        moved = f"{min(self.ratios) - 1:+.1%} to {max(self.ratios) - 1:+.1%}, median {median(self.ratios) - 1:+.1%}"
        words = [f"front measured again, {len(self.ratios)} networks in turns: latencies moved by {moved}"]
        words += [f"{_trials(self.left)} left it"] if self.left else []
        words += [f"{_trials(self.joined)} joined it"] if self.joined else []
        words += ["it stays as it was"] if not self.left and not self.joined else []
        words += [f"{self.capped} were ended by the time cap"] if self.capped else []
        return "; ".join(words)


def _trials(numbers: Sequence[int]) -> str:
    return f"trial{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def deployment_columns(config: LatencyConfig, device_id: int) -> dict[str, Any]:
    """What tells one deployment's rows of the views from another's."""
    return {
        "device_id": device_id, "engine": config.engine, "dtype": config.dtype, "batch_size": config.batch_size,
        "resolution": config.resolution, "threads": config.threads,
    }  # fmt: skip


def of_deployment(rows: pd.DataFrame, config: LatencyConfig, device_id: int) -> pd.DataFrame:
    """The rows of a view that are one deployment's."""
    for column, value in deployment_columns(config, device_id).items():
        rows = rows[rows[column] == value]
    return rows


def latency_row(
    trial_id: int, latency: Latency, config: LatencyConfig, device_id: int, stage: LatencyStage
) -> studies.Latency:
    """A measurement as the database has it. How long a compiler took is shown, and no property of the network."""
    return studies.Latency(
        trial_id=trial_id, stage=stage, **deployment_columns(config, device_id),
        median_ms=latency.median_ms, p20_ms=latency.p20_ms, p80_ms=latency.p80_ms, repeats=latency.repeats,
        raw_median_ms=latency.raw_median_ms, anchor_median_ms=latency.anchor_median_ms,
        weight_bytes=latency.weight_bytes, workspace_bytes=latency.workspace_bytes,
        interval_share=latency.interval_share, capped=latency.capped, throttled=latency.throttled,
        sm_clock_mhz=latency.sm_clock_mhz, temperature_c=latency.temperature_c,
    )  # fmt: skip


def remeasure_front(
    store: Store, name: str, study_id: int, config: LatencyConfig, device_id: int, measure: Measure,
    again: bool = False,
) -> Changes | None:  # fmt: skip
    """Measure the members of a front again, until all its members were; None where all have been, or it is empty.

    Args:
        name: of the study.
        config, device_id: the deployment whose front it is.
        measure: several architectures in turns.
        again: also where all were measured already.
    """
    front = of_deployment(store.front(name), config, device_id)
    before = front.set_index("number")["latency_ms"]
    if front.empty or (not again and (front["latency_stage"] == LatencyStage.FINAL).all()):
        return None
    found: dict[int, Latency] = {}
    searched: dict[int, float] = {}
    lacking = front
    for _ in range(MAX_ROUNDS):
        rows = []
        for begin in range(0, len(lacking), TOGETHER):
            group = lacking.iloc[begin : begin + TOGETHER]
            latencies = measure([ArchSpec.from_json(text) for text in group["arch"]])
            for (_, row), latency in zip(group.iterrows(), latencies, strict=True):
                found[int(row["number"])], searched[int(row["number"])] = latency, float(row["latency_ms"])
                rows.append(latency_row(int(row["trial_id"]), latency, config, device_id, LatencyStage.FINAL))
        store.add_latencies(study_id, rows)
        front = of_deployment(store.front(name), config, device_id)
        lacking = front[~front["number"].isin(found.keys())]
        if lacking.empty:
            break
    now = set(front["number"])
    return Changes(
        ratios=tuple(found[number].median_ms / searched[number] for number in found),
        left=tuple(sorted(set(before.index) - now)),
        joined=tuple(sorted(now - set(before.index))),
        capped=sum(latency.capped for latency in found.values()),
        size=len(front),
        config=config,
        device_id=device_id,
    )


def remeasure(
    store: Store, name: str, changes: dict[str, Any], everything: bool, note: Callable[[str], None]
) -> Changes | None:
    """Measure a study's candidates again, where it was searched or elsewhere.

    In the study's own deployment the front's members are measured, elsewhere all that are complete and were not
    measured there yet, and then the members of the front that they make there.

    Args:
        changes: fields of `LatencyConfig` that differ from the study's.
        everything: measure all complete candidates, also where they were measured before.
        note: told what is done.

    Raises:
        UsageError: the device is not here, does not run the engine, the engine does not run the anchor or the front in
            turns, or the study has no complete candidate.
        studies.StorageError: a process searches the study.
    """
    row = store.find_study(name)
    assert row is not None
    own = LatencyConfig(**json.loads(row.config)["latency"])
    config = moved(own, **changes)
    device = check_device(config)
    rows = [candidate for candidate in store.candidates(row.study_id) if candidate.state == CandidateState.COMPLETE]
    if not rows:
        raise UsageError(f"--study {name}: has no complete candidate")
    info = asdict(DeviceInfo.of(device))
    device_id = store.device_id(info)
    here = deployment_columns(config, device_id)
    at_home = here == deployment_columns(own, row.device_id)
    lacking = [candidate for candidate in rows if everything or candidate.latency_on(**here) is None]
    owner = Owner.me()
    store.claim(row.study_id, owner)
    try:
        profile.find_or_measure(store, device, config.dtype, config.threads)
        lock = device_lock(device)

        def waiting() -> None:
            note("waiting for another process that measures or trains on this device")

        try:
            with lock.measuring(waiting):
                meter = meter_for(config, ArchSpec.from_json(row.anchor), row.anchor_ms if at_home else None)
        except CandidateFailed as error:
            raise UsageError(f"--engine {config.engine}: does not run even the anchor network ({error})") from error

        def measure(archs: Sequence[ArchSpec]) -> list[Latency]:
            with lock.measuring(waiting):
                return meter.measure_together(archs)

        with closing(meter):
            for number, candidate in enumerate(lacking, start=1):
                try:
                    (latency,) = measure([ArchSpec.from_json(candidate.arch)])
                except CandidateFailed as error:
                    note(f"{number}/{len(lacking)}  trial {candidate.number}: failed ({error})")
                    continue
                # Measured a second time it is shown, also in the place of an older one that was measured in turns.
                stage = LatencyStage.SEARCH if candidate.latency_on(**here) is None else LatencyStage.FINAL
                added = latency_row(candidate.trial_id, latency, config, device_id, stage)
                store.add_latencies(row.study_id, [added])
                note(f"{number}/{len(lacking)}  trial {candidate.number}: {latency.median_ms:.4f} ms")
            note("measuring the front in turns")
            try:
                return remeasure_front(store, name, row.study_id, config, device_id, measure, again=True)
            except CandidateFailed as error:
                # Each ran alone before; together they may not.
                raise UsageError(f"--study {name}: its front could not be measured in turns ({error})") from error
    finally:
        store.release(row.study_id, owner)
