"""The rounds of a search: some candidates are proposed and timed, then trained side by side.

The sampler learns of a round when all of it has ended, in the order of its numbers: proposals do not depend on which
training ends first. Where the latency's device is none of those that train, the next round is proposed and timed while
one trains, and its proposals do not know the results of that one; its trainings begin as workers become free.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

from nas.config import SearchConfig
from nas.errors import message_line
from nas.locks import working_clock
from nas.reporting import Note
from nas.search.evaluation import Evaluator, Outcome, Screened, screen
from nas.search.live_study import LiveStudy
from nas.search.sampling import Proposal
from nas.training.proxy import ProxyResult
from nas.training.stopping import Rule
from nas.training.weights import Trained, Weights, near_front, weight_folder
from nas.training.workers import Done
from search_spaces import ArchSpec
from studies import TRAINED, TrainingStage

# Candidates in a row that failed or broke a limit, after which the user should look at the limits or the machine.
MAX_BARREN = 200


@dataclass(frozen=True)
class Flight:
    """A candidate that was proposed and timed, and is to be trained."""

    proposal: Proposal
    trial_id: int
    screened: Screened


@dataclass(frozen=True)
class Recorded:
    """A candidate that was recorded.

    Args:
        ends_round: whether all that was proposed in its round has ended with it.
    """

    proposal: Proposal
    outcome: Outcome
    ends_round: bool = False


class Trainings:
    """The trainings of a round, in this thread or in another.

    Args:
        flights: the candidates of the round, of which those with most to compute are begun first, so that no worker is
            left with one of them at the end.
        rules: by the candidate's number, the rule by which its training may end early, of those that have one.

    Attributes:
        left: number of those whose end this thread has not seen.
        complete: by the candidate's number, whether it counts for the budget, of those that have ended.
        begin, end: time at which the trainings in another thread began, and ended.
    """

    def __init__(self, flights: Sequence[Flight], evaluator: Evaluator, rules: Mapping[int, Rule]) -> None:
        self.rules = rules
        self.flights = sorted(flights, key=lambda flight: (-flight.screened.cost.macs, flight.proposal.number))
        self.evaluator = evaluator
        self.left = len(flights)
        self.complete: dict[int, bool] = {}
        self.begin = self.end = time.perf_counter()
        self.thread: threading.Thread | None = None

    def here(self) -> Generator[Done[ProxyResult]]:
        """Train in this thread, and yield each result."""
        if self.flights:
            archs = [flight.proposal.arch for flight in self.flights]
            rules = [self.rules.get(flight.proposal.number) for flight in self.flights]
            yield from self.evaluator.train(archs, rules=rules) if self.rules else self.evaluator.train(archs)

    def start(self, results: queue.Queue[Result]) -> None:
        """Train in another thread, and put each result into a queue; None comes last, or an exception."""
        self.thread = threading.Thread(target=self._work, args=(results,))
        self.thread.start()

    def _work(self, results: queue.Queue[Result]) -> None:
        try:
            for done in self.here():
                self.end = time.perf_counter()
                results.put((self, done))
            results.put((self, None))
        except BaseException as error:  # for the thread that waits
            results.put((self, error))

    def join(self) -> None:
        if self.thread is not None:
            self.thread.join()


# A training that ended, or None when there are no more of its round, or what ended them all.
Result: TypeAlias = tuple[Trainings, Done[ProxyResult] | BaseException | None]


class Rounds:
    """The candidates of a run, round by round.

    Args:
        begin: the time at which the run began, on the clock of `time.perf_counter`.
        note: function that receives a line about what went wrong beside the search.
        timed: function that is called with each architecture that was timed, while nothing trains there.

    Attributes:
        why: the reason for which no more candidates are proposed; empty until there is one.
        busy: number of workers that train.
        training, latency: seconds of this run in which it trained, and in which it measured latency.
        worked: seconds of all trainings, those at the same time added up.
        both: seconds of `latency` in which it also trained.
    """

    def __init__(
        self, config: SearchConfig, study: LiveStudy, evaluator: Evaluator, begin: float, note: Note,
        timed: Callable[[ArchSpec], None],
    ) -> None:  # fmt: skip
        self.config, self.study, self.evaluator, self.begin = config, study, evaluator, begin
        self.note, self.timed = note, timed
        self.why = ""
        self.training = self.latency = self.worked = self.both = 0.0
        self.busy = self.barren = 0
        # Trained candidates without those of rounds that have not ended: a decision that counted these would depend on
        # which training ends first.
        self.complete = study.trained
        self.running: list[Trainings] = []
        # The rounds that the sampler does not know.
        self.unsettled: list[Trainings] = []
        self.results: queue.Queue[Result] = queue.Queue()
        self.trained_until = 0.0
        self.passes_before = study.passes

    def run(self) -> Generator[Recorded]:
        """Evaluate candidates until the budget is met, or there is another reason to end; yield each when recorded."""
        return self._side_by_side() if self.evaluator.apart else self._in_turns()

    def _in_turns(self) -> Generator[Recorded]:
        """Propose and time a round, then train it, and so on."""
        while not self._ended():
            flights: list[Flight] = []
            yield from self._propose(flights)
            trainings = self._trainings(flights)
            self.evaluator.foresee(self.study.likely_next())
            begin = working_clock()
            self.running = [trainings]
            self._count_busy()
            with closing(trainings.here()) as results:
                for done in results:
                    yield self._record_trained(trainings, done)
            self.running = []
            self.training += working_clock() - begin if flights else 0.0
            self._settle(trainings)

    def _side_by_side(self) -> Generator[Recorded]:
        """Propose and time a round while the one before is trained."""
        try:
            while not self._ended() or self.unsettled:
                flights: list[Flight] = []
                yield from self._propose(flights)
                self.evaluator.foresee(self.study.likely_next())
                before, self.unsettled = self.unsettled, []
                if flights:
                    trainings = self._trainings(flights)
                    self.unsettled.append(trainings)
                    self.running.append(trainings)
                    trainings.start(self.results)
                while any(each in self.running for each in before):
                    yield from self._received(self.results.get())
                # The next proposals know the rounds before this one, even if all of this one has ended.
                for each in before:
                    self._settle(each)
        except BaseException:
            # The results that are there are kept; the other trainings are given up.
            while not self.results.empty():
                try:
                    for _ in self._received(self.results.get()):
                        pass
                except BaseException as error:
                    self.note(f"a training ended with {message_line(error)}")
            self.evaluator.close()
            for each in self.running:
                each.join()
            raise

    def _received(self, result: Result) -> Iterator[Recorded]:
        """Record what has come from a round that is trained in another thread."""
        trainings, done = result
        if isinstance(done, BaseException):
            raise done
        if done is None:
            trainings.join()
            self.running.remove(trainings)
            if trainings.left:
                raise RuntimeError(f"{trainings.left} trainings ended without a result")
            # Two rounds may have been trained at the same time.
            self.training += trainings.end - max(trainings.begin, self.trained_until)
            self.trained_until = trainings.end
        else:
            yield self._record_trained(trainings, done)

    def _ended(self) -> bool:
        if not self.why:
            if self.complete >= self.config.budget:
                self.why = "budget met"
            elif self.barren >= MAX_BARREN:
                self.why = f"the last {self.barren} candidates all failed or broke a limit"
            elif self._is_late():
                self.why = f"time limit of {self.config.time_limit_s:g} s reached"
        return bool(self.why)

    def _is_late(self) -> bool:
        limit = self.config.time_limit_s
        return limit is not None and time.perf_counter() - self.begin + self.confirming_seconds >= limit

    @property
    def confirming_seconds(self) -> float:
        """Estimate of the time that it takes to confirm the front of what is complete now."""
        return max(0.0, self.config.confirm * self.study.passes - self.confirmed) * self.seconds_each

    @cached_property
    def confirmed(self) -> int:
        """Number of trainings that confirmed the front before; they count towards those that will."""
        recorded = self.study.recorded
        return len(recorded.store.trainings.of_study(recorded.study_id, TrainingStage.CONFIRMATION))

    @property
    def seconds_each(self) -> float:
        """Time of this run for a whole training, as far as trainings side by side share it; 0 before one has ended."""
        passes = self.study.passes - self.passes_before
        return self.training / passes if passes else 0.0

    def _propose(self, flights: list[Flight]) -> Iterator[Recorded]:
        """Propose and time candidates until there is a round of them to train; yield those that are not to be trained,
        and what ends meanwhile.

        Args:
            flights: list to which the others are added.
        """
        if self._ended():
            return
        in_flight = sum(len(each.flights) for each in self.unsettled)
        wanted = min(self.evaluator.round_size, self.config.budget - self.complete - in_flight)
        # The rest of a round that was interrupted is a round: what follows is proposed with its results.
        wanted = min(wanted, self.study.left_over or wanted)
        barren = self.barren
        while len(flights) < wanted and barren < MAX_BARREN and not self.why and not self._is_late():
            batch = []
            # What is compiled before it is timed is proposed together, so that the compilers have work.
            most = wanted if self.evaluator.compiles else self.evaluator.timers
            for _ in range(min(most, wanted - len(flights))):
                proposed = self.study.propose()
                if proposed is None:
                    self.why = f"the space {self.config.space.name!r} yields nothing new"
                    break
                batch.append(proposed)
            begin = working_clock()
            results = self._screen([proposal.arch for proposal, _ in batch])
            for (proposal, _), screened in zip(batch, results, strict=True):
                if screened.latency is not None:
                    self.timed(proposal.arch)
            seconds = working_clock() - begin
            self.latency += seconds
            self.both += seconds if any(each.left for each in self.running) else 0.0
            for (proposal, trial_id), screened in zip(batch, results, strict=True):
                if isinstance(screened, Outcome):
                    barren += 1
                    self.barren += 1
                    yield self._record(proposal, trial_id, screened)
                    # It comes in the order of the numbers, whatever is trained.
                    self.study.settle(proposal.number)
                else:
                    flights.append(Flight(proposal, trial_id, screened))
            while not self.results.empty():
                yield from self._received(self.results.get())

    def _trainings(self, flights: Sequence[Flight]) -> Trainings:
        """The trainings of a round that is about to begin."""
        archs = [flight.proposal.arch for flight in flights]
        rules = self.study.rules(archs, [flight.screened.latency.median_ms for flight in flights])
        numbered = {flight.proposal.number: rule for flight, rule in zip(flights, rules, strict=True) if rule}
        return Trainings(flights, self.evaluator, numbered)

    def _screen(self, archs: Sequence[ArchSpec]) -> list[Outcome | Screened]:
        """Count and time several candidates, as many at once as there are devices for it."""
        if self.evaluator.compiles:
            self.evaluator.foresee(archs)
        if self.evaluator.timers == 1 or len(archs) <= 1:
            return [screen(arch, self.evaluator, self.config.limits) for arch in archs]
        threads = ThreadPoolExecutor(min(self.evaluator.timers, len(archs)))
        try:
            results = [threads.submit(screen, arch, self.evaluator, self.config.limits) for arch in archs]
            for result in wait(results, return_when=FIRST_EXCEPTION).done:
                result.result()
            return [result.result() for result in results]
        except BaseException:
            # The others may have to wait for a device.
            self.evaluator.close()
            raise
        finally:
            threads.shutdown()

    def _count_busy(self) -> None:
        self.busy = min(sum(each.left for each in self.running), self.evaluator.workers)

    def _record_trained(self, trainings: Trainings, done: Done[ProxyResult]) -> Recorded:
        flight = trainings.flights[done.index]
        trainings.left -= 1
        self._count_busy()
        self.worked += done.seconds
        outcome = flight.screened.trained(done)
        if self.config.keep_weights:
            self._keep_weights(flight.proposal, outcome)
        recorded = self._record(flight.proposal, flight.trial_id, outcome)
        trainings.complete[flight.proposal.number] = outcome.state in TRAINED
        return replace(recorded, ends_round=not trainings.left)

    def _settle(self, trainings: Trainings) -> None:
        """Tell the sampler of a round that has ended."""
        for number, complete in sorted(trainings.complete.items()):
            self.study.settle(number)
            self.complete += complete
            self.barren = 0 if complete else self.barren + 1

    def _record(self, proposal: Proposal, trial_id: int, outcome: Outcome) -> Recorded:
        self.study.record(proposal, trial_id, outcome)
        return Recorded(proposal, outcome)

    def _keep_weights(self, proposal: Proposal, outcome: Outcome) -> None:
        if not (outcome.proxy and outcome.proxy.trained and outcome.latency):
            return
        # Whatever another candidate is far better than, a member of the front is.
        others = list(zip(self.study.front.accuracy, self.study.front.latency_ms, strict=True))
        if near_front(outcome.proxy.accuracy, outcome.latency.median_ms, others):
            self.keep_better(proposal.number, proposal.arch.arch_id, outcome.proxy.accuracy, outcome.proxy.trained)

    def keep_better(self, number: int, arch_id: str, accuracy: float, trained: Trained) -> None:
        """Keep a candidate's weights, unless better ones are kept already."""
        try:
            weights(self.config, self.study).keep_better(number, arch_id, accuracy, trained)
        except OSError as error:
            # The candidate is recorded all the same.
            self.note(f"weights of trial {number} could not be kept ({error})")


def weights(config: SearchConfig, study: LiveStudy) -> Weights:
    """The weights that are kept of a study's candidates."""
    return Weights(weight_folder(config.storage), study.recorded.study_id)
