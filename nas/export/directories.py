"""Directories of exported networks, which timm builds, trains and publishes, and our kernels deploy.

The content of all files comes from config.json: a study's figures are written there, and the other files are made from
it. Directories are written in a temporary folder and then renamed, so that no directory is ever incomplete.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from kernels.machine import cores
from nas.config import DataConfig, LatencyConfig, is_folder, is_mirrored
from nas.display.notes import code, plain, stage_table
from nas.errors import UsageError, message_line, of_this_version, unreadable
from nas.export.selection import Selection
from nas.files import NO_ROOM, folder_for
from nas.latency.analysis import from_table
from nas.latency.block_table import BlockTable
from nas.recommendation import directory_name
from nas.recorded import RecordedStudy
from nas.reporting import Note
from nas.training.data import Kind, SplitFiles, kind_of, split_files
from nas.training.folders import class_names, natural_order, split_folders
from nas.training.recipe import OF_IMAGES, Recipe, recipe_for
from nas.training.weights import Images, Trained, Weights, require_finite, weight_folder
from search_spaces import ArchSpec, cost
from search_spaces.timm_config import timm_config
from search_spaces.timm_file import timm_file
from studies import displayed

CONFIG, WEIGHTS, RECIPE, CARD = "config.json", "model.safetensors", "train.yaml", "README.md"
CLASSIFY = "classify.py"
# The names of the outputs, one a line, as timm's `--class-map` reads them.
CLASSES = "classes.txt"
# The key of our section under which the digests of the recipe and the card are, as they were written.
DIGESTS = "digests"
# Files that `nas.export.formats` makes from the weights.
FILES = ONNX, PROGRAM, COMPILED, FUSED = "model.onnx", "model.pt2", "model_aoti.pt2", "model_fused.pt2"
# Our section of config.json.
SECTION = "convfirst"
PROXY_WEIGHTS = "proxy"
# Of our section, the key of what a training to the end has found.
TRAINED = "trained"
# And that of the images: their number, and the folder in which timm finds them.
IMAGES = "images"
# Begin of the name of a folder of links to the images of the search, in its own split. It is hidden, so that a shell's
# `exports/*` names networks only.
LINKS = ".split"

Formats = Sequence[Callable[["Exported", Path], object]]


@dataclass(frozen=True, eq=False)
class Exported:
    """An exported network, which is the content of its directory.

    Args:
        config: the content of config.json.
        weights: the content of model.safetensors, if there is one.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor] | None

    @property
    def name(self) -> str:
        """The name under which it was exported, a Python identifier; its directory may have been renamed since."""
        return str(self.config[SECTION]["name"])

    @cached_property
    def arch(self) -> ArchSpec:
        return ArchSpec.from_json(json.dumps(self.config[SECTION]["arch_spec"]))

    @property
    def num_classes(self) -> int:
        return int(self.config["num_classes"])

    @property
    def classes(self) -> list[str]:
        """The names of the outputs, in their order; empty where they are not known."""
        return [str(label) for label in self.config.get("label_names", ())]

    @property
    def resolution(self) -> int:
        return int(self.config["pretrained_cfg"]["input_size"][-1])

    @property
    def data(self) -> DataConfig:
        """The images of its search."""
        told = self.config[SECTION]["accuracy"]["data"]
        known = {each.name for each in fields(DataConfig)}
        # It is left out where it is 1.
        return DataConfig(**{"reading": 1, **{name: value for name, value in told.items() if name in known}})

    @property
    def deployment(self) -> LatencyConfig:
        """The deployment in which its latency was measured."""
        return LatencyConfig(**self.config[SECTION]["latency"]["deployment"])

    def build(self) -> nn.Module:
        """The network with its weights, or with new random ones, in evaluation mode."""
        network = self.arch.build(self.num_classes)
        if self.weights is not None:
            network.load_state_dict(self.weights)
        return network.eval()


# -- From a study ----------------------------------------------------------------------------------------------------


def chosen(recorded: RecordedStudy, selection: Selection) -> pd.DataFrame:
    """The rows of the selected candidates in the study's own deployment, fastest first.

    Raises:
        UsageError: a trial does not exist or is not complete, or nothing passes.
    """
    rows = recorded.evaluations()
    if selection.trials:
        rows = rows[rows["number"].isin(selection.trials)]
        for number in selection.trials:
            if number not in set(rows["number"]):
                raise UsageError(f"--trial {number}: {_why_not(recorded, number)}")
    else:
        rows = rows[rows["trial_id"].isin(recorded.front()["trial_id"])]
        if rows.empty:
            raise UsageError(f"--study {recorded.name}: its front is empty, there is nothing to export")
    passing = rows
    if selection.max_latency_ms is not None:
        passing = passing[passing["latency_ms"] <= selection.max_latency_ms]
        if passing.empty:
            least = rows["latency_ms"].min()
            raise UsageError(f"--max-latency-ms {selection.max_latency_ms:g}: the fastest takes {least:.4g} ms")
    # Of candidates that were not trained again, the accuracy of the search is all that is known.
    confirmed = passing["confirmed_accuracy"].where(passing["confirmed"] == 1)
    passing = passing.assign(known_accuracy=confirmed.fillna(passing["accuracy"]))
    if selection.min_accuracy is not None:
        accurate = passing[passing["known_accuracy"] >= selection.min_accuracy]
        if accurate.empty:
            raise UsageError(
                f"--min-accuracy {selection.min_accuracy:g}: the best has {passing['known_accuracy'].max():.4f}"
            )
        passing = accurate
    if selection.top is not None:
        passing = passing.sort_values(["known_accuracy", "latency_ms"], ascending=[False, True]).head(selection.top)
    return passing.sort_values(["latency_ms", "number"])


def _why_not(recorded: RecordedStudy, number: int) -> str:
    for candidate in recorded.candidates():
        if candidate.number == number:
            reason = f" ({candidate.reason})" if candidate.reason else ""
            return f"is not complete but {candidate.state.replace('_', ' ')}{reason}"
    return "there is no such candidate"


def of_study(recorded: RecordedStudy, storage: str, rows: pd.DataFrame) -> list[Exported]:
    """The exported networks of some candidates.

    Args:
        storage: URL of the study database.
        rows: rows that `chosen` returned.

    Raises:
        UsageError: another version of the program wrote a candidate.
    """
    study, config, identity = recorded.row, recorded.config.latency, recorded.identity
    with of_this_version(recorded.name):
        archs = [ArchSpec.from_json(str(text)) for text in rows["arch"]]
    table = BlockTable(recorded.store, recorded.device, config)
    anchor = {"arch_spec": json.loads(study.anchor), "median_ms": study.anchor_ms}
    kept = Weights(weight_folder(storage), study.study_id)
    images = Images.from_json(study.images) if study.images else None
    for_timm = _images_section(recorded)
    networks = []
    for arch, (_, row) in zip(archs, rows.iterrows(), strict=True):
        own = replace(config, resolution=arch.shown(config.resolution))
        number, latency_ms = int(row["number"]), float(row["latency_ms"])
        trained = kept.find(number, arch.arch_id)
        section = {
            "name": directory_name(latency_ms, number),
            "arch": str(arch), "arch_id": arch.arch_id, "arch_spec": json.loads(arch.to_json()),
            "study": _study_section(recorded, storage, number),
            "latency": _latency_section(row, own, table, arch) | {"anchor": anchor},
            "accuracy": {
                "proxy": float(row["accuracy"]), "training": identity["proxy"], "seed": identity["seed"],
                "confirmed": _confirmed_section(row), "weights": None if trained is None else trained.accuracy,
                "data": {
                    **identity["data"], "resolution": arch.shown(identity["data"]["resolution"]),
                    "mirror": recorded.config.data.mirror, "fingerprint": study.data_fingerprint,
                    # At the anchor's size the images were told from others, and none was taken that does not fit into
                    # memory at the largest.
                    "fingerprint_resolution": recorded.anchor.shown(identity["data"]["resolution"]),
                    "largest": max(recorded.config.space.own_resolutions, default=0),
                },
                "preparation": [] if trained is None else list(trained.images.preparation),
            },
            "weights": None if trained is None else PROXY_WEIGHTS, IMAGES: for_timm,
        }  # fmt: skip
        networks.append(_exported(arch, section, own, trained, images))
    return networks


def _images_section(recorded: RecordedStudy) -> dict[str, Any]:
    """See `images_section`; of the images of a study."""
    images = json.loads(recorded.row.images) if recorded.row.images else {}
    return images_section(recorded.config.data, recorded.row.data_fingerprint, images.get("train_images"))


def images_section(data: DataConfig, fingerprint: str, count: int | None) -> dict[str, Any]:
    """The number of the training images, and the folder in which timm's scripts find them, if they are here.

    Args:
        count: the number of the training images; None where it is not known.
    """
    section: dict[str, Any] = {"train_images": count} if count else {}
    try:
        if kind_of(data) is not Kind.FOLDER:
            return section
        root = Path(data.source).expanduser()
        train, val = split_folders(root, data.reading)
    except (UsageError, OSError):
        # They were moved away, or are on another machine.
        return section
    if val is not None and train.parent == val.parent == root:
        return {**section, "data_dir": str(root.absolute()), "train_split": train.name, "val_split": val.name}
    # timm would validate on training images.
    name = f"{LINKS}_{fingerprint}"
    return {**section, "data_dir": f"../{name}", "train_split": "train", "val_split": "val", "links": name}


def _confirmed_section(row: pd.Series) -> dict[str, float] | None:
    """The accuracy over trainings with other seeds, with its 95 % interval; None where there were none."""
    if pd.isna(row["confirmed_accuracy"]):
        return None
    return {
        "accuracy": float(row["confirmed_accuracy"]), "low": float(row["confirmed_low"]),
        "high": float(row["confirmed_high"]), "trainings": int(row["confirmed_trainings"]),
    }  # fmt: skip


def _study_section(recorded: RecordedStudy, storage: str, number: int) -> dict[str, Any]:
    study = recorded.row
    return {
        "name": recorded.name, "trial": number, "storage": displayed(storage), "space": recorded.config.space.name,
        "begun": f"{study.created_at:%Y-%m-%d %H:%M} UTC", "versions": json.loads(study.versions),
    }  # fmt: skip


def _latency_section(row: pd.Series, config: LatencyConfig, table: BlockTable, arch: ArchSpec) -> dict[str, Any]:
    latency_ms = float(row["latency_ms"])
    efficiency = from_table(table, arch, "", latency_ms)
    blocks = [
        {
            "name": part.block.name, "kind": part.block.kind, "macs": part.block.macs,
            "latency_ms": None if part.seconds is None else 1e3 * part.seconds, "bound": part.bound,
            "computational_efficiency": part.efficiency, "bound_by": part.bound_by,
        }
        for part in (efficiency.rows if efficiency else ())
    ]  # fmt: skip
    return {
        "median_ms": latency_ms, "p20_ms": float(row["latency_p20_ms"]), "p80_ms": float(row["latency_p80_ms"]),
        "interval_share": _number(row["latency_interval_share"]), "stage": row["latency_stage"],
        "capped": bool(_number(row["latency_capped"])), "throttled": bool(_number(row["latency_throttled"])),
        "computational_efficiency": _number(row["computational_efficiency"]),
        "device": asdict(table.device), "deployment": asdict(config), "blocks": blocks,
        "peak_macs_per_s": table.profile.macs_per_s if table.profile else None,
    }  # fmt: skip


def _number(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)


def same_network(one: Exported, other: Exported) -> bool:
    """Whether two exports are of one candidate, however the database is spelt and whatever latency it has now."""
    told = [network.config[SECTION] for network in (one, other)]
    studies = [(each["study"]["name"], each["study"]["begun"], each["study"]["trial"]) for each in told]
    return studies[0] == studies[1] and told[0]["arch_id"] == told[1]["arch_id"]


def _exported(
    arch: ArchSpec, section: dict[str, Any], config: LatencyConfig, trained: Trained | None, images: Images | None
) -> Exported:
    """The export of a network.

    Args:
        trained: its weights, if there are any.
        images: the images of its study, if they were recorded.
    """
    latency = section["latency"]
    # timm keeps these through training and publishing, but not our section.
    notes = [
        f"convfirst arch_id: {arch.arch_id}",
        "convfirst study: " + json.dumps({key: section["study"][key] for key in ("name", "trial", "storage")}),
        "convfirst latency: " + json.dumps({key: latency[key] for key in ("median_ms", "deployment", "device")}),
    ]
    fields: dict[str, Any] = {"notes": notes, SECTION: section}
    if trained is None and (images is None or len(images.classes) != config.num_classes):
        # The deployment was timed with other classes than those of the images.
        return Exported(timm_config(arch, config.num_classes, config.resolution, **fields), None)
    images = trained.images if trained else images
    assert images is not None
    made = timm_config(
        arch, len(images.classes), images.resolution if trained else config.resolution, mean=images.mean,
        std=images.std, label_names=list(images.classes), **fields,
    )  # fmt: skip
    return Exported(made, trained.weights if trained else None)


# -- A directory -----------------------------------------------------------------------------------------------------


def render(exported: Exported) -> dict[str, str]:
    """The text files of a directory: name -> content."""
    name, config, arch = exported.name, exported.config, exported.arch
    counted = cost(arch, exported.resolution, exported.num_classes)
    section = config[SECTION]
    trained_on = section["accuracy"]["data"]
    own_recipe = timm_recipe(exported, counted.params)
    steps = (section.get(IMAGES, {}).get("train_images") or OF_IMAGES) // own_recipe.images_a_step
    values = {
        "name": name, "arch": arch, "resolution": exported.resolution, "num_classes": exported.num_classes,
        "params": counted.params, "macs": counted.macs, "proxy": section["weights"] == PROXY_WEIGHTS,
        "stages": stage_table(arch, exported.resolution, exported.num_classes),
        "recipe": own_recipe, "ema_decay": own_recipe.ema_decay(steps),
        "images": {"train_images": None, "data_dir": None, **section.get(IMAGES, {})},
        # Directories that were exported before these were recorded do not have them.
        "mirror": trained_on.get("mirror", is_mirrored(trained_on["source"])), "reading": trained_on.get("reading", 1),
        "folder": is_folder(trained_on["source"]),
        "preparation": section["accuracy"].get("preparation", ()),
        "confirmed": section["accuracy"].get("confirmed"), "own_accuracy": section["accuracy"].get("weights"),
        "trained": section.get(TRAINED), "classes": exported.classes, "timms_order": _is_timms_order(exported.classes),
        **{key: section[key] for key in ("weights", "latency", "accuracy", "study")},
    }  # fmt: skip
    templates = Environment(
        loader=PackageLoader("nas.export"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    templates.filters.update(code=code, plain=plain, number=_yaml_number)
    edited = {
        RECIPE: templates.get_template("train.yaml").render(values),
        CARD: templates.get_template("model_card.md").render(values),
    }
    # By these is known later whether a user has edited them.
    stamped = {**section, DIGESTS: {name: _digest(text) for name, text in edited.items()}}
    named = {CLASSES: "".join(f"{label}\n" for label in exported.classes)} if exported.classes else {}
    return {
        CONFIG: json.dumps({**config, SECTION: stamped}, indent=2) + "\n",
        f"{name}.py": timm_file(name, arch, config),
        CLASSIFY: templates.get_template(f"{CLASSIFY}.txt").render(),
        **named,
        **edited,
    }


def _yaml_number(value: float) -> str:
    """A number as YAML 1.1 reads it: what has an exponent and no point is a word there."""
    text = f"{value:.6g}"
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


def timm_recipe(exported: Exported, params: int) -> Recipe:
    """The recipe of a training by timm's own script, on this machine.

    Args:
        params: number of the network's parameters.
    """
    told = exported.config[SECTION]["accuracy"]
    proxy, source = told["training"], told["data"]["source"]
    count = exported.config[SECTION].get(IMAGES, {}).get("train_images") or OF_IMAGES
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    made = recipe_for(
        params, exported.resolution, count, kind, devices=1, cores=cores(),
        mirror=told["data"].get("mirror", is_mirrored(source)), base_rate=proxy["learning_rate"],
        base_batch=proxy["batch_size"],
    )  # fmt: skip
    return replace(made, amp=kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]


def _is_timms_order(classes: Sequence[str]) -> bool:
    """Whether timm numbers folders of these names so; of names that differ in case alone, it takes any order."""
    keys = [natural_order(name) for name in classes]
    return all(one < other for one, other in pairwise(keys))


def write(
    networks: Sequence[Exported], out_dir: Path, formats: Formats = (), force: bool = False,
    note: Note = lambda line: None,
) -> list[Path]:  # fmt: skip
    """Write a directory for each network, all of them or none, and return their paths.

    Args:
        formats: functions that make more files of each network in its directory.
        force: whether to write into a folder that is not empty, too. In a directory that exists already, our files are
            replaced one by one, and all other files stay.
        note: function that takes a line where the images of a split cannot be linked to.

    Raises:
        UsageError: the folder is not empty or cannot be written to, a format cannot be made, or an existing directory
            holds the weights of a training.
    """
    places = [out_dir / network.name for network in networks]
    try:
        if out_dir.exists() and not force and any(not path.name.startswith(_ASIDE) for path in out_dir.iterdir()):
            raise UsageError(f"--out {out_dir}: is not empty (--force writes into it all the same)")
        for place in places:
            _require_no_training(place)
        with folder_for(out_dir):
            made: list[Path] = []
            try:
                with _aside(out_dir) as aside:
                    for network in networks:
                        _fill(aside / network.name, network, formats)
                    for name, files in _splits(networks, out_dir).items():
                        if not _put_links(out_dir / name, files, aside, note):
                            continue
                        made.append(out_dir / name)
                    for place in places:
                        if place.exists():
                            _merge(aside / place.name, place, stale=(WEIGHTS, CLASSES, *FILES))
                        else:
                            os.rename(aside / place.name, place)
                            made.append(place)
            except BaseException:
                for place in made:
                    shutil.rmtree(place)
                raise
    except OSError as error:
        raise UsageError(f"--out {out_dir}: cannot be written ({error.strerror or error})") from error
    return places


def _splits(networks: Sequence[Exported], out_dir: Path) -> dict[str, SplitFiles]:
    """The folders of links that the networks' recipes need and that are not there, by name."""
    found = {}
    for network in networks:
        name = network.config[SECTION].get(IMAGES, {}).get("links")
        if name and name not in found and not _leads_somewhere(out_dir / name):
            # The images may have gone since the network was exported; then there is nothing to link to.
            with contextlib.suppress(UsageError):
                files = split_files(network.data)
                if files is not None:
                    found[name] = files
    return found


def _leads_somewhere(folder: Path) -> bool:
    """Whether a folder of links is there, and its first link leads to a file."""
    link = next(folder.glob("*/*/*"), None)
    return link is not None and link.exists()


def _put_links(place: Path, files: SplitFiles, aside: Path, note: Note) -> bool:
    """Make a folder of links, in the place of one whose links lead nowhere any more; returns whether it was made.

    Args:
        aside: a temporary folder beside it.
        note: function that takes a line where the images cannot be linked to.
    """
    made_of = _link(aside / place.name, files)
    if made_of is not LINKED:
        note(f"{place}: {made_of}, as there can be no symbolic links here")
    if made_of is NOTHING:
        return False
    if place.exists():
        os.rename(place, aside / f"{place.name}.old")
    os.rename(aside / place.name, place)
    return True


# What a folder of links is made of. There are disks without the first two, as those of cameras.
LINKED, HARD_LINKED, COPIED = "links to the images", "hard links to the images", "copies of the images"
NOTHING = "not made, the copies would fill the disk (train.py needs a --data-dir with the split)"


def _link(folder: Path, files: SplitFiles) -> str:
    """Make a folder of each part of the split, with a folder for each class, of links to the images.

    Returns:
        What the folder holds: symbolic links if that is possible, else hard links, else copies.
    """
    ways: list[tuple[str, Callable[[Path, Path], object]]] = [
        (LINKED, lambda path, place: place.symlink_to(path.absolute())),
        (HARD_LINKED, lambda path, place: os.link(path.resolve(), place)), (COPIED, shutil.copyfile),
    ]  # fmt: skip
    for part, items in (("train", files.train), ("val", files.val)):
        for name in files.classes:
            (folder / part / name).mkdir(parents=True)
        for number, (path, label) in enumerate(items):
            within = folder / part / files.classes[label]
            while True:
                try:
                    _made_in(within, number, path, ways[0][1])
                    break
                except OSError as error:
                    if len(ways) == 1 or error.errno in NO_ROOM or not path.exists():
                        raise
                ways.pop(0)
                if ways[0][0] is COPIED and not _is_room_for(files, folder):
                    return NOTHING
    return ways[0][0]


def _made_in(folder: Path, number: int, path: Path, make: Callable[[Path, Path], object]) -> None:
    # Files of several folders may have one name; with the number before it, it may be too long.
    try:
        make(path, folder / f"{number:07d}_{path.name}")
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        make(path, folder / f"{number:07d}{path.suffix}")


def _is_room_for(files: SplitFiles, folder: Path) -> bool:
    """Whether copies of all images take half of the free disk at most."""
    return sum(path.stat().st_size for path, _ in (*files.train, *files.val)) <= shutil.disk_usage(folder).free / 2


def _require_no_training(place: Path) -> None:
    """Refuse a directory that holds the weights of a longer training, which would be lost.

    Raises:
        UsageError: it holds such weights.
    """
    if not (place / CONFIG).exists():
        return
    there = read(place)
    named = there.config[SECTION]["weights"]
    if there.weights is not None and named != PROXY_WEIGHTS:
        raise UsageError(f"{place}: holds the weights of {named or 'a training'}; move it away first")


def rewrite(folder: Path, network: Exported, formats: Formats = (), note: Note = lambda line: None) -> None:
    """Write a network into the directory from which it was read, file by file.

    Files that are not ours stay, and so do the recipe and the card if they were edited. Where the weights change, the
    formats that were made from the old ones are deleted.

    Args:
        formats: functions that make more files of the network in its directory.
        note: function that takes a line on each edited file that stays.

    Raises:
        UsageError: the directory cannot be written to, or a format cannot be made.
    """
    try:
        before = read(folder)
        digests, why = before.config[SECTION].get(DIGESTS), "stays as it was edited"
        if digests is None:
            digests = {name: _digest(text) for name, text in render(before).items()}
            why = "stays as it is: it was edited, or another version wrote it"
        with _aside(folder.absolute().parent) as aside:
            made = aside / network.name
            _fill(made, network, formats)
            for name in (RECIPE, CARD):
                there = folder / name
                # What is no UTF-8 was edited, too.
                if there.exists() and _digest(there.read_text(encoding="utf-8", errors="replace")) != digests[name]:
                    (made / name).unlink()
                    note(f"{there}: {why}")
            if _images_of(network) != _images_of(before):
                _link_again(network, folder.absolute().parent, aside, note)
            _merge(made, folder, stale=() if _same_outputs(before, network) else (CLASSES, *FILES))
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _images_of(network: Exported) -> tuple[Any, ...]:
    """Where a network's images are, and what its recipe says of them."""
    return network.data.source, network.config[SECTION].get(IMAGES)


def _link_again(network: Exported, parent: Path, aside: Path, note: Note) -> None:
    """Make the folder of links that a network's recipe needs, if there is none; no reason to lose its weights."""
    try:
        for name, files in _splits([network], parent).items():
            _put_links(parent / name, files, aside, note)
    except OSError as error:
        note(
            f"warning: {network.name}: the links to its images that {RECIPE} names cannot be made "
            f"({error.strerror or error})"
        )


def _same_outputs(one: Exported, other: Exported) -> bool:
    """Whether two networks give the same answers, under the same names."""
    told = [
        (network.classes, *(network.config["pretrained_cfg"].get(name) for name in ("mean", "std", "input_size")))
        for network in (one, other)
    ]
    return told[0] == told[1] and _same(one.weights, other.weights)


def _same(one: Mapping[str, Tensor] | None, other: Mapping[str, Tensor] | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


_ASIDE = ".export-"


@contextlib.contextmanager
def _aside(parent: Path) -> Iterator[Path]:
    """A temporary folder on the same file system, so that its files can be renamed into their places."""
    with tempfile.TemporaryDirectory(dir=parent, prefix=_ASIDE) as aside:
        yield Path(aside)


def _fill(folder: Path, network: Exported, formats: Formats) -> None:
    folder.mkdir()
    for name, text in render(network).items():
        # A folder's name may hold bytes that are no text.
        (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    if network.weights is not None:
        # `save_file` would make a file that no other user may read.
        (folder / WEIGHTS).write_bytes(save(network.weights, metadata={"format": "pt"}))
    for make in formats:
        make(network, folder)


def _merge(made: Path, place: Path, stale: Sequence[str]) -> None:
    """Rename files into an existing directory, the configuration last; `stale` files that were not made are deleted."""
    for name in stale:
        if not (made / name).exists():
            (place / name).unlink(missing_ok=True)
    for path in sorted(made.iterdir(), key=lambda path: path.name == CONFIG):
        os.replace(path, place / path.name)


def read(folder: Path) -> Exported:
    """Read an exported directory.

    Raises:
        UsageError: the folder is no exported directory, or is damaged, or a weight is NaN or infinite.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such directory")
    path = folder / CONFIG
    try:
        # Editors on Windows begin files with a byte-order mark.
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UsageError(f"{folder}: holds no {CONFIG}, so it is no exported network") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read ({unreadable(path, error)})") from error
    try:
        network = Exported(config, _read_weights(folder / WEIGHTS))
        section = config[SECTION]
        if network.arch.arch_id != section["arch_id"]:
            raise ValueError("its arch_id is that of another architecture")
        if not network.name.isidentifier():
            raise ValueError(f"its name {network.name!r} is no Python identifier")
        # These fields are read elsewhere.
        _ = network.deployment, float(section["latency"]["median_ms"]), dict(section["latency"]["device"])
        ArchSpec.from_json(json.dumps(section["latency"]["anchor"]["arch_spec"]))
        render(network)
        network.build()
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError, TemplateError) as error:
        raise UsageError(f"{path}: damaged, or not one that `export` wrote ({message_line(error)})") from error
    return network


def _read_weights(path: Path) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError

    if not path.exists():
        return None
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({unreadable(path, error)})") from error
    require_finite(weights, str(path))
    return weights


def trained(
    network: Exported, checkpoint: Path, classes: Sequence[str] | None = None, note: Note = lambda line: None
) -> Exported:
    """A network with the weights of a checkpoint of timm's; the averaged ones (EMA), if it has them.

    The names of its classes are the given ones, else those of the folder that the checkpoint was trained on, if that is
    here, else those that the network had.

    Args:
        classes: names of the outputs, in their order.
        note: function that takes a line on where the names come from, or that they are not known.

    Raises:
        UsageError: the file cannot be read, or holds another network's weights, or a weight is NaN or infinite; or
            there are not as many names as outputs.
    """
    from timm.models import load_state_dict

    # timm would refuse it, too, but in other words.
    if not checkpoint.is_file():
        raise UsageError(f"--checkpoint {checkpoint}: no such file")
    try:
        loaded = dict(load_state_dict(str(checkpoint), use_ema=True))
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in loaded.items()}
        count = int(weights["classifier.weight"].shape[0])
    except Exception as error:  # a file that is no checkpoint may raise anything
        reason = unreadable(checkpoint, error)
        raise UsageError(f"--checkpoint {checkpoint}: holds no weights of a network ({reason})") from error
    require_finite(weights, f"--checkpoint {checkpoint}")
    config: dict[str, Any] = json.loads(json.dumps(network.config))
    for part in (config, config["model_args"], config["pretrained_cfg"]):
        part["num_classes"] = count
    config.pop("label_names", None)
    if names := _names(network, checkpoint, count, classes, note):
        config["label_names"] = names
    config[SECTION]["weights"] = checkpoint.name
    # They are of other weights.
    config[SECTION].pop(TRAINED, None)
    network = Exported(config, weights)
    try:
        network.build()
    except RuntimeError as error:
        # torch names the first difference in the second line.
        words = message_line(error, 1)
        raise UsageError(f"--checkpoint {checkpoint}: holds another network's weights ({words})") from error
    return network


def _names(
    network: Exported, checkpoint: Path, count: int, classes: Sequence[str] | None, note: Note
) -> list[str]:  # fmt: skip
    """The names of a checkpoint's outputs; empty where they are not known.

    Raises:
        UsageError: there are not as many given names as outputs.
    """
    if classes is not None:
        if len(classes) != count:
            raise UsageError(f"--classes: {len(classes)} names, but {checkpoint} has {count} outputs")
        return list(classes)
    folder, names = trained_on(checkpoint), list[str]()
    with contextlib.suppress(UsageError, OSError):
        names = class_names(folder) if folder is not None else []
    if len(names) == count:
        note(f"{network.name}: its {count} classes are named as the folders of {folder}, on which it was trained")
        return names
    if len(network.classes) == count:
        note(
            f"{network.name}: its {count} classes keep their names, those of the images before; if the checkpoint was "
            "trained on other ones, --classes names them"
        )
        return network.classes
    note(f"warning: {network.name}: the names of its {count} classes are not known; --classes FILE gives them")
    return []


def read_names(path: Path) -> list[str]:
    """The names in a file, one a line, or those of the class folders in a folder, which may have splits.

    Raises:
        UsageError: it cannot be read, or holds none.
    """
    try:
        if path.is_dir():
            names = class_names(path)
        else:
            names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UsageError as error:
        # As it is said of the images of a search.
        raise UsageError(f"--classes {str(error).removeprefix('--data ')}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"--classes {path}: cannot be read ({unreadable(path, error)})") from error
    if not names:
        raise UsageError(f"--classes {path}: holds no names")
    return names


def trained_on(checkpoint: Path) -> Path | None:
    """The folder of the training images of a checkpoint of timm's train.py; None where it is not told, or not here."""
    from argparse import Namespace

    try:
        with torch.serialization.safe_globals([Namespace]):
            arguments = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["args"]
        # With these, timm numbers classes in another way.
        if arguments.class_map or "/" in (arguments.dataset or ""):
            return None
        root = Path(arguments.data_dir or arguments.data)
        split = root / str(arguments.train_split)
        found = split if split.is_dir() else root
        return found if found.is_dir() else None
    except Exception:  # a checkpoint of something else may hold anything
        return None
