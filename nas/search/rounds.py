"""The rounds of a search: some candidates are proposed and timed one after the other, then trained side by side.

A round is twice as many candidates as there are workers, so that none waits long for the last of them; one worker has
rounds of one. The sampler learns of a round when all of it has ended, in the order of its numbers: proposals do not
depend on which training ends first. Where the latency's device is none of those that train, the next round is proposed
and timed while one trains, and its proposals do not know the results of that one.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
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
        self.busy = self.barren = 0

    def run(self) -> Iterator[Recorded]:
        """Evaluate candidates until the budget is met, or there is another reason to end; yield each when recorded."""
        flights: list[Flight] = []
        while flights or not self._ended():
            following: list[Flight] = []
            if self.evaluator.apart:
                with _in_background(self._train(flights)) as trainings:
                    yield from self._propose(following, len(flights))
                    yield from self._trained(flights, trainings)
                self.study.settle()
            else:
                yield from self._trained(flights, self._train(flights))
                self.study.settle()
                yield from self._propose(following, 0)
            # The longest first, so that no worker is left with one at the end.
            flights = sorted(following, key=lambda flight: (-flight.screened.cost.macs, flight.proposal.number))

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

    def _propose(self, flights: list[Flight], in_flight: int) -> Iterator[Recorded]:
        """Propose and time the candidates of a round, and yield those that are not to be trained.

        Args:
            flights: list to which the others are added.
            in_flight: number of candidates that are trained meanwhile.
        """
        if self._ended():
            return
        allowed = min(self.size, self.config.budget - len(self.study.complete) - in_flight)
        for _ in range(allowed):
            if self._is_late():
                return
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
                yield self._record(proposal, trial_id, screened)
            else:
                flights.append(Flight(proposal, trial_id, screened))

    def _train(self, flights: list[Flight]) -> Iterator[Done[ProxyResult]]:
        return self.evaluator.train([flight.proposal.arch for flight in flights]) if flights else iter(())

    def _trained(self, flights: list[Flight], trainings: Iterator[Done[ProxyResult]]) -> Iterator[Recorded]:
        begin, left = time.perf_counter(), len(flights)
        self.busy = min(left, self.evaluator.workers)
        for done in trainings:
            flight = flights[done.index]
            left -= 1
            self.busy = min(left, self.evaluator.workers)
            self.worked += done.seconds
            outcome = flight.screened.trained(done)
            if self.config.keep_weights:
                self._keep_weights(flight.proposal, outcome)
            self.training += time.perf_counter() - begin
            yield self._record(flight.proposal, flight.trial_id, outcome)
            begin = time.perf_counter()
        self.busy = 0

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


@contextlib.contextmanager
def _in_background(trainings: Iterator[Done[ProxyResult]]) -> Iterator[Iterator[Done[ProxyResult]]]:
    """Context in which an iterator is used up by another thread; yields an iterator of what it yielded."""
    results: queue.Queue[Done[ProxyResult] | BaseException | None] = queue.Queue()

    def work() -> None:
        try:
            for done in trainings:
                results.put(done)
            results.put(None)
        except BaseException as error:  # for the thread that waits
            results.put(error)

    def found() -> Iterator[Done[ProxyResult]]:
        while (result := results.get()) is not None:
            if isinstance(result, BaseException):
                raise result
            yield result

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield found()
    finally:
        thread.join()
