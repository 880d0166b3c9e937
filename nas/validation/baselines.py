"""Known networks beside a study's own: the same data, the same measurement, stored apart from the sampler's history.

Every contender is trained and deployed at one resolution that suits its stride (`suited_resolution`). Each is trained
with several learning rates on the long schedule, and with the best of them on half of it: so it is seen what doubling
the steps gained (`convergence`). All are timed in turns with one another and the device's yardsticks, so that their
latencies compare. What is kept when a run ends early is each training, and the latencies together.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch
from rich.table import Table
from torch import nn

import studies
from kernels.timing import DeviceInfo
from nas.config import MAX_RESOLUTION, DataConfig, LatencyConfig, ProxyConfig
from nas.errors import CandidateFailed, UsageError, memory_may_run_out
from nas.latency import ceilings as profile
from nas.latency.analysis import TIMM_ENGINE, Note, require_timm_model, timm_model
from nas.latency.engines import deploy
from nas.latency.meter import threads
from nas.latency.parts import layers
from nas.latency.yardsticks import Corrected, Timed, Yardsticks
from nas.search.evaluation import check_device
from nas.training.data import ImageData
from nas.training.pool import Trainer, Unit, fill
from nas.training.proxy import ProxyResult
from nas.validation.config import ALL, LONG, RATES, BaselineConfig
from nas.validation.contenders import Contender, ContenderKind
from nas.validation.remeasure import TOGETHER, of_deployment
from nas.worker import Worker
from search_spaces import ArchSpec, cost
from search_spaces.cost import strided
from studies import BaselineLatency, BaselineTraining, Store

MODELS = (
    "convnext_atto", "convnext_femto", "convnext_pico", "convnext_nano", "mobilenetv4_conv_small",
    "mobilenetv4_conv_medium", "efficientnet_b0", "efficientnetv2_rw_t", "resnet18", "resnet26", "resnet50",
    "regnety_002", "regnety_004", "repvgg_a0",
)  # fmt: skip
# On a CPU the one of them that learns in minutes: mobilenetv4_conv_small takes twice as long to be near chance still.
DEFAULT_MODELS = {"cpu": ("regnety_002",), "cuda": MODELS}
ANCHOR = "ConvFirst anchor"
# Where a timm model's feature maps are looked at to tell its stride.
PROBE_PIXELS = 224

# What counts as converged, see `convergence`: shares of accuracy.
MOST_GAIN = 0.02
ABOVE_CHANCE = 0.25
# Latencies that differ by less than this share are told as equal: on a CPU no less is real.
SAME_LATENCY = 0.1


# -- contenders ----------------------------------------------------------------------------------------------------


def suited_resolution(total_stride: int, map_size: int) -> int:
    """Pixels of the images at which a network's final feature map is (map_size, map_size).

    A network of total stride 32 that is shown 32 pixels sees a final map of one: it starves. So all contenders that are
    not ours get one final map, by default that of the study's networks: 32 pixels and stride 8 make 4x4, hence stride
    32 gets 128 pixels, stride 16 64; 224 pixels and stride 32 make 7x7, hence stride 32 gets 224. At least 8
    pixels, at most `MAX_RESOLUTION`.
    """
    return min(max(8, map_size * total_stride), MAX_RESOLUTION)


def own_map_size(anchor: ArchSpec, resolution: int) -> int:
    """Pixels, across, of the final feature map of a study's networks."""
    return strided(resolution, anchor.total_stride)


def default_map_size(own: int, kind: str) -> int:
    """Of networks that are not ours: the study's own; on a CPU half of it, rounded up, which trains in a quarter of
    the time. So beside 32 pixels and stride 8, stride 32 is shown 64 pixels on a CPU, whose 2x2 is no single pixel yet.

    Args:
        kind: of device.
    """
    return own if kind == "cuda" else (own + 1) // 2


def total_stride(model: nn.Module) -> int:
    """Of a timm model: what it says of its last features, or else what a forward pass shows.

    Raises:
        CandidateFailed: its features are no map.
    """
    info: Any = getattr(model, "feature_info", None)
    if info:
        return int(info[-1]["reduction"])
    with torch.inference_mode():
        features: Any = model.eval().forward_features(torch.zeros(1, 3, PROBE_PIXELS, PROBE_PIXELS))  # type: ignore[operator]
    if features.ndim != 4:
        raise CandidateFailed("its total stride cannot be told: its features are no map")
    # (1, C, H, W) or (1, H, W, C).
    return round(PROBE_PIXELS / int(features.shape[2]))


@dataclass(frozen=True)
class Entrant:
    """A network that is to be trained and measured. Fields as `Contender`'s.

    Args:
        arch: None of a timm model.
        params, macs: as it is deployed, of one image.
    """

    name: str
    kind: ContenderKind
    trial: int | None
    arch: ArchSpec | None
    engine: str
    resolution: int
    params: int
    macs: int

    @property
    def summary(self) -> str:
        return self.name if self.arch is None else str(self.arch)

    @property
    def ours(self) -> bool:
        return self.arch is not None

    def build(self, classes: int) -> nn.Module:
        return timm_model(self.name, classes) if self.arch is None else self.arch.build(classes)

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """What a network that is not ours raises is its failure. What ours raise is a bug."""
        try:
            with memory_may_run_out():
                yield
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            if self.arch is not None:
                raise
            raise CandidateFailed(_words(error)) from error


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _looked_at(name: str, engine: str, map_size: int, classes: int) -> Entrant:
    """A timm model, counted at the resolution that suits it.

    Raises:
        CandidateFailed: it does not run there.
    """
    entrant = Entrant(name, ContenderKind.TIMM, None, None, engine, 0, 0, 0)
    with entrant.failing():
        model = entrant.build(classes)
        resolution = suited_resolution(total_stride(model), map_size)
        # Counted wherever it will run.
        config = LatencyConfig(device="cpu", engine="eager", resolution=resolution, num_classes=classes)
        try:
            macs = sum(part.block.macs for part, _ in layers(model, config))
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            reason = f"does not run on images of {resolution}x{resolution} ({_words(error)})"
            raise CandidateFailed(reason) from error
        params = sum(weights.numel() for weights in model.parameters())
        return replace(entrant, resolution=resolution, params=params, macs=macs)


# -- in a process of its own ---------------------------------------------------------------------------------------


def _measured(entrants: Sequence[Entrant], config: LatencyConfig, references_ms: Sequence[float]) -> list[Any]:
    """Latencies of contenders, timed in turns with each other and the yardsticks: a `Corrected` each, or why not."""
    meter = Yardsticks(config, references_ms)
    with threads(config.threads):
        deployed = [_deployed(entrant, config, meter) for entrant in entrants]
        times = iter(meter.time([each for each in deployed if isinstance(each, Timed)]))
    return [next(times) if isinstance(each, Timed) else each for each in deployed]


def _deployed(entrant: Entrant, config: LatencyConfig, yardsticks: Yardsticks) -> Timed | str:
    config = replace(config, engine=entrant.engine, resolution=entrant.resolution)
    try:
        with entrant.failing():
            inputs = yardsticks.meter.random_inputs((config.batch_size, 3, config.resolution, config.resolution))
            module = deploy(entrant.build(config.num_classes), config, inputs[0])
            return Timed(yardsticks.meter.forwards(module, inputs), config.batch_size * entrant.macs)
    except CandidateFailed as error:
        return str(error)


# -- a run ---------------------------------------------------------------------------------------------------------


def compare(store: Store, name: str, config: BaselineConfig, note: Note = lambda line: None) -> None:
    """Train and measure what is lacking of a study's baselines, and write it down; `contenders` reads it.

    The study may be searched meanwhile: its trials are read only. What was trained in earlier runs is measured again
    with the rest, so that all latencies are of the same minutes.

    Args:
        name: of the study, which is there.
        note: told what is done.

    Raises:
        UsageError: timm has no such model, the study has no complete candidate, its device is not here, or its data
            are not there or are other ones.
        studies.StorageError: the study was deleted meanwhile.
    """
    row = store.find_study(name)
    assert row is not None
    with _Run(store, name, row, config, note) as run:
        entrants = run.entrants()
        for entrant in entrants:
            note(f"{entrant.name}: {entrant.resolution}x{entrant.resolution}, {entrant.macs / 1e6:,.1f} MMACs")
        run.train(run.measure(entrants))


class _Run:
    """What one call of `compare` needs, checked."""

    def __init__(self, store: Store, name: str, row: studies.Study, config: BaselineConfig, note: Note) -> None:
        self.store, self.name, self.row, self.note = store, name, row, note
        stored = json.loads(row.config)
        self.anchor = ArchSpec.from_json(row.anchor)
        self.proxy, self.seed = ProxyConfig(**stored["proxy"]), int(stored["seed"])
        self.data = DataConfig(**stored["data"], data_dir=config.data_dir, download=config.download)
        own = LatencyConfig(**stored["latency"])
        self.own = own
        # All are deployed at the resolution of their training.
        self.latency = replace(own, resolution=self.data.resolution)
        self.device = check_device(own)
        kind = self.device.type
        self.timm_engine = TIMM_ENGINE[kind]
        self.models = _models(config.models, kind)
        self.front = self._front(config.found)
        own_map = own_map_size(self.anchor, self.data.resolution)
        self.map_size = config.map_size or default_map_size(own_map, kind)
        self.steps = LONG * self.proxy.steps if config.steps is None else config.steps
        rates = config.learning_rates or tuple(factor * self.proxy.learning_rate for factor in RATES)
        self.learning_rates = tuple(sorted({float(f"{rate:.4g}") for rate in rates}))
        self.trainer = Trainer(self.data, self.proxy, self.device, self.seed, note, self._check_data)
        self.lock, self.waiting = self.trainer.lock, self.trainer.waiting

    def __enter__(self) -> _Run:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.trainer)
            # Before anything is measured: they may be other ones.
            self.trainer.data_path(self.data.resolution)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stack.close()

    def _check_data(self, data: ImageData) -> None:
        if data.train_images.shape[-1] == self.data.resolution and data.fingerprint != self.row.data_fingerprint:
            reason = f"holds other images than when --study {self.name} was begun"
            raise UsageError(f"--data {self.data.source}: {reason}")

    def _front(self, count: int) -> list[tuple[int, ArchSpec]]:
        front = of_deployment(self.store.front(self.name), self.own, self.row.device_id)
        if front.empty:
            raise UsageError(f"--study {self.name}: has no complete candidate on its front")
        archs = [ArchSpec.from_json(text) for text in front["arch"]]
        members = list(zip(map(int, front["number"]), archs, strict=True))
        return [members[index] for index in spread(len(members), count)]

    # -- who takes part ----

    def entrants(self) -> list[Entrant]:
        """The study's own, and those timm models that run; of the others it is written down why not."""
        anchor = self._of_ours(ANCHOR, ContenderKind.DEFAULT, None, self.anchor)
        found = [self._found(number, arch) for number, arch in self.front]
        return [anchor, *found, *self._looked_at(self.models, self.map_size)]

    def _of_ours(self, name: str, kind: ContenderKind, trial: int | None, arch: ArchSpec) -> Entrant:
        counted = cost(arch, self.latency.resolution, self.latency.num_classes)
        resolution = self.latency.resolution
        return Entrant(name, kind, trial, arch, self.latency.engine, resolution, counted.params, counted.macs)

    def _found(self, number: int, arch: ArchSpec) -> Entrant:
        return self._of_ours(f"trial {number}", ContenderKind.FOUND, number, arch)

    def _looked_at(self, models: Sequence[str], map_size: int) -> list[Entrant]:
        found = []
        for model in models:
            try:
                with self.lock.training(self.waiting):
                    found.append(
                        self.trainer.workers[0].call(
                            _looked_at, model, self.timm_engine, map_size, self.latency.num_classes
                        )
                    )
            except CandidateFailed as error:
                self._write_failure(model, str(error))
        return found

    def _write_failure(self, model: str, reason: str) -> None:
        self.note(f"{model}: failed ({reason})")
        # Of no resolution: none suits it.
        self.store.add_baselines(
            self.row.study_id, [self._latency_row(model, self.timm_engine, 0, datetime.now(UTC), reason)]
        )

    def _earlier(self, entrants: Sequence[Entrant]) -> list[Entrant]:
        """Those that were trained in earlier runs and are not among these."""
        here = {(entrant.name, entrant.resolution) for entrant in entrants}
        archs = {each.number: ArchSpec.from_json(each.arch) for each in self.store.candidates(self.row.study_id)}
        found: dict[tuple[str, int], Entrant] = {}
        for row in self.store.baseline_trainings(self.row.study_id):
            key, kind = (row.name, row.resolution), ContenderKind(row.kind)
            if key in here or row.accuracy is None:
                continue
            engine, arch = self.latency.engine, self.anchor
            if kind is ContenderKind.FOUND:
                if row.trial not in archs:
                    # Deleted meanwhile.
                    continue
                arch = archs[row.trial]
            of_ours = Entrant(row.name, kind, row.trial, arch, engine, row.resolution, row.params, row.macs)
            timm = kind is ContenderKind.TIMM
            found[key] = replace(of_ours, arch=None, engine=self.timm_engine) if timm else of_ours
        return list(found.values())

    # -- latencies ----

    def measure(self, entrants: Sequence[Entrant]) -> list[Entrant]:
        """Those of them that have a latency, measured now together with all of earlier runs unless that was done."""
        wanted = [*entrants, *self._earlier(entrants)]
        if not self._measured_together(wanted):
            references_ms = profile.references_ms(
                profile.find_or_measure(self.store, self.latency, waiting=self.waiting)
            )
            self.note(f"measuring {len(wanted)} networks in turns")
            with self.lock.measuring(self.waiting):
                figures = self._in_turns(wanted, references_ms)
            now = datetime.now(UTC)
            rows = [
                self._latency_row(entrant.name, entrant.engine, entrant.resolution, now, figure)
                for entrant, figure in zip(wanted, figures, strict=True)
            ]
            self.store.add_baselines(self.row.study_id, rows)
            for row in rows:
                worth = f"{row.median_ms:.4f} ms" if row.reason is None else f"failed ({row.reason})"
                self.note(f"{row.name}: {worth}")
        failed = {(row.name, row.resolution) for row in self._latencies() if row.reason is not None}
        return [entrant for entrant in entrants if (entrant.name, entrant.resolution) not in failed]

    def _in_turns(self, entrants: Sequence[Entrant], references_ms: Sequence[float]) -> list[Any]:
        """As many at once as run together."""
        if len(entrants) > TOGETHER:
            return self._in_turns(entrants[:TOGETHER], references_ms) + self._in_turns(
                entrants[TOGETHER:], references_ms
            )
        # Compilers never give their memory back, so in a process that ends.
        with Worker() as worker:
            try:
                return worker.call(_measured, entrants, self.latency, references_ms)
            except CandidateFailed as error:
                if len(entrants) == 1:
                    return [str(error)]
        half = len(entrants) // 2
        return self._in_turns(entrants[:half], references_ms) + self._in_turns(entrants[half:], references_ms)

    def _latencies(self) -> list[BaselineLatency]:
        """Of this deployment."""
        here = (self._device_id, self.latency.dtype, self.latency.batch_size, self.latency.threads)
        return [
            row
            for row in self.store.baseline_latencies(self.row.study_id)
            if (row.device_id, row.dtype, row.batch_size, row.threads) == here
        ]

    def _measured_together(self, entrants: Sequence[Entrant]) -> bool:
        rows = {(row.name, row.resolution, row.engine): row.measured_at for row in self._latencies()}
        times = {rows.get((entrant.name, entrant.resolution, entrant.engine)) for entrant in entrants}
        return len(times) == 1 and None not in times

    def _latency_row(
        self, name: str, engine: str, resolution: int, when: datetime, figure: Corrected | str
    ) -> BaselineLatency:
        config = self.latency
        found: dict[str, Any] = {"reason": figure} if isinstance(figure, str) else asdict(figure)
        return BaselineLatency(
            name=name, device_id=self._device_id, engine=engine, dtype=config.dtype, batch_size=config.batch_size,
            resolution=resolution, threads=config.threads, measured_at=when, **found,
        )  # fmt: skip

    @property
    def _device_id(self) -> int:
        return self.store.device_id(asdict(DeviceInfo.of(self.device)))

    # -- trainings ----

    def train(self, entrants: Sequence[Entrant]) -> None:
        """Each at every learning rate on the whole schedule, and then at the best of them on half of it."""
        self._train([Unit(entrant, self.steps, rate) for entrant in entrants for rate in self.learning_rates])
        rows = self._trainings()
        units = []
        for entrant in entrants:
            best = _best([rows[_key(Unit(entrant, self.steps, rate))] for rate in self.learning_rates])
            if best.accuracy is not None:
                units.append(Unit(entrant, self.steps // 2, best.learning_rate))
        self._train(units)

    def _trainings(self) -> dict[tuple[str, int, int, float], BaselineTraining]:
        return {
            (row.name, row.resolution, row.steps, row.learning_rate): row
            for row in self.store.baseline_trainings(self.row.study_id)
            if row.batch_size == self.proxy.batch_size
        }

    def _train(self, units: Sequence[Unit]) -> None:
        done = self._trainings()
        self.trainer.train([unit for unit in units if _key(unit) not in done], self._write)

    def _write(self, unit: Unit, result: ProxyResult | CandidateFailed) -> str:
        entrant = unit.trainee
        assert isinstance(entrant, Entrant)
        row = BaselineTraining(
            name=entrant.name, resolution=entrant.resolution, steps=unit.steps, batch_size=self.proxy.batch_size,
            learning_rate=unit.learning_rate, kind=entrant.kind, summary=entrant.summary, trial=entrant.trial,
            params=entrant.params, macs=entrant.macs, classes=self.trainer.classes,
        )  # fmt: skip
        worth = fill(row, result)
        self.store.add_baselines(self.row.study_id, [row])
        return f"{unit.trainee.name}, {unit.steps} steps at {unit.learning_rate:g}: {worth}"


def _key(unit: Unit) -> tuple[str, int, int, float]:
    return unit.trainee.name, unit.trainee.resolution, unit.steps, unit.learning_rate


def _models(chosen: tuple[str, ...] | None, kind: str) -> tuple[str, ...]:
    if chosen is None:
        return DEFAULT_MODELS[kind]
    if chosen == (ALL,):
        return MODELS
    for name in chosen:
        require_timm_model(name, "--models")
    return tuple(dict.fromkeys(chosen))


def spread(size: int, count: int) -> list[int]:
    """`count` indices of `size` members, the first and the last among them, as even as may be; of one the last."""
    if count >= size:
        return list(range(size))
    if count == 1:
        return [size - 1]
    return [round(index * (size - 1) / (count - 1)) for index in range(count)]


def _best(rows: Sequence[BaselineTraining]) -> BaselineTraining:
    """The most accurate, of equal ones that of the lowest learning rate."""
    return max(rows, key=lambda row: (-1.0 if row.accuracy is None else row.accuracy, -row.learning_rate))


# -- what came of it -----------------------------------------------------------------------------------------------


def convergence(
    accuracies: Mapping[float, float], learning_rate: float, half: float | None, chance: float
) -> tuple[bool, str]:
    """Whether a training came to an end of its improvement, and the reason in words.

    It did where doubling the steps gained at most `MOST_GAIN`, which is what another seed may give; where the accuracy
    is past `ABOVE_CHANCE` of the way from chance to 1, as a network that has learnt nothing gains nothing either; and
    where no learning rate that was not tried looks better: the best one lies between others, or is ahead of its
    neighbour by no more than `MOST_GAIN`. A loss that flattens tells nothing here: the schedule ends at a rate of 0.

    Args:
        accuracies: learning rate -> accuracy at the end of the whole schedule, of those trainings that did not fail.
        learning_rate: the best of them.
        half: accuracy at the end of half the schedule at that rate, if that was trained.
        chance: the accuracy of guessing.
    """
    accuracy = accuracies[learning_rate]
    if accuracy < chance + ABOVE_CHANCE * (1 - chance):
        return False, f"it is hardly above chance ({chance:.0%})"
    if half is None:
        return False, "there is no shorter training to hold it against"
    gain = accuracy - half
    if gain > MOST_GAIN:
        return False, f"doubling the steps still gained {100 * gain:.1f} points"
    rates = sorted(accuracies)
    if len(rates) > 1 and learning_rate in (rates[0], rates[-1]):
        lowest = learning_rate == rates[0]
        ahead = accuracy - accuracies[rates[1] if lowest else rates[-2]]
        if ahead > MOST_GAIN:
            return False, f"a {'lower' if lowest else 'higher'} learning rate than those tried may do better"
    return True, f"doubling the steps gained {100 * gain:+.1f} points"


def contenders(store: Store, study_name: str) -> list[Contender]:
    """A study's baselines and its own, each with the best of its trainings, fastest first; empty if there are none.

    Of several schedules the longest on which one was trained counts, and of the latencies those measured last: so all
    that are listed compare.
    """
    study = store.find_study(study_name)
    if study is None:
        return []
    trainings = [row for row in store.baseline_trainings(study.study_id) if row.accuracy is not None]
    steps = max((row.steps for row in trainings), default=0)
    by_contender: dict[tuple[str, int], list[BaselineTraining]] = {}
    for row in trainings:
        by_contender.setdefault((row.name, row.resolution), []).append(row)
    found = []
    for latency in _last_measured(store, study.study_id):
        rows = by_contender.get((latency.name, latency.resolution), [])
        if latency.median_ms is not None and any(row.steps == steps for row in rows):
            found.append(_contender(rows, steps, latency))
    return sorted(found, key=lambda each: (each.latency_ms, each.name))


def _last_measured(store: Store, study_id: int) -> list[BaselineLatency]:
    """Those that were measured in turns with one another, the last time that was done."""
    rows = [row for row in store.baseline_latencies(study_id) if row.resolution]
    last = max((row.measured_at for row in rows), default=None)
    return [row for row in rows if row.measured_at == last]


def _contender(rows: Sequence[BaselineTraining], steps: int, latency: BaselineLatency) -> Contender:
    accuracies = {(row.steps, row.learning_rate): row.accuracy for row in rows if row.accuracy is not None}
    best = _best([row for row in rows if row.steps == steps])
    wholes = {rate: accuracy for (count, rate), accuracy in accuracies.items() if count == steps}
    half = accuracies.get((steps // 2, best.learning_rate))
    converged, reason = convergence(wholes, best.learning_rate, half, 1 / best.classes)
    of_rates = f"the best of {len(wholes)}" if len(wholes) > 1 else "the only one"
    assert latency.median_ms is not None
    assert latency.p20_ms is not None
    assert latency.p80_ms is not None
    return Contender(
        name=best.name, kind=ContenderKind(best.kind), summary=best.summary, trial=best.trial, params=best.params,
        macs=best.macs, accuracy=wholes[best.learning_rate], latency_ms=latency.median_ms,
        latency_p20_ms=latency.p20_ms, latency_p80_ms=latency.p80_ms, engine=latency.engine, resolution=best.resolution,
        learning_rate=best.learning_rate, steps=steps, batch_size=best.batch_size, converged=converged,
        training=(
            f"{steps} steps of {best.batch_size} images at learning rate {best.learning_rate:g}, {of_rates}; "
            f"{'converged' if converged else 'not converged'}: {reason}"
        ),
    )  # fmt: skip


def failures(store: Store, study_name: str) -> list[str]:
    """A line for each baseline that has no figure, with its reason."""
    study = store.find_study(study_name)
    if study is None:
        return []
    trainings = store.baseline_trainings(study.study_id)
    trained = {(row.name, row.resolution) for row in trainings if row.accuracy is not None}
    names = {name for name, _ in trained}
    found = {
        row.name: f"{row.name}: {row.reason}"
        for row in store.baseline_latencies(study.study_id)
        # Of no resolution: it may have run at another since.
        if row.reason and not (row.resolution == 0 and row.name in names)
    }
    for row in trainings:
        if row.reason is not None and (row.name, row.resolution) not in trained:
            found[row.name] = f"{row.name}, trained at {row.learning_rate:g}: {row.reason}"
    return list(found.values())


def verdict(contenders: Sequence[Contender]) -> list[str]:
    """What a study has found is worth beside what was known, in sentences.

    At equal accuracy each baseline is held against the fastest found network that is at least as accurate, at equal
    latency against the most accurate one that is at most as slow; nothing is interpolated. Only what has converged is
    compared. Where there is nothing to compare, one sentence says why.
    """
    found = [each for each in contenders if each.kind is ContenderKind.FOUND]
    others = [each for each in contenders if each.kind is not ContenderKind.FOUND]
    ready = [each for each in found if each.converged]
    compared = [each for each in others if each.converged]
    if not contenders:
        return ["No verdict: no baseline has been trained and measured."]
    if not ready or not compared:
        lacking, which = (found, "found network") if not ready else (others, "baseline")
        if not lacking:
            return [f"No verdict: no {which} has been trained and measured."]
        reasons = "; ".join(f"{each.name}: {each.training.rpartition(': ')[2]}" for each in lacking)
        return [
            f"No verdict: the training of no {which} has converged ({reasons}). A longer schedule (--steps) may help."
        ]
    sentences = [_sentence(each, ready) for each in compared]
    steps = contenders[0].steps
    gains = f"doubling the steps to {steps} gained each at most {100 * MOST_GAIN:g} points"
    sentences.append(f"All of these have converged: {gains}.")
    left_out = [each for each in contenders if not each.converged]
    if left_out:
        reasons = "; ".join(f"{each.name} ({each.training.rpartition(': ')[2]})" for each in left_out)
        sentences.append(f"Not compared, as not converged: {reasons}.")
    return sentences


def _sentence(baseline: Contender, found: Sequence[Contender]) -> str:
    """A baseline beside the found networks."""
    as_accurate = [each for each in found if each.accuracy >= baseline.accuracy]
    as_fast = [each for each in found if each.latency_ms <= baseline.latency_ms]
    if as_accurate:
        fastest = min(as_accurate, key=lambda each: each.latency_ms)
        at_accuracy = f"at equal accuracy {fastest.name} {_faster(fastest, baseline)}"
    else:
        best = max(found, key=lambda each: each.accuracy)
        at_accuracy = f"no found network is as accurate, the best, {best.name}, {_figures(best)}"
    if as_fast:
        best = max(as_fast, key=lambda each: each.accuracy)
        points = 100 * (best.accuracy - baseline.accuracy)
        more = f"{abs(points):.1f} points {'more' if points >= 0 else 'less'} accurate"
        at_latency = f"at equal latency {best.name} is {more} ({_figures(best)})"
    else:
        fastest = min(found, key=lambda each: each.latency_ms)
        at_latency = f"no found network is as fast, the fastest, {fastest.name}, {_figures(fastest)}"
    return f"{baseline.name} ({_figures(baseline)}): {at_accuracy}; {at_latency}."


def _faster(found: Contender, baseline: Contender) -> str:
    ratio = baseline.latency_ms / found.latency_ms
    if 1 / (1 + SAME_LATENCY) < ratio < 1 + SAME_LATENCY:
        return f"is about as fast ({_figures(found)})"
    if ratio > 1:
        return f"is {ratio:.1f} times as fast ({_figures(found)})"
    return f"is slower, {1 / ratio:.1f} times its latency ({_figures(found)})"


def _figures(contender: Contender) -> str:
    return f"{contender.accuracy:.1%} in {contender.latency_ms:.3g} ms at {contender.resolution} px"


def table(contenders: Sequence[Contender], title: str) -> Table:
    """For a terminal of 80 columns."""
    found = Table(title=title, title_justify="left", show_edge=False, padding=(0, 0, 0, 1))
    for header in ("network", "accuracy", "latency ms", "px", "params k", "MMACs", "converged"):
        left = header == "network"
        found.add_column(header, justify="left" if left else "right", overflow="fold" if left else "ellipsis")
    for each in contenders:
        found.add_row(
            each.name, f"{each.accuracy:.1%}", f"{each.latency_ms:.4f}", str(each.resolution),
            f"{each.params / 1e3:,.0f}", f"{each.macs / 1e6:,.1f}", "yes" if each.converged else "no",
        )  # fmt: skip
    return found


def training_lines(contenders: Sequence[Contender]) -> list[str]:
    """The state of each training."""
    return [f"{each.name}: {each.training}" for each in contenders]
