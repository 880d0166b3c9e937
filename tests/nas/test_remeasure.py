"""Measuring again, on studies of candidates whose scores are written out."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pandas as pd
import psutil
import pytest
import torch

from kernels.device_info import DeviceInfo
from nas.config import LatencyConfig, SearchConfig, moved
from nas.errors import CandidateFailed, UsageError
from nas.lab.invented import FakeEvaluator
from nas.latency import device_profile
from nas.latency.block_meter import BlockMeter
from nas.latency.block_table import BlockTable
from nas.latency.device_profile import DeviceProfile
from nas.latency.parts import network_shape
from nas.latency.values import Latency, Measurement, ShapeLatency
from nas.recorded import RecordedStudy, deployment_of
from nas.search import front_measurement
from nas.search import loop as search
from nas.search.front_measurement import FrontChanges, measure_front
from nas.training.proxy import ProxyResult
from nas.validation import remeasure
from search_spaces import ArchSpec, load_space
from studies import CandidateState, Owner, StorageError, Store, Study

HERE = DeviceInfo.of(torch.device("cpu"))
# Accuracy and latency in ms of each trial. On the front are 0, 1 and 3; 1 hides 2 and 3 hides 4.
SCORES = ((0.50, 1.0), (0.70, 2.0), (0.60, 2.1), (0.80, 4.0), (0.75, 5.0))


def measurement_of(median_ms: float) -> Measurement:
    latency = Latency(median_ms, 0.9 * median_ms, 1.2 * median_ms, 100, interval_share=0.01)
    return Measurement(latency, median_ms, 1.0, weight_bytes=4000, workspace_bytes=1000)


class Scored(FakeEvaluator):
    """Candidates score by their trial's number; those measured again by `later`, in ms, if they are there.

    Attributes:
        together: trials of each call that measured several in turns.
    """

    device = HERE

    def __init__(self, later: dict[int, float] | None = None, scores: Sequence[tuple[float, float]] = SCORES) -> None:
        super().__init__()
        self.scores = scores
        self.later = later or {}
        self.numbers: dict[str, int] = {}
        self.together: list[list[int]] = []

    def measure(self, arch: ArchSpec) -> Measurement:
        number = self.numbers.setdefault(arch.arch_id, len(self.numbers))
        return measurement_of(self.scores[number][1])

    def train_one(self, arch: ArchSpec) -> ProxyResult:
        return ProxyResult(self.scores[self.numbers[arch.arch_id]][0], 1.0, (), 0.0, 0)

    def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
        numbers = [self.numbers[arch.arch_id] for arch in archs]
        self.together.append(numbers)
        return [measurement_of(self.later.get(number, self.scores[number][1])) for number in numbers]


@pytest.fixture
def config(sqlite_url: str) -> SearchConfig:
    return SearchConfig(
        budget=len(SCORES),
        storage=sqlite_url,
        sampler="random",
        latency=LatencyConfig(device="cpu", engine="eager"),
        confirm=0,
    )


def opened(config: SearchConfig) -> tuple[Store, Study]:
    store = Store.open(config.storage, create=True)
    assert store is not None
    study = store.find_study(config.study)
    assert study is not None
    return store, study


def searched(config: SearchConfig, monkeypatch: pytest.MonkeyPatch, evaluator: Scored) -> tuple[Store, Study]:
    """A study as it is before its front is measured again."""
    with monkeypatch.context() as patch:
        patch.setattr(search, "_time_front", lambda *_: ((), False))
        patch.setattr(search, "_measure_parts", lambda *_: ())
        assert search.run(config, evaluator).complete == config.budget
    return opened(config)


def fronted(
    config: SearchConfig, store: Store, study: Study, evaluator: Scored, again: bool = False
) -> FrontChanges | None:
    recorded = RecordedStudy.open(store, config.study)
    return measure_front(recorded, recorded.deployment, evaluator.measure_together, again=again)


def shown(store: Store, config: SearchConfig) -> dict[int, tuple[float, str]]:
    """The front: trial -> latency and stage."""
    front = store.front(config.study)
    columns = (front["latency_ms"], front["latency_stage"])
    return dict(zip(front["number"], zip(*columns, strict=True), strict=True))


# -- The front in turns ----------------------------------------------------------------------------------------------


def test_members_that_became_slower_leave_and_those_behind_them_join(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trial 1 turns out slower than 3, which is better: 2, which it had hidden, comes on the front, and is measured."""
    evaluator = Scored(later={1: 4.5, 2: 2.31, 3: 3.8})
    store, study = searched(config, monkeypatch, evaluator)
    assert shown(store, config) == {0: (1.0, "search"), 1: (2.0, "search"), 3: (4.0, "search")}
    changes = fronted(config, store, study, evaluator)
    assert evaluator.together == [[0, 1, 3], [2]]
    assert changes is not None
    assert (changes.left, changes.joined, changes.size, changes.capped) == ((1,), (2,), 3, 0)
    assert changes.ratios == pytest.approx((1.0, 2.25, 0.95, 1.1))
    assert changes.deployment == deployment_of(config.latency, study.device_id)
    for words in (
        "4 networks in turns", "-5.0% to +125.0%", "median +5.0%", "trial 1 left it", "trial 2 joined it",
    ):  # fmt: skip
        assert words in str(changes)
    assert shown(store, config) == {0: (1.0, "final"), 2: (2.31, "final"), 3: (3.8, "final")}
    # What the search measured stands beside it.
    front = store.front(config.study).set_index("number")
    assert list(front["searched_latency_ms"]) == [1.0, 2.1, 4.0]
    evaluations = store.evaluations(config.study).set_index("number")
    assert (evaluations.loc[1, "latency_ms"], evaluations.loc[1, "latency_stage"]) == (4.5, "final")
    assert (evaluations.loc[4, "latency_ms"], evaluations.loc[4, "latency_stage"]) == (5.0, "search")


def test_a_newcomer_that_is_slower_too_lets_the_next_in(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trial 2 comes on the front as 1 leaves, and leaves it again; 4 comes as 3 is no longer faster."""
    evaluator = Scored(later={1: 6.0, 2: 6.1, 3: 5.5, 4: 5.6})
    store, study = searched(config, monkeypatch, evaluator)
    changes = fronted(config, store, study, evaluator)
    assert evaluator.together == [[0, 1, 3], [2, 4]]
    assert changes is not None
    assert (changes.left, changes.joined) == ((1,), ())
    assert set(shown(store, config)) == {0, 3}


def test_where_nothing_moves_the_front_stays(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = Scored()
    store, study = searched(config, monkeypatch, evaluator)
    changes = fronted(config, store, study, evaluator)
    assert changes is not None
    assert (changes.left, changes.joined) == ((), ())
    assert "it stays as it was" in str(changes)
    # Measured once, all are final.
    assert fronted(config, store, study, evaluator) is None
    assert len(evaluator.together) == 1
    evaluator.later = {0: 1.1}
    again = fronted(config, store, study, evaluator, again=True)
    assert evaluator.together == [[0, 1, 3]] * 2
    assert again is not None
    assert again.ratios == pytest.approx((1.1, 1.0, 1.0))
    assert shown(store, config)[0] == (1.1, "final")


def test_what_was_capped_is_told(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = Scored()
    store, _ = searched(config, monkeypatch, evaluator)

    def measure(archs: Sequence[ArchSpec]) -> list[Measurement]:
        found = evaluator.measure_together(archs)
        return [replace(each, latency=replace(each.latency, capped=True, throttled=True)) for each in found]

    recorded = RecordedStudy.open(store, config.study)
    changes = measure_front(recorded, recorded.deployment, measure)
    assert changes is not None
    assert changes.capped == 3
    assert "3 were ended by the time cap" in str(changes)
    front = store.front(config.study)
    assert front["latency_capped"].all()
    assert (front["latency_interval_share"] == 0.01).all()


def test_a_large_front_is_measured_in_groups(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = Scored()
    store, study = searched(config, monkeypatch, evaluator)
    monkeypatch.setattr(front_measurement, "TOGETHER", 2)
    changes = fronted(config, store, study, evaluator)
    assert evaluator.together == [[0, 1], [3]]
    assert changes is not None
    assert len(changes.ratios) == 3


def test_a_study_without_complete_candidates_has_nothing_to_measure(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = Scored()
    with monkeypatch.context() as patch:
        patch.setattr(search, "_time_front", lambda *_: ((), False))
        patch.setattr(search, "_measure_parts", lambda *_: ())
        search.run(replace(config, time_limit_s=1e-6), evaluator)
    store, study = opened(config)
    assert fronted(config, store, study, evaluator, again=True) is None
    assert evaluator.together == []


# -- At the end of a search ------------------------------------------------------------------------------------------


def test_a_search_ends_with_its_front_measured_again(config: SearchConfig) -> None:
    evaluator = Scored(later={1: 4.5, 2: 2.31, 3: 3.8})
    result = search.run(config, evaluator)
    assert evaluator.together == [[0, 1, 3], [2]]
    front = result.pareto_front
    assert list(zip(front["number"], front["latency_ms"], strict=True)) == [(0, 1.0), (2, 2.31), (3, 3.8)]
    assert list(front["searched_latency_ms"]) == [1.0, 2.1, 4.0]
    measured_again, blocks = result.remarks
    assert "trial 1 left it; trial 2 joined it" in measured_again
    assert "parts measured alone add up to the networks' latencies within" in blocks
    # The hypervolume is that of the front as it is now, up to twice the anchor's latency, 2 ms.
    assert result.hypervolumes.searched == pytest.approx(0.5 * (2.0 - 1.0) / 2.0)

    # A finished search has nothing left to measure, and shows the same.
    second = Scored()
    second.numbers = evaluator.numbers
    same = search.run(config, second)
    assert second.together == []
    assert list(same.pareto_front["latency_ms"]) == [1.0, 2.31, 3.8]
    assert same.hypervolumes.searched == result.hypervolumes.searched
    assert not any("measured again" in line for line in same.remarks)

    # A larger budget brings new candidates, and a new end.
    third = Scored(scores=(*SCORES, (0.9, 8.0)))
    third.numbers = dict(evaluator.numbers)
    search.run(replace(config, budget=6), third)
    assert sorted(third.together[0]) == [0, 2, 3, 5]


# -- Elsewhere -------------------------------------------------------------------------------------------------------


class Meter:
    """An `ArchMeter` that invents latencies: so many times a study's own.

    Attributes:
        measured: the trials of each call.
    """

    reference_ms = 1.0

    def __init__(self, numbers: dict[str, int], factor: float = 2.0, failing: tuple[int, ...] = ()) -> None:
        self.numbers, self.factor, self.failing = numbers, factor, failing
        self.measured: list[list[int]] = []
        self.made: list[tuple[LatencyConfig, ArchSpec, float | None]] = []
        self.closed = 0

    def make(self, config: LatencyConfig, anchor: ArchSpec, reference_ms: float | None) -> Meter:
        self.made.append((config, anchor, reference_ms))
        return self

    def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
        numbers = [self.numbers[arch.arch_id] for arch in archs]
        if set(numbers) & set(self.failing):
            raise CandidateFailed("engine fake does not compile it")
        self.measured.append(numbers)
        return [measurement_of(self.factor * SCORES[number][1]) for number in numbers]

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Profiles are invented; yields the dtype and threads of each that was asked for."""
    asked: list[tuple[str, int]] = []

    def measure(config: LatencyConfig) -> DeviceProfile:
        asked.append((config.dtype, config.threads))
        return DeviceProfile(copy_bytes_per_s=1e10, macs_per_s=1e11, launch_seconds=1e-6)

    monkeypatch.setattr(device_profile, "measure_profile", measure)
    monkeypatch.setattr(BlockTable, "anchor_ms", lambda table, anchor, measure: 3.0)
    return asked


@pytest.fixture
def done(config: SearchConfig) -> tuple[SearchConfig, Scored]:
    """A finished search, with one more candidate that broke a limit."""
    evaluator = Scored()
    assert search.run(config, evaluator).complete == len(SCORES)
    return config, evaluator


def remeasured(
    config: SearchConfig, meter: Meter, monkeypatch: pytest.MonkeyPatch, everything: bool = False, **changes: Any
) -> tuple[FrontChanges | None, list[str]]:
    monkeypatch.setattr(remeasure, "meter_for", meter.make)
    notes: list[str] = []
    store, _ = opened(config)
    try:
        recorded = RecordedStudy.open(store, config.study)
        there = moved(recorded.config.latency, **changes)
        return remeasure.remeasure(recorded, there, everything, notes.append), notes
    finally:
        store.close()


def latency_rows(config: SearchConfig) -> pd.DataFrame:
    with sqlite3.connect(config.storage.removeprefix("sqlite:///")) as connection:
        return pd.read_sql(
            "select c.number, l.* from convfirst_latencies l join convfirst_candidates c using (trial_id) "
            "order by c.number, l.stage, l.latency_id",
            connection,
        )


@pytest.mark.parametrize("changes", [dict(threads=2), dict(batch_size=8), dict(dtype="bfloat16")], ids=str)
def test_elsewhere_all_candidates_get_a_second_latency(
    done: tuple[SearchConfig, Scored], monkeypatch: pytest.MonkeyPatch, profiled: list[tuple[str, int]],
    changes: dict[str, Any],
) -> None:  # fmt: skip
    config, evaluator = done
    before = latency_rows(config)
    meter = Meter(evaluator.numbers)
    changed, notes = remeasured(config, meter, monkeypatch, **changes)
    there = replace(config.latency, **changes)
    # One after the other, and then the front they make there in turns.
    assert meter.measured == [[0], [1], [2], [3], [4], [0, 1, 3]]
    assert meter.closed == 1
    # Another deployment's anchor has another reference, that of the block latency table.
    assert meter.made == [(there, config.space.anchor(), 3.0)]
    assert changed is not None
    assert (changed.left, changed.joined) == ((), ())
    assert changed.deployment == deployment_of(there, changed.deployment.device_id)
    assert changed.ratios == pytest.approx((1.0, 1.0, 1.0))
    assert len([line for line in notes if " ms" in line]) == 5
    assert notes[0].startswith("1/5  trial 0: 2.0000 ms")

    after = latency_rows(config)
    own = after[after["latency_id"].isin(before["latency_id"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(own, before)
    new = after[~after["latency_id"].isin(before["latency_id"])]
    for column, value in changes.items():
        assert set(new[column]) == {value}
    assert sorted(new[new["stage"] == "search"]["number"]) == [0, 1, 2, 3, 4]
    assert sorted(new[new["stage"] == "final"]["number"]) == [0, 1, 3]
    store, study = opened(config)
    for deployment, factor in ((config.latency, 1.0), (there, 2.0)):
        front = deployment_of(deployment, study.device_id).rows_of(store.front(config.study))
        assert list(front["number"]) == [0, 1, 3]
        assert list(front["latency_ms"]) == [factor * SCORES[number][1] for number in (0, 1, 3)]
        # The profile of the new deployment is measured if there is none: the view shows shares of it.
        assert (front["computational_efficiency"] > 0).all()
    assert store.devices.find_profile(asdict(HERE), there.dtype, there.threads) is not None
    # Nobody holds the study any longer.
    assert study.owner is None
    assert evaluator.together == [[0, 1, 3]]
    store.close()


def test_a_second_time_elsewhere_only_the_front_is_measured_unless_all_are_asked_for(
    done: tuple[SearchConfig, Scored], monkeypatch: pytest.MonkeyPatch, profiled: list[tuple[str, int]]
) -> None:
    config, evaluator = done
    remeasured(config, Meter(evaluator.numbers), monkeypatch, threads=2)
    second = Meter(evaluator.numbers, factor=2.02)
    changed, _ = remeasured(config, second, monkeypatch, threads=2)
    assert second.measured == [[0, 1, 3]]
    assert changed is not None
    assert changed.ratios == pytest.approx((1.01, 1.01, 1.01))
    third = Meter(evaluator.numbers, factor=4.0)
    remeasured(config, third, monkeypatch, everything=True, threads=2)
    assert third.measured == [[0], [1], [2], [3], [4], [0, 1, 3]]
    assert profiled == [("float32", 2)]
    store, study = opened(config)
    rows = deployment_of(replace(config.latency, threads=2), study.device_id).rows_of(store.evaluations(config.study))
    assert list(rows["latency_ms"]) == [4.0 * latency_ms for _, latency_ms in SCORES]
    store.close()


def test_all_measured_again_elsewhere_are_shown_as_they_were_measured_last(
    done: tuple[SearchConfig, Scored], monkeypatch: pytest.MonkeyPatch, profiled: list[tuple[str, int]]
) -> None:
    """Trial 1 was measured in turns there, and left the front: its older final latency hides no newer one."""
    config, evaluator = done

    class Moving(Meter):
        def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
            found = super().measure_together(archs)
            slower = [1.0 if number != 1 or len(archs) == 1 else 25.0 for number in self.measured[-1]]
            return [measurement_of(each.median_ms * by) for each, by in zip(found, slower, strict=True)]

    remeasured(config, Moving(evaluator.numbers), monkeypatch, threads=2)
    remeasured(config, Meter(evaluator.numbers, factor=5.0), monkeypatch, everything=True, threads=2)
    store, study = opened(config)
    rows = deployment_of(replace(config.latency, threads=2), study.device_id).rows_of(store.evaluations(config.study))
    assert list(rows["latency_ms"]) == [5.0 * latency_ms for _, latency_ms in SCORES]
    store.close()


def test_at_home_the_front_is_measured_against_the_studys_own_reference(
    done: tuple[SearchConfig, Scored], monkeypatch: pytest.MonkeyPatch, profiled: list[tuple[str, int]]
) -> None:
    config, evaluator = done
    meter = Meter(evaluator.numbers, factor=1.01)
    # How long and how precisely is no other deployment.
    changed, _ = remeasured(config, meter, monkeypatch, seconds=9.0, precision=0.01)
    assert meter.measured == [[0, 1, 3]]
    assert [(made.seconds, made.precision, reference_ms) for made, _, reference_ms in meter.made] == [(9.0, 0.01, 1.0)]
    assert changed is not None
    assert changed.ratios == pytest.approx((1.01, 1.01, 1.01))
    assert profiled == []
    meter = Meter(evaluator.numbers, factor=3.0)
    remeasured(config, meter, monkeypatch, everything=True)
    assert meter.measured == [[0], [1], [2], [3], [4], [0, 1, 3]]
    rows = latency_rows(config)
    assert list(rows[rows["stage"] == "final"]["median_ms"]) == [3.0 * latency_ms for _, latency_ms in SCORES]
    assert list(rows[rows["stage"] == "search"]["median_ms"]) == [latency_ms for _, latency_ms in SCORES]


def test_a_candidate_that_fails_elsewhere_is_noted_and_left_out(
    done: tuple[SearchConfig, Scored], monkeypatch: pytest.MonkeyPatch, profiled: list[tuple[str, int]]
) -> None:
    config, evaluator = done
    meter = Meter(evaluator.numbers, failing=(1,))
    changed, notes = remeasured(config, meter, monkeypatch, threads=2)
    assert "2/5  trial 1: failed (engine fake does not compile it)" in notes
    assert changed is not None
    assert meter.measured == [[0], [2], [3], [4], [0, 2, 3]]
    store, study = opened(config)
    there = deployment_of(replace(config.latency, threads=2), study.device_id).rows_of(store.front(config.study))
    assert list(there["number"]) == [0, 2, 3]
    assert study.owner is None
    store.close()
    # Asked again, only the missing one is tried.
    meter = Meter(evaluator.numbers)
    remeasured(config, meter, monkeypatch, threads=2)
    assert meter.measured == [[1], [0, 1, 3]]


def test_a_front_that_does_not_run_together_is_measured_in_smaller_groups(
    done: tuple[SearchConfig, Scored], monkeypatch: pytest.MonkeyPatch, profiled: list[tuple[str, int]]
) -> None:
    """Three of them take more memory than there is, two do not."""
    config, evaluator = done

    class Cramped(Meter):
        def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
            if len(archs) > 2:
                raise CandidateFailed("its process was killed by SIGKILL")
            return super().measure_together(archs)

    meter = Cramped(evaluator.numbers)
    changed, _ = remeasured(config, meter, monkeypatch, threads=2)
    assert meter.measured[5:] == [[0], [1, 3]]
    assert changed is not None
    assert len(changed.ratios) == 3


def test_a_member_that_runs_no_more_is_told_and_what_was_measured_is_kept(
    done: tuple[SearchConfig, Scored], monkeypatch: pytest.MonkeyPatch, profiled: list[tuple[str, int]]
) -> None:
    config, evaluator = done

    class Ailing(Meter):
        def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
            if len(self.measured) >= len(SCORES):
                raise CandidateFailed("out of memory")
            return super().measure_together(archs)

    meter = Ailing(evaluator.numbers)
    with pytest.raises(
        UsageError, match=r"--study convfirst: its front could not be measured in turns .*out of memory"
    ):
        remeasured(config, meter, monkeypatch, threads=2)
    assert meter.closed == 1
    store, study = opened(config)
    there = deployment_of(replace(config.latency, threads=2), study.device_id).rows_of(store.front(config.study))
    assert list(there["number"]) == [0, 1, 3]
    assert set(there["latency_stage"]) == {"search"}
    assert study.owner is None
    store.close()


def test_the_studys_limit_holds_at_home_only(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch, profiled: list[tuple[str, int]]
) -> None:
    """Trial 3 took 4.0 ms of 4.5, and takes 4.8 now; in another deployment the limit says nothing."""
    config = replace(config, limits=replace(config.limits, latency_ms=4.5), budget=4)
    evaluator = Scored()
    search.run(config, evaluator)
    changed, _ = remeasured(config, Meter(evaluator.numbers, factor=1.2), monkeypatch)
    assert changed is not None
    assert (changed.over_limit, changed.left) == ((3,), (3,))
    assert "trial 3 broke the latency limit" in str(changed)
    changed, _ = remeasured(config, Meter(evaluator.numbers, factor=2.0), monkeypatch, threads=2)
    assert changed is not None
    assert (changed.over_limit, changed.size) == ((), 3)


def test_changes_are_told_of_the_front_before_all_were_measured_again(
    done: tuple[SearchConfig, Scored], monkeypatch: pytest.MonkeyPatch, profiled: list[tuple[str, int]]
) -> None:
    config, evaluator = done
    remeasured(config, Meter(evaluator.numbers), monkeypatch, threads=2)
    changed, _ = remeasured(config, Meter(evaluator.numbers, factor=3.0), monkeypatch, everything=True, threads=2)
    assert changed is not None
    assert changed.ratios == pytest.approx((1.5, 1.5, 1.5))


def test_the_reference_elsewhere_is_the_anchors_in_the_table(config: SearchConfig) -> None:
    """Measured once for all studies of the database."""
    store = Store.open(config.storage, create=True)
    assert store is not None
    there = replace(config.latency, seconds=0.02, threads=2)
    device_profile.store_profile(
        store, HERE, there.dtype, there.threads, DeviceProfile(1e10, 1e11, 1e-6, None, 2.0, 4.0)
    )
    table = BlockTable(store, HERE, there)
    anchor = load_space("small").smallest()

    def measure(references_ms: Sequence[float]) -> ShapeLatency:
        return BlockMeter(there, references_ms).measure_anchor(anchor)

    first = table.anchor_ms(anchor, measure)
    assert first > 0
    assert BlockTable(store, HERE, there).anchor_ms(anchor, measure) == first
    assert table.median_ms(network_shape(str(anchor), there)) == first
    store.close()


def test_where_all_fail_there_is_no_front(
    done: tuple[SearchConfig, Scored], monkeypatch: pytest.MonkeyPatch, profiled: list[tuple[str, int]]
) -> None:
    config, evaluator = done
    changed, notes = remeasured(config, Meter(evaluator.numbers, failing=tuple(range(5))), monkeypatch, threads=2)
    assert changed is None
    assert len([line for line in notes if "failed" in line]) == 5


def test_candidates_over_a_limit_are_not_measured_again(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch, profiled: list[tuple[str, int]]
) -> None:
    config = replace(config, budget=4, limits=replace(config.limits, latency_ms=4.5))
    evaluator = Scored(scores=(SCORES[0], SCORES[4], *SCORES[1:4]))
    search.run(config, evaluator)
    store, study = opened(config)
    states = [candidate.state for candidate in store.candidates(study.study_id)]
    store.close()
    assert states.count(CandidateState.OVER_LIMIT) == 1
    meter = Meter(evaluator.numbers)
    remeasured(config, meter, monkeypatch, threads=2)
    assert sorted(number for numbers in meter.measured[:-1] for number in numbers) == [0, 2, 3, 4]


# -- What is refused -------------------------------------------------------------------------------------------------


def test_a_study_that_is_being_searched_is_refused(
    done: tuple[SearchConfig, Scored], monkeypatch: pytest.MonkeyPatch, profiled: list[tuple[str, int]]
) -> None:
    config, evaluator = done
    store, study = opened(config)
    other = Owner(Owner.me().host, os.getppid(), psutil.Process(os.getppid()).create_time())
    store.ownership.claim(study.study_id, other)
    meter = Meter(evaluator.numbers)
    with pytest.raises(StorageError, match=f"is being searched by process {other.pid}"):
        remeasured(config, meter, monkeypatch, threads=2)
    assert meter.made == []
    assert profiled == []
    _, study = opened(config)
    assert study.owner == str(other)
    store.close()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(device="tpu"), "--device tpu: not a device"),
        (dict(device="cuda:99"), "--device cuda:99: "),
        (dict(engine="nosuch"), "--engine nosuch: none of"),
        (dict(dtype="float16"), "--dtype float16: not on the CPU"),
    ],
)
def test_a_deployment_that_does_not_run_here_is_refused(
    done: tuple[SearchConfig, Scored], monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], told: str
) -> None:
    config, evaluator = done
    with pytest.raises(UsageError, match=told):
        remeasured(config, Meter(evaluator.numbers), monkeypatch, **changes)


def test_an_engine_that_does_not_even_run_the_anchor_is_refused(
    done: tuple[SearchConfig, Scored], monkeypatch: pytest.MonkeyPatch, profiled: list[tuple[str, int]]
) -> None:
    config, evaluator = done

    class Refusing(Meter):
        def make(self, config: LatencyConfig, anchor: ArchSpec, reference_ms: float | None) -> Meter:
            raise CandidateFailed("engine inductor does not compile it (no compiler)")

    with pytest.raises(UsageError, match=r"--engine inductor: does not run even the anchor network \(.*no compiler"):
        remeasured(config, Refusing(evaluator.numbers), monkeypatch, engine="compile")
    _, study = opened(config)
    assert study.owner is None


def test_a_study_of_which_nothing_is_complete_is_refused(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    search.run(replace(config, time_limit_s=1e-6), Scored())
    with pytest.raises(UsageError, match="--study convfirst: has no complete candidate"):
        remeasured(config, Meter({}), monkeypatch, threads=2)


def test_on_another_kind_of_device_engine_and_dtype_are_its_own(
    done: tuple[SearchConfig, Scored], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What suits a CPU does not suit a GPU: by default a GPU runs the fused engine in float16, at its precision."""
    config, evaluator = done
    asked: list[LatencyConfig] = []

    def check(deployment: LatencyConfig, note: object) -> torch.device:
        asked.append(deployment)
        raise UsageError("enough")

    monkeypatch.setattr(remeasure, "check_device", check)
    for changes in (dict(device="cuda"), dict(device="cuda:1", dtype="float32"), dict(device="cpu", threads=2)):
        with pytest.raises(UsageError, match="enough"):
            remeasured(config, Meter(evaluator.numbers), monkeypatch, **changes)
    told = [(made.device, made.engine, made.dtype, made.precision) for made in asked]
    assert told == [
        ("cuda", "fused", "float16", 0.02), ("cuda:1", "fused", "float32", 0.02), ("cpu", "eager", "float32", 0.05),
    ]  # fmt: skip
