"""The loop, on real SQLite files, with invented scores."""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import optuna
import psutil
import pytest
import torch
from optuna.trial import TrialState

from nas.config import DataConfig, LatencyConfig, Limits, ProxyConfig, Sampler, SearchConfig
from nas.errors import CandidateFailed, FieldError, UsageError
from nas.lab.invented import FakeEvaluator
from nas.latency.block_table import BlockTable
from nas.latency.device_profile import DeviceProfile
from nas.latency.parts import arch_parts
from nas.latency.values import Measurement, ShapeLatency
from nas.pareto import front
from nas.recorded import deployment_of
from nas.search import loop as search
from nas.search.rows import latency_row
from nas.training.proxy import ProxyResult
from search_spaces import ArchSpec, SearchSpace
from studies import Candidate, CandidateState, LatencyStage, Owner, StorageError, Store, Study
from studies.optuna_storage import OptunaStorage
from studies.sql import transaction
from tests.conftest import copy_database, quicken


class Counting(FakeEvaluator):
    """Remembers what it was asked; measured once more at the end, networks are slower by so much."""

    def __init__(self, slower: float = 1.0) -> None:
        super().__init__()
        self.slower = slower
        self.measured: list[str] = []
        self.trained: list[str] = []
        self.together: list[str] = []
        self.in_blocks: list[str] = []
        self.profiles = 0

    def measure(self, arch: ArchSpec) -> Measurement:
        self.measured.append(arch.arch_id)
        return super().measure(arch)

    def train_one(self, arch: ArchSpec) -> ProxyResult:
        self.trained.append(arch.arch_id)
        return super().train_one(arch)

    def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
        self.together += [arch.arch_id for arch in archs]
        return [
            replace(measured, latency=measured.latency.scaled(self.slower))
            for measured in map(FakeEvaluator().measure, archs)
        ]

    def measure_blocks(
        self, archs: Sequence[ArchSpec], known: Mapping[str, float], references_ms: Sequence[float]
    ) -> list[ShapeLatency]:
        self.in_blocks += [arch.arch_id for arch in archs]
        return super().measure_blocks(archs, known, references_ms)

    def profile(self) -> DeviceProfile:
        self.profiles += 1
        return super().profile()


def opened(config: SearchConfig) -> Store:
    store = Store.open(config.storage, create=False)
    assert store is not None
    return store


def candidates(config: SearchConfig) -> list[Candidate]:
    store = opened(config)
    study = store.find_study(config.study)
    assert study is not None
    rows = store.candidates(study.study_id)
    store.close()
    return rows


def trials(config: SearchConfig) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=config.study, storage=config.storage).get_trials()


@pytest.fixture
def config(sqlite_url: str) -> SearchConfig:
    return SearchConfig(budget=12, storage=sqlite_url, confirm=0)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The storage of a finished search, made once."""
    folder = tmp_path_factory.mktemp("finished")
    config = SearchConfig(budget=12, storage=f"sqlite:///{folder / 'study.db'}", confirm=0)
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch, folder)
        search.run(config, FakeEvaluator())
    return config.storage


@pytest.fixture
def finished(once: str, config: SearchConfig) -> None:
    """As after `search.run(config, FakeEvaluator())`."""
    copy_database(once, config.storage)


@pytest.mark.parametrize("sampler", Sampler)
def test_a_search_ends_with_exactly_its_budget(config: SearchConfig, sampler: str) -> None:
    config = replace(config, sampler=sampler)
    result = search.run(config, FakeEvaluator())
    assert result.complete == 12
    assert result.why == "budget met"
    rows = candidates(config)
    complete = [row for row in rows if row.state == CandidateState.COMPLETE]
    assert len({row.arch_id for row in complete}) == len(complete) == 12
    study = optuna.load_study(study_name=config.study, storage=config.storage)
    assert study.metric_names == ["accuracy", "latency_ms"]
    told = {trial._trial_id: trial for trial in study.get_trials(states=[TrialState.COMPLETE])}
    assert {row.trial_id for row in complete} == set(told)
    for row in complete:
        assert told[row.trial_id].values == [row.accuracy, row.latencies[0].median_ms]
        arch = ArchSpec.from_json(row.arch)
        assert arch.arch_id == row.arch_id
        assert told[row.trial_id].user_attrs["arch"] == row.summary == str(arch)
        values = config.space.values_of(arch)
        assert told[row.trial_id].params == {name: values[name] for name in told[row.trial_id].params}


def test_the_front_of_the_result_is_that_of_all_candidates(config: SearchConfig) -> None:
    result = search.run(replace(config, budget=24), FakeEvaluator())
    rows = [row for row in candidates(config) if row.state == CandidateState.COMPLETE]
    members = front([row.accuracy for row in rows], [row.latencies[0].median_ms for row in rows])
    assert list(result.pareto_front["number"]) == [rows[i].number for i in members]
    assert 0 < result.hypervolumes.searched < 1


def test_a_second_run_goes_on_and_a_larger_budget_extends(config: SearchConfig) -> None:
    first, second = Counting(), Counting()
    search.run(replace(config, budget=5), first)
    assert search.run(replace(config, budget=12), second).complete == 12
    assert not set(first.trained) & set(second.trained)
    third = Counting()
    assert search.run(replace(config, budget=12), third).complete == 12
    assert third.trained == []


def test_a_resumed_search_proposes_what_an_unbroken_one_would(config: SearchConfig, tmp_path: object) -> None:
    """Although each of its runs ended with measuring the front again: samplers know what the search measured."""
    whole = Counting()
    search.run(replace(config, budget=21, storage=f"sqlite:///{tmp_path}/whole.db"), whole)
    broken = Counting(slower=3.0)
    for budget in (7, 14, 21):
        search.run(replace(config, budget=budget), broken)
    assert broken.measured == whole.measured
    assert broken.together


# -- The end of a search, and what stands beside it ------------------------------------------------------------------


@pytest.fixture
def on_cpu(config: SearchConfig) -> SearchConfig:
    """The deployment whose blocks `FakeEvaluator` invents."""
    return replace(config, latency=LatencyConfig(device="cpu"))


def test_the_front_is_measured_once_more_and_added_up_from_its_blocks(on_cpu: SearchConfig) -> None:
    evaluator = Counting(slower=1.25)
    noted: list[str] = []

    class Noting(search.Silent):
        def note(self, line: str) -> None:
            noted.append(line)

    result = search.run(replace(on_cpu, budget=20), evaluator, Noting())
    front = result.pareto_front
    assert set(front["arch_id"]) <= set(evaluator.together)
    assert set(front["latency_stage"]) == {"final"}
    assert front["latency_ms"].to_numpy() == pytest.approx(1.25 * front["searched_latency_ms"].to_numpy())
    # All became slower alike, but those behind the front were not measured again, and may have come on it.
    assert len(evaluator.together) == len(set(evaluator.together)) < len(set(evaluator.measured))
    measured_again, blocks = result.remarks
    assert measured_again.startswith(f"front measured again, {len(evaluator.together)} networks in turns")
    assert "+25.0% to +25.0%" in measured_again
    assert f"(median of {len(front)}; at most" in blocks
    assert any("measuring" in line for line in noted)
    table = BlockTable(opened(on_cpu), evaluator.device, on_cpu.latency)
    for text in front["arch"]:
        assert table.add_up_arch(ArchSpec.from_json(text)).total_ms is not None

    again = Counting()
    same = search.run(replace(on_cpu, budget=20), again)
    assert (again.measured, again.trained, again.together, again.in_blocks) == ([], [], [], [])
    assert list(same.pareto_front["latency_ms"]) == list(front["latency_ms"])
    assert same.remarks == (blocks,)


def test_a_front_that_does_not_run_together_or_in_blocks_ends_no_search(on_cpu: SearchConfig) -> None:
    """Hours of training are not to be lost for want of a last measurement, which the next run makes up for."""

    class Cramped(Counting):
        def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
            raise CandidateFailed("its process was killed by SIGKILL")

        def measure_blocks(
            self, archs: Sequence[ArchSpec], known: Mapping[str, float], references_ms: Sequence[float]
        ) -> list[ShapeLatency]:
            raise CandidateFailed("out of memory")

    result = search.run(replace(on_cpu, block_table=True), Cramped())
    assert (result.complete, result.why) == (12, "budget met")
    again, blocks = result.remarks
    assert again == "the front could not be measured again (its process was killed by SIGKILL)"
    size = len(result.pareto_front)
    assert blocks == f"blocks of {size} of the front's networks could not be measured alone"
    assert set(result.pareto_front["latency_stage"]) == {"search"}
    second = Counting()
    assert len(search.run(on_cpu, second).remarks) == 2
    assert second.together


def test_a_search_that_found_nothing_has_nothing_to_measure_again(on_cpu: SearchConfig) -> None:
    evaluator = Counting()
    result = search.run(replace(on_cpu, time_limit_s=1e-6), evaluator)
    assert result.complete == 0
    assert result.remarks == ()
    assert (evaluator.together, evaluator.in_blocks) == ([], [])


@pytest.mark.parametrize("everything", [False, True], ids=["the front", "all"])
def test_the_block_table_holds_the_blocks_of_the_front_or_of_all(on_cpu: SearchConfig, everything: bool) -> None:
    """Also of those over a limit that were timed; not of those that were not."""
    limits = Limits(latency_ms=1.0, params=200_000)
    config = replace(on_cpu, block_table=everything, limits=limits)
    evaluator = Counting()
    result = search.run(config, evaluator)
    table = BlockTable(opened(config), evaluator.device, config.latency)
    added_up = {
        row.arch_id
        for row in candidates(config)
        if table.add_up_arch(ArchSpec.from_json(row.arch)).total_ms is not None
    }
    front, timed = set(result.pareto_front["arch_id"]), set(evaluator.measured)
    assert front < timed < {row.arch_id for row in candidates(config)}, "too few candidates to tell these apart"
    if everything:
        assert timed <= added_up
        # What an earlier one shares is not measured again.
        assert len(evaluator.in_blocks) == len(set(evaluator.in_blocks)) <= len(timed)
    else:
        assert front <= added_up
        assert set(evaluator.in_blocks) <= front
    # It is no part of a study's identity; begun later it has candidates of before to make up for.
    later = Counting()
    assert search.run(replace(config, block_table=not everything, budget=13), later).complete == 13
    if not everything:
        table.load()
        for row in candidates(config):
            if row.latencies:
                assert not table.lacks(arch_parts(ArchSpec.from_json(row.arch), config.latency))


def test_whoever_breaks_the_limit_at_the_end_leaves_the_front(on_cpu: SearchConfig) -> None:
    """All turn out a quarter slower than the search found them: those near the limit are over it."""
    limit_ms = 1.0
    config = replace(on_cpu, budget=30, limits=Limits(latency_ms=limit_ms))
    front = search.run(config, Counting(slower=1.25)).pareto_front
    assert (front["latency_ms"] <= limit_ms).all()
    assert (front["searched_latency_ms"] <= 0.8 * limit_ms).all()
    rows = opened(config).evaluations(config.study)
    assert rows["latency_over_limit"].any(), "none was near the limit"
    over = rows[rows["latency_over_limit"]]
    assert (over["latency_ms"] > limit_ms).all()


@pytest.mark.usefixtures("finished")
def test_how_precisely_one_measures_may_change_between_runs(config: SearchConfig) -> None:
    finer = replace(config, budget=13, latency=replace(config.latency, precision=0.01, seconds=9.0))
    assert search.run(finer, FakeEvaluator()).complete == 13


@pytest.mark.usefixtures("finished")
def test_a_study_from_before_precision_was_a_setting_can_be_gone_on_with(config: SearchConfig) -> None:
    path = config.storage.removeprefix("sqlite:///")
    with sqlite3.connect(path) as connection:
        (text,) = connection.execute("select config from convfirst_studies").fetchone()
        stored = json.loads(text)
        del stored["latency"]["precision"]
        stored["latency"]["seconds"] = 1.0
        connection.execute("update convfirst_studies set config = ?", (json.dumps(stored),))
    assert search.run(replace(config, budget=13), FakeEvaluator()).complete == 13


def test_the_devices_profile_is_measured_once_for_all_studies(on_cpu: SearchConfig) -> None:
    first, second = Counting(), Counting()
    search.run(on_cpu, first)
    search.run(replace(on_cpu, study="another"), second)
    assert (first.profiles, second.profiles) == (1, 0)
    profile = opened(on_cpu).devices.find_profile(asdict(first.device), "float32", 1)
    assert profile is not None
    assert (profile.macs_per_s, profile.copy_bytes_per_s, profile.launch_seconds) == (4e10, 2e10, 4e-6)


def test_computational_efficiency_by_hand(on_cpu: SearchConfig) -> None:
    """Operations of the batch over those that the device could have done in the time: 4e10 a second."""
    config = replace(on_cpu, latency=replace(on_cpu.latency, batch_size=4))
    search.run(config, FakeEvaluator())
    rows = opened(config).evaluations(config.study)
    expected = 4 * rows["macs"] / (rows["latency_ms"] / 1e3 * 4e10)
    assert rows["computational_efficiency"].to_numpy() == pytest.approx(expected.to_numpy())
    shown = [trial.user_attrs["computational_efficiency"] for trial in trials(config) if trial.values]
    assert shown == pytest.approx(expected.tolist(), abs=1e-4)


def test_latencies_that_are_not_to_be_trusted_are_marked_in_the_dashboard(on_cpu: SearchConfig) -> None:
    class Doubtful(FakeEvaluator):
        """The second was ended by the cap, the third throttled as well."""

        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def measure(self, arch: ArchSpec) -> Measurement:
            self.count += 1
            measured = super().measure(arch)
            latency = replace(measured.latency, capped=self.count in (2, 3), throttled=self.count == 3)
            return replace(measured, latency=latency)

    search.run(replace(on_cpu, budget=3), Doubtful())
    marks = [trial.user_attrs.get("latency_doubtful") for trial in trials(on_cpu)]
    assert marks[:3] == [None, "ended by the time cap", "throttled"]


def test_the_first_candidates_are_the_smallest_and_the_anchor(config: SearchConfig) -> None:
    search.run(replace(config, budget=3), FakeEvaluator())
    space = config.space
    assert [row.arch_id for row in candidates(config)][:2] == [space.smallest().arch_id, space.anchor().arch_id]


class Picky(Counting):
    """Scores a tiny space, whose few hundred architectures a sampler soon proposes again."""

    def train_one(self, arch: ArchSpec) -> ProxyResult:
        self.trained.append(arch.arch_id)
        return ProxyResult(0.5, 1.0, (), 0.0, 0)


def test_no_architecture_is_trained_twice_and_a_space_that_is_used_up_ends_the_search(
    config: SearchConfig, tiny_space: SearchSpace
) -> None:
    small = replace(tiny_space, stages=(replace(tiny_space.stages[0], width=(8,), stride=(1,)),))
    assert small.size() < 100
    evaluator = Picky()
    # The sampler that models proposes nothing known by itself.
    config = replace(config, budget=1000, space=small, sampler="tpe")
    result = search.run(config, evaluator)
    assert result.complete == small.size() == len(set(evaluator.trained)) == len(evaluator.trained)
    assert result.why == "the space 'tiny' yields nothing new"
    duplicates = [trial for trial in trials(config) if "duplicate_of" in trial.user_attrs]
    assert duplicates, "no duplicate was ever proposed, so nothing was tested"
    numbers = {row.number: row.summary for row in candidates(config)}
    for trial in duplicates:
        assert trial.state == TrialState.PRUNED
        assert numbers[trial.user_attrs["duplicate_of"]] == trial.user_attrs["arch"]
    assert search.run(config, evaluator).complete == small.size()


class Failing(Counting):
    """The first trainings go wrong, each in its own way."""

    troubles = (
        CandidateFailed("the loss diverged before step 10 of 200"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    )

    def train_one(self, arch: ArchSpec) -> ProxyResult:
        self.trained.append(arch.arch_id)
        if len(self.trained) <= len(self.troubles):
            raise self.troubles[len(self.trained) - 1]
        return ProxyResult(0.5, 1.0, (), 0.0, 0)


def test_candidates_that_cannot_run_are_recorded_with_their_reason_and_the_search_goes_on(
    config: SearchConfig,
) -> None:
    assert search.run(config, Failing()).complete == 12
    failed = [row for row in candidates(config) if row.state == CandidateState.FAILED]
    assert [row.reason for row in failed] == ["the loss diverged before step 10 of 200"] + ["out of memory"] * 3
    by_id = {trial._trial_id: trial for trial in trials(config)}
    for row in failed:
        assert by_id[row.trial_id].state == TrialState.FAIL
        assert by_id[row.trial_id].user_attrs["reason"] == row.reason
        assert row.accuracy is None


class Buggy(Counting):
    def train_one(self, arch: ArchSpec) -> ProxyResult:
        if len(self.trained) == 3:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return super().train_one(arch)


def test_a_bug_stops_the_search_and_leaves_it_fit_to_go_on(config: SearchConfig) -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        search.run(config, Buggy())
    assert not [trial for trial in trials(config) if not trial.state.is_finished()]
    assert search.run(config, FakeEvaluator()).complete == 12


class Interrupting(Counting):
    def train_one(self, arch: ArchSpec) -> ProxyResult:
        if len(self.trained) == 3:
            raise KeyboardInterrupt
        return super().train_one(arch)


def test_an_interrupted_candidate_is_closed_and_counts_for_nothing(config: SearchConfig) -> None:
    with pytest.raises(KeyboardInterrupt):
        search.run(config, Interrupting())
    last = trials(config)[-1]
    assert last.state == TrialState.FAIL
    assert last.user_attrs["reason"] == "interrupted"
    assert len(candidates(config)) == 3
    assert search.run(config, FakeEvaluator()).complete == 12


class Stumbling(FakeEvaluator):
    """Is interrupted at the training of this number, in a round of several.

    Attributes:
        trained: what was trained, the last one without success.
    """

    def __init__(self, at: int | None = None, workers: int = 1) -> None:
        super().__init__()
        self.at, self.workers, self.trained = at, workers, list[str]()

    def train_one(self, arch: ArchSpec) -> ProxyResult:
        self.trained.append(arch.arch_id)
        if len(self.trained) == self.at:
            raise KeyboardInterrupt
        return super().train_one(arch)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("sampler", Sampler)
def test_an_interrupted_search_proposes_what_it_would_have_proposed(
    config: SearchConfig, sampler: Sampler, workers: int
) -> None:
    """Openers, random ones and, with the sampler that models, its own are interrupted.

    With several workers the samplers see the trials of a round in another order afterwards, so that only the rounds
    that were interrupted are the same.
    """
    whole = replace(config, study="whole", sampler=sampler, budget=24 if workers == 1 else 16)
    search.run(whole, Stumbling(workers=workers))
    parts = replace(whole, study="parts")
    for at in (2, 7, 8):
        with pytest.raises(KeyboardInterrupt):
            search.run(parts, Stumbling(at, workers))
    search.run(parts, Stumbling(workers=workers))
    assert {row.arch for row in candidates(parts)} == {row.arch for row in candidates(whole)}


@pytest.mark.parametrize("at", [1, 3], ids=["an opener", "another"])
def test_what_was_interrupted_again_and_again_is_given_up(config: SearchConfig, at: int) -> None:
    """It may be what ends the search, for want of memory."""
    ended = set()
    for number in (at, 1, 1):
        evaluator = Stumbling(number)
        with pytest.raises(KeyboardInterrupt):
            search.run(config, evaluator)
        ended.add(evaluator.trained[-1])
    (given_up,) = ended
    evaluator = Stumbling()
    assert search.run(config, evaluator).complete == 12
    assert given_up not in evaluator.trained


@pytest.mark.parametrize("told", ["before Optuna was told", "while Optuna was being told"])
def test_a_candidate_whose_row_was_written_is_told_on_the_next_start(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    """As if killed between our row and Optuna's: the process is gone without any cleaning up."""
    config = replace(config, limits=Limits(latency_ms=5.0))
    with monkeypatch.context() as patch:
        kill = KeyboardInterrupt
        if told.startswith("before"):
            patch.setattr("nas.search.trials.Trials.finish", lambda *_: (_ for _ in ()).throw(kill()))
        else:
            # The constraint is set already, the state is not: setting it again would only warn.
            patch.setattr(OptunaStorage, "set_trial_state_values", lambda *_: (_ for _ in ()).throw(kill()))
        patch.setattr("nas.search.live_study.LiveStudy.recover", lambda _: None)
        with pytest.raises(KeyboardInterrupt):
            search.run(config, FakeEvaluator())
    (running,) = trials(config)
    assert running.state == TrialState.RUNNING
    (row,) = candidates(config)
    evaluator = Counting()
    assert search.run(config, evaluator).complete == 12
    first = trials(config)[0]
    assert first.state == TrialState.COMPLETE
    assert first.values == [row.accuracy, row.latencies[0].median_ms]
    assert first.constraints["latency_ms"] <= 0
    assert row.arch_id not in evaluator.trained


@pytest.mark.parametrize(
    ("limits", "measures"),
    [
        (Limits(latency_ms=0.5), True),
        (Limits(memory_mb=0.8), True),
        (Limits(params=150_000), False),
        (Limits(macs=5_000_000), False),
    ],
    ids=["latency", "memory", "params", "macs"],
)
def test_candidates_over_a_limit_cost_no_training_and_are_never_complete(
    config: SearchConfig, limits: Limits, measures: bool
) -> None:
    config = replace(config, limits=limits)
    evaluator = Counting()
    search.run(config, evaluator)
    rows = {row.trial_id: row for row in candidates(config)}
    over = [trial for trial in trials(config) if rows[trial._trial_id].state == CandidateState.OVER_LIMIT]
    assert over, "no candidate was over the limit, so nothing was tested"
    for trial in over:
        row = rows[trial._trial_id]
        assert trial.state == TrialState.PRUNED
        assert trial.values is None
        assert row.accuracy is None
        assert max(trial.constraints.values()) > 0
        (what,) = (name for name, limit in asdict(limits).items() if limit is not None)
        shown = {"latency_ms": "latency", "memory_mb": "memory", "params": "parameters", "macs": "MACs"}[what]
        value, limit = re.findall(r"[0-9][0-9.,e+-]*(?= |$|,)", trial.user_attrs["reason"])
        assert trial.user_attrs["reason"].startswith(f"{shown} {value}")
        assert float(value.replace(",", "")) > float(limit.replace(",", "")) == asdict(limits)[what]
        assert row.arch_id not in evaluator.trained
        assert (row.arch_id in evaluator.measured) == measures
    for trial in trials(config):
        if trial.state == TrialState.COMPLETE:
            assert max(trial.constraints.values()) <= 0
    study = optuna.load_study(study_name=config.study, storage=config.storage)
    assert all(trial.state == TrialState.COMPLETE for trial in study.best_trials)


def test_limits_that_nothing_meets_end_the_search(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.search.rounds.MAX_BARREN", 30)
    result = search.run(replace(config, limits=Limits(latency_ms=1e-6)), FakeEvaluator())
    assert result.complete == 0
    assert result.why == "the last 30 candidates all failed or broke a limit"


def test_a_time_limit_ends_a_search_early_and_cleanly(config: SearchConfig) -> None:
    result = search.run(replace(config, time_limit_s=1e-6), FakeEvaluator())
    assert result.complete == 0
    assert result.why.startswith("time limit")
    assert search.run(config, FakeEvaluator()).complete == 12


@pytest.mark.usefixtures("finished")
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(seed=1), "seed: study has 0, now 1"),
        (dict(sampler="random"), "sampler: study has model, now random"),
        (dict(proxy=ProxyConfig(steps=100)), "proxy.steps: study has 200, now 100"),
        (dict(latency=LatencyConfig(batch_size=8)), "latency.batch_size: study has 1, now 8"),
        (dict(limits=Limits(params=10**6)), "limits.params: study has None, now 1000000"),
    ],
)
def test_going_on_under_another_configuration_is_refused_with_what_differs(
    config: SearchConfig, changes: dict[str, object], told: str
) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        search.run(replace(config, **changes), FakeEvaluator())
    assert "--study convfirst" in str(caught.value)


@pytest.mark.usefixtures("finished")
def test_another_space_is_told_by_the_choices_that_differ(config: SearchConfig) -> None:
    stages = config.space.stages
    other = replace(config.space, stages=(*stages[:2], replace(stages[2], blocks=(1, 2))))
    with pytest.raises(UsageError, match=r"space.stages.3.blocks: study has \[1, 2, 3\], now \[1, 2\]"):
        search.run(replace(config, space=other), FakeEvaluator())


@pytest.mark.usefixtures("finished")
def test_going_on_elsewhere_or_with_other_data_is_refused(config: SearchConfig) -> None:

    class Elsewhere(FakeEvaluator):
        device = replace(FakeEvaluator.device, name="another GPU")

    class OtherData(FakeEvaluator):
        data_fingerprint = "other"

    with pytest.raises(UsageError, match="name: study has invented, now another GPU"):
        search.run(config, Elsewhere())
    with pytest.raises(UsageError, match="--data digits: holds other images"):
        search.run(config, OtherData())


@pytest.mark.usefixtures("finished")
def test_a_study_remembers_its_whole_configuration(config: SearchConfig) -> None:
    study = opened(config).find_study(config.study)
    assert study is not None
    assert json.loads(study.config) == json.loads(json.dumps(config.identity()))
    assert json.loads(study.versions)["torch"] == torch.__version__.partition("+")[0]
    assert ArchSpec.from_json(study.anchor) == config.space.anchor()


def test_studies_of_before_images_could_be_converted_go_on(config: SearchConfig) -> None:
    assert "to_rgb" not in config.identity()["data"]
    search.run(replace(config, data=replace(config.data, to_rgb=True)), FakeEvaluator())
    with pytest.raises(UsageError, match=r"data\.to_rgb: study has True"):
        search.run(config, FakeEvaluator())


def test_a_folder_by_another_path_is_the_same_data_set(
    config: SearchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fingerprint decides, once the images are loaded."""
    monkeypatch.chdir(tmp_path)
    photos = replace(config, budget=2, data=DataConfig(source="photos"))
    search.run(photos, FakeEvaluator())
    for path in ("photos/", "./photos", str(tmp_path / "photos"), "moved/elsewhere"):
        again = replace(photos, data=replace(photos.data, source=path, mirror=True))
        assert search.run(again, FakeEvaluator()).complete == 2
    other = FakeEvaluator()
    other.data_fingerprint = "other"
    with pytest.raises(UsageError, match="--data moved: holds other images than when --study convfirst was begun"):
        search.run(replace(photos, data=DataConfig(source="moved")), other)
    with pytest.raises(UsageError, match=r"data\.source: study has photos, now digits"):
        search.run(replace(photos, data=DataConfig(mirror=True)), FakeEvaluator())


def test_cuda_is_its_first_device(config: SearchConfig) -> None:
    on = {name: replace(config, budget=2, latency=LatencyConfig(device=name)) for name in ("cuda", "cuda:0", "cuda:1")}
    search.run(on["cuda"], FakeEvaluator())
    assert search.run(on["cuda:0"], FakeEvaluator()).complete == 2
    with pytest.raises(UsageError, match=r"latency\.device: study has cuda, now cuda:1"):
        search.run(on["cuda:1"], FakeEvaluator())


def test_mirroring_is_part_of_a_study(config: SearchConfig) -> None:
    photos = replace(config, budget=2, data=DataConfig(source="photos"))
    assert photos.identity()["data"]["mirror"] is True
    search.run(photos, FakeEvaluator())
    with pytest.raises(UsageError, match=r"data\.mirror: study has True, now False"):
        search.run(replace(photos, data=replace(photos.data, mirror=False)), FakeEvaluator())


@pytest.mark.parametrize(
    ("source", "mirrored"),
    [("digits", False), ("cifar10", True), ("photos", True), ("torch/mnist", False), ("torch/fashion_mnist", True),
     ("torch/svhn", False), ("svhn-crops", True)],
)  # fmt: skip
def test_what_is_mirrored_by_default(source: str, mirrored: bool) -> None:
    assert DataConfig(source=source).mirror == mirrored
    assert DataConfig(source=source, mirror=not mirrored).mirror != mirrored


def test_a_study_that_another_process_searches_is_refused_until_that_process_is_gone(config: SearchConfig) -> None:
    search.run(replace(config, budget=2), FakeEvaluator())
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        store = opened(config)
        study = store.find_study(config.study)
        assert study is not None
        store.ownership.claim(
            study.study_id, Owner(socket.gethostname(), other.pid, psutil.Process(other.pid).create_time())
        )
        store.close()
        with pytest.raises(StorageError, match=f"is being searched by process {other.pid}"):
            search.run(config, FakeEvaluator())
        assert len(candidates(config)) == 2
    finally:
        other.kill()
        other.wait()
    assert search.run(config, FakeEvaluator()).complete == 12


def test_a_process_id_that_came_round_again_is_not_taken_for_the_owner() -> None:
    me = Owner.me()
    assert me.may_live()
    assert not replace(me, started=me.started - 1000).may_live()
    # A container that was killed and started anew at once.
    assert not replace(me, started=me.started - 3).may_live()
    assert Owner.parse(str(me)) == me


@pytest.mark.parametrize("trials", [0, 1])
def test_another_programs_study_is_refused_and_its_database_left_as_it_was(config: SearchConfig, trials: int) -> None:
    theirs = optuna.create_study(study_name=config.study, storage=config.storage)
    if trials:
        theirs.add_trial(optuna.trial.create_trial(value=1.0))

    def tables() -> list[str]:
        with sqlite3.connect(config.storage.removeprefix("sqlite:///")) as connection:
            return [row[0] for row in connection.execute("select name from sqlite_master order by name")]

    before = tables()
    with pytest.raises(StorageError, match="'convfirst' was made by another program; choose another --study"):
        search.run(config, FakeEvaluator())
    assert tables() == before
    assert search.run(replace(config, study="ours", budget=2), FakeEvaluator()).complete == 2


def test_trials_that_another_program_adds_end_the_search_with_a_line(config: SearchConfig) -> None:
    class Meddled(FakeEvaluator):
        def train_one(self, arch: ArchSpec) -> ProxyResult:
            study = optuna.load_study(study_name=config.study, storage=config.storage)
            study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
            return super().train_one(arch)

    with pytest.raises(StorageError, match="another program adds trials"):
        search.run(config, Meddled())


def test_a_trial_that_another_program_left_running_does_not_keep_a_study_shut(config: SearchConfig) -> None:
    """It is closed as interrupted, and has no architecture to begin with."""
    search.run(replace(config, budget=3), FakeEvaluator())
    study = optuna.load_study(study_name=config.study, storage=config.storage)
    study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING))
    assert search.run(replace(config, budget=5), FakeEvaluator()).complete == 5
    assert search.run(config, FakeEvaluator()).complete == 12


def test_a_study_deleted_while_it_is_searched_ends_the_search_with_a_line(config: SearchConfig) -> None:
    class Deleted(FakeEvaluator):
        def train_one(self, arch: ArchSpec) -> ProxyResult:
            optuna.delete_study(study_name=config.study, storage=config.storage)
            return super().train_one(arch)

    with pytest.raises(StorageError, match="deleted while it was searched"):
        search.run(config, Deleted())


@pytest.mark.usefixtures("finished")
def test_several_studies_share_a_database(config: SearchConfig) -> None:
    search.run(replace(config, study="other", seed=3, budget=4), FakeEvaluator())
    store = opened(config)
    assert [(s.name, s.complete) for s in store.summaries()] == [("convfirst", 12), ("other", 4)]
    assert set(store.front("other")["study_name"]) == {"other"}


def test_events_tell_where_the_search_stands(config: SearchConfig) -> None:
    class Recorder(search.Silent):
        def __init__(self) -> None:
            self.events: list[search.Event] = []

        def candidate(self, event: search.Event) -> None:
            self.events.append(event)

    recorder = Recorder()
    search.run(config, FakeEvaluator(), recorder)
    done = [event.complete for event in recorder.events]
    assert done == sorted(done)
    assert done[-1] == 12
    volumes = [event.hypervolume for event in recorder.events]
    assert np.all(np.diff(volumes) >= 0)
    assert recorder.events[-1].seconds_left == 0


def test_two_processes_that_begin_a_study_at_once(config: SearchConfig) -> None:
    """The second finds that the first was quicker while it measured its own anchor."""

    class Slow(FakeEvaluator):
        def anchor(self, references_ms: Sequence[float]) -> ShapeLatency:
            search.run(replace(config, budget=1), FakeEvaluator())
            return super().anchor(references_ms)

    with pytest.raises(StorageError, match="has just been made by another process"):
        search.run(config, Slow())
    assert search.run(config, FakeEvaluator()).complete == 12


@pytest.mark.parametrize("when", ["trained", "proposing"])
def test_a_study_taken_over_meanwhile_is_left_alone(config: SearchConfig, when: str) -> None:
    """The robbed process writes no rows, and a trial that is running is the new owner's: closing it as failed would end
    that search, too."""
    thief = replace(Owner.me(), host="elsewhere")
    running: list[int] = []

    def rob() -> None:
        store = opened(config)
        study = store.find_study(config.study)
        assert study is not None
        with transaction(store.engine) as session:
            session.get_one(Study, study.study_id).owner = str(thief)
        running.append(store.optuna_storage.create_new_trial(study.study_id))
        store.close()

    class Robbed(FakeEvaluator):
        def train_one(self, arch: ArchSpec) -> ProxyResult:
            if when == "trained":
                rob()
            return super().train_one(arch)

    class Robber(search.Silent):
        def candidate(self, event: search.Event) -> None:
            if when == "proposing":
                rob()

    with pytest.raises(StorageError, match="taken over by another process"):
        search.run(config, Robbed(), Robber())
    assert len(candidates(config)) == {"trained": 0, "proposing": 1}[when]
    store = opened(config)
    trials = store.optuna_storage.get_all_trials(1)
    assert next(trial for trial in trials if trial._trial_id == running[0]).state == TrialState.RUNNING
    # And nothing was begun after that.
    assert trials[-1]._trial_id == running[0]
    study = store.find_study(config.study)
    assert study is not None
    assert study.owner == str(thief)
    store.close()


def test_a_killed_candidate_is_told_as_the_search_judged_it(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured again before the study goes on, it may have turned out over the limit: it was feasible when it was
    recorded, and is not told as complete with a broken constraint."""
    config = replace(config, limits=Limits(latency_ms=10.0), budget=3)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nas.search.trials.Trials.finish", die)
        with pytest.raises(KeyboardInterrupt):
            search.run(config, FakeEvaluator())
    (row,) = candidates(config)
    store = opened(config)
    measured = FakeEvaluator().measure(ArchSpec.from_json(row.arch))
    slower = replace(measured, latency=replace(measured.latency, median_ms=14.0))
    again = latency_row(
        row.trial_id, slower, deployment_of(config.latency, row.latencies[0].device_id), LatencyStage.FINAL,
    )  # fmt: skip
    again.over_limit = True
    store.add_latencies(row.study_id, [again])
    store.close()
    search.run(config, FakeEvaluator())
    trial = trials(config)[0]
    assert trial.state == TrialState.COMPLETE
    assert trial.constraints["latency_ms"] < 0


@pytest.mark.gpu
def test_a_whole_search_runs_on_cuda(sqlite_url: str) -> None:
    config = SearchConfig(
        budget=3, storage=sqlite_url, proxy=ProxyConfig(steps=20), latency=LatencyConfig(device="cuda", seconds=0.2)
    )
    assert search.run(config).complete == 3
    for row in candidates(config):
        assert row.latencies[0].engine == "fused"
        assert row.latencies[0].dtype == "float16"


def test_a_name_is_as_long_as_every_database_takes(any_url: str) -> None:
    """SQLite would take a longer one, and the study could then not be moved to PostgreSQL."""
    config = SearchConfig(budget=1, storage=any_url, latency=LatencyConfig(device="cpu"))
    with pytest.raises(FieldError, match="at most 512 characters"):
        search.run(replace(config, study="x" * 513), FakeEvaluator())
    assert Store.open(any_url, create=False) is None
    longest = replace(config, study="\u4e2d" * 512)
    assert search.run(longest, FakeEvaluator()).complete == 1
    for name in ("", "a\0b", "a\udcff"):
        with pytest.raises(FieldError, match="is not a name"):
            replace(config, study=name)
