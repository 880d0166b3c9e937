"""The search, from top to bottom: propose, evaluate, record, until the budget is met."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import pandas as pd

from nas.config import SearchConfig
from nas.display.notes import stopping_line
from nas.display.showcase import show
from nas.errors import CandidateFailed, UsageError
from nas.latency.block_table import BlockTable, sum_errors, sum_errors_line
from nas.latency.parts import arch_parts, network_shape
from nas.locks import waited_seconds, working_clock
from nas.recommendation import advice
from nas.recorded import Hypervolumes, RecordedStudy
from nas.reporting import Note
from nas.search.confirmation import Confirmer, trainings_of_share
from nas.search.evaluation import Evaluator, Outcome
from nas.search.front_measurement import measure_front
from nas.search.live_study import LiveStudy
from nas.search.machine import Machine
from nas.search.opening import known_device, open_study, refuse_early
from nas.search.rounds import Recorded, Rounds, weights
from nas.training.proxy import ProxyResult
from nas.versions import versions
from search_spaces import ArchSpec
from studies import LatencyStage
from studies.display import artifact_folder

# Times that a front is confirmed and timed, where members turn out over the limit.
MAX_CONFIRMATIONS = 3


@dataclass(frozen=True)
class Event:
    """The state of a search after a candidate was recorded.

    Args:
        seconds_left: estimate of the time until the budget is met; None before the first round has ended.
        complete, stopped: number of candidates that count for the budget, and of those whose training was given up.
        workers, busy: number of workers, and of those that train.
        per_minute: candidates that are completed in a minute; None before the first round has ended.
    """

    arch: ArchSpec
    outcome: Outcome
    complete: int
    budget: int
    best_accuracy: float
    front_size: int
    hypervolume: float
    seconds_left: float | None
    workers: int = 1
    busy: int = 0
    per_minute: float | None = None
    stopped: int = 0


class Progress(Protocol):
    """Shows the course of a search."""

    def note(self, line: str) -> None: ...

    def begin(self, complete: int, budget: int) -> None: ...

    def candidate(self, event: Event) -> None: ...

    def confirming(self, done: int, most: int, likely: int) -> None:
        """Show that the front is being confirmed.

        Args:
            done, most: number of trainings that have ended, and of those that there may be.
            likely: number of candidates that are likely on the front.
        """
        ...


class Silent:
    """Progress that shows nothing."""

    def note(self, line: str) -> None:
        pass

    def begin(self, complete: int, budget: int) -> None:
        pass

    def candidate(self, event: Event) -> None:
        pass

    def confirming(self, done: int, most: int, likely: int) -> None:
        pass


@dataclass(frozen=True)
class Shares:
    """Seconds that this run spent on training, on latency, and in all.

    Args:
        workers: number of workers.
        worked: seconds of all trainings, those at the same time added up.
        both: seconds in which it trained and measured latency.
        waiting: seconds in which it waited for other processes that train or measure.
    """

    training: float
    latency: float
    total: float
    workers: int = 1
    worked: float = 0.0
    both: float = 0.0
    waiting: float = 0.0

    @property
    def rest(self) -> float:
        """Seconds that were spent on neither, and not waiting."""
        return max(0.0, self.total - self.training - self.latency - self.waiting + self.both)

    @property
    def busy(self) -> float:
        """The share of the time of training in which a worker trained, on average."""
        return self.worked / (self.workers * self.training) if self.training else 0.0


@dataclass(frozen=True)
class SearchResult:
    """The result of a run.

    Args:
        complete: number of distinct architectures that were timed and trained in the study, earlier runs included.
        stopped: number of those whose training was given up.
        why: the reason for which the run ended, a line.
        pareto_front: the study's rows of the view of that name, fastest first.
        hypervolumes: hypervolumes of the front as searched and as confirmed.
        shares: the seconds that this run spent, and on what.
        remarks: lines on the last measurement of the front and its blocks.
        advice: lines that say which network of the front to take; empty where there is none.
    """

    complete: int
    stopped: int
    why: str
    pareto_front: pd.DataFrame
    hypervolumes: Hypervolumes
    shares: Shares
    remarks: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()


def run(config: SearchConfig, evaluator: Evaluator | None = None, progress: Progress | None = None) -> SearchResult:
    """Search until the study holds `config.budget` trained candidates, going on where an earlier run stopped.

    Args:
        config: the whole search.
        evaluator: what scores candidates (default: a `RealEvaluator`, which trains and times them).
        progress: what shows the course of the search (default: nothing does).

    Raises:
        UsageError: the search is impossible; nothing was begun.
        studies.StorageError: the database cannot be used, or no longer; all finished candidates are kept.
        KeyboardInterrupt: the user stopped the search; the running candidate was closed first.
    """
    begin, waited = time.perf_counter(), waited_seconds()
    progress = progress or Silent()
    config = refuse_early(config)
    if evaluator is None:
        progress.note("loading data")
        evaluator = _real_evaluator(config, progress.note)
    for line in evaluator.notes:
        progress.note(line)
    with closing(evaluator), open_study(config, evaluator, json.dumps(versions()), progress.note) as study:
        progress.begin(study.trained, config.budget)
        rounds = _loop(config, study, evaluator, progress, begin)
        remarks: tuple[str, ...] = ()
        for _ in range(MAX_CONFIRMATIONS):
            confirmed = _confirm(config, study, evaluator, progress, rounds)
            timed_begin = working_clock()
            timed, over_limit = _time_front(config, study, evaluator, progress)
            rounds.latency += working_clock() - timed_begin
            remarks = (*remarks, *confirmed, *timed)
            # In the place of members that turned out over the limit others may be on the front, to be confirmed.
            if not (confirmed and over_limit):
                break
        final_begin = working_clock()
        remarks += _measure_parts(config, study, evaluator, progress)
        stopping = stopping_line(study.recorded.candidates(), study.recorded.config.proxy.steps)
        remarks += (stopping,) if stopping else ()
        if config.keep_weights:
            front, kept = study.recorded.front(), weights(config, study)
            kept.keep_only({int(number) for number in front["number"]})
            lacking = kept.without(zip(front["number"].astype(int), front["arch_id"], strict=True))
            remarks += (lacking,) if lacking else ()
        latency = rounds.latency + working_clock() - final_begin
        remarks += _show(config, study)
        return SearchResult(
            complete=study.trained,
            stopped=study.stopped,
            why=rounds.why,
            pareto_front=study.recorded.store.front(config.study),
            hypervolumes=study.recorded.hypervolumes(),
            shares=Shares(
                rounds.training,
                latency,
                time.perf_counter() - begin,
                evaluator.workers,
                rounds.worked,
                rounds.both,
                waited_seconds() - waited,
            ),
            remarks=remarks,
            advice=_advice(config, study.recorded),
        )


def _advice(config: SearchConfig, recorded: RecordedStudy) -> tuple[str, ...]:
    """Lines that say which network of the front to take; none where the front is empty, or over the limit."""
    try:
        return tuple(advice(recorded, config.storage))
    except UsageError:
        return ()


def _real_evaluator(config: SearchConfig, note: Note) -> Evaluator:
    """What trains and times candidates, on this machine or on a cluster.

    Raises:
        UsageError: it cannot be had.
    """
    if not config.ray and config.ray_address is None:
        return Machine(config, note)
    if config.ray and config.ray_address is not None:
        raise UsageError(f"--ray-address {config.ray_address}: not with --ray, which starts a cluster of its own")
    from nas.search.cluster import Cluster

    return Cluster(config, note, known_device(config))


def _confirm(
    config: SearchConfig, study: LiveStudy, evaluator: Evaluator, progress: Progress, rounds: Rounds
) -> tuple[str, ...]:
    """Train the front's likely members again with other seeds, and return a remark on the result."""
    most = trainings_of_share(config.confirm, study.passes)
    if not most:
        return ()
    confirmer = Confirmer(study.recorded, study.owner, evaluator.train, evaluator.val_images, evaluator.round_size)
    begin = working_clock()

    def is_late() -> bool:
        seconds = time.perf_counter() - rounds.begin + rounds.seconds_each * confirmer.batch
        return config.time_limit_s is not None and seconds >= config.time_limit_s

    def step(index: int, result: ProxyResult | CandidateFailed, seconds: float) -> None:
        rounds.worked += seconds
        progress.confirming(confirmer.trainings, most, confirmer.likely)
        if config.keep_weights and isinstance(result, ProxyResult) and result.trained:
            row = confirmer.rows.iloc[index]
            rounds.keep_better(int(row["number"]), str(row["arch_id"]), result.accuracy, result.trained)

    progress.confirming(confirmer.trainings, most, confirmer.likely)
    done = confirmer.run(most, is_late, step)
    rounds.training += working_clock() - begin
    return (str(done),)


def _time_front(
    config: SearchConfig, study: LiveStudy, evaluator: Evaluator, progress: Progress
) -> tuple[tuple[str, ...], bool]:
    """Measure the front's members again in turns; return remarks on the result, and whether some broke the limit."""
    recorded = study.recorded
    front = recorded.front()
    if front.empty or (front["latency_stage"] == LatencyStage.FINAL).all():
        return (), False
    members = "the one network" if len(front) == 1 else f"the {len(front)} networks"
    progress.note(f"measuring {members} of the front again" + (", in turns" if len(front) > 1 else ""))
    try:
        changes = measure_front(
            recorded, recorded.deployment, evaluator.measure_together, limit_ms=config.limits.latency_ms
        )
    except CandidateFailed as error:
        # Each member ran before; now one does not.
        return (f"the front could not be measured again ({error})",), False
    study.reload()
    return ((), False) if changes is None else ((str(changes),), bool(changes.over_limit))


def _measure_parts(config: SearchConfig, study: LiveStudy, evaluator: Evaluator, progress: Progress) -> tuple[str, ...]:
    """Measure the blocks of the front's members, and return remarks on how they add up."""
    deployment, recorded = config.latency, study.recorded
    front = recorded.front()
    if front.empty:
        return ()
    archs = [ArchSpec.from_json(text) for text in front["arch"]]
    table = BlockTable(study.recorded.store, evaluator.device, deployment)
    _measure_blocks(table, evaluator, archs, progress)
    failed = sum(table.lacks(arch_parts(arch, deployment)) for arch in archs)
    remarks = [f"blocks of {failed} of the front's networks could not be measured alone"] if failed else []
    anchor = table.median_ms(network_shape(str(config.space.anchor()), deployment))
    errors = sum_errors(table, archs, list(front["latency_ms"]), recorded.row.anchor_ms, anchor)
    return (*remarks, sum_errors_line(errors)) if errors else tuple(remarks)


def _show(config: SearchConfig, study: LiveStudy) -> tuple[str, ...]:
    """Make the dashboard's files; where they cannot be written, return a remark, so that the other results are kept."""
    folder = artifact_folder(config.storage)
    try:
        show(study.recorded, folder)
    except OSError as error:
        return (f"the dashboard's files could not be written to {folder} ({error})",)
    return ()


def _measure_blocks(table: BlockTable, evaluator: Evaluator, archs: Sequence[ArchSpec], progress: Progress) -> None:
    """Measure the blocks of these architectures that the table lacks."""
    lacking = [arch for arch in archs if table.lacks(arch_parts(arch, table.config))]
    if lacking:
        progress.note(f"measuring the blocks of {len(lacking)} network{'s' if len(lacking) > 1 else ''}")
    for arch in lacking:
        # One after the other, so that an interrupt loses one network's measurements at most.
        _add_blocks(table, evaluator, arch)


def _add_blocks(table: BlockTable, evaluator: Evaluator, arch: ArchSpec) -> None:
    if table.lacks(arch_parts(arch, table.config)):
        # A block that fails alone is missing from the table; that is no reason to end a search.
        with contextlib.suppress(CandidateFailed):
            table.add(evaluator.measure_blocks([arch], table.known, table.references_ms))


def _loop(config: SearchConfig, study: LiveStudy, evaluator: Evaluator, progress: Progress, begin: float) -> Rounds:
    """Evaluate candidates; returns why that ended, and what was spent on them."""
    table: BlockTable | None = None
    earlier_seconds = 0.0
    if config.block_table:
        blocks_begin = working_clock()
        table = BlockTable(study.recorded.store, evaluator.device, config.latency)
        # Earlier runs may not have measured them.
        _measure_blocks(table, evaluator, study.timed_archs(), progress)
        earlier_seconds = working_clock() - blocks_begin

    def timed(arch: ArchSpec) -> None:
        if table is not None:
            _add_blocks(table, evaluator, arch)

    rounds = Rounds(config, study, evaluator, begin, progress.note, timed)
    rounds.latency += earlier_seconds
    pace = Pace(study.trained)
    with closing(rounds.run()) as course:
        for recorded in course:
            if recorded.ends_round:
                pace.pause(study.trained)
            left = pace.seconds_left(config.budget - study.trained)
            progress.candidate(_event(config, study, rounds, recorded, pace.per_minute, left))
    return rounds


class Pace:
    """How fast candidates are completed; it is looked at when a round ends, as its members end at about once.

    Args:
        complete: number of complete candidates at the beginning.
    """

    def __init__(self, complete: int) -> None:
        self.begin, self.before = working_clock(), complete
        self.per_minute: float | None = None

    def pause(self, complete: int) -> None:
        """Take note of the number of complete candidates while none is trained."""
        if complete > self.before:
            self.per_minute = 60 * (complete - self.before) / (working_clock() - self.begin)

    def seconds_left(self, candidates: int) -> float | None:
        """Seconds until as many more candidates are complete; None before the first round has ended."""
        return 60 * candidates / self.per_minute if self.per_minute else None


def _event(
    config: SearchConfig, study: LiveStudy, rounds: Rounds, recorded: Recorded, per_minute: float | None,
    seconds_left: float | None,
) -> Event:  # fmt: skip
    return Event(
        arch=recorded.proposal.arch,
        outcome=recorded.outcome,
        complete=study.trained,
        stopped=study.stopped,
        budget=config.budget,
        best_accuracy=study.front.best_accuracy,
        front_size=len(study.front),
        hypervolume=study.hypervolume,
        seconds_left=seconds_left,
        workers=rounds.evaluator.workers,
        busy=rounds.busy,
        per_minute=per_minute,
    )
