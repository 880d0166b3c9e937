"""Measuring candidates of a finished study again: its front, in turns with one another, or all of them elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import pandas as pd

import studies
from kernels.timing import DeviceInfo
from nas.config import LatencyConfig, moved
from nas.errors import CandidateFailed, UsageError, memory_may_run_out
from nas.latency.block_meter import BlockMeter
from nas.latency.block_table import BlockTable
from nas.latency.device_profile import find_or_measure_profile
from nas.latency.devices import check_device
from nas.latency.isolation import meter_for
from nas.latency.parts import network_shape
from nas.latency.values import Measurement
from nas.locks import WAITING, device_lock
from search_spaces import ArchSpec
from studies import CandidateState, LatencyStage, Owner, Store

Measure = Callable[[Sequence[ArchSpec]], list[Measurement]]

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
        over_limit: numbers of the trials that turned out to break the study's limit on the latency.
        size: of the front now.
        unmeasured: members that came on the front last, and were not measured again.
        config, device_id: the deployment.
    """

    ratios: tuple[float, ...]
    left: tuple[int, ...]
    joined: tuple[int, ...]
    capped: int
    over_limit: tuple[int, ...]
    size: int
    unmeasured: int
    config: LatencyConfig
    device_id: int

    def __str__(self) -> str:
        if len(self.ratios) == 1:
            words = [f"front measured again, one network: its latency moved by {self.ratios[0] - 1:+.1%}"]
        else:
            moved = f"{min(self.ratios) - 1:+.1%} to {max(self.ratios) - 1:+.1%}, median {median(self.ratios) - 1:+.1%}"
            words = [f"front measured again, {len(self.ratios)} networks in turns: latencies moved by {moved}"]
        words += [f"{_trials(self.left)} left it"] if self.left else []
        words += [f"{_trials(self.joined)} joined it"] if self.joined else []
        words += ["it stays as it was"] if not self.left and not self.joined else []
        words += [f"{_trials(self.over_limit)} broke the latency limit"] if self.over_limit else []
        words += [f"{self.unmeasured} of the front were not measured again"] if self.unmeasured else []
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
    trial_id: int, measured: Measurement, config: LatencyConfig, device_id: int, stage: LatencyStage,
    limit_ms: float | None = None,
) -> studies.Latency:  # fmt: skip
    """A measurement as the database has it. How long a compiler took is shown, and no property of the network."""
    return studies.Latency(
        trial_id=trial_id, stage=stage, **deployment_columns(config, device_id),
        **asdict(measured.latency), raw_median_ms=measured.raw_median_ms, anchor_median_ms=measured.anchor_median_ms,
        weight_bytes=measured.weight_bytes, workspace_bytes=measured.workspace_bytes,
        sm_clock_mhz=measured.sm_clock_mhz, temperature_c=measured.temperature_c,
        over_limit=limit_ms is not None and measured.median_ms > limit_ms,
    )  # fmt: skip


def remeasure_front(
    store: Store, name: str, study_id: int, config: LatencyConfig, device_id: int, measure: Measure,
    again: bool = False, limit_ms: float | None = None, before: pd.DataFrame | None = None,
) -> Changes | None:  # fmt: skip
    """Measure the members of a front again, until all its members were; None where all have been, or it is empty.

    They are measured in turns with each other; those whom a slower one lets in, in turns among themselves.

    Args:
        name: of the study.
        config, device_id: the deployment whose front it is.
        measure: several architectures in turns.
        again: also where all were measured already.
        limit_ms: the study's limit in this deployment: who is slower leaves the front.
        before: the front that changes are told of, if it is not that of now.

    Raises:
        CandidateFailed: a member does not run, not even alone.
    """
    front = of_deployment(store.front(name), config, device_id)
    old = (front if before is None or before.empty else before).set_index("number")["latency_ms"]
    if front.empty or (not again and (front["latency_stage"] == LatencyStage.FINAL).all()):
        return None
    found: dict[int, Measurement] = {}
    searched: dict[int, float] = {}
    lacking = front
    for _ in range(MAX_ROUNDS):
        rows = []
        for begin in range(0, len(lacking), TOGETHER):
            group = lacking.iloc[begin : begin + TOGETHER]
            latencies = _in_turns(measure, [ArchSpec.from_json(text) for text in group["arch"]])
            for (_, row), latency in zip(group.iterrows(), latencies, strict=True):
                number = int(row["number"])
                found[number], searched[number] = latency, float(old.get(number, row["latency_ms"]))
                added = latency_row(int(row["trial_id"]), latency, config, device_id, LatencyStage.FINAL, limit_ms)
                rows.append(added)
        store.add_latencies(study_id, rows)
        front = of_deployment(store.front(name), config, device_id)
        lacking = front[~front["number"].isin(found.keys())]
        if lacking.empty:
            break
    now = set(front["number"])
    return Changes(
        ratios=tuple(found[number].median_ms / searched[number] for number in found),
        left=tuple(sorted(set(old.index) - now)),
        joined=tuple(sorted(now - set(old.index))),
        capped=sum(measured.latency.capped for measured in found.values()),
        over_limit=tuple(
            sorted(number for number, latency in found.items() if limit_ms and latency.median_ms > limit_ms)
        ),
        size=len(front),
        unmeasured=len(lacking),
        config=config,
        device_id=device_id,
    )


def _in_turns(measure: Measure, archs: Sequence[ArchSpec]) -> list[Measurement]:
    """As many at once as run together: all their weights and graphs are in memory."""
    try:
        return measure(archs)
    except CandidateFailed:
        if len(archs) == 1:
            raise
    half = len(archs) // 2
    return _in_turns(measure, archs[:half]) + _in_turns(measure, archs[half:])


@dataclass(frozen=True)
class Remeasuring:
    """What is to be measured again, checked before anything is.

    Args:
        config: the deployment.
        own: that of the study.
        row: the study's.
        limit_ms: the study's limit on latency in its own deployment.
    """

    config: LatencyConfig
    own: LatencyConfig
    row: studies.Study
    limit_ms: float | None


def plan(store: Store, name: str, changes: dict[str, Any]) -> Remeasuring:
    """A study's deployment with some fields changed.

    Raises:
        ValueError: of a field's value, see `LatencyConfig`.
    """
    row = store.find_study(name)
    assert row is not None
    stored = json.loads(row.config)
    own = LatencyConfig(**stored["latency"])
    return Remeasuring(moved(own, **changes), own, row, stored["limits"]["latency_ms"])


def remeasure(
    store: Store, name: str, planned: Remeasuring, everything: bool, note: Callable[[str], None]
) -> Changes | None:
    """Measure a study's candidates again, where it was searched or elsewhere.

    In the study's own deployment the front's members are measured, elsewhere all that are complete and were not
    measured there yet, and then the members of the front that they make there. Elsewhere latencies are corrected to the
    anchor's in the block latency table, so that those of several days, and studies, compare.

    Args:
        planned: see `plan`.
        everything: measure all complete candidates, also where they were measured before.
        note: told what is done.

    Raises:
        UsageError: the device is not here, does not run the engine, the engine does not run the anchor or one of the
            front, or the study has no complete candidate.
        studies.StorageError: a process searches the study.
    """
    config, row = planned.config, planned.row
    device = check_device(config)
    rows = [candidate for candidate in store.candidates(row.study_id) if candidate.state == CandidateState.COMPLETE]
    if not rows:
        raise UsageError(f"--study {name}: has no complete candidate")
    info = DeviceInfo.of(device)
    device_id = store.device_id(asdict(info))
    here = deployment_columns(config, device_id)
    at_home = here == deployment_columns(planned.own, row.device_id)
    limit_ms = planned.limit_ms if at_home else None
    lacking = [candidate for candidate in rows if everything or candidate.latency_on(**here) is None]
    before = of_deployment(store.front(name), config, device_id)
    owner = Owner.me()
    store.claim(row.study_id, owner)
    try:
        lock, waiting = device_lock(device), partial(note, WAITING)
        find_or_measure_profile(store, config, waiting=waiting)
        anchor = ArchSpec.from_json(row.anchor)
        try:
            with lock.measuring(waiting), memory_may_run_out():
                reference_ms = row.anchor_ms if at_home else _anchor_ms(BlockTable(store, info, config), anchor)
                meter = meter_for(config, anchor, reference_ms)
        except CandidateFailed as error:
            raise UsageError(f"--engine {config.engine}: does not run even the anchor network ({error})") from error

        def measure(archs: Sequence[ArchSpec]) -> list[Measurement]:
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
                added = latency_row(candidate.trial_id, latency, config, device_id, stage, limit_ms)
                store.add_latencies(row.study_id, [added])
                note(f"{number}/{len(lacking)}  trial {candidate.number}: {latency.median_ms:.4f} ms")
            note("measuring the front in turns")
            try:
                return remeasure_front(
                    store, name, row.study_id, config, device_id, measure, again=True, limit_ms=limit_ms, before=before
                )
            except CandidateFailed as error:
                # Each ran before; now one does not.
                raise UsageError(f"--study {name}: its front could not be measured in turns ({error})") from error
    finally:
        store.release(row.study_id, owner)


def _anchor_ms(table: BlockTable, anchor: ArchSpec) -> float:
    """The anchor's latency on the table's scale, measured if it lacks there; the caller holds the device's lock."""
    known = table.median_ms(network_shape(str(anchor), table.config))
    if known is not None:
        return known
    measured = BlockMeter(table.config, table.references_ms).measure_anchor(anchor)
    table.add([measured])
    return measured.latency.median_ms
