"""An exported directory, trained to the end on the images of its search, deployable and described."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import subprocess
import sys
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
from nas.errors import CandidateFailed, OutOfMemory, UsageError, memory_may_run_out, message_line
from nas.export.directories import (
    IMAGES,
    ONNX,
    PROXY_WEIGHTS,
    SECTION,
    TRAINED,
    WEIGHTS,
    Exported,
    images_section,
    read,
    rewrite,
)
from nas.export.formats import write_onnx
from nas.final_training.config import FinalConfig
from nas.final_training.fit import (
    COPIES,
    FREE_MEMORY,
    LAST,
    RECIPE,
    Epoch,
    Fitted,
    Job,
    Within,
    copies_of,
    done_so_far,
    fit,
    read_job,
    teacher_of_job,
    write_job,
)
from nas.final_training.pictures import SHARED_MEMORY, loaders_may_die, most_workers
from nas.final_training.rates import (
    FACTORS,
    LIKE,
    MEASURED,
    Measured,
    Trials,
    Tried,
    checkpoint_steps,
    epoch_seconds,
)
from nas.final_training.teacher import TEMPERATURE, WEIGHT, forget, require_knowledge, resolved
from nas.final_training.worker import ERROR, result
from nas.latency.devices import check_device
from nas.locks import only_one, training_on, working_clock
from nas.reporting import Note
from nas.training.data import NAMED, ImageData, Kind, Progress, kind_of, load
from nas.training.pool import every_cuda
from nas.training.recipe import LEAST_BATCH, Recipe, Start, fitted, recipe_for
from nas.training.weights import Images
from search_spaces import cost

# The folder of a training within the directory, and the picture of its course.
FOLDER, CURVE = "training", "curve.png"
# The name of the weights that a training made.
FINAL_WEIGHTS = "trained"
# Share by which a rate may differ from itself once it was printed (:g).
PRINTED = 1e-5

# Errors of a place that is another user's, or on a disk that is only read, or where something else is.
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)

Told = Callable[[Epoch, int], None]
ToldWithin = Callable[[Within, int], None]


@dataclass(frozen=True)
class Described:
    """A directory that is trained.

    Args:
        section: what its config.json says of the training.
        failed: why there is no ONNX file; empty where there is one.
    """

    folder: Path
    section: dict[str, Any]
    failed: str = ""

    def __str__(self) -> str:
        own = self.section
        tested = "" if own["test_accuracy"] is None else f", {own['test_accuracy']:.1%} on the test images"
        return (
            f"{self.folder}: accuracy {own['accuracy']:.1%} ({own['low']:.1%} to {own['high']:.1%}, the sampling error "
            f"of {own['val_images']:,} validation images){tested}, after {own['epochs']} passes in "
            f"{duration(own['seconds'])}"
        )


def train(
    folder: Path, config: FinalConfig, note: Note, told: Told = lambda epoch, epochs: None,
    told_within: ToldWithin = lambda within, epochs: None,
) -> Described:  # fmt: skip
    """Train an exported network to the end, going on where an earlier call stopped, and describe it in its directory.

    Args:
        folder: the exported directory.
        note: function that takes a line for the user.
        told: function that is called after each epoch, with the number of all.
        told_within: function that is called every ten seconds within an epoch, with the number of all.

    Raises:
        UsageError: the directory is damaged, its images are missing or others than the search's, or there is too
            little time.
        CandidateFailed: the loss diverges.
    """
    exported = read(folder)
    section = exported.config[SECTION]
    if exported.weights is not None and section["weights"] not in (PROXY_WEIGHTS, FINAL_WEIGHTS):
        raise UsageError(f"{folder}: holds the weights of {section['weights']}, which would be lost; export it anew")
    if exported.weights is not None and (done := section.get(TRAINED)):
        note(f"{folder}: is trained already; to train it otherwise, export it into another folder (--out)")
        return Described(folder, done, "" if (folder / ONNX).exists() else _onnx_failed(folder, exported))
    if config.hours is not None and config.epochs is not None:
        raise UsageError(f"--hours {config.hours:g}: not with --epochs, which says how long it is, too")
    device = check_device(LatencyConfig(device=config.device, engine="eager"))
    devices = [device] if ":" in config.device else every_cuda(device)
    begin = working_clock()
    place = folder / FOLDER
    with _alone(folder):
        data_config, largest = images_of(exported, config)
        data = load(data_config, note, largest)
        for line in data.notes:
            note(line)
        check_images(exported, data_config, largest, data)

        def turn() -> contextlib.AbstractContextManager[None]:
            return training_on(devices, note)

        # Before the first checkpoint there is nothing that another recipe would lose.
        if (place / RECIPE).exists() and (place / LAST).exists():
            job, recipe = read_job(place)
            _require_same(folder, config, job, recipe, devices)
            # What there is was made of the weights with which it began.
            job = replace(job, data=asdict(data_config), start="")
            devices = devices[: recipe.devices]
            note(f"{folder}: its training goes on, with the recipe with which it was begun; {_left(place, recipe)}")
            with turn():
                _looked_through(place, job, note)
        else:
            start = _start(folder, exported, config)
            teacher = "" if config.teacher is None else resolved(config.teacher, folder)
            job = Job(
                exported.arch.to_json(), data.classes, asdict(data_config), largest, start, teacher, config.batch_size,
                asked_hours=config.hours or 0.0,
            )  # fmt: skip
            with turn():
                if teacher:
                    _require_knowledge(exported, job, data, devices[0], note)
                job = _looked_through(place, job, note, len(data.train_labels))
                recipe = chosen_recipe(exported, config, job, data, devices, place, note, begin)
        write_job(place, job, recipe)
        count = len(data.train_labels) if (files := job.files()) is None else len(files)
        taught = f", taught by {job.teacher}" if job.teacher else ""
        note(f"{exported.name}: {recipe.words(count)}{taught}")
        if recipe.devices > 1:
            with turn():
                found = _side_by_side(place, recipe, told, told_within)
        else:
            found = fit(place, recipe, job, devices[0], data=data, told=told, told_within=told_within, turn=turn)
        made = finished(exported, found, recipe, data, data_config, count, job.teacher)
        # Whatever becomes of the curve and the ONNX file, the weights are there.
        rewrite(folder, made, note=note)
        plot_training(
            [each.number for each in found.epochs], [each.train_loss for each in found.epochs],
            [each.accuracy for each in found.epochs], exported.name, place / CURVE,
        )  # fmt: skip
        shutil.rmtree(place / COPIES, ignore_errors=True)
        return Described(folder, made.config[SECTION][TRAINED], _onnx_failed(folder, made))


def _onnx_failed(folder: Path, network: Exported) -> str:
    """Make the ONNX file of a trained network; returns why that fails, and nothing if it does not."""
    try:
        rewrite(folder, network, [write_onnx])
    except Exception as error:  # exporters and runtimes raise anything
        reason = str(error) if isinstance(error, UsageError) else message_line(error)
        return (
            f"{folder / ONNX}: cannot be made ({reason}); the weights are in {folder / WEIGHTS}, and "
            f"`export {folder} --format onnx` tries it again"
        )
    return ""


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine from training the same directory.

    Raises:
        UsageError: another one does, or nothing can be written there.
    """
    place = folder / FOLDER
    with only_one(f"training of {folder.resolve()}") as alone:
        if not alone:
            raise UsageError(f"{folder}: another process trains it now")
        try:
            place.mkdir(exist_ok=True)
            yield
        except OSError as error:
            if error.errno not in NOT_WRITABLE:
                raise
            raise UsageError(
                f"{error.filename or place}: cannot be read or written ({error.strerror or error})"
            ) from error
        except (UsageError, CandidateFailed):
            # Of what was refused nothing is left.
            if not (place / RECIPE).exists():
                shutil.rmtree(place / COPIES, ignore_errors=True)
            raise
        finally:
            with contextlib.suppress(OSError):
                place.rmdir()


def _require_same(
    folder: Path, config: FinalConfig, job: Job, recipe: Recipe, devices: Sequence[torch.device]
) -> None:  # fmt: skip
    """Refuse flags that say something else than the recipe with which a training was begun.

    Raises:
        UsageError: there is such a flag, or the devices are not there.
    """
    told: dict[str, tuple[Any, Any]] = {
        "--hours": (config.hours, config.hours if job.asked_hours is None else job.asked_hours or "none"),
        "--epochs": (config.epochs, recipe.epochs),
        "--batch": (config.batch_size, job.asked_batch or recipe.batch_size),
        "--lr": (config.learning_rate, recipe.learning_rate), "--seed": (config.seed, recipe.seed),
        "--start": (config.start, recipe.start), "--workers": (config.workers, recipe.workers),
        "--teacher": (config.teacher and resolved(config.teacher, folder), job.teacher or "none"),
    }  # fmt: skip
    anew = f"move {folder / FOLDER} away to begin anew"
    for flag, (now, before) in told.items():
        if now is not None and now != before and not (flag == "--lr" and math.isclose(now, before, rel_tol=PRINTED)):
            raise UsageError(f"{flag} {now}: the training of {folder} was begun with {before}; {anew}")
    if devices[0].type != recipe.kind or len(devices) < recipe.devices:
        begun = f"{recipe.devices} GPUs" if recipe.devices > 1 else f"one device of kind {recipe.kind}"
        raise UsageError(f"--device {config.device}: the training of {folder} was begun on {begun}; {anew}")


def _left(place: Path, recipe: Recipe) -> str:
    """What is done of a training and how long the rest takes, in words."""
    epochs, seconds = done_so_far(place)
    left = seconds / epochs * (recipe.epochs - epochs)
    return f"{round(epochs, 1):g} of {recipe.epochs} passes are done, about {duration(left)} left"


# -- Images ------------------------------------------------------------------------------------------------------------


def images_of(exported: Exported, config: FinalConfig) -> tuple[DataConfig, int]:
    """The images on which a network is trained, those of its search, and their largest size in the search."""
    told = exported.config[SECTION]["accuracy"]["data"]
    # The size at which it was timed; the search may have trained it at another.
    size = exported.deployment.resolution
    own = replace(exported.data, data_dir=config.data_dir, download=config.download, resolution=size)
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
        raise UsageError(
            f"--data {config.source}: holds other images than those of the search of {exported.name}; where one was "
            "deleted since, put a file of its name back, damaged or not: training leaves out what it cannot read"
        )


def _looked_through(place: Path, job: Job, note: Note, loaded: int | None = None) -> Job:
    """Make smaller copies of large photos, of which each pass would otherwise decode all pixels.

    Args:
        place: folder of the training.
        loaded: number of training images that the search has read, of a training that is not begun.

    Returns:
        The training, without the images that cannot be read: the search has seen as many as fit into memory only.
    """
    files = job.files()
    if files is None:
        return job
    copies, progress = copies_of(place, job), Progress(len(files), note)
    verified = loaded is not None and len(files) > loaded
    damaged = copies.keep((path for path, _ in files), verified, progress.step)
    if count := len(list((place / COPIES).glob("*.jpg"))):
        note(f"{place / COPIES}: smaller copies of {count:,} large photos, until the training ends")
    if loaded is None or not damaged:
        return job
    named = "; ".join(f"{path} ({reason})" for path, reason in damaged[:NAMED])
    more = f"; and {len(damaged) - NAMED:,} more" if len(damaged) > NAMED else ""
    note(f"left out of the training, as they cannot be read: {named}{more}")
    root = Path(job.data_config.source).expanduser()
    return replace(job, left_out=tuple(str(path.relative_to(root)) for path, _ in damaged))


def _start(folder: Path, exported: Exported, config: FinalConfig) -> str:
    """The file of the weights to begin with; empty for fresh ones.

    Raises:
        UsageError: there are no kept ones.
    """
    if config.start is not Start.KEPT:
        return ""
    if exported.weights is None or exported.config[SECTION]["weights"] != PROXY_WEIGHTS:
        raise UsageError(f"--start kept: the search kept no weights of {exported.name} (--keep-weights)")
    return str((folder / WEIGHTS).absolute())


def _require_knowledge(exported: Exported, job: Job, data: ImageData, device: torch.device, note: Note) -> None:
    """Say what the teacher knows of the images.

    Raises:
        UsageError: it does not exist, tells other classes apart, or is no better than chance.
    """
    mean, std = (tuple(map(float, each)) for each in data.mean_std)
    told = exported.config[SECTION]["accuracy"]
    reached = (told.get("confirmed") or {}).get("accuracy", told["proxy"])
    require_knowledge(job.teacher, teacher_of_job(job, mean, std, device, note), data, reached, device, note)


# -- The recipe --------------------------------------------------------------------------------------------------------


def chosen_recipe(
    exported: Exported, config: FinalConfig, job: Job, data: ImageData, devices: Sequence[torch.device], place: Path,
    note: Note, begin: float,
) -> Recipe:  # fmt: skip
    """The recipe by the rules, by what short trainings show, and by the time that there is.

    Args:
        place: folder of the training, in which the short ones are kept, for another start before a checkpoint.
        begin: the time at which the command began, on `nas.locks.working_clock`.

    Raises:
        UsageError: not even one pass over the images fits into the time.
        CandidateFailed: the loss diverges at every rate, or a process that prepares images died.
        OutOfMemory: memory ran out with the batch that was asked for, or with the smallest one.
    """
    proxy = exported.config[SECTION]["accuracy"]["training"]
    trials = Trials(job, data, devices[0], place)
    count = len(trials.files) if trials.files is not None else len(data.train_labels)
    size = exported.deployment.resolution
    params = cost(exported.arch, size, len(data.classes)).params
    recipe = recipe_for(
        params, size, count, devices[0].type, devices=len(devices), cores=cores(), mirror=data.flip,
        base_rate=proxy["learning_rate"], base_batch=proxy["batch_size"], epochs=config.epochs,
        batch_size=config.batch_size, learning_rate=config.learning_rate, seed=config.seed or 0,
        start=config.start or Start.FRESH, workers=config.workers,
    )  # fmt: skip
    if config.workers is None and (most := most_workers(recipe, size)) < recipe.workers:
        note(
            f"{SHARED_MEMORY}, the shared memory, is small: {most} processes prepare images instead of {recipe.workers}"
        )
        recipe = replace(recipe, workers=most)
    while True:
        try:
            with memory_may_run_out(), loaders_may_die():
                return _found(recipe, trials, exported.name, config, note, begin, place)
        except OutOfMemory:
            smaller = _smaller(recipe, config)
        note(f"memory ran out in a step of {recipe.batch_size} images: steps are of {smaller.batch_size}")
        recipe = smaller


def _smaller(recipe: Recipe, config: FinalConfig) -> Recipe:
    """A recipe of half the batch, where memory ran out.

    Raises:
        OutOfMemory: the user asked for the batch, or it is the smallest one.
    """
    if config.batch_size is not None:
        raise OutOfMemory(f"--batch {recipe.batch_size}: memory ran out; a smaller one may fit")
    if recipe.batch_size <= LEAST_BATCH:
        raise OutOfMemory(f"memory ran out in a step of {recipe.batch_size} images: {FREE_MEMORY}")
    half = recipe.batch_size // 2
    usual = recipe.learning_rate * math.sqrt(half / recipe.batch_size)
    return replace(recipe, batch_size=half, learning_rate=config.learning_rate or usual)


def _found(
    recipe: Recipe, trials: Trials, name: str, config: FinalConfig, note: Note, begin: float, place: Path
) -> Recipe:  # fmt: skip
    """A recipe with what short trainings show and the length for which there is time; see `chosen_recipe`."""
    factors = FACTORS if config.learning_rate is None else (1.0,)
    inputs = trials.inputs(recipe, factors)
    known = Measured.read(place / MEASURED, inputs)
    recipe = replace(recipe, amp=trials.is_faster_in_16_bits(recipe) if known is None else known.amp)
    steps = trials.steps_an_epoch(recipe)
    if config.hours is not None and config.epochs is None:
        # The short trainings are a share of the long one, so its length has to be about known before.
        seconds = epoch_seconds(recipe, [trials.run(recipe, 8)] if known is None else known.tried, steps)
        recipe = fitted(recipe, config.hours, (working_clock() - begin) / 3600, seconds)
    length = trials.length(recipe)
    if known is None or not known.steps / LIKE <= length <= known.steps * LIKE:
        known = Measured(inputs, recipe.amp, length, tuple(trials.tried(recipe, factors, length)))
    recipe = trials.with_best_rate(recipe, factors, known.tried)
    seconds = epoch_seconds(recipe, known.tried, steps)
    if config.hours is not None and config.epochs is None:
        recipe = fitted(recipe, config.hours, (working_clock() - begin) / 3600, seconds)
    recipe = replace(recipe, checkpoint_steps=checkpoint_steps(known.tried, steps))
    known.write(place / MEASURED)
    if len(known.tried) > 1:
        note(f"rates tried: {rates_line(known.tried)}")
    note(f"{name}: will take about {duration(recipe.epochs * seconds)}")
    return recipe


def rates_line(tried: Sequence[Tried]) -> str:
    """The rates that were tried, and what each came to, in words."""
    return ", ".join(f"{each.rate:.3g} (validation loss {each.loss:.3f})" for each in tried)


# -- Several devices ---------------------------------------------------------------------------------------------------


def _side_by_side(place: Path, recipe: Recipe, told: Told, told_within: ToldWithin) -> Fitted:
    """Train on several devices: torchrun starts a process for each.

    Raises:
        UsageError: they fail.
    """
    (place / ERROR).unlink(missing_ok=True)
    if recipe.kind == "cuda":
        # Those processes need the memory that the short trainings and their teacher took.
        forget()
        torch.cuda.empty_cache()
    command = [
        sys.executable, "-m", "nas.final_training.launch", str(os.getpid()), "--standalone", "--nproc-per-node",
        str(recipe.devices), "-m", "nas.final_training.worker", str(place),
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
                fields = json.loads(line)
                if "step" in fields:
                    told_within(Within(**fields), recipe.epochs)
                else:
                    told(Epoch(**fields), recipe.epochs)
        status = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if (place / ERROR).exists():
        raise CandidateFailed((place / ERROR).read_text())
    if status:
        raise UsageError(f"the training on {recipe.devices} devices ended with status {status}; it said why above")
    return result(place)


# -- The description ---------------------------------------------------------------------------------------------------


def finished(
    exported: Exported, found: Fitted, recipe: Recipe, data: ImageData, place: DataConfig, images: int, teacher: str
) -> Exported:  # fmt: skip
    """A network with the weights of its training, and what there is to say of it.

    Args:
        place: the source of the images, which may have been moved since the search.
        images: number of training images.
        teacher: its teacher; empty for none.
    """
    config: dict[str, Any] = json.loads(json.dumps(exported.config))
    own, count = Images.of(data), len(data.val_labels)
    right = round(found.accuracy * count)
    interval = stats.binomtest(right, count).proportion_ci(method="wilson")
    for part in (config, config["model_args"], config["pretrained_cfg"]):
        part["num_classes"] = len(own.classes)
    config["pretrained_cfg"] |= {
        "mean": list(own.mean), "std": list(own.std), "input_size": [3, own.resolution, own.resolution]
    }  # fmt: skip
    config["label_names"] = list(own.classes)
    config[SECTION]["weights"] = FINAL_WEIGHTS
    config[SECTION]["accuracy"]["preparation"] = list(own.preparation)
    searched = config[SECTION]["accuracy"]["data"]
    if place.source != searched["source"]:
        is_here = kind_of(place) is Kind.FOLDER
        searched["source"] = str(Path(place.source).expanduser().absolute()) if is_here else place.source
    known = config[SECTION].get(IMAGES, {}).get("train_images", images)
    config[SECTION][IMAGES] = images_section(place, searched.get("fingerprint", data.fingerprint), known)
    config[SECTION][TRAINED] = {
        "accuracy": found.accuracy, "low": float(interval.low), "high": float(interval.high), "val_images": count,
        "test_accuracy": found.test_accuracy, "loss": found.loss, "train_images": images,
        "seconds": found.epochs[-1].seconds if found.epochs else 0.0, **asdict(recipe),
        "teacher": {"name": teacher, "temperature": TEMPERATURE, "weight": WEIGHT} if teacher else None,
    }  # fmt: skip
    return Exported(config, found.weights)
