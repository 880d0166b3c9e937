"""Comparison of a study with known networks on the same data and measurement, stored apart from the study's trials.

Every network is trained and deployed at one resolution that suits its stride (`nas.validation.networks`). Each is
trained with several learning rates on the long schedule, and with the best of them on half of it: this shows what
doubling the steps gained (`contenders.convergence`). All are timed in turns with one another and the device's
yardsticks, so that their latencies compare. A run that ends early keeps each training, and the latencies together.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

from nas import pareto
from nas.errors import CandidateFailed, UsageError
from nas.latency.devices import check_device
from nas.latency.timm_networks import require_timm_model, timm_engine
from nas.recorded import RecordedStudy
from nas.reporting import Note
from nas.training.data import ImageData
from nas.training.pool import Trainer, TrainingJob, fill
from nas.training.proxy import ProxyResult
from nas.training.workers import Call
from nas.validation.baseline_latencies import BaselineLatencies
from nas.validation.config import ALL, LONG, RATES, BaselineConfig
from nas.validation.contenders import ContenderKind, best_training
from nas.validation.networks import NetworkSpec, default_map_size, own_map_size, timm_network
from search_spaces import ArchSpec, cost
from studies import BaselineTraining

MODELS = (
    "convnext_atto", "convnext_femto", "convnext_pico", "convnext_nano", "mobilenetv4_conv_small",
    "mobilenetv4_conv_medium", "efficientnet_b0", "efficientnetv2_rw_t", "resnet18", "resnet26", "resnet50",
    "regnety_002", "regnety_004", "repvgg_a0",
)  # fmt: skip
# On a CPU only the model that learns in minutes: mobilenetv4_conv_small takes twice as long and is still near chance.
DEFAULT_MODELS = {"cpu": ("regnety_002",), "cuda": MODELS}
ANCHOR = "ConvFirst anchor"


# -- A run -----------------------------------------------------------------------------------------------------------


def compare(recorded: RecordedStudy, config: BaselineConfig, note: Note = lambda line: None) -> None:
    """Train and measure the baselines that a study lacks, and store the results; `contenders` reads them.

    The study may be searched meanwhile: its trials are only read. Networks of earlier runs are measured again with the
    rest, so that all latencies come from the same minutes.

    Args:
        note: function that takes a line for each step of the work.

    Raises:
        UsageError: timm lacks the model, the study has no complete candidate, its device is not here, or its data
            are missing or have changed.
        studies.StorageError: the study was deleted meanwhile.
    """
    run = _Run(recorded, config, note)
    with run.trainer as trainer:
        # Loaded before anything is measured, because the data may have changed.
        trainer.data_file(run.anchor_resolution)
        networks = [*run.own_networks(), *run.timm_networks()]
        for network in networks:
            note(f"{network.name}: {network.resolution}x{network.resolution}, {network.macs / 1e6:,.1f} MMACs")
        run.trainings.train(run.latencies.measure(networks, run.earlier_networks(networks)))


class _Run:
    """The networks of one call of `compare`, with the trainer, the trainings and the latencies that they share."""

    def __init__(self, recorded: RecordedStudy, config: BaselineConfig, note: Note) -> None:
        self.recorded = recorded
        searched = recorded.config.data
        data = replace(
            searched, source=config.data or searched.source, data_dir=config.data_dir, download=config.download
        )
        proxy = recorded.config.proxy
        # Networks are deployed at the resolution of their training.
        self.latency = replace(recorded.config.latency, resolution=data.resolution)
        device = check_device(recorded.config.latency, note)
        self.timm_engine = timm_engine(self.latency.engine)
        self.models = _models(config.models, device.type)
        self.members = self._members(config.found)
        self.anchor_resolution = recorded.anchor.shown(data.resolution)
        own_map = own_map_size(recorded.anchor, self.anchor_resolution)
        self.map_size = config.map_size or default_map_size(own_map, device.type)
        steps = LONG * proxy.steps if config.steps is None else config.steps
        rates = config.learning_rates or tuple(factor * proxy.learning_rate for factor in RATES)
        rounded = tuple(sorted({float(f"{rate:.4g}") for rate in rates}))
        self.trainer = Trainer(
            data, proxy, device, recorded.config.seed, config.workers, note, self._check_data,
            max(recorded.config.space.own_resolutions, default=0),
        )  # fmt: skip
        self.trainings = _Trainings(recorded, self.trainer, steps, rounded)
        self.latencies = BaselineLatencies(recorded, self.latency, self.trainer)

    def _check_data(self, data: ImageData) -> None:
        if data.train_images.shape[-1] == self.anchor_resolution:
            self.recorded.check_images(self.trainer.data.source, data.fingerprint)

    def _members(self, count: int) -> list[tuple[int, ArchSpec]]:
        """Number and architecture of some members of the front, evenly spaced."""
        front = self.recorded.front()
        if front.empty:
            raise UsageError(f"--study {self.recorded.name}: has no complete candidate on its front")
        chosen = front.iloc[pareto.evenly_spaced(len(front), count)]
        return [(int(row["number"]), ArchSpec.from_json(row["arch"])) for _, row in chosen.iterrows()]

    def own_networks(self) -> list[NetworkSpec]:
        """The anchor and members of the front."""
        return [
            self._own_network(ANCHOR, ContenderKind.DEFAULT, None, self.recorded.anchor),
            *(self._own_network(f"trial {number}", ContenderKind.FOUND, number, arch) for number, arch in self.members),
        ]

    def _own_network(self, name: str, kind: ContenderKind, trial: int | None, arch: ArchSpec) -> NetworkSpec:
        counted = cost(arch, self.latency.resolution, self.latency.num_classes)
        resolution = arch.shown(self.latency.resolution)
        return NetworkSpec(name, kind, trial, arch, self.latency.engine, resolution, counted.params, counted.macs)

    def timm_networks(self) -> list[NetworkSpec]:
        """The timm models that run; the reasons why others do not are stored."""
        networks = []
        calls = [Call(_timm_network, (model, self.timm_engine, self.map_size, self.latency.num_classes))
                 for model in self.models]  # fmt: skip
        with self.trainer.training(), closing(self.trainer.workers.run(calls)) as results:
            for done in sorted(results, key=lambda each: each.index):
                if isinstance(done.result, CandidateFailed):
                    self.latencies.add_failure(self.models[done.index], self.timm_engine, str(done.result))
                else:
                    networks.append(done.result)
        return networks

    def earlier_networks(self, networks: Sequence[NetworkSpec]) -> list[NetworkSpec]:
        """Networks that were trained in earlier runs and are not among `networks`."""
        here = {network.key for network in networks}
        archs = {each.number: ArchSpec.from_json(each.arch) for each in self.recorded.candidates()}
        earlier: dict[tuple[str, int], NetworkSpec] = {}
        for row in self.recorded.store.baselines.trainings(self.recorded.study_id):
            key, kind = (row.name, row.resolution), ContenderKind(row.kind)
            if key in here or row.accuracy is None:
                continue
            engine, arch = self.latency.engine, None
            if kind is ContenderKind.TIMM:
                engine = self.timm_engine
            elif kind is ContenderKind.DEFAULT:
                arch = self.recorded.anchor
            elif row.trial in archs:
                arch = archs[row.trial]
            else:
                # The trial was deleted meanwhile.
                continue
            earlier[key] = NetworkSpec(row.name, kind, row.trial, arch, engine, row.resolution, row.params, row.macs)
        return list(earlier.values())


class _Trainings:
    """The trainings of a study's baselines on one schedule.

    Args:
        steps: length of the whole schedule.
        learning_rates: rates at which each network is trained; the best one counts.
    """

    def __init__(
        self, recorded: RecordedStudy, trainer: Trainer, steps: int, learning_rates: tuple[float, ...]
    ) -> None:
        self.recorded, self.trainer, self.steps, self.learning_rates = recorded, trainer, steps, learning_rates
        self.batch_size = trainer.config.batch_size

    def train(self, networks: Sequence[NetworkSpec]) -> None:
        """Train each network at every rate on the whole schedule, and then at its best rate on half of it."""
        self._train([TrainingJob(each, self.steps, rate) for each in networks for rate in self.learning_rates])
        rows = self._rows()
        halves = []
        for each in networks:
            best = best_training([rows[_key(TrainingJob(each, self.steps, rate))] for rate in self.learning_rates])
            if best.accuracy is not None:
                halves.append(TrainingJob(each, self.steps // 2, best.learning_rate))
        self._train(halves)

    def _train(self, jobs: Sequence[TrainingJob]) -> None:
        done = self._rows()
        lacking = [job for job in jobs if _key(job) not in done]
        self.trainer.train(lacking, self._write)

    def _rows(self) -> dict[tuple[str, int, int, float], BaselineTraining]:
        """The stored trainings, by name, resolution, steps and learning rate."""
        return {
            (row.name, row.resolution, row.steps, row.learning_rate): row
            for row in self.recorded.store.baselines.trainings(self.recorded.study_id)
            if row.batch_size == self.batch_size
        }

    def _write(self, job: TrainingJob, result: ProxyResult | CandidateFailed) -> str:
        network = job.network
        assert isinstance(network, NetworkSpec)
        row = BaselineTraining(
            name=network.name, resolution=network.resolution, steps=job.steps, batch_size=self.batch_size,
            learning_rate=job.learning_rate, kind=network.kind, summary=network.summary, trial=network.trial,
            params=network.params, macs=network.macs, classes=self.trainer.classes,
        )  # fmt: skip
        worth = fill(row, result)
        self.recorded.store.baselines.add(self.recorded.study_id, [row])
        return f"{network.name}, {job.steps} steps at {job.learning_rate:g}: {worth}"


def _timm_network(name: str, engine: str, map_size: int, classes: int, device: str) -> NetworkSpec:
    return timm_network(name, engine, map_size, classes)


def _key(job: TrainingJob) -> tuple[str, int, int, float]:
    return job.network.name, job.network.resolution, job.steps, job.learning_rate


def _models(chosen: tuple[str, ...] | None, kind: str) -> tuple[str, ...]:
    if chosen is None:
        return DEFAULT_MODELS[kind]
    if chosen == (ALL,):
        return MODELS
    for name in chosen:
        require_timm_model(name, "--models")
    return tuple(dict.fromkeys(chosen))
