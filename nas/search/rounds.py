"""The rounds of a search: some candidates are proposed and timed one after the other, then trained side by side.

A round is twice as many candidates as there are workers, so that none waits long for the last of them; one worker has
rounds of one. The sampler learns of a round when all of it has ended, in the order of its numbers: proposals do not
depend on which training ends first. Where the latency's device is none of those that train, the next round is proposed
and timed while one trains, and its proposals do not know the results of that one.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from nas.config import SearchConfig
from nas.reporting import Note
from nas.search.evaluation import Evaluator, Outcome, Screened, screen
from nas.search.live_study import LiveStudy
from nas.search.sampling import Proposal
from nas.training.proxy import ProxyResult
from nas.training.weights import Weights, near_front, weight_folder
from nas.training.workers import Done
from search_spaces import ArchSpec
from studies import CandidateState

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
    """A candidate that was recorded."""

    proposal: Proposal
    outcome: Outcome


class Trainings:
    """The trainings of a round, in this thread or in another.

    Attributes:
        left: number of those that have not ended, as far as this thread has looked.
        seconds: time from the beginning of the trainings in another thread to their end.
    """

    def __init__(self, flights: Sequence[Flight], evaluator: Evaluator) -> None:
        self.flights, self.evaluator = flights, evaluator
        self.left = len(flights)
        self.seconds = 0.0
        self.results: queue.Queue[Done[ProxyResult] | BaseException | None] = queue.Queue()
        self.thread: threading.Thread | None = None

    def here(self) -> Generator[Done[ProxyResult]]:
        """Train in this thread, and yield each result."""
        if self.flights:
            with closing(self.evaluator.train([flight.proposal.arch for flight in self.flights])) as results:
                for done in results:
                    self.left -= 1
                    yield done

    def start(self) -> None:
        """Train in another thread."""
        self.thread = threading.Thread(target=self._work)
        self.thread.start()

    def _work(self) -> None:
        begin = time.perf_counter()
        try:
            for done in self.evaluator.train([flight.proposal.arch for flight in self.flights]) if self.flights else ():
                self.results.put(done)
            self.seconds = time.perf_counter() - begin if self.flights else 0.0
            self.results.put(None)
        except BaseException as error:  # for the thread that waits
            self.results.put(error)

    def ready(self) -> Iterator[Done[ProxyResult]]:
        """Yield the results that are there already."""
        while not self.results.empty():
            result = self.results.get()
            if not isinstance(result, Done):
                # The end, which `rest` is to see.
                self.results.put(result)
                return
            self.left -= 1
            yield result

    def rest(self) -> Iterator[Done[ProxyResult]]:
        """Wait for all results, and yield each."""
        while (result := self.results.get()) is not None:
            if isinstance(result, BaseException):
                raise result
            self.left -= 1
            yield result

    def join(self) -> None:
        if self.thread is not None:
            self.thread.join()


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
        in_flight: number of candidates that were timed and whose training has not ended.
    """

    def __init__(
        self, config: SearchConfig, study: LiveStudy, evaluator: Evaluator, begin: float, note: Note,
        timed: Callable[[ArchSpec], None],
    ) -> None:  # fmt: skip
        self.config, self.study, self.evaluator, self.begin = config, study, evaluator, begin
        self.note, self.timed = note, timed
        self.size = 1 if evaluator.workers == 1 else 2 * evaluator.workers
        self.why = ""
        self.training = self.latency = self.worked = 0.0
        self.busy = self.barren = self.in_flight = 0

    def run(self) -> Generator[Recorded]:
        """Evaluate candidates until the budget is met, or there is another reason to end; yield each when recorded."""
        flights: list[Flight] = []
        while flights or not self._ended():
            following: list[Flight] = []
            trainings = Trainings(flights, self.evaluator)
            begin = time.perf_counter()
            if self.evaluator.apart:
                trainings.start()
                try:
                    yield from self._propose(following, trainings)
                    yield from self._record_trained(trainings, trainings.rest())
                except BaseException:
                    # The results that are there are kept; the other trainings are given up.
                    for _ in self._record_trained(trainings, trainings.ready()):
                        pass
                    self.evaluator.close()
                    trainings.join()
                    raise
                self.training += trainings.seconds
                self.study.settle()
            else:
                with closing(trainings.here()) as results:
                    yield from self._record_trained(trainings, results)
                self.training += time.perf_counter() - begin if flights else 0.0
                self.study.settle()
                yield from self._propose(following, None)
            # The longest first, so that no worker is left with one at the end.
            flights = sorted(following, key=lambda flight: (-flight.screened.cost.macs, flight.proposal.number))

    @property
    def round_ended(self) -> bool:
        """Whether all that was proposed has ended."""
        return not self.in_flight

    def _ended(self) -> bool:
        if not self.why:
            if len(self.study.complete) >= self.config.budget:
                self.why = "budget met"
            elif self.barren >= MAX_BARREN:
                self.why = f"the last {self.barren} candidates all failed or broke a limit"
            elif self._is_late():
                self.why = f"time limit of {self.config.time_limit_s:g} s reached"
        return bool(self.why)

    def _is_late(self) -> bool:
        limit = self.config.time_limit_s
        return limit is not None and time.perf_counter() - self.begin >= limit

    def _propose(self, flights: list[Flight], meanwhile: Trainings | None) -> Iterator[Recorded]:
        """Propose and time candidates until there is a round of them to train; yield those that are not to be trained.

        Args:
            flights: list to which the others are added.
            meanwhile: the round that is trained at this time.
        """
        if self._ended():
            return
        # Both are those of the beginning, however soon trainings end meanwhile.
        in_flight = 0 if meanwhile is None else meanwhile.left
        wanted = min(self.size, self.config.budget - len(self.study.complete) - in_flight)
        barren = self.barren
        while len(flights) < wanted and barren < MAX_BARREN and not self._is_late():
            proposed = self.study.propose()
            if proposed is None:
                self.why = f"the space {self.config.space.name!r} yields nothing new"
                return
            proposal, trial_id = proposed
            screened = screen(proposal.arch, self.evaluator, self.config.limits)
            self.latency += screened.latency_seconds or 0.0
            if screened.latency is not None:
                timing_begin = time.perf_counter()
                self.timed(proposal.arch)
                self.latency += time.perf_counter() - timing_begin
            if isinstance(screened, Outcome):
                barren += 1
                yield self._record(proposal, trial_id, screened)
                # It comes in the order of the numbers, whatever is trained.
                self.study.settle(proposal.number)
            else:
                flights.append(Flight(proposal, trial_id, screened))
                self.in_flight += 1
            if meanwhile is not None:
                yield from self._record_trained(meanwhile, meanwhile.ready())

    def _record_trained(self, trainings: Trainings, results: Iterator[Done[ProxyResult]]) -> Iterator[Recorded]:
        self.busy = min(trainings.left, self.evaluator.workers)
        for done in results:
            flight = trainings.flights[done.index]
            self.busy = min(trainings.left, self.evaluator.workers)
            self.worked += done.seconds
            self.in_flight -= 1
            outcome = flight.screened.trained(done)
            if self.config.keep_weights:
                self._keep_weights(flight.proposal, outcome)
            yield self._record(flight.proposal, flight.trial_id, outcome)

    def _record(self, proposal: Proposal, trial_id: int, outcome: Outcome) -> Recorded:
        self.study.record(proposal, trial_id, outcome)
        self.barren = 0 if outcome.state == CandidateState.COMPLETE else self.barren + 1
        return Recorded(proposal, outcome)

    def _keep_weights(self, proposal: Proposal, outcome: Outcome) -> None:
        if not (outcome.proxy and outcome.proxy.trained and outcome.latency):
            return
        # Whatever another candidate is far better than, a member of the front is.
        others = list(zip(self.study.front.accuracy, self.study.front.latency_ms, strict=True))
        if near_front(outcome.proxy.accuracy, outcome.latency.median_ms, others):
            try:
                weights(self.config, self.study).keep(proposal.number, proposal.arch.arch_id, outcome.proxy.trained)
            except OSError as error:
                # The candidate is recorded all the same.
                self.note(f"weights of trial {proposal.number} could not be kept ({error})")


def weights(config: SearchConfig, study: LiveStudy) -> Weights:
    """The weights that are kept of a study's candidates."""
    return Weights(weight_folder(config.storage), study.recorded.study_id)
