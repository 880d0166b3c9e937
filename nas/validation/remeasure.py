"""Repeated measurement of a finished study: of its front, or of all its candidates in another deployment."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict

from kernels.device_info import DeviceInfo
from nas.config import LatencyConfig
from nas.errors import CandidateFailed, UsageError, memory_may_run_out
from nas.latency.block_meter import BlockMeter
from nas.latency.block_table import BlockTable
from nas.latency.device_profile import find_or_measure_profile
from nas.latency.devices import anchor_must_run, check_device
from nas.latency.isolation import meter_for
from nas.latency.values import Measurement
from nas.locks import device_lock
from nas.recorded import RecordedStudy, deployment_of
from nas.reporting import Note
from nas.search.front_measurement import FrontChanges, measure_front
from nas.search.rows import latency_row
from search_spaces import ArchSpec
from studies import CandidateState, LatencyStage, Owner


def remeasure(recorded: RecordedStudy, config: LatencyConfig, everything: bool, note: Note) -> FrontChanges | None:
    """Measure a study's candidates again, in its own deployment or in another one.

    In the study's own deployment the front's members are measured in turns with one another. In another one all
    complete candidates that were not measured there yet come first, and then the members of their front there. These
    latencies are corrected to the anchor's in the block latency table, so that those of several days and studies can
    be compared.

    Args:
        config: the deployment, and how precisely to measure.
        everything: whether to measure all complete candidates, also those that were measured before.
        note: function that takes a line on the progress.

    Raises:
        UsageError: the device is not here or does not run the engine, the engine does not run the anchor or a member of
            the front, or the study has no complete candidate.
        studies.StorageError: a process searches the study.
    """
    device = check_device(config, note)
    store, study_id, name = recorded.store, recorded.study_id, recorded.name
    complete = [candidate for candidate in recorded.candidates() if candidate.state == CandidateState.COMPLETE]
    if not complete:
        raise UsageError(f"--study {name}: has no complete candidate")
    info = DeviceInfo.of(device)
    here = deployment_of(config, store.devices.id_of(asdict(info)))
    at_home = here == recorded.deployment
    limit_ms = recorded.config.limits.latency_ms if at_home else None
    lacking = [candidate for candidate in complete if everything or candidate.latency_in(here) is None]
    before = here.rows_of(store.front(name))
    owner = Owner.me()
    store.ownership.claim(study_id, owner)
    try:
        lock = device_lock(device)
        find_or_measure_profile(store, config, waiting=note)
        with anchor_must_run(config), lock.measuring(note), memory_may_run_out():
            anchor, reference_ms = recorded.anchor, recorded.row.anchor_ms
            if not at_home:
                reference_ms = BlockTable(store, info, config).anchor_ms(
                    anchor, lambda references_ms: BlockMeter(config, references_ms).measure_anchor(anchor)
                )
            meter = meter_for(config, anchor, reference_ms)

        def measure(archs: Sequence[ArchSpec]) -> list[Measurement]:
            with lock.measuring(note):
                return meter.measure_together(archs)

        with closing(meter):
            for number, candidate in enumerate(lacking, start=1):
                try:
                    (latency,) = measure([ArchSpec.from_json(candidate.arch)])
                except CandidateFailed as error:
                    note(f"{number}/{len(lacking)}  trial {candidate.number}: failed ({error})")
                    continue
                # A second latency counts as final, so that it replaces one that was measured in turns before.
                stage = LatencyStage.SEARCH if candidate.latency_in(here) is None else LatencyStage.FINAL
                store.add_latencies(study_id, [latency_row(candidate.trial_id, latency, here, stage, limit_ms)])
                note(f"{number}/{len(lacking)}  trial {candidate.number}: {latency.median_ms:.4f} ms")
            note("measuring the front in turns")
            try:
                return measure_front(recorded, here, measure, again=True, limit_ms=limit_ms, before=before)
            except CandidateFailed as error:
                # Each member ran before, and now one does not.
                raise UsageError(f"--study {name}: its front could not be measured in turns ({error})") from error
    finally:
        store.ownership.release(study_id, owner)
