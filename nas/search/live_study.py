"""A study that is being searched: claimed, recovered, proposing and recording."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

import studies
from nas.config import LatencyConfig, SearchConfig
from nas.display import notes
from nas.errors import UsageError
from nas.latency.block_table import BlockTable, network_shape
from nas.latency.ceilings import store_profile
from nas.options import Keep, options
from nas.search.evaluation import Evaluator, Outcome
from nas.search.sampling import Proposal, Proposer
from nas.validation.remeasure import deployment_columns, latency_row, of_deployment
from search_spaces import ArchSpec
from studies import Candidate, CandidateState, Deployment, LatencyStage, Owner, StorageError, Store, guarded
from studies.display import write_note

# After this many known architectures in a row the sampler is helped out by a random draw. TPE proposes the known
# the more often the longer a study is (after 1,950 candidates eight proposals for a new one), and so goes on exploring.
MAX_DUPLICATES = 2
TOLD = {
    CandidateState.COMPLETE: TrialState.COMPLETE,
    # Never COMPLETE: the dashboard does not read Optuna 5's constraints, and would draw it on the front.
    CandidateState.OVER_LIMIT: TrialState.PRUNED,
    CandidateState.FAILED: TrialState.FAIL,
}
REASON, DUPLICATE_OF = "reason", "duplicate_of"


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
    Store.check_writable(config.storage)
    Store.check_free(config.storage, config.study)
    with _existing(config) as (store, row):
        if store and row:
            store.check_claimable(row, Owner.me())


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
            store.disown(row.study_id)


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

    def __init__(
        self, store: Store, row: studies.Study, config: SearchConfig, anchor_ms: float, peak_macs_per_s: float,
        owner: Owner,
    ) -> None:  # fmt: skip
        self.store = store
        self.owner = owner
        self.row = row
        self.config = config
        self.anchor_ms = anchor_ms
        self.peak_macs_per_s = peak_macs_per_s
        self.identity = config.identity()
        self.optuna = store.load_optuna_study(config.study)
        self.recover()
        candidates = store.candidates(row.study_id)
        self.known = {candidate.arch_id: candidate.number for candidate in candidates}
        self.complete = self._objectives(candidates)
        self.proposer = Proposer(
            config.space, config.sampler, config.seed, self.optuna.directions, self.optuna.get_trials(deepcopy=False)
        )
        self.size = config.space.size()
        # The fast end of the front and its middle, so that a sampler has them to build on from the start. Random search
        # stays what it is: the plain baseline.
        self.openers = () if config.sampler == "random" else (config.space.smallest(), config.space.anchor())

    def _objectives(self, candidates: Sequence[Candidate]) -> list[Measured]:
        """Of the complete ones, with the latency of this deployment that was measured last."""
        found = []
        for candidate in candidates:
            latency = self._own_latency(candidate)
            if candidate.state == CandidateState.COMPLETE and candidate.accuracy is not None and latency is not None:
                found.append(Measured(candidate.accuracy, latency.median_ms))
        return found

    def _own_latency(self, candidate: Candidate) -> studies.Latency | None:
        """In the deployment that is searched; of others, a study may hold more."""
        return candidate.latency_in(Deployment(**self._deployment))

    @property
    def _deployment(self) -> dict[str, Any]:
        return deployment_columns(self.config.latency, self.row.device_id)

    def archs(self) -> list[ArchSpec]:
        """Of all candidates that were timed in the deployment that is searched."""
        candidates = self.store.candidates(self.row.study_id)
        return [ArchSpec.from_json(each.arch) for each in candidates if self._own_latency(each) is not None]

    def reload(self) -> None:
        """Read the candidates' latencies anew, of which some were measured again."""
        self.complete = self._objectives(self.store.candidates(self.row.study_id))

    def front(self) -> pd.DataFrame:
        """The front in the deployment that is searched."""
        return of_deployment(self.store.front(self.config.study), self.config.latency, self.row.device_id)

    @property
    def reference_latency_ms(self) -> float:
        """The hypervolume's: the latency limit, or else twice the anchor's latency.

        A choice, and one that favours fast networks: docs/measurements.md shows how a comparison turns with it.
        """
        return self.config.limits.latency_ms or 2 * self.anchor_ms

    def recover(self) -> None:
        """Close every trial left running: as its row says if it has one, else as failed.

        Only the one process that holds the claim may call this: then no owner of such a trial still lives.
        """
        open_states = (TrialState.RUNNING, TrialState.WAITING)
        left = self.optuna.get_trials(deepcopy=False, states=open_states)
        if not left:
            return
        rows = {candidate.trial_id: candidate for candidate in self.store.candidates(self.row.study_id)}
        for trial in left:
            row = rows.get(trial._trial_id)
            if row is None:
                self._set_attrs(trial._trial_id, {REASON: "interrupted"})
                self.store.optuna_storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            else:
                self._tell(trial, row, self._constraints_of(row))

    def propose(self) -> tuple[Proposal, int] | None:
        """The next architecture that was never evaluated, and its trial's id; None where the space has no more.

        A known architecture that the sampler proposes is recorded as a pruned trial of its own: to the samplers a
        place where nothing is to be gained, and in the dashboard visibly not a result.
        """
        self.store.require_owner(self.row.study_id, self.owner)
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
                return proposal, self._add_trial(proposal, TrialState.RUNNING, self._first_attrs(proposal.arch))
            duplicates += 1
            known_as = {DUPLICATE_OF: first, "arch": str(proposal.arch)}
            trial_id = self._add_trial(proposal, TrialState.PRUNED, known_as)
            self._note(trial_id, notes.duplicate_note(proposal.arch, first))
            self.proposer.tell(None, TrialState.PRUNED, {})
        return None

    def record(self, proposal: Proposal, trial_id: int, outcome: Outcome) -> None:
        """Write a candidate's rows, then tell Optuna, then the sampler's copy."""
        row = self._row(proposal, trial_id, outcome)
        self.store.add_candidate(row, self.owner)
        constraints = outcome.constraints or {}
        trial = self.optuna._storage.get_trial(trial_id)
        self._tell(trial, row, constraints)
        self.proposer.tell(_values(row), TOLD[outcome.state], constraints)
        self.known[proposal.arch.arch_id] = proposal.number
        if outcome.state == CandidateState.COMPLETE and outcome.proxy and outcome.latency:
            self.complete.append(Measured(outcome.proxy.accuracy, outcome.latency.median_ms))

    # -- Optuna's side ---------------------------------------------------------------------------------------------

    def _add_trial(self, proposal: Proposal, state: TrialState, user_attrs: dict[str, Any]) -> int:
        trial_id = self.store.optuna_storage.create_new_trial(
            self.row.study_id,
            create_trial(
                state=state, params=proposal.params, distributions=proposal.distributions, user_attrs=user_attrs,
                system_attrs=proposal.system_attrs,
            ),
        )  # fmt: skip
        number = self.store.optuna_storage.get_trial_number_from_id(trial_id)
        if number != proposal.number:
            raise StorageError(f"another program adds trials to the study {self.config.study!r}")
        return trial_id

    def _first_attrs(self, arch: ArchSpec) -> dict[str, Any]:
        return {
            "arch": str(arch),
            "arch_id": arch.arch_id,
            "device": self.row.device.name,
            "engine": self.config.latency.engine,
        }

    def _note(self, trial_id: int, body: str) -> None:
        write_note(self.store.optuna_storage, self.row.study_id, trial_id, body)

    def _set_attrs(self, trial_id: int, attrs: dict[str, Any]) -> None:
        for key, value in attrs.items():
            self.store.optuna_storage.set_trial_user_attr(trial_id, key, value)

    def _tell(self, trial: FrozenTrial, row: Candidate, constraints: dict[str, float]) -> None:
        self._set_attrs(trial._trial_id, self._last_attrs(row))
        self._note(trial._trial_id, notes.trial_note(row, self._own_latency(row), self.identity))
        # Some may be there already, if an earlier process was killed just here.
        if missing := constraints.keys() - trial.constraints.keys():
            live = Trial(self.optuna, trial._trial_id)
            for key in sorted(missing):
                live.set_constraint(key, constraints[key])
        self.optuna.tell(trial.number, _values(row), TOLD[CandidateState(row.state)])

    def _last_attrs(self, row: Candidate) -> dict[str, Any]:
        """What the dashboard shows of a finished trial beside its objectives."""
        attrs: dict[str, Any] = {"params": row.params, "macs": row.macs}
        if row.reason:
            attrs[REASON] = row.reason
        if latency := self._own_latency(row):
            attrs["latency_p20_p80_ms"] = f"{latency.p20_ms:.4g} to {latency.p80_ms:.4g}"
            attrs["memory_mb"] = round((latency.weight_bytes + latency.workspace_bytes) / 1e6, 3)
            macs_per_s = row.macs * latency.batch_size / latency.median_ms * 1e3
            attrs["computational_efficiency"] = round(macs_per_s / self.peak_macs_per_s, 4)
            if latency.capped or latency.throttled:
                attrs["latency_doubtful"] = "throttled" if latency.throttled else "ended by the time cap"
        attrs["seconds"] = round(row.total_seconds, 2)
        return attrs

    def _constraints_of(self, row: Candidate) -> dict[str, float]:
        limits = self.config.limits
        constraints = limits.excess(params=row.params, macs=row.macs)
        if latency := _searched(row):
            memory_mb = (latency.weight_bytes + latency.workspace_bytes) / 1e6
            constraints |= limits.excess(latency_ms=latency.median_ms, memory_mb=memory_mb)
        return constraints

    # -- our side --------------------------------------------------------------------------------------------------

    def _row(self, proposal: Proposal, trial_id: int, outcome: Outcome) -> Candidate:
        row = Candidate(
            trial_id=trial_id, study_id=self.row.study_id, number=proposal.number, arch_id=proposal.arch.arch_id,
            arch=proposal.arch.to_json(), summary=str(proposal.arch), params=outcome.cost.params,
            macs=outcome.cost.macs, state=outcome.state, reason=outcome.reason, seed=self.config.seed,
            latency_seconds=outcome.latency_seconds, total_seconds=outcome.total_seconds,
        )  # fmt: skip
        row.latencies, row.curve = [], []
        if outcome.latency:
            deployment = self.config.latency
            row.latencies = [
                latency_row(trial_id, outcome.latency, deployment, self.row.device_id, LatencyStage.SEARCH)
            ]
        if outcome.proxy:
            row.accuracy, row.loss = outcome.proxy.accuracy, outcome.proxy.loss
            row.train_seconds, row.train_memory_bytes = outcome.proxy.seconds, outcome.proxy.train_memory_bytes
            row.curve = [studies.CurvePoint(**asdict(point)) for point in outcome.proxy.curve]
        return row


def _searched(row: Candidate) -> studies.Latency | None:
    """The latency that the search measured, and judged the candidate by; it may have been measured again since."""
    return row.latencies[0] if row.latencies else None


def _values(row: Candidate) -> list[float] | None:
    latency = _searched(row)
    if row.state != CandidateState.COMPLETE or row.accuracy is None or latency is None:
        return None
    return [row.accuracy, latency.median_ms]


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
            store.claim(row.study_id, owner)
            write_note(store.optuna_storage, row.study_id, None, notes.study_note(row, config.study))
        else:
            check_same_config(config, row)
            check_same_set_up(config, row, evaluator)
            store.claim(row.study_id, owner)
            profile = _profile(store, config, evaluator)
            anchor_ms = row.anchor_ms
            evaluator.start(anchor_ms)
        try:
            study = LiveStudy(store, row, config, anchor_ms, profile.macs_per_s, owner)
            try:
                with guarded():
                    yield study
            finally:
                # Deleted in the dashboard, say, or taken over: then whatever went wrong went wrong for that reason, and
                # a trial that is running is another's.
                store.require_owner(row.study_id, owner)
                study.recover()
        finally:
            store.release(row.study_id, owner)
    finally:
        store.close()


def _profile(store: Store, config: SearchConfig, evaluator: Evaluator) -> studies.Profile:
    """The device's, measured if the database has none."""
    deployment = config.latency
    found = store.find_profile(asdict(evaluator.device), deployment.dtype, deployment.threads)
    if found is not None:
        return found
    return store_profile(store, evaluator.device, deployment.dtype, deployment.threads, evaluator.ceilings())


def _anchor_ms(store: Store, config: SearchConfig, evaluator: Evaluator) -> float:
    """The anchor's latency in the block latency table, measured if it is not there: so studies' latencies compare."""
    table = BlockTable(store, evaluator.device, config.latency)
    shape = network_shape(str(config.space.anchor()), config.latency)
    if table.median_ms(shape) is None:
        table.add([replace(evaluator.anchor(table.references_ms), shape=shape)])
    found = table.median_ms(shape)
    assert found is not None
    return found
