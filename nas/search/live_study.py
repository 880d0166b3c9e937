"""A study that is being searched: claimed, recovered, proposing and recording."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import optuna
from optuna.trial import TrialState

import studies
from nas.config import LatencyConfig, SearchConfig
from nas.display import notes
from nas.errors import UsageError
from nas.latency.block_table import BlockTable
from nas.latency.device_profile import store_profile
from nas.latency.parts import network_shape
from nas.options import Keep, options
from nas.pareto import hypervolume
from nas.recorded import RecordedStudy
from nas.search.evaluation import Evaluator, Outcome
from nas.search.rows import candidate_row, constraints, objectives
from nas.search.sampling import Proposal, Proposer
from nas.search.trials import TRIAL_STATES, Trials
from search_spaces import ArchSpec
from studies import Candidate, CandidateState, Owner, Store, guarded
from studies.display import write_note

# After this many known architectures in a row the sampler is helped out by a random draw. TPE proposes the known
# the more often the longer a study is (after 1,950 candidates eight proposals for a new one), and so goes on exploring.
MAX_DUPLICATES = 2


def differences(stored: Any, now: Any, path: str = "") -> list[str]:
    """One `name: study has A, now B` for each value that differs between two nested plain values."""
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
    """As JSON gives it back: tuples become lists, and dataclasses mappings."""
    return json.loads(json.dumps(value, default=asdict))


@dataclass(frozen=True)
class Measured:
    """A complete candidate's two objectives."""

    accuracy: float
    latency_ms: float


def check_same_config(config: SearchConfig, study: studies.Study) -> None:
    """Raises UsageError where the study was begun under another configuration."""
    stored = json.loads(study.config)
    if lines := differences(_compared(stored), _compared(plain(config.identity()))):
        raise other_configuration(config.study, lines)


def other_configuration(study: str, lines: Sequence[str]) -> UsageError:
    """The refusal of going on with a study under another configuration, with a line for each difference."""
    return UsageError(
        f"--study {study}: was begun with another configuration ({'; '.join(lines)}); "
        "use its settings, or another --study"
    )


def _compared(identity: dict[str, Any]) -> dict[str, Any]:
    """The part of a stored configuration that must not change: how long one samples for a median does not change it."""
    declared = options(LatencyConfig)
    latency = {
        name: value
        for name, value in identity["latency"].items()
        if name not in declared or declared[name].keep is Keep.FIXED
    }
    return {**identity, "latency": latency}


@contextmanager
def _existing(config: SearchConfig) -> Iterator[tuple[Store | None, studies.Study | None]]:
    """The study that `config` names, if it was begun, and begun under this configuration."""
    store = Store.open(config.storage, create=False)
    try:
        row = store.find_study(config.study) if store else None
        if row:
            check_same_config(config, row)
        yield store, row
    finally:
        if store:
            store.close()


def refuse_early(config: SearchConfig) -> None:
    """What can be refused before data are loaded: another configuration, another owner, an unusable storage, a limit
    that nothing of the space keeps.

    Raises:
        UsageError, StorageError: with the reason.
    """
    _require_possible(config)
    studies.check_writable(config.storage)
    studies.check_free(config.storage, config.study)
    with _existing(config) as (store, row):
        if store and row:
            studies.check_claimable(row.owner, Owner.me())


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
            raise UsageError(f"{flag} {limit}: the least of the space {config.space.name!r} is {smallest:,}")


def take_over(config: SearchConfig) -> None:
    """Free a study from the claim of a process on another host that is gone.

    Raises:
        UsageError, StorageError: it was begun under another configuration, or its process lives on this host.
    """
    with _existing(config) as (store, row):
        if store and row:
            store.ownership.disown(row.study_id)


def check_same_set_up(config: SearchConfig, study: studies.Study, evaluator: Evaluator) -> None:
    """Raises UsageError where the study's figures come from another device, other versions or other data."""
    device = {name: getattr(study.device, name) for name in asdict(evaluator.device)}
    if lines := differences(device, asdict(evaluator.device)):
        raise UsageError(
            f"--study {config.study}: its latencies were measured elsewhere ({'; '.join(lines)}); use another --study"
        )
    if study.data_fingerprint != evaluator.data_fingerprint:
        raise UsageError(f"--data {config.data.source}: holds other images than when --study {config.study} was begun")


class LiveStudy:
    """The study of a running search. Make one with `open_study`, which claims it for this process.

    Attributes:
        complete: the objectives of each complete candidate, in order.
        known: arch_id -> trial number of every evaluated candidate, whatever its outcome.
    """

    def __init__(self, recorded: RecordedStudy, peak_macs_per_s: float, owner: Owner) -> None:
        self.recorded, self.owner = recorded, owner
        self.trials = Trials(recorded, peak_macs_per_s)
        self.recover()
        candidates = recorded.candidates()
        self.known = {candidate.arch_id: candidate.number for candidate in candidates}
        self.complete = self._objectives(candidates)
        config, optuna_study = recorded.config, self.trials.study
        self.proposer = Proposer(
            config.space, config.sampler, config.seed, optuna_study.directions, optuna_study.get_trials(deepcopy=False)
        )
        self.size = config.space.size()
        # The fast end of the front and its middle, so that a sampler has them to build on from the start. Random search
        # stays what it is: the plain baseline.
        self.openers = () if config.sampler == "random" else (config.space.smallest(), config.space.anchor())

    def _objectives(self, candidates: Sequence[Candidate]) -> list[Measured]:
        """Accuracy and latency of the complete candidates, with the latency that was measured last."""
        found = []
        for candidate in candidates:
            latency = candidate.latency_in(self.recorded.deployment)
            if candidate.state == CandidateState.COMPLETE and candidate.accuracy is not None and latency is not None:
                found.append(Measured(candidate.accuracy, latency.median_ms))
        return found

    def timed_archs(self) -> list[ArchSpec]:
        """The architectures of all candidates that were timed in the deployment that is searched."""
        candidates, deployment = self.recorded.candidates(), self.recorded.deployment
        return [ArchSpec.from_json(each.arch) for each in candidates if each.latency_in(deployment) is not None]

    def reload(self) -> None:
        """Read the candidates' latencies anew, of which some were measured again."""
        self.complete = self._objectives(self.recorded.candidates())

    @property
    def hypervolume(self) -> float:
        """Hypervolume of the complete candidates, in 0..1; see `RecordedStudy.reference_latency_ms`."""
        accuracy = [measured.accuracy for measured in self.complete]
        latency_ms = [measured.latency_ms for measured in self.complete]
        return hypervolume(accuracy, latency_ms, self.recorded.reference_latency_ms)

    def recover(self) -> None:
        """Close every trial left running: as its row says if it has one, else as failed.

        Only the one process that holds the claim may call this: then no owner of such a trial still lives.
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

        A known architecture that the sampler proposes is recorded as a pruned trial of its own: to the samplers a
        place where nothing is to be gained, and in the dashboard visibly not a result.
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
            first = self.known.get(proposal.arch.arch_id)
            if first is None:
                return proposal, self.trials.begin(proposal)
            duplicates += 1
            self.trials.add_duplicate(proposal, first)
            self.proposer.tell(None, TrialState.PRUNED, {})
        return None

    def record(self, proposal: Proposal, trial_id: int, outcome: Outcome) -> None:
        """Write a candidate's rows, then tell Optuna, then the sampler's copy."""
        row = candidate_row(self.recorded, proposal, trial_id, outcome)
        self.recorded.store.add_candidate(row, self.owner)
        broken = outcome.constraints or {}
        self.trials.finish(trial_id, row, broken)
        self.proposer.tell(objectives(row), TRIAL_STATES[outcome.state], broken)
        self.known[proposal.arch.arch_id] = proposal.number
        if outcome.state == CandidateState.COMPLETE and outcome.proxy and outcome.latency:
            self.complete.append(Measured(outcome.proxy.accuracy, outcome.latency.median_ms))


@contextmanager
def open_study(
    config: SearchConfig, evaluator: Evaluator, versions: str, note: Callable[[str], None]
) -> Iterator[LiveStudy]:
    """The study that `config` names, made if it is new, held for this process while the block runs.

    Args:
        versions: of the libraries, as JSON.
        note: told what is to be known when a study begins.

    Raises:
        UsageError: it was begun under another configuration, device or data; or the storage cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    store = Store.open(config.storage, create=True)
    assert store is not None
    owner = Owner.me()
    try:
        row = store.find_study(config.study)
        if row is None:
            # Measured before anything is made: a study is whole or is not there.
            note(f"measuring {evaluator.device.name} and the anchor network, once")
            if cost := evaluator.determinism():
                note(cost)
            profile = _profile(store, config, evaluator)
            anchor_ms = _anchor_ms(store, config, evaluator)
            evaluator.start(anchor_ms)
            row = store.create_study(
                config.study, config=json.dumps(config.identity()), data_fingerprint=evaluator.data_fingerprint,
                versions=versions, device=asdict(evaluator.device), anchor=config.space.anchor().to_json(),
                anchor_ms=anchor_ms,
            )  # fmt: skip
            store.ownership.claim(row.study_id, owner)
            recorded = RecordedStudy.open(store, config.study)
            write_note(store.optuna_storage, row.study_id, None, notes.study_note(recorded))
        else:
            check_same_config(config, row)
            check_same_set_up(config, row, evaluator)
            store.ownership.claim(row.study_id, owner)
            profile = _profile(store, config, evaluator)
            evaluator.start(row.anchor_ms)
        try:
            study = LiveStudy(RecordedStudy.open(store, config.study), profile.macs_per_s, owner)
            try:
                with guarded():
                    yield study
            finally:
                # Deleted in the dashboard, say, or taken over: then whatever went wrong went wrong for that reason, and
                # a trial that is running is another's.
                store.ownership.require(row.study_id, owner)
                study.recover()
        finally:
            store.ownership.release(row.study_id, owner)
    finally:
        store.close()


def _profile(store: Store, config: SearchConfig, evaluator: Evaluator) -> studies.Profile:
    """The device's, measured if the database has none."""
    deployment = config.latency
    found = store.devices.find_profile(asdict(evaluator.device), deployment.dtype, deployment.threads)
    if found is not None:
        return found
    return store_profile(store, evaluator.device, deployment.dtype, deployment.threads, evaluator.profile())


def _anchor_ms(store: Store, config: SearchConfig, evaluator: Evaluator) -> float:
    """The anchor's latency in the block latency table, measured if it is not there: so studies' latencies compare."""
    table = BlockTable(store, evaluator.device, config.latency)
    shape = network_shape(str(config.space.anchor()), config.latency)
    if table.median_ms(shape) is None:
        table.add([replace(evaluator.anchor(table.references_ms), shape=shape)])
    found = table.median_ms(shape)
    assert found is not None
    return found
