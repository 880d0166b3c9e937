"""Opening a study to search it: it is refused or claimed for this process; a new one is made whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from typing import Any

import optuna

import studies
from kernels.device_info import DeviceInfo
from nas.config import LatencyConfig, SearchConfig, respelled
from nas.display import notes
from nas.errors import FieldError, UsageError
from nas.latency.block_table import BlockTable
from nas.latency.device_profile import machine, store_profile
from nas.latency.launches import arch_launches_line
from nas.options import NEW_NAME, Keep, options
from nas.recorded import RecordedStudy
from nas.reporting import Note
from nas.search.evaluation import Evaluator
from nas.search.live_study import LiveStudy
from nas.search.pilot import Adjustable, Piloting, wants_pilot
from nas.training.weights import Weights, weight_folder
from studies import Owner, Store, guarded
from studies.display import write_note


def differences(stored: Any, now: Any, path: str = "") -> list[str]:
    """A line `name: study has A, now B` for each value that differs between two nested plain values."""
    if isinstance(stored, dict) and isinstance(now, dict):
        lines = []
        for key in dict.fromkeys([*stored, *now]):
            lines += differences(stored.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        return lines
    if isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now) and path.endswith("stages"):
        lines = []
        for number, (one, other) in enumerate(zip(stored, now, strict=True), start=1):
            lines += differences(one, other, f"{path}.{number}")
        return lines
    return [] if stored == now else [f"{path}: study has {stored}, now {now}"]


def plain(value: Any) -> Any:
    """A value after a round trip through JSON: tuples become lists, and dataclasses mappings."""
    return json.loads(json.dumps(value, default=asdict))


def check_same_config(config: SearchConfig, recorded: RecordedStudy) -> None:
    """Refuse a study that was begun with another configuration.

    Raises:
        UsageError: the configurations differ.
    """
    now = respelled(config, recorded.config)
    if lines := differences(_compared(recorded.identity), _compared(plain(now.identity()))):
        raise other_configuration(config.study, lines)


def other_configuration(study: str, lines: Sequence[str]) -> UsageError:
    """The error for a study that was begun with another configuration; each of `lines` names a difference."""
    return UsageError(
        f"--study {study}: was begun with another configuration ({'; '.join(lines)}); "
        "use its settings, or another --study"
    )


def _compared(identity: dict[str, Any]) -> dict[str, Any]:
    """The part of a stored configuration that must stay the same: how precisely a latency is measured may change."""
    declared = options(LatencyConfig)
    latency = {
        name: value
        for name, value in identity["latency"].items()
        if name not in declared or declared[name].keep is Keep.FIXED
    }
    return {**identity, "latency": latency}


@contextmanager
def _existing(config: SearchConfig) -> Iterator[RecordedStudy | None]:
    """The study that `config` names, open while the block runs; None where there is none.

    Raises:
        UsageError: it was begun with another configuration.
    """
    store = Store.open(config.storage, create=False)
    try:
        recorded = RecordedStudy.find(store, config.study) if store else None
        if recorded:
            check_same_config(config, recorded)
        yield recorded
    finally:
        if store:
            store.close()


def refuse_early(config: SearchConfig) -> SearchConfig:
    """Refuse a search where that is possible before data are loaded.

    Returns:
        The configuration, whose images are read in the way in which a study that is there already reads them.

    Raises:
        UsageError: the study was begun with another configuration, or every network of the space breaks a limit.
        FieldError: a new study would have a name that is hard to print or to store.
        StorageError: the storage cannot be used, or another process searches the study.
    """
    _require_possible(config)
    studies.check_writable(config.storage)
    studies.check_free(config.storage, config.study)
    with _existing(config) as recorded:
        if recorded:
            studies.check_claimable(recorded.row.owner, Owner.me())
            reading = recorded.config.data.reading
            return replace(config, data=replace(config.data, reading=reading))
        if not NEW_NAME.hold(config.study):
            # A study of such a name that is there already can still be read and continued.
            raise FieldError(SearchConfig, "study", config.study, NEW_NAME.expected)
    return config


def known_device(config: SearchConfig) -> DeviceInfo | None:
    """The device of the study that `config` names; None where there is no such study."""
    with _existing(config) as recorded:
        return recorded.device if recorded else None


def _require_possible(config: SearchConfig) -> None:
    limits, latency = config.limits, config.latency
    if limits.params is None and limits.macs is None:
        return
    least, _ = config.space.cost_range(latency.resolution, latency.num_classes)
    for flag, limit, smallest in (
        ("--max-params", limits.params, least.params),
        ("--max-macs", limits.macs, least.macs),
    ):
        if limit is not None and limit < smallest:
            raise UsageError(f"{flag} {limit}: the smallest value in the space {config.space.name!r} is {smallest:,}")


def take_over(config: SearchConfig) -> None:
    """Remove the claim on a study of a process on another host that is gone.

    Raises:
        UsageError: the study was begun with another configuration.
        StorageError: its process runs on this host.
    """
    with _existing(config) as recorded:
        if recorded:
            recorded.store.ownership.disown(recorded.study_id)


def check_same_set_up(config: SearchConfig, recorded: RecordedStudy, evaluator: Evaluator) -> None:
    """Refuse a study that was measured elsewhere.

    Raises:
        UsageError: the study's figures come from another device, other versions or other data.
    """
    if lines := differences(asdict(recorded.device), asdict(evaluator.device)):
        raise UsageError(
            f"--study {config.study}: its latencies were measured elsewhere ({'; '.join(lines)}); use another --study"
        )
    recorded.check_images(config.data.source, evaluator.data_fingerprint)


@contextmanager
def open_study(config: SearchConfig, evaluator: Evaluator, versions: str, note: Note) -> Iterator[LiveStudy]:
    """The study that `config` names, made if it is new, and claimed for this process while the block runs.

    Args:
        versions: the libraries' versions, as JSON.
        note: function that takes a line for the user when a study begins.

    Raises:
        UsageError: the study was begun with another configuration, device or data.
        StorageError: the storage cannot be used, or another process searches the study.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    store = Store.open(config.storage, create=True)
    assert store is not None
    studies.keep_connecting(store.engine, note)
    owner = Owner.me()
    # All of it is guarded, to begin and to tidy up as well: the disk may be full at any moment.
    with guarded(), closing(store):
        recorded = RecordedStudy.find(store, config.study)
        if recorded is None:
            recorded, profile = _begin(store, config, evaluator, owner, versions, note)
        else:
            check_same_config(config, recorded)
            check_same_set_up(config, recorded, evaluator)
            store.ownership.claim(recorded.study_id, owner)
            profile = _profile(store, config, evaluator)
            if isinstance(evaluator, Adjustable):
                evaluator.adopt(recorded.config.proxy)
            evaluator.start(recorded.row.anchor_ms)
        try:
            if line := arch_launches_line(
                "the anchor network's", config.space.anchor(), config.latency, machine(profile),
                profile.graph_launch_seconds, recorded.row.anchor_ms,
            ):  # fmt: skip
                note(line)
            study = LiveStudy(recorded, profile.macs_per_s, owner)
            try:
                yield study
            finally:
                # The study may have been deleted in the dashboard, for example, or taken over. Then that is the cause
                # of whatever went wrong, and a running trial belongs to another process.
                store.ownership.require(recorded.study_id, owner)
                study.recover()
        finally:
            store.ownership.release(recorded.study_id, owner)


def _begin(
    store: Store, config: SearchConfig, evaluator: Evaluator, owner: Owner, versions: str, note: Note
) -> tuple[RecordedStudy, studies.Profile]:
    """Make a new study, claim it, and return it with the device's profile.

    All is measured before anything is stored, so that there is a whole study or none.
    """
    note(f"measuring {evaluator.device.name} and the anchor network, once")
    if cost := evaluator.determinism():
        note(cost)
    profile = _profile(store, config, evaluator)
    anchor_ms = BlockTable(store, evaluator.device, config.latency).anchor_ms(config.space.anchor(), evaluator.anchor)
    evaluator.start(anchor_ms)
    pilot = None
    if wants_pilot(config) and isinstance(evaluator, Adjustable):
        note("a pilot trains a few networks")
        pilot = Piloting(config, evaluator).run()
        for line in pilot.lines:
            note(line)
        config = replace(config, proxy=pilot.proxy, pilot=())
    row = store.create_study(
        config.study, config=json.dumps(config.identity()), data_fingerprint=evaluator.data_fingerprint,
        versions=versions, device=asdict(evaluator.device), anchor=config.space.anchor().to_json(),
        anchor_ms=anchor_ms, pilot=pilot.to_json() if pilot else None,
        images=None if evaluator.images is None else json.dumps(
            {**asdict(evaluator.images), "train_images": evaluator.train_images,
             "val_images": evaluator.val_images}
        ),
    )  # fmt: skip
    store.ownership.claim(row.study_id, owner)
    # On SQLite a study may have the id of one that was deleted, whose files are still there.
    Weights(weight_folder(config.storage), row.study_id).keep_only(())
    recorded = RecordedStudy.open(store, config.study)
    write_note(store.optuna_storage, row.study_id, None, notes.study_note(recorded))
    return recorded, profile


def _profile(store: Store, config: SearchConfig, evaluator: Evaluator) -> studies.Profile:
    """The device's profile, which is measured if the database has none."""
    deployment = config.latency
    stored = store.devices.find_profile(asdict(evaluator.device), deployment.dtype, deployment.threads)
    return stored or store_profile(store, evaluator.device, deployment.dtype, deployment.threads, evaluator.profile())
