"""The confirmation of a finished study's front, or one that goes on: see `nas.search.confirmation`."""

from __future__ import annotations

import platform
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace

import torch

from nas.errors import CandidateFailed, UsageError
from nas.latency.devices import check_device
from nas.recorded import RecordedStudy
from nas.reporting import Note
from nas.search.confirmation import Confirmation, Confirmer, trainings_of_share
from nas.search.evaluation import round_of
from nas.search.machine import train_devices
from nas.search.progress import confirming_words
from nas.training.data import ImageData
from nas.training.pool import Trainer, TrainingJob
from nas.training.proxy import ProxyResult
from nas.training.workers import Done
from nas.validation.config import ConfirmConfig
from nas.validation.contenders import ContenderKind
from nas.validation.networks import NetworkSpec
from search_spaces import ArchSpec, cost
from studies import Owner, TrainingStage


def confirm(recorded: RecordedStudy, config: ConfirmConfig, note: Note = lambda line: None) -> Confirmation:
    """Train the likely members of a study's front again with other seeds, and store the confirmed accuracies.

    What is trained already counts. Nothing is timed.

    Raises:
        UsageError: there are no candidates, the study's device is not here, or the data are missing or have changed.
        studies.StorageError: the study was deleted meanwhile, or a process searches it.
    """
    searched = recorded.config
    complete = int((~recorded.evaluations()["latency_over_limit"].astype(bool)).sum())
    if not complete:
        raise UsageError(f"--study {recorded.name}: has no complete candidate")
    passes = recorded.passes()
    if not trainings_of_share(config.share, passes):
        raise UsageError(f"--share {config.share:g}: is less than one training for {complete} candidates")
    source = config.data or searched.data.source
    data = replace(searched.data, source=source, data_dir=config.data_dir, download=config.download)
    images: list[int] = []
    anchor_resolution = recorded.anchor.shown(data.resolution)

    def check(loaded: ImageData) -> None:
        # At all resolutions the images are the same; the anchor's, which come first, stand for them.
        if loaded.train_images.shape[-1] == anchor_resolution:
            recorded.check_images(source, loaded.fingerprint)
            images.append(len(loaded.val_labels))

    device, devices = _devices(recorded, config, note)
    # As many images as the search had, which needed them at all resolutions.
    largest = max(searched.space.own_resolutions, default=0)
    # They change the rounding.
    threads = searched.proxy.threads
    trainer = Trainer(
        data, searched.proxy, device, searched.seed, config.workers, note, check, largest, devices, threads
    )
    with trainer:
        trainer.data_file(anchor_resolution)

        def train(archs: Sequence[ArchSpec], seeds: Sequence[int]) -> Generator[Done[ProxyResult]]:
            jobs = [
                TrainingJob(network_of(arch), searched.proxy.steps, searched.proxy.learning_rate, seed, test=True)
                for arch, seed in zip(archs, seeds, strict=True)
            ]
            with closing(trainer.results(jobs)) as results:
                yield from results

        def network_of(arch: ArchSpec) -> NetworkSpec:
            counted = cost(arch, searched.latency.resolution, searched.latency.num_classes)
            return NetworkSpec(
                str(arch), ContenderKind.FOUND, None, arch, searched.latency.engine, arch.shown(data.resolution),
                counted.params, counted.macs,
            )  # fmt: skip

        owner = Owner.me()
        recorded.store.ownership.claim(recorded.study_id, owner)
        try:
            confirmer = Confirmer(recorded, owner, train, images[0], round_of(trainer.count))
            most = trainings_of_share(config.share, passes)

            def step(index: int, result: ProxyResult | CandidateFailed, seconds: float) -> None:
                note(confirming_words(confirmer.trainings, most, confirmer.likely))

            return confirmer.run(most, step=step)
        finally:
            recorded.store.ownership.release(recorded.study_id, owner)


def _devices(recorded: RecordedStudy, config: ConfirmConfig, note: Note) -> tuple[torch.device, list[torch.device]]:
    """The first of the devices that train, and all of them.

    A study does not store on which kind of device it trained, and on another kind trainings round otherwise. Where the
    kind is not named, and the search trained on another machine, a line says so.

    Raises:
        UsageError: one of them is not here.
    """
    searched = replace(recorded.config, train_devices=config.train_devices, workers=config.workers)
    if config.train_devices is not None:
        devices = train_devices(searched, torch.device(recorded.config.latency.device))
        return devices[0], devices
    device = check_device(replace(searched.latency, engine="eager"))
    hosts = {row.host for row in recorded.store.trainings.of_study(recorded.study_id, TrainingStage.SEARCH)}
    if others := sorted(host for host in hosts if host is not None and host != platform.node()):
        note(
            f"the search trained on {', '.join(others)}, and this trains on {device} of {platform.node()}: "
            "--train-devices must name another kind of device if the search trained on one"
        )
    return device, train_devices(searched, device)
