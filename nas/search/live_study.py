"""A study that is being searched: it closes interrupted trials, proposes candidates and records them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optuna.trial import TrialState

from nas.config import Sampler
from nas.pareto import GrowingFront
from nas.recorded import RecordedStudy
from nas.search.evaluation import Outcome
from nas.search.front_sampler import Memory
from nas.search.rows import beliefs, candidate_row, constraints, further_accuracies, objectives
from nas.search.sampling import Proposal, Proposer, openers
from nas.search.stopper import Stopper
from nas.search.trials import TRIAL_STATES, Trials
from nas.training.curves import CurvePoint, from_json
from nas.training.stopping import Rule
from search_spaces import ArchSpec
from studies import Candidate, CandidateState, Owner, TrainingStage

# After this many known architectures in a row, a random draw takes the sampler's place. TPE proposes known
# architectures more often the longer a study is (after 1,950 candidates, eight proposals for a new one); thanks to the
# random draws it goes on exploring.
MAX_DUPLICATES = 2


@dataclass(frozen=True)
class Measured:
    """The two objectives of a complete candidate."""

    accuracy: float
    latency_ms: float


@dataclass(frozen=True)
class Told:
    """What sampler and stopper are told of a trial when its round has ended.

    Args:
        values: the objectives; None where the candidate is not complete.
        attributes: what is believed of a candidate that was not trained to the end.
    """

    values: list[float] | None
    state: TrialState
    constraints: dict[str, float]
    attributes: dict[str, float]
    arch: ArchSpec
    curve: Sequence[CurvePoint]


class LiveStudy:
    """The study of a running search. Make one with `open_study`, which claims it for this process.

    Attributes:
        complete: the objectives of each complete candidate, in the order in which they were evaluated.
        stopped: number of candidates whose training was given up.
        steps: number of steps of all of the search's trainings together.
        front: the front of the complete candidates, by their places in `complete`.
        known: arch_id -> trial number of every candidate, whatever its outcome, those in flight included.
        untold: by number, the trials that the sampler is not told of yet.
    """

    def __init__(self, recorded: RecordedStudy, peak_macs_per_s: float, owner: Owner) -> None:
        self.recorded, self.owner = recorded, owner
        self.trials = Trials(recorded, peak_macs_per_s)
        self.recover()
        candidates = recorded.candidates()
        self.known = {candidate.arch_id: candidate.number for candidate in candidates}
        self._count(candidates)
        config, optuna_study = recorded.config, self.trials.study
        interrupted = self.trials.interrupted()
        memory = None
        if config.sampler == Sampler.MODEL or config.early_stopping:
            deployed = config.latency
            memory = Memory(
                config.space,
                deployed.resolution,
                deployed.num_classes,
                recorded.reference_latency_ms,
                config.limits,
                further_accuracies(recorded),
            )
        self.proposer = Proposer(
            config.space, config.sampler, config.seed, optuna_study.directions, optuna_study.get_trials(deepcopy=False),
            memory if config.sampler == Sampler.MODEL else None, self.known, interrupted.repeated,
        )  # fmt: skip
        self.stopper = Stopper(memory, config.proxy.steps) if memory is not None and config.early_stopping else None
        if self.stopper is not None:
            self._teach(self.stopper, candidates)
        self.untold: dict[int, Told] = {}
        self.size = config.space.size()
        # What was interrupted comes first, so that the search goes on as if it had not been.
        self.interrupted = interrupted.again
        others = [arch for arch in openers(config.space, config.sampler) if str(arch) not in interrupted.given_up]
        self.openers = (*self.interrupted, *others)

    def _teach(self, stopper: Stopper, candidates: Sequence[Candidate]) -> None:
        """Teach the stopper the trainings that are stored."""
        stored = self.recorded.store.trainings.of_study(self.recorded.study_id, TrainingStage.SEARCH)
        curves = {training.trial_id: training.curve for training in stored}
        for row in candidates:
            values = objectives(row)
            if values is not None:
                stopper.add(ArchSpec.from_json(row.arch), values[0], values[1], from_json(curves.get(row.trial_id)))

    def rules(self, archs: Sequence[ArchSpec], latency_ms: Sequence[float]) -> list[Rule | None]:
        """The rules by which the trainings of architectures may end early; None for those that may not."""
        return [None] * len(archs) if self.stopper is None else self.stopper.rules(archs, latency_ms)

    @property
    def trained(self) -> int:
        """Number of candidates that were trained, those whose training was given up included."""
        return len(self.complete) + self.stopped

    @property
    def passes(self) -> float:
        """Number of whole trainings that all of the search's took together."""
        return self.steps / self.recorded.config.proxy.steps

    def _count(self, candidates: Sequence[Candidate]) -> None:
        """Set accuracy and latest latency of the complete candidates, and their front."""
        self.complete: list[Measured] = []
        self.front = GrowingFront()
        given_up = [each.given_up_at or 0 for each in candidates if each.state == CandidateState.STOPPED]
        self.stopped, self.steps = len(given_up), sum(given_up)
        for candidate in candidates:
            latency = candidate.latency_in(self.recorded.deployment)
            if candidate.state == CandidateState.COMPLETE and candidate.accuracy is not None and latency is not None:
                self._add_complete(Measured(candidate.accuracy, latency.median_ms))

    def _add_complete(self, measured: Measured) -> None:
        self.front.add(len(self.complete), measured.accuracy, measured.latency_ms)
        self.complete.append(measured)
        self.steps += self.recorded.config.proxy.steps

    def timed_archs(self) -> list[ArchSpec]:
        """The architectures of all candidates that were timed in the deployment that is searched."""
        candidates, deployment = self.recorded.candidates(), self.recorded.deployment
        return [ArchSpec.from_json(each.arch) for each in candidates if each.latency_in(deployment) is not None]

    def reload(self) -> None:
        """Read the candidates' latencies anew, after some were measured again."""
        self._count(self.recorded.candidates())

    @property
    def hypervolume(self) -> float:
        """Hypervolume of the complete candidates as searched, in 0..1; see `RecordedStudy.reference_latency_ms`."""
        return self.front.hypervolume(self.recorded.reference_latency_ms)

    def recover(self) -> None:
        """Close every trial that was left running: as its row says if it has one, else as failed.

        Only the process that holds the claim may call this: then no other process still evaluates such a trial.
        """
        left = self.trials.unfinished()
        if not left:
            return
        rows = {candidate.trial_id: candidate for candidate in self.recorded.candidates()}
        for trial in left:
            row = rows.get(trial._trial_id)
            if row is None:
                self.trials.interrupt(trial)
            else:
                self.trials.finish(row.trial_id, row, constraints(row, self.recorded.config.limits))

    def propose(self) -> tuple[Proposal, int] | None:
        """The next architecture that was never evaluated, and its trial's id; None where the space has no more.

        A known architecture that the sampler proposes is recorded as a pruned trial of its own: so the samplers learn
        that nothing is to be gained there, and the dashboard shows that it is no result.
        """
        self.recorded.store.ownership.require(self.recorded.study_id, self.owner)
        duplicates = 0
        while len(self.known) < self.size:
            opener = next((arch for arch in self.openers if arch.arch_id not in self.known), None)
            if opener is not None:
                proposal = self.proposer.propose_this(opener)
            elif duplicates < MAX_DUPLICATES:
                proposal = self.proposer.propose()
            else:
                unseen = self.proposer.propose_unseen(self.known)
                if unseen is None:
                    return None
                proposal = unseen
            first = self.known.setdefault(proposal.arch.arch_id, proposal.number)
            if first == proposal.number:
                return proposal, self.trials.begin(proposal)
            duplicates += 1
            self.trials.add_duplicate(proposal, first)
            self.proposer.tell(proposal.number, None, TrialState.PRUNED, {})
        return None

    @property
    def left_over(self) -> int:
        """Number of candidates that were interrupted and are to be evaluated first."""
        return sum(arch.arch_id not in self.known for arch in self.interrupted)

    def likely_next(self) -> list[ArchSpec]:
        """Architectures that may be proposed next, the likeliest first, as far as that costs nothing to say."""
        return [arch for arch in self.proposer.likely_next() if arch.arch_id not in self.known]

    def settle(self, number: int) -> None:
        """Tell the sampler and the stopper of a trial that was recorded."""
        told = self.untold.pop(number)
        self.proposer.tell(number, told.values, told.state, told.constraints, told.attributes)
        if told.values is not None and self.stopper is not None:
            self.stopper.add(told.arch, told.values[0], told.values[1], told.curve)

    def record(self, proposal: Proposal, trial_id: int, outcome: Outcome) -> None:
        """Write a candidate's rows, then close its trial in Optuna's tables. The sampler learns of it from `settle`."""
        row = candidate_row(self.recorded, proposal, trial_id, outcome)
        self.recorded.store.add_candidate(row, self.owner)
        broken = outcome.constraints or {}
        self.trials.finish(trial_id, row, broken)
        self.untold[proposal.number] = Told(
            objectives(row), TRIAL_STATES[outcome.state], broken, beliefs(row), proposal.arch,
            outcome.proxy.curve if outcome.proxy else (),
        )  # fmt: skip
        if outcome.state == CandidateState.COMPLETE and outcome.proxy and outcome.latency:
            self._add_complete(Measured(outcome.proxy.accuracy, outcome.latency.median_ms))
        elif outcome.state == CandidateState.STOPPED and row.given_up_at:
            self.stopped += 1
            self.steps += row.given_up_at
