"""An exported directory, trained to the end on the images of its search, deployable and described."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from kernels.machine import cores
from nas.config import DataConfig, LatencyConfig
from nas.display.notes import duration
from nas.display.study_plots import plot_training
from nas.errors import UsageError
from nas.export.directories import PROXY_WEIGHTS, SECTION, TRAINED, WEIGHTS, Exported, read, rewrite
from nas.export.formats import write_onnx
from nas.final_training.config import FinalConfig
from nas.final_training.fit import LAST, RECIPE, Epoch, Fitted, Job, fit, read_job, write_job
from nas.final_training.rates import FACTORS, Trials, Tried, epoch_seconds
from nas.final_training.teacher import TEMPERATURE, WEIGHT, resolved
from nas.latency.devices import check_device
from nas.locks import training_on
from nas.reporting import Note
from nas.training.data import ImageData, load, split_files
from nas.training.pool import every_cuda
from nas.training.recipe import Recipe, Start, fitted, recipe_for
from nas.training.weights import Images
from search_spaces import cost

# The folder of a training within the directory, and the picture of its course.
FOLDER, CURVE = "training", "curve.png"
# The name of the weights that a training made.
FINAL_WEIGHTS = "trained"

Told = Callable[[Epoch, int], None]


@dataclass(frozen=True)
class Described:
    """A directory that is trained.

    Args:
        section: what its config.json says of the training.
    """

    folder: Path
    section: dict[str, Any]

    def __str__(self) -> str:
        own = self.section
        tested = "" if own["test_accuracy"] is None else f", {own['test_accuracy']:.1%} on the test images"
        return (
            f"{self.folder}: accuracy {own['accuracy']:.1%} ({own['low']:.1%} to {own['high']:.1%}, the sampling error "
            f"of {own['val_images']:,} validation images){tested}, after {own['epochs']} passes in "
            f"{duration(own['seconds'])}"
        )


def train(folder: Path, config: FinalConfig, note: Note, told: Told = lambda epoch, epochs: None) -> Described:
    """Train an exported network to the end, going on where an earlier call stopped, and describe it in its directory.

    Args:
        folder: the exported directory.
        note: function that takes a line for the user.
        told: function that is called after each epoch, with the number of all.

    Raises:
        UsageError: the directory is damaged, its images are missing or others than the search's, or there is too
            little time.
        CandidateFailed: the loss diverges.
    """
    exported = read(folder)
    if done := exported.config[SECTION].get(TRAINED):
        note(f"{folder}: is trained already; move {folder / FOLDER} and the weights away to train it anew")
        return Described(folder, done)
    device = check_device(LatencyConfig(device=config.device, engine="eager"))
    devices = [device] if ":" in config.device else every_cuda(device)
    with _alone(folder):
        data_config, largest = images_of(exported, config)
        data = load(data_config, note, largest)
        for line in data.notes:
            note(line)
        check_images(exported, data_config, largest, data)
        begin = time.perf_counter()
        place = folder / FOLDER

        def turn() -> contextlib.AbstractContextManager[None]:
            return training_on(devices, note)

        if (place / RECIPE).exists():
            job, recipe = read_job(place)
            job = replace(job, data=asdict(data_config))
            at = "" if (place / LAST).exists() else " from its beginning"
            note(f"{folder}: its training goes on{at}, with the recipe with which it was begun")
        else:
            start = _start(folder, exported, config)
            teacher = "" if config.teacher is None else resolved(config.teacher, folder)
            job = Job(exported.arch.to_json(), data.classes, asdict(data_config), largest, start, teacher)
            with turn():
                recipe = chosen_recipe(exported, config, job, data, devices, note, begin)
        write_job(place, job, recipe)
        count = len(files.train) if (files := split_files(data_config)) else len(data.train_labels)
        taught = f", taught by {job.teacher}" if job.teacher else ""
        note(f"{exported.name}: {recipe.words(count)}{taught}")
        if recipe.devices > 1:
            found = _side_by_side(place, recipe, told)
        else:
            found = fit(place, recipe, job, devices[0], data=data, told=told, turn=turn)
        plot_training(
            [each.number for each in found.epochs], [each.train_loss for each in found.epochs],
            [each.accuracy for each in found.epochs], exported.name, place / CURVE,
        )  # fmt: skip
        made = finished(exported, found, recipe, data, count, job.teacher)
        rewrite(folder, made, [write_onnx], note)
        return Described(folder, made.config[SECTION][TRAINED])


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from training the same directory.

    Raises:
        UsageError: another one does.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    number = os.open(folder / FOLDER, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{folder}: another process trains it now") from error
        yield
    finally:
        os.close(number)
        # Of what was refused nothing is left.
        with contextlib.suppress(OSError):
            (folder / FOLDER).rmdir()


# -- Images ------------------------------------------------------------------------------------------------------------


def images_of(exported: Exported, config: FinalConfig) -> tuple[DataConfig, int]:
    """The images on which a network is trained, those of its search, and the largest size at which the search had them.

    Raises:
        UsageError: they are not those that a flag names.
    """
    told = exported.config[SECTION]["accuracy"]["data"]
    own = replace(
        exported.data, data_dir=config.data_dir, download=config.download, resolution=exported.resolution
    )  # fmt: skip
    return (own if config.data is None else replace(own, source=config.data)), int(told.get("largest", 0))


def check_images(exported: Exported, config: DataConfig, largest: int, data: ImageData) -> None:
    """Refuse images that are not those of the search, as far as the directory knows these.

    Raises:
        UsageError: they are others.
    """
    told = exported.config[SECTION]["accuracy"]["data"]
    wanted, size = told.get("fingerprint"), told.get("fingerprint_resolution", config.resolution)
    if wanted is None:
        return
    own = data if size == config.resolution else load(replace(config, resolution=size), largest=largest)
    if own.fingerprint != wanted:
        raise UsageError(f"--data {config.source}: holds other images than those of the search of {exported.name}")


def _start(folder: Path, exported: Exported, config: FinalConfig) -> str:
    """The file of the weights to begin with; empty for fresh ones.

    Raises:
        UsageError: there are no kept ones.
    """
    if config.start is Start.FRESH:
        return ""
    if exported.weights is None or exported.config[SECTION]["weights"] != PROXY_WEIGHTS:
        raise UsageError(f"--start kept: the search kept no weights of {exported.name} (--keep-weights)")
    return str((folder / WEIGHTS).absolute())


# -- The recipe --------------------------------------------------------------------------------------------------------


def chosen_recipe(
    exported: Exported, config: FinalConfig, job: Job, data: ImageData, devices: Sequence[torch.device], note: Note,
    begin: float,
) -> Recipe:  # fmt: skip
    """The recipe by the rules, by what short trainings show, and by the time that there is.

    Args:
        begin: the time at which the command began, on the clock of `time.perf_counter`.

    Raises:
        UsageError: not even one pass over the images fits into the time.
        CandidateFailed: the loss diverges at every rate.
    """
    proxy = exported.config[SECTION]["accuracy"]["training"]
    trials = Trials(job, data, devices[0])
    count = len(trials.files) if trials.files is not None else len(data.train_labels)
    params = cost(exported.arch, exported.resolution, len(data.classes)).params
    recipe = recipe_for(
        params, exported.resolution, count, devices[0].type, devices=len(devices), cores=cores(), mirror=data.flip,
        base_rate=proxy["learning_rate"], base_batch=proxy["batch_size"], epochs=config.epochs,
        batch_size=config.batch_size, learning_rate=config.learning_rate, seed=config.seed, start=config.start,
        workers=config.workers,
    )  # fmt: skip
    recipe = replace(recipe, amp=trials.is_faster_in_16_bits(recipe))
    steps = trials.steps_an_epoch(recipe)
    if config.hours is not None and config.epochs is None:
        # The short trainings are a share of the long one, so its length has to be about known before.
        seconds = epoch_seconds(recipe, [trials.run(recipe, 8)], steps)
        recipe = fitted(recipe, config.hours - (time.perf_counter() - begin) / 3600, seconds)
    factors = FACTORS if config.learning_rate is None else (1.0,)
    recipe, tried = trials.with_best_rate(recipe, factors)
    seconds = epoch_seconds(recipe, tried, steps)
    if config.hours is not None and config.epochs is None:
        recipe = fitted(recipe, config.hours - (time.perf_counter() - begin) / 3600, seconds)
    if len(tried) > 1:
        note(f"rates tried: {rates_line(tried)}")
    note(f"{exported.name}: will take about {duration(recipe.epochs * seconds)}")
    return recipe


def rates_line(tried: Sequence[Tried]) -> str:
    """The rates that were tried, and what each came to, in words."""
    return ", ".join(f"{each.rate:.3g} (validation loss {each.loss:.3f})" for each in tried)


# -- Several devices ---------------------------------------------------------------------------------------------------


def _side_by_side(place: Path, recipe: Recipe, told: Told) -> Fitted:
    """Train on several devices: torchrun starts a process for each.

    Raises:
        UsageError: they fail.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(recipe.devices), "-m",
        "nas.final_training.worker", str(place),
    ]  # fmt: skip
    # A folder of this one's may have the name of a package of ours, as `studies` has.
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(recipe.threads), "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            with contextlib.suppress(ValueError, TypeError):
                told(Epoch(**json.loads(line)), recipe.epochs)
        status = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if status:
        raise UsageError(f"the training on {recipe.devices} devices ended with status {status}; it said why above")
    from nas.final_training.worker import result

    return result(place)


# -- The description ---------------------------------------------------------------------------------------------------


def finished(
    exported: Exported, found: Fitted, recipe: Recipe, data: ImageData, images: int, teacher: str
) -> Exported:  # fmt: skip
    """A network with the weights of its training, and what there is to say of it.

    Args:
        images: number of training images.
        teacher: its teacher; empty for none.
    """
    config: dict[str, Any] = json.loads(json.dumps(exported.config))
    own, count = Images.of(data), len(data.val_labels)
    right = round(found.accuracy * count)
    interval = stats.binomtest(right, count).proportion_ci(method="wilson")
    for part in (config, config["model_args"], config["pretrained_cfg"]):
        part["num_classes"] = len(own.classes)
    config["pretrained_cfg"] |= {"mean": list(own.mean), "std": list(own.std)}
    config["label_names"] = list(own.classes)
    config[SECTION]["weights"] = FINAL_WEIGHTS
    config[SECTION]["accuracy"]["preparation"] = list(own.preparation)
    config[SECTION][TRAINED] = {
        "accuracy": found.accuracy, "low": float(interval.low), "high": float(interval.high), "val_images": count,
        "test_accuracy": found.test_accuracy, "loss": found.loss, "train_images": images,
        "seconds": found.epochs[-1].seconds if found.epochs else 0.0, **asdict(recipe),
        "teacher": {"name": teacher, "temperature": TEMPERATURE, "weight": WEIGHT} if teacher else None,
    }  # fmt: skip
    return Exported(config, found.weights)
