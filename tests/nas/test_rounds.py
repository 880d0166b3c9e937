"""Rounds of candidates that are proposed and timed one after the other, and trained side by side."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from nas import search
from nas.config import LatencyConfig, Limits, Sampler, SearchConfig
from nas.errors import CandidateFailed
from nas.lab.invented import FakeEvaluator
from nas.latency.values import Measurement
from nas.search.loop import Event, Pace, Silent
from nas.training.proxy import ProxyResult
from nas.training.stopping import Rules
from nas.training.workers import Done
from search_spaces import ArchSpec, StageChoices
from studies import TRAINED
from tests.conftest import candidates_of, make_tiny_space

STAGE = StageChoices(
    width=(8, 16), kernel_size=(3,), group_width=(1, 8), expansion=(1.0, 1.5), blocks=(1, 2), stride=(1, 2)
)


class SideBySide(FakeEvaluator):
    """Trainings that end in whatever order the seed says; it notes what is trained while others are timed."""

    def __init__(self, workers: int, seed: int = 0, apart: bool = False) -> None:
        super().__init__()
        self.workers, self.apart = workers, apart  # type: ignore[misc]
        self.rng = random.Random(seed)
        self.training = threading.Event()
        self.timed_meanwhile = 0
        self.rounds: list[int] = []

    def measure(self, arch: ArchSpec) -> Measurement:
        self.timed_meanwhile += self.training.is_set()
        return super().measure(arch)

    def train(
        self, archs: Sequence[ArchSpec], seeds: Sequence[int] | None = None, rules: Rules = None
    ) -> Iterator[Done[ProxyResult]]:
        self.rounds.append(len(archs))
        order = list(range(len(archs)))
        self.rng.shuffle(order)
        self.training.set()
        for index in order:
            (done,) = super().train([archs[index]], None, rules and [rules[index]])
            yield replace(done, index=index, worker=index % self.workers)
        self.training.clear()


@pytest.fixture
def config(sqlite_url: str) -> SearchConfig:
    return SearchConfig(storage=sqlite_url, latency=LatencyConfig(device="cpu", engine="eager"), confirm=0)


def proposed(config: SearchConfig) -> list[tuple[int, str, str]]:
    """Number, architecture and outcome of all candidates."""
    return [(row.number, row.arch, row.state) for row in candidates_of(config.storage, config.study)]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("sampler", Sampler)
def test_proposals_do_not_depend_on_which_training_ends_first(sampler: str, apart: bool, config: SearchConfig) -> None:
    # Twenty are drawn at random before samplers look at what was found, if they ever do.
    budget = 15 if sampler == Sampler.RANDOM else 30
    config = replace(config, budget=budget, sampler=sampler)
    runs = []
    for seed in (1, 2):
        evaluator = SideBySide(3, seed, apart)
        runs.append(replace(config, study=f"seed {seed}"))
        assert search.run(runs[-1], evaluator).complete == budget
    assert proposed(runs[0]) == proposed(runs[1])


class Overlapping(SideBySide):
    """As on a cluster: a round's trainings begin before the one before has ended, and may end before it."""

    def __init__(self, workers: int, seed: int, slow_rounds: Sequence[int]) -> None:
        super().__init__(workers, seed, apart=True)
        self.slow_rounds = slow_rounds
        # (round, whether the one before was still trained when all of this one had ended).
        self.overtaken: list[bool] = []
        self.ended: set[int] = set()

    @property
    def round_size(self) -> int:
        return self.workers

    def train(
        self, archs: Sequence[ArchSpec], seeds: Sequence[int] | None = None, rules: Rules = None
    ) -> Iterator[Done[ProxyResult]]:
        number = len(self.rounds)
        for done in super().train(archs, seeds, rules):
            time.sleep(0.2 if number in self.slow_rounds else 0.0)
            yield done
        self.overtaken.append(number > 0 and number - 1 not in self.ended)
        self.ended.add(number)


@pytest.mark.parametrize("sampler", [Sampler.TPE, Sampler.NSGA2])
def test_rounds_may_overtake_each_other(sampler: str, config: SearchConfig) -> None:
    config = replace(config, budget=30, sampler=sampler)
    runs, overtaken = [], []
    for name, slow in (("quick", ()), ("slow", (5, 6, 8)), ("slower", (4, 7))):
        evaluator = Overlapping(3, 1, slow)
        runs.append(replace(config, study=name))
        assert search.run(runs[-1], evaluator).complete == 30
        overtaken.append(any(evaluator.overtaken))
    assert overtaken[2]
    assert proposed(runs[0]) == proposed(runs[1]) == proposed(runs[2])


class Stations(SideBySide):
    """Three candidates are timed at once, each on a device of its own."""

    timers = 3

    def __init__(self, seed: int) -> None:
        super().__init__(3, seed, apart=True)
        self.timing = self.most = 0
        self.lock = threading.Lock()

    def measure(self, arch: ArchSpec) -> Measurement:
        with self.lock:
            self.timing += 1
            self.most = max(self.most, self.timing)
        time.sleep(self.rng.uniform(0.0, 0.02))
        with self.lock:
            self.timing -= 1
        return super().measure(arch)


def test_several_are_timed_at_once(config: SearchConfig) -> None:
    config = replace(config, budget=18, limits=Limits(latency_ms=0.7))
    runs = []
    for seed in (1, 2):
        evaluator = Stations(seed)
        runs.append(replace(config, study=f"seed {seed}"))
        assert search.run(runs[-1], evaluator).complete == 18
        assert evaluator.most == 3
    first, second = map(proposed, runs)
    assert first == second
    assert len({arch for _, arch, _ in first}) == len(first)
    assert Counter(state for *_, state in first)["over_limit"] > 0


class Compiling(SideBySide):
    """Notes what is prepared and what is timed."""

    compiles = True

    def __init__(self, apart: bool) -> None:
        super().__init__(2, 1, apart)
        self.events: list[tuple[str, ...]] = []

    def foresee(self, archs: Sequence[ArchSpec]) -> None:
        self.events.append(tuple(arch.arch_id for arch in archs))

    def measure(self, arch: ArchSpec) -> Measurement:
        self.events.append((arch.arch_id,))
        return super().measure(arch)


@pytest.mark.parametrize("apart", [False, True])
def test_what_has_to_be_compiled_is_proposed_before_one_of_it_is_timed(apart: bool, config: SearchConfig) -> None:
    evaluator = Compiling(apart)
    assert search.run(replace(config, budget=12), evaluator).complete == 12
    size = evaluator.round_size
    rounds = 0
    for number, event in enumerate(evaluator.events):
        after = evaluator.events[number + 1 : number + 1 + size]
        rounds += len(event) == size and after == [(arch,) for arch in event]
    assert rounds == 12 // size


def test_an_error_while_several_are_timed_does_not_wait_for_the_others(config: SearchConfig) -> None:
    class Stuck(Stations):
        ended = threading.Event()

        def measure(self, arch: ArchSpec) -> Measurement:
            with self.lock:
                self.timing += 1
                number = self.timing
            if number == 8:
                raise KeyboardInterrupt
            if number > 6:
                # As where a node is busy with something else, until the search is closed.
                assert self.ended.wait(30)
            return FakeEvaluator.measure(self, arch)

        def close(self) -> None:
            self.ended.set()

    with pytest.raises(KeyboardInterrupt):
        search.run(replace(config, budget=30), Stuck(1))


@pytest.mark.parametrize(("sampler", "at_random"), [(Sampler.TPE, 20), (Sampler.MODEL, 10)])
def test_the_number_of_workers_changes_what_a_proposal_knows(
    sampler: str, at_random: int, config: SearchConfig
) -> None:
    config = replace(config, budget=at_random + 12, sampler=sampler)
    found = {}
    for workers in (1, 4):
        search.run(replace(config, study=str(workers)), SideBySide(workers))
        found[workers] = [arch for _, arch, _ in proposed(replace(config, study=str(workers)))]
    # The first are openers and random draws.
    assert found[1][:at_random] == found[4][:at_random]
    assert found[1] != found[4]


@pytest.mark.parametrize("apart", [False, True])
def test_the_budget_is_exact_and_nothing_is_evaluated_twice(apart: bool, config: SearchConfig) -> None:
    evaluator = SideBySide(4, apart=apart)
    result = search.run(replace(config, budget=21), evaluator)
    assert result.complete == 21
    rows = proposed(replace(config, budget=21))
    assert Counter(state for *_, state in rows)["complete"] == 21
    assert max(Counter(arch for _, arch, _ in rows).values()) == 1
    assert max(evaluator.rounds) == 8
    assert result.shares.workers == 4


def test_the_next_round_is_timed_meanwhile_where_its_device_does_not_train(config: SearchConfig) -> None:
    config = replace(config, budget=12)
    waiting = SideBySide(2)
    search.run(replace(config, study="waiting"), waiting)
    assert waiting.timed_meanwhile == 0

    class Slow(SideBySide):
        def train(
            self, archs: Sequence[ArchSpec], seeds: Sequence[int] | None = None, rules: Rules = None
        ) -> Iterator[Done[ProxyResult]]:
            timed.clear()
            for done in super().train(archs, seeds, rules):
                # Until the search's own thread has timed something, which it does not in the last round.
                timed.wait(1.0)
                yield done

        def measure(self, arch: ArchSpec) -> Measurement:
            measurement = super().measure(arch)
            timed.set()
            return measurement

    timed = threading.Event()
    apart = Slow(2, apart=True)
    search.run(replace(config, study="apart"), apart)
    assert apart.timed_meanwhile > 0


def test_a_small_space_is_evaluated_whole_and_once(config: SearchConfig) -> None:
    config = replace(config, space=make_tiny_space(activation=("relu",), stem_width=(8,), stages=(STAGE,)))
    size = config.space.size()
    result = search.run(replace(config, budget=size + 5), SideBySide(4))
    assert result.complete == size
    assert "yields nothing new" in result.why


def test_candidates_over_a_limit_take_no_part_in_a_round(config: SearchConfig) -> None:
    evaluator = SideBySide(3)
    result = search.run(replace(config, budget=20, limits=Limits(latency_ms=0.7)), evaluator)
    assert result.complete == 20
    states = Counter(state for *_, state in proposed(config))
    assert states["over_limit"] > 0
    assert sum(evaluator.rounds) == states["complete"] + states["failed"]
    # Others take their places: no worker idles because of them, but in the last rounds.
    assert set(evaluator.rounds[:2]) == {6}


def test_an_interrupt_while_the_next_round_is_timed_keeps_what_was_trained(config: SearchConfig) -> None:
    class Impatient(SideBySide):
        def measure(self, arch: ArchSpec) -> Measurement:
            if len(self.rounds) == 2:
                # Until the second round's trainings have ended, in their own thread.
                while self.training.is_set():
                    time.sleep(0.01)
                raise KeyboardInterrupt
            return super().measure(arch)

    evaluator = Impatient(2, apart=True)
    with pytest.raises(KeyboardInterrupt):
        search.run(replace(config, budget=30), evaluator)
    assert evaluator.rounds == [4, 4]
    assert len(proposed(config)) == 8


class Dying(SideBySide):
    """The third training cannot be done."""

    def train(
        self, archs: Sequence[ArchSpec], seeds: Sequence[int] | None = None, rules: Rules = None
    ) -> Iterator[Done[ProxyResult]]:
        for done in super().train(archs, seeds, rules):
            if len(self.rounds) == 2 and done.index == 0:
                yield replace(done, result=CandidateFailed("its process was killed by SIGKILL"))
            else:
                yield done


def test_a_worker_that_dies_costs_its_candidate_and_not_the_search(config: SearchConfig) -> None:
    assert search.run(replace(config, budget=12), Dying(2)).complete == 12
    assert Counter(state for *_, state in proposed(config))["failed"] >= 1


class Interrupted(SideBySide):
    """Ctrl-C in the middle of the third round."""

    def train(
        self, archs: Sequence[ArchSpec], seeds: Sequence[int] | None = None, rules: Rules = None
    ) -> Iterator[Done[ProxyResult]]:
        for number, done in enumerate(super().train(archs, seeds, rules)):
            if len(self.rounds) == 3 and number == 2:
                raise KeyboardInterrupt
            yield done


@pytest.mark.parametrize("apart", [False, True])
def test_what_was_trained_before_an_interrupt_is_kept(apart: bool, config: SearchConfig) -> None:
    config = replace(config, budget=22)
    with pytest.raises(KeyboardInterrupt):
        search.run(config, Interrupted(3, apart=apart))
    before = proposed(config)
    assert len(before) >= 2 * 6 + 2
    assert search.run(config, SideBySide(3)).complete == 22
    rows = proposed(config)
    assert rows[: len(before)] == before or set(before) <= set(rows)
    assert sum(state in TRAINED for *_, state in rows) == 22


def test_the_line_shows_workers_and_pace(config: SearchConfig) -> None:
    class Recorder(Silent):
        def __init__(self) -> None:
            self.events: list[Event] = []

        def candidate(self, event: Event) -> None:
            self.events.append(event)

    recorder = Recorder()
    search.run(replace(config, budget=12), SideBySide(2), recorder)
    assert {event.workers for event in recorder.events} == {2}
    assert {event.busy for event in recorder.events} == {0, 1, 2}
    # Nothing is known of the pace before a round has ended.
    assert recorder.events[0].per_minute is None
    assert recorder.events[0].seconds_left is None
    assert (recorder.events[-1].per_minute or 0) > 0
    assert recorder.events[-1].seconds_left == 0


def test_the_pace_is_that_of_whole_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("nas.search.loop.time.perf_counter", lambda: now)
    pace = Pace(complete=10)
    assert pace.seconds_left(5) is None
    now = 160.0
    pace.pause(14)
    assert (pace.per_minute, pace.seconds_left(8)) == (4.0, 120.0)
