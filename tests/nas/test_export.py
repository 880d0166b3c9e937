"""Exported directories: what is in them, that they come back, and that none is ever half there."""

from __future__ import annotations

import argparse
import codecs
import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_dataset
from torch import Tensor
from typer.testing import CliRunner

from nas.cli.app import app
from nas.config import SearchConfig
from nas.errors import UsageError
from nas.export import directories as export
from nas.export import formats
from nas.export.directories import (
    Exported,
    chosen,
    of_study,
    read,
    render,
    rewrite,
    write,
)
from nas.export.selection import Selection
from nas.lab.invented import FakeEvaluator
from nas.recommendation import directory_name
from nas.recorded import RecordedStudy
from nas.search import loop as search
from nas.training import data as image_data
from nas.training import recipe as recipes
from nas.training.data import split_files
from nas.training.recipe import regularisation
from nas.training.weights import Images, Trained, Weights, require_finite, weight_folder
from search_spaces import ArchSpec
from studies import Candidate, CandidateState, Owner, Store
from tests.conftest import LFS_POINTER
from tests.nas.conftest import archs, study_id

IMAGES = Images(("dark", "bright"), 16, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
# Of timm 1.0's train.py, which its wheel does not hold: what it takes of a YAML file, as far as a recipe may want it.
TRAIN_OPTIONS = {
    "data_dir", "train_split", "val_split",
    "model", "num_classes", "input_size", "img_size", "crop_pct", "interpolation", "batch_size",
    "validation_batch_size", "channels_last", "grad_accum_steps", "device", "amp", "amp_dtype", "opt", "opt_eps",
    "opt_betas", "momentum", "weight_decay", "clip_grad", "clip_mode", "layer_decay", "sched", "sched_on_updates",
    "lr", "lr_base", "lr_base_size", "lr_base_scale", "warmup_lr", "min_lr", "epochs", "epoch_repeats",
    "warmup_epochs", "warmup_prefix", "cooldown_epochs", "scale", "ratio", "hflip", "vflip", "color_jitter", "aa",
    "aug_repeats", "aug_splits", "bce_loss", "reprob", "remode", "recount", "mixup", "cutmix", "mixup_prob",
    "mixup_switch_prob", "mixup_mode", "mixup_off_epoch", "smoothing", "train_interpolation", "drop", "drop_path",
    "model_ema", "model_ema_decay", "model_ema_warmup", "seed", "log_interval", "checkpoint_hist", "workers",
    "pin_mem", "output", "experiment", "eval_metric",
}  # fmt: skip


def exported(store: Store, config: SearchConfig, **selection: Any) -> list[Exported]:
    recorded = RecordedStudy.open(store, config.study)
    return of_study(recorded, config.storage, chosen(recorded, Selection(**selection)))


def links(config: SearchConfig) -> str:
    """The name of the folder of links to the images."""
    return f".split_{image_data.load(config.data).fingerprint}"


def keep_weights(store: Store, config: SearchConfig, number: int) -> dict[str, Tensor]:
    arch = archs(config, 4)[number]
    torch.manual_seed(number)
    network = arch.build(2)
    Weights(weight_folder(config.storage), study_id(store, config)).keep_better(
        number, arch.arch_id, 0.5, Trained.of(network, IMAGES)
    )
    return network.state_dict()


# -- Which ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "numbers"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top": 2}, [2, 3]),
        ({"max_latency_ms": 2.5}, [0, 1]),
        ({"min_accuracy": 0.6}, [1, 2, 3]),
        ({"max_latency_ms": 3.0, "min_accuracy": 0.6, "top": 1}, [2]),
        ({"trials": (3, 1)}, [1, 3]),
        ({"trials": (3, 1), "top": 1}, [3]),
    ],
)
def test_a_selection(store: Store, config: SearchConfig, selection: dict[str, Any], numbers: list[int]) -> None:
    """Of (accuracy, ms): (.5, 1), (.6, 2), (.7, 3), (.8, 4)."""
    assert [each.config["convfirst"]["study"]["trial"] for each in exported(store, config, **selection)] == numbers


def fail_a_candidate(store: Store, config: SearchConfig) -> int:
    me = Owner.me()
    store.ownership.claim(study_id(store, config), me)
    arch = archs(config, 5)[4]
    trial_id = store.optuna_storage.create_new_trial(study_id(store, config))
    number = store.optuna_storage.get_trial_number_from_id(trial_id)
    candidate = Candidate(
        trial_id=trial_id, study_id=study_id(store, config), number=number, arch_id=arch.arch_id, arch=arch.to_json(),
        summary=str(arch), params=1, macs=1, state=CandidateState.FAILED, reason="out of memory", seed=0,
        total_seconds=1.0, latencies=[],
    )  # fmt: skip
    store.add_candidate(candidate, me)
    store.ownership.release(study_id(store, config), me)
    return number


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ({"trials": (9,)}, "--trial 9: there is no such candidate"),
        ({"trials": (4,)}, r"--trial 4: is not complete but failed \(out of memory\)"),
        ({"max_latency_ms": 0.5}, "--max-latency-ms 0.5: the fastest takes 1 ms"),
        ({"min_accuracy": 0.9}, "--min-accuracy 0.9: the best has 0.8000"),
        ({"max_latency_ms": 2.0, "min_accuracy": 0.8}, "--min-accuracy 0.8: the best has 0.6000"),
    ],
)
def test_nothing_to_export_is_refused(
    store: Store, config: SearchConfig, selection: dict[str, Any], words: str
) -> None:
    assert fail_a_candidate(store, config) == 4
    with pytest.raises(UsageError, match=words):
        exported(store, config, **selection)


@pytest.mark.parametrize(
    ("table", "column", "old", "new", "words"),
    [
        ("convfirst_candidates", "arch", '"silu"', '"swiglu"', "activation='swiglu' is none of"),
        ("convfirst_candidates", "arch", '"stages"', '"branches"', "stages"),
        ("convfirst_studies", "config", '"threads"', '"strands"', "strands"),
    ],
)
def test_a_study_of_another_version_is_told(
    store: Store, config: SearchConfig, table: str, column: str, old: str, new: str, words: str
) -> None:
    with store.engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (old, new))
    with pytest.raises(UsageError, match=f"--study convfirst: holds what this version does not know .*{words}") as told:
        exported(store, config)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("fields", [{"top": 0}, {"max_latency_ms": -1.0}, {"min_accuracy": float("nan")}])
def test_impossible_selections(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is not (at least|between 0 and 1)"):
        Selection(**fields)


# -- What is in a directory ------------------------------------------------------------------------------------------


def test_a_directory_without_weights(store: Store, config: SearchConfig, tmp_path: Path) -> None:
    (network,) = exported(store, config, trials=(2,))
    (folder,) = write([network], tmp_path / "out")
    assert folder == tmp_path / "out" / "convfirst_3ms_t002"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "README.md", "classify.py", "train.yaml", "convfirst_3ms_t002.py",
    }  # fmt: skip
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, links(config)}
    again = read(folder)
    assert again.config["convfirst"].pop("digests").keys() == {"README.md", "train.yaml"}
    assert again.config == network.config
    assert again.weights is None
    assert again.arch == archs(config, 4)[2]
    # What was measured, where, and of which study comes back, exactly.
    assert again.deployment == config.latency
    section = again.config["convfirst"]
    assert section["arch_id"] == archs(config, 4)[2].arch_id
    assert section["latency"]["median_ms"] == 3.0
    assert section["study"]["name"] == config.study
    assert section["study"]["storage"] == config.storage
    # By default the deployment's classes and images are those of the network.
    assert (again.num_classes, again.resolution) == (2, 16)
    card = (folder / "README.md").read_text()
    assert "There are no weights here yet" in card
    assert "**3 ms**" in card
    assert "70.00 % on held-out images" in card
    assert str(again.arch) in card
    assert "{{" not in card


def test_timm_keeps_what_matters_through_training_and_publishing(
    store: Store, config: SearchConfig, tmp_path: Path
) -> None:
    (network,) = exported(store, config, trials=(2,))
    (folder,) = write([network], tmp_path / "out")
    model: Any = timm.create_model(f"local-dir:{folder}", num_classes=5)
    timm.models.save_for_hf(model, str(tmp_path / "again"), safe_serialization=True)
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["num_classes"] == 5
    notes = dict(note.removeprefix("convfirst ").split(": ", 1) for note in saved["pretrained_cfg"]["notes"])
    assert notes["arch_id"] == network.arch.arch_id
    assert json.loads(notes["study"])["trial"] == 2
    latency = json.loads(notes["latency"])
    assert latency["median_ms"] == 3.0
    assert latency["deployment"] == network.config["convfirst"]["latency"]["deployment"]


def test_hugging_faces_hub_takes_it(
    store: Store, config: SearchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the upload."""
    uploaded: dict[str, Any] = {}

    class Api:
        def __init__(self, **_: object) -> None:
            pass

        def create_repo(self, repo_id: str, **_: object) -> Any:
            return type("Url", (), {"repo_id": repo_id})

        def file_exists(self, **_: object) -> bool:
            return False

        def upload_folder(self, repo_id: str, folder_path: str, **_: object) -> None:
            uploaded.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()}, repo_id=repo_id)

    monkeypatch.setattr("timm.models._hub.HfApi", Api)
    own = keep_weights(store, config, 1)
    (folder,) = write(exported(store, config, trials=(1,)), tmp_path / "out")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    timm.models.push_to_hf_hub(model, "someone/convfirst", model_config={"convfirst": read(folder).config["convfirst"]})
    assert uploaded["repo_id"] == "someone/convfirst"
    saved = json.loads(uploaded["config.json"])
    assert saved["convfirst"] == read(folder).config["convfirst"]
    assert saved["architecture"] == "convfirst"
    (tmp_path / "model.safetensors").write_bytes(uploaded["model.safetensors"])
    assert all(torch.equal(tensor, own[name]) for name, tensor in load_file(tmp_path / "model.safetensors").items())


def test_kept_weights_are_exported_with_what_they_were_trained_for(
    store: Store, config: SearchConfig, tmp_path: Path
) -> None:
    own = keep_weights(store, config, 3)
    (folder,) = write(exported(store, config, top=1), tmp_path / "out")
    network = read(folder)
    assert network.weights is not None
    assert all(torch.equal(tensor, own[name]) for name, tensor in network.weights.items())
    assert network.config["convfirst"]["weights"] == "proxy"
    assert network.config["label_names"] == ["dark", "bright"]
    cfg = network.config["pretrained_cfg"]
    assert (cfg["mean"], cfg["std"], cfg["crop_pct"]) == ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3], 1.0)
    assert "short proxy training" in (folder / "README.md").read_text()
    # Not for their owner only, as safetensors writes files.
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == (folder / "config.json").stat().st_mode & 0o777
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(model(images), network.build()(images))


def test_weights_of_another_architecture_are_not_taken(store: Store, config: SearchConfig) -> None:
    """The number of a study that was deleted may come round again."""
    arch = archs(config, 4)[0]
    kept = Weights(weight_folder(config.storage), study_id(store, config))
    kept.keep_better(3, arch.arch_id, 0.5, Trained.of(arch.build(2), IMAGES))
    assert exported(store, config, top=1)[0].weights is None


@pytest.mark.parametrize(("params", "resolution"), [(1e5, 32), (5e6, 224), (2e7, 224), (5e7, 32)])
@pytest.mark.parametrize("on_cuda", [False, True])
def test_the_recipe_speaks_train_pys_language(
    store: Store, config: SearchConfig, params: float, resolution: int, on_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    made = regularisation(int(params), resolution)
    monkeypatch.setattr(recipes, "regularisation", lambda *_: made)
    (network,) = exported(store, config, top=1)
    network.config["convfirst"]["accuracy"]["training"]["learning_rate"] = 4e-6
    loaded = yaml.safe_load(render(network)["train.yaml"])
    assert loaded.keys() <= TRAIN_OPTIONS
    assert {key: loaded[key] for key in made} == made
    # Numbers that YAML took for words would reach timm as such.
    assert all(isinstance(loaded[key], float) for key in ("lr", "warmup_lr", "min_lr", "drop_path", "mixup"))
    assert loaded["model"] == "convfirst_4ms_t003"
    # It runs on the machine on which it was written.
    assert loaded["device"] == ("cuda" if on_cuda else "cpu")
    assert loaded["amp"] == on_cuda
    assert 1 <= loaded["warmup_epochs"] <= loaded["epochs"] / 10


def test_the_recipe_validates_on_the_searchs_own_split(store: Store, config: SearchConfig, tmp_path: Path) -> None:
    """Of a folder without validation images, timm's script would validate on the training images."""
    folder = write(exported(store, config, top=1), tmp_path / "out")[0]
    recipe = yaml.safe_load((folder / "train.yaml").read_text())
    root = (folder / recipe["data_dir"]).resolve()
    assert root.parent == (tmp_path / "out").resolve()
    linked = {
        split: sorted(path.resolve() for path in (root / recipe[f"{split}_split"]).rglob("*.png"))
        for split in ("train", "val")
    }
    files = split_files(config.data)
    assert files is not None
    assert linked == {"train": sorted(path.resolve() for path, _ in files.train),
                      "val": sorted(path.resolve() for path, _ in files.val)}  # fmt: skip
    assert not set(linked["train"]) & set(linked["val"])
    for split in ("train", "val"):
        dataset = create_dataset("", str(folder / recipe["data_dir"]), split=recipe[f"{split}_split"])
        assert dataset.reader.class_to_idx == {"bright": 0, "dark": 1}
        assert len(dataset) == len(linked[split])
    # Networks that are exported later share them.
    before = root.stat().st_ino
    write(exported(store, config, trials=(0,)), tmp_path / "out", force=True)
    assert root.stat().st_ino == before


def test_where_there_can_be_no_links_the_split_is_made_otherwise(
    store: Store, config: SearchConfig, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = exported(store, config, trials=(1,))
    # With a number before it, such a name is too long.
    for number in (1, 2, 3):
        shutil.copy(images / "dark" / "0.png", images / "dark" / f"{number}{'x' * 249}.png")
    files = split_files(networks[0].data)
    assert files is not None

    def refuse(*rest: Any, **named: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def made(name: str) -> tuple[list[Path], list[str]]:
        lines: list[str] = []
        write(networks, tmp_path / name, note=lines.append)
        split = tmp_path / name / links_of(networks[0])
        found = sorted(split.glob("train/*/*"), key=lambda path: path.name)
        assert [path.read_bytes() for path in found] == [path.read_bytes() for path, _ in files.train][: len(found)]
        write(networks, tmp_path / name, force=True, note=lines.append)
        return found, lines

    found, lines = made("linked")
    assert len(found) == len(files.train)
    assert all(path.is_symlink() for path in found)
    assert any(len(path.name) == len("0000000.png") for path in found)
    assert not lines
    monkeypatch.setattr(Path, "symlink_to", refuse)
    found, lines = made("hard")
    assert all(path.samefile(each) for path, (each, _) in zip(found, files.train, strict=True))
    assert lines == [
        f"{tmp_path}/hard/{links_of(networks[0])}: hard links to the images, as there can be no symbolic links here"
    ]
    monkeypatch.setattr(os, "link", refuse)
    found, lines = made("copied")
    assert len(found) == len(files.train)
    assert not any(path.samefile(each) for path, (each, _) in zip(found, files.train, strict=True))
    assert ["copies of the images, as there" in line for line in lines] == [True]
    # Of all images, there may be too many for that.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=100))
    found, lines = made("full")
    assert not found
    assert "not made, the copies would fill the disk" in lines[0]


def links_of(network: Exported) -> str:
    return str(network.config["convfirst"]["images"]["links"])


def test_a_folder_with_validation_images_is_named_as_it_is(store: Store, config: SearchConfig, images: Path) -> None:
    (images.parent / "flat").mkdir()
    for name in ("dark", "bright"):
        (images / name).rename(images.parent / "flat" / name)
    for split in ("Train", "valid"):
        shutil.copytree(images.parent / "flat", images / split)
    loaded = yaml.safe_load(render(exported(store, config, top=1)[0])["train.yaml"])
    assert (loaded["data_dir"], loaded["train_split"], loaded["val_split"]) == (str(images), "Train", "valid")
    shutil.rmtree(images)
    # Images that are no longer there are no reason not to export.
    text = render(exported(store, config, top=1)[0])["train.yaml"]
    assert "data_dir" not in yaml.safe_load(text)
    assert "--data-dir path/to/images" in text


def test_a_recipe_does_not_mirror_what_the_search_did_not(store: Store, config: SearchConfig) -> None:
    (network,) = exported(store, config, top=1)
    assert "hflip" not in yaml.safe_load(render(network)["train.yaml"])
    assert "mirrored at random" in render(network)["README.md"]
    network.config["convfirst"]["accuracy"]["data"]["mirror"] = False
    assert yaml.safe_load(render(network)["train.yaml"])["hflip"] == 0.0
    assert "never mirrored" in render(network)["README.md"]


def test_a_card_says_what_timms_loaders_do_otherwise(store: Store, config: SearchConfig, tmp_path: Path) -> None:
    arch = archs(config, 4)[3]
    images = replace(IMAGES, classes=("10", "2"), preparation=("images were laid on white",))
    kept = Weights(weight_folder(config.storage), study_id(store, config))
    kept.keep_better(3, arch.arch_id, 0.5, Trained.of(arch.build(2), images))
    (folder,) = write(exported(store, config, top=1), tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert "- images were laid on white\n" in card
    assert "**It is not the order in which timm numbers such folders**" in card
    assert (folder / "classes.txt").read_text() == "10\n2\n"
    assert "--class-map classes.txt" in card
    # What is no folder, timm's script cannot be pointed at.
    network = read(folder)
    network.config["convfirst"]["accuracy"]["data"]["source"] = "digits"
    assert "--class-map classes.txt" not in render(network)["README.md"]


# -- Whole, or not at all --------------------------------------------------------------------------------------------


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_is_not_empty_wants_force(store: Store, config: SearchConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write(exported(store, config, top=1), out)
    (out / "mine.txt").write_text("mine")
    (out / "convfirst_4ms_t003" / "stale.txt").write_text("stale")
    (out / "convfirst_4ms_t003" / "model.onnx").write_text("of weights that are no longer there")
    before = everything(out)
    with pytest.raises(UsageError, match=r"--out .*out: is not empty \(--force"):
        write(exported(store, config), out)
    assert everything(out) == before
    written = write(exported(store, config), out, force=True)
    assert [path.name for path in written] == [directory_name(ms, number) for number, ms in enumerate((1, 2, 3, 4))]
    after = everything(out)
    assert after["mine.txt"] == b"mine"
    assert "convfirst_4ms_t003/model.onnx" not in after
    # Ours is replaced, file by file: a training may be under way there.
    assert after["convfirst_4ms_t003/stale.txt"] == b"stale"


@pytest.mark.parametrize("there", [False, True])
def test_what_fails_halfway_leaves_nothing(store: Store, config: SearchConfig, tmp_path: Path, there: bool) -> None:
    out = tmp_path / "deep" / "out"
    if there:
        write(exported(store, config, top=1), out)
    before = everything(tmp_path / "deep")

    def failing(network: Exported, folder: Path) -> None:
        (folder / "half").write_text("half")
        if network.config["convfirst"]["study"]["trial"] == 3:
            raise UsageError("--format x: does not work")

    with pytest.raises(UsageError, match="--format x"):
        write(exported(store, config), out, [failing], force=there)
    assert everything(tmp_path / "deep") == before
    assert (tmp_path / "deep").exists() is there
    assert not list(tmp_path.rglob(".export*"))


@pytest.mark.parametrize("there", [False, True])
def test_an_interrupt_leaves_all_or_nothing(
    store: Store, config: SearchConfig, tmp_path: Path, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two directories."""
    out = tmp_path / "deep" / "out"
    if there:
        out.mkdir(parents=True)
    rename, count = os.rename, 0

    def interrupted(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(exported(store, config), out)
    assert list(tmp_path.rglob("convfirst_*")) == []
    assert (tmp_path / "deep").exists() is there
    # What a killed process left behind does not count as content.
    if there:
        (out / ".export-abc").mkdir()
    assert len(write(exported(store, config), out)) == 4


def test_weights_of_a_training_are_not_lost_by_force(store: Store, config: SearchConfig, tmp_path: Path) -> None:
    keep_weights(store, config, 3)
    (folder,) = write(exported(store, config, top=1), tmp_path / "out")
    torch.save({"state_dict": read(folder).arch.build(2).state_dict()}, tmp_path / "best.pth")
    rewrite(folder, export.trained(read(folder), tmp_path / "best.pth"))
    before = everything(tmp_path / "out")
    with pytest.raises(UsageError, match=r"convfirst_4ms_t003: holds the weights of best\.pth; move it away first"):
        write(exported(store, config), tmp_path / "out", force=True)
    assert everything(tmp_path / "out") == before
    # Nor those that somebody put there without a word to the configuration.
    (other,) = write(exported(store, config, trials=(0,)), tmp_path / "other")
    save_file(read(other).build().state_dict(), other / "model.safetensors")
    with pytest.raises(UsageError, match="holds the weights of a training"):
        write(exported(store, config, trials=(0,)), tmp_path / "other", force=True)
    # The proxy's give way.
    keep_weights(store, config, 1)
    (proxy,) = write(exported(store, config, trials=(1,)), tmp_path / "proxy")
    Weights(weight_folder(config.storage), study_id(store, config)).keep_only(())
    write(exported(store, config, trials=(1,)), tmp_path / "proxy", force=True)
    assert not (proxy / "model.safetensors").exists()


def test_what_a_user_edited_stays(store: Store, config: SearchConfig, tmp_path: Path) -> None:
    (folder,) = write(exported(store, config, top=1), tmp_path / "out")
    (folder / "train.yaml").write_text("epochs: 3\n")
    (folder / "output").mkdir()
    (folder / "output" / "last.pth").write_text("a training under way")
    torch.save({"state_dict": read(folder).arch.build(2).state_dict()}, tmp_path / "best.pth")
    notes: list[str] = []
    inode = folder.stat().st_ino
    rewrite(folder, export.trained(read(folder), tmp_path / "best.pth"), note=notes.append)
    assert (folder / "train.yaml").read_text() == "epochs: 3\n"
    assert [Path(note.partition(":")[0]).name for note in notes] == ["train.yaml"]
    assert "those of `best.pth`" in (folder / "README.md").read_text()
    assert (folder / "output" / "last.pth").exists()
    assert folder.stat().st_ino == inode


def test_a_folder_that_cannot_be_written_is_told(store: Store, config: SearchConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write(exported(store, config, top=1), tmp_path / "file" / "out")


# -- Back again ------------------------------------------------------------------------------------------------------


def damage(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        fields = config
        for parent in parents:
            fields = fields[parent]
        if value is None:
            del fields[last]
        else:
            fields[last] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"convfirst": None}, "damaged.*KeyError: 'convfirst'"),
        ({"convfirst": "text"}, "damaged"),
        ({"convfirst__arch_id": "0123456789ab"}, "damaged.*arch_id is that of another"),
        ({"convfirst__arch_spec__stem_width": 9}, "damaged.*stem_width=9"),
        ({"convfirst__latency__deployment__dtype": "int8"}, "damaged.*int8"),
        ({"convfirst__name": "no identifier"}, "damaged.*no Python identifier"),
        ({"pretrained_cfg__input_size": []}, "damaged"),
        ({"convfirst__study": None}, "damaged"),
        ({"convfirst__accuracy": None}, "damaged"),
        ({"convfirst__weights": None}, "damaged"),
        ({"convfirst__latency__anchor": None}, "damaged"),
        ({"convfirst__latency__median_ms": None}, "damaged"),
        ({"convfirst__latency__device": None}, "damaged"),
        ({"num_classes": 3}, "damaged.*Error"),
    ],
)
def test_a_damaged_directory_is_told(
    store: Store, config: SearchConfig, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    keep_weights(store, config, 3)
    (folder,) = write(exported(store, config, top=1), tmp_path / "out")
    damage(folder, **changes)
    with pytest.raises(UsageError, match=words) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def test_what_is_no_export_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        read(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json: cannot be read"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UsageError, match="damaged"):
        read(tmp_path)


def test_damaged_weights_are_told(store: Store, config: SearchConfig, tmp_path: Path) -> None:
    (folder,) = write(exported(store, config, top=1), tmp_path / "out")
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UsageError, match=r"model\.safetensors: cannot be read"):
        read(folder)
    # Of another network.
    save_file(archs(config, 4)[0].build(2).state_dict(), folder / "model.safetensors")
    with pytest.raises(UsageError, match="damaged"):
        read(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(("content", "told"), [(LFS_POINTER, "`git lfs pull` fetches"), ("", "it is empty")])
def test_files_that_were_not_fetched_are_told(
    store: Store, config: SearchConfig, tmp_path: Path, file: str, content: str, told: str
) -> None:
    keep_weights(store, config, 3)
    (folder,) = write(exported(store, config, top=1), tmp_path / "out")
    (folder / file).write_text(content)
    with pytest.raises(UsageError, match=rf"{file}: cannot be read .*{told}") as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_of_bytes_that_are_no_text_is_shown_by_numbers(
    store: Store, config: SearchConfig, tmp_path: Path
) -> None:
    """Classes, too, may have such names: those of folders from an old archive."""
    network = exported(store, config, top=1)[0]
    network.config["convfirst"]["accuracy"]["data"]["source"] = network.config["label_names"] = "caf\udce9"
    (folder,) = write([network], tmp_path / "out")
    assert r"`caf\udce9`" in (folder / "README.md").read_text(encoding="utf-8")
    assert read(folder).config["label_names"] == "caf\udce9"


def test_texts_that_an_editor_wrote_are_read(store: Store, config: SearchConfig, tmp_path: Path) -> None:
    """With a byte-order mark, or not in UTF-8 where nobody but the user minds."""
    (folder,) = write(exported(store, config, top=1), tmp_path / "out")
    text = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(codecs.BOM_UTF8 + text)
    (folder / "README.md").write_bytes("Fran\u00e7ois".encode("latin-1"))
    notes: list[str] = []
    rewrite(folder, read(folder), note=notes.append)
    # timm itself refuses the mark.
    assert (folder / "config.json").read_bytes() == text
    assert (folder / "README.md").read_bytes() == "Fran\u00e7ois".encode("latin-1")
    assert notes == [f"{folder / 'README.md'}: stays as it was edited"]


def test_a_card_of_another_version_is_no_edited_one_without_a_doubt(
    store: Store, config: SearchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a later version would write itself does not matter; before there were digests, nobody can know."""
    (folder,) = write(exported(store, config, top=1), tmp_path / "out")
    (folder / "README.md").write_text("of another template")
    stored = json.loads((folder / "config.json").read_text())
    digests = stored["convfirst"]["digests"]
    digests["README.md"] = export._digest("of another template")
    (folder / "config.json").write_text(json.dumps(stored))
    notes: list[str] = []
    rewrite(folder, read(folder), note=notes.append)
    assert notes == []
    assert "ConvFirst network" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("of another template")
    stored = json.loads((folder / "config.json").read_text())
    del stored["convfirst"]["digests"]
    (folder / "config.json").write_text(json.dumps(stored))
    rewrite(folder, read(folder), note=notes.append)
    assert notes == [f"{folder / 'README.md'}: stays as it is: it was edited, or another version wrote it"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["classifier.bias", "bn1.running_var"])
def test_weights_of_a_training_that_diverged_are_refused_by_name(
    store: Store, config: SearchConfig, tmp_path: Path, value: float, name: str
) -> None:
    """In a checkpoint, in a directory, and among those that the search kept; nothing is written."""
    weights = keep_weights(store, config, 3)
    (folder,) = write(exported(store, config, top=1), tmp_path / "out")
    network = read(folder)
    broken = {key: tensor.clone() for key, tensor in weights.items()}
    broken[name][0] = value
    checkpoint = tmp_path / "best.pth.tar"
    torch.save({"state_dict": broken}, checkpoint)
    told = f"its tensor {name} has NaN or infinite values"
    with pytest.raises(UsageError, match=rf"^--checkpoint .*best\.pth\.tar: {told}"):
        export.trained(network, checkpoint)
    save_file(broken, folder / "model.safetensors")
    with pytest.raises(UsageError, match=rf"model\.safetensors: {told}"):
        read(folder)
    kept = Weights(weight_folder(config.storage), study_id(store, config))
    diverged = network.arch.build(2)
    diverged.load_state_dict(broken)
    kept.keep_better(3, network.arch.arch_id, 0.5, Trained.of(diverged, IMAGES))
    with pytest.raises(UsageError, match=rf"study1_t0003\.safetensors: {told}"):
        exported(store, config, top=1)


def test_weights_of_eight_bits_are_looked_into() -> None:
    require_finite({"a": torch.ones(2).to(torch.float8_e4m3fn), "b": torch.ones(2, dtype=torch.int64)}, "here")
    with pytest.raises(UsageError, match="here: its tensor a has NaN"):
        require_finite({"a": torch.full((2,), float("nan")).to(torch.float8_e4m3fn)}, "here")


@pytest.mark.parametrize("averaged", [False, True])
def test_a_checkpoint_of_timms_training(store: Store, config: SearchConfig, tmp_path: Path, averaged: bool) -> None:
    """As `timm.utils.CheckpointSaver` writes it, of other classes than the search's."""
    keep_weights(store, config, 3)
    (folder,) = write(exported(store, config, top=1), tmp_path / "out")
    (folder / "mine.txt").write_text("mine")
    (folder / "model.onnx").write_text("of the old weights")
    plain, mean = (read(folder).arch.build(5).state_dict() for _ in range(2))
    checkpoint = tmp_path / "model_best.pth.tar"
    torch.save({"epoch": 1, "state_dict": plain} | ({"state_dict_ema": mean} if averaged else {}), checkpoint)
    network = export.trained(read(folder), checkpoint)
    rewrite(folder, network)
    again = read(folder)
    wanted = mean if averaged else plain
    assert again.weights is not None
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.weights.items())
    assert again.num_classes == 5
    assert "label_names" not in again.config
    assert again.config["convfirst"]["weights"] == "model_best.pth.tar"
    assert "those of `model_best.pth.tar`" in (folder / "README.md").read_text()
    # Theirs stays, and what belonged to the old weights goes.
    assert (folder / "mine.txt").read_text() == "mine"
    assert not (folder / "model.onnx").exists()
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, links(config)}
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes == 5


def checkpoint_of(network: Exported, path: Path, classes: int, **arguments: Any) -> Path:
    """A checkpoint as timm's train.py writes it, with its arguments."""
    known = {"data_dir": None, "data": None, "dataset": "", "class_map": "", "train_split": "train"}
    torch.save(
        {"state_dict": network.arch.build(classes).state_dict(), "args": argparse.Namespace(**known | arguments)}, path
    )
    return path


def test_a_checkpoints_weights_are_there_where_no_onnx_file_can_be_made(
    store: Store, config: SearchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (network,) = exported(store, config, trials=(3,))
    (folder,) = write([network], tmp_path / "out")
    path = checkpoint_of(network, tmp_path / "last.pth.tar", 2)

    def fail(*rest: Any, **named: Any) -> None:
        raise UsageError("--format onnx: onnx is not installed")

    monkeypatch.setattr(formats, "write_onnx", fail)
    result = CliRunner().invoke(app, ["export", str(folder), "--checkpoint", str(path), "--format", "onnx"])
    assert result.exit_code == 2
    assert result.output.splitlines()[-2:] == [
        f"{folder}: has the weights of {path} now", "Error: --format onnx: onnx is not installed",
    ]  # fmt: skip
    assert read(folder).config["convfirst"]["weights"] == "last.pth.tar"


def test_the_names_of_a_checkpoints_classes(store: Store, config: SearchConfig, tmp_path: Path) -> None:
    keep_weights(store, config, 3)
    (network,) = exported(store, config, trials=(3,))
    assert network.classes == ["dark", "bright"]
    lines: list[str] = []

    def named(classes: int, names: list[str] | None = None, **arguments: Any) -> list[str]:
        lines.clear()
        path = checkpoint_of(network, tmp_path / "last.pth.tar", classes, **arguments)
        return export.trained(network, path, names, lines.append).classes

    # Given ones come first.
    assert named(3, ["a", "b", "c"]) == ["a", "b", "c"]
    assert not lines
    with pytest.raises(UsageError, match=r"--classes: 2 names, but .*last\.pth\.tar has 3 outputs"):
        named(3, ["a", "b"])
    # Then those of the folder that it was trained on, in timm's order.
    for name in ("img10", "img9", "Img1"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
    assert named(3, data_dir=str(tmp_path / "data")) == ["Img1", "img9", "img10"]
    assert "named as the folders of" in lines[0]
    assert named(3, data=str(tmp_path / "data")) == ["Img1", "img9", "img10"]
    # A folder of splits is looked into, also where the checkpoint names another split.
    for place in ("photos/training/cat", "photos/training/dog", "photos/val/cat"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / place / "0.png")
    assert named(2, data_dir=str(tmp_path / "photos")) == ["cat", "dog"]
    # With these, timm numbers them otherwise.
    for arguments in ({"class_map": "map.txt"}, {"dataset": "hfds/x"}, {"train_split": "other"}):
        assert named(3, data_dir=str(tmp_path / "data"), **arguments) == []
    # Then those that it had, and it says so; else none, and it says that loudly.
    assert named(2) == ["dark", "bright"]
    assert "keep their names" in lines[0]
    assert named(2, data_dir="/not/here") == ["dark", "bright"]
    assert named(5) == []
    assert lines[0].startswith("warning: ")
    assert "--classes FILE gives them" in lines[0]


def test_names_are_read_from_a_file_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\ufeffcat\n\n  dog  \n", encoding="utf-8")
    assert export.read_names(tmp_path / "names.txt") == ["cat", "dog"]
    for name in ("b", "a10", "a9"):
        (tmp_path / "folder" / name).mkdir(parents=True)
    (tmp_path / "folder" / "note.txt").write_text("")
    assert export.read_names(tmp_path / "folder") == ["a9", "a10", "b"]
    # Splits and hidden folders are no classes.
    for place in ("splits/training/b", "splits/training/a", "splits/validation/a", "splits/test/a", "splits/.cache/b"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / place / "0.png")
    assert export.read_names(tmp_path / "splits") == ["a", "b"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare" / "train").mkdir(parents=True)
    for path, told in (
        (tmp_path / "none", "No such file"), (tmp_path / "empty", "holds no names"),
        (tmp_path / "bare", "train: no folders of images in them"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=f"--classes .*: .*{told}"):
            export.read_names(path)


def test_a_network_without_weights_has_the_studys_classes(config: SearchConfig, tmp_path: Path) -> None:
    """A search records them; they are those of the deployment that was timed, where that has as many."""
    for classes, names in ((2, ["dark", "bright"]), (7, [])):
        own = replace(
            config, storage=f"sqlite:///{tmp_path / str(classes)}.db", budget=3, confirm=0,
            latency=replace(config.latency, num_classes=classes),
        )  # fmt: skip
        fake = FakeEvaluator()
        fake.images = IMAGES
        search.run(own, fake)
        opened = Store.open(own.storage, create=False)
        assert opened is not None
        network = exported(opened, own)[0]
        assert (network.weights, network.classes, network.num_classes) == (None, names, classes)
        assert network.config["pretrained_cfg"]["mean"] == ([0.4, 0.5, 0.6] if names else [0.485, 0.456, 0.406])
        (folder,) = write([network], tmp_path / f"out{classes}")
        assert (folder / "classes.txt").exists() == bool(names)
        opened.close()


def test_checkpoints_that_do_not_fit_are_refused(store: Store, config: SearchConfig, tmp_path: Path) -> None:
    network = exported(store, config, top=1)[0]
    checkpoint = tmp_path / "checkpoint.pth"
    with pytest.raises(UsageError, match=r"--checkpoint .*: no such file"):
        export.trained(network, checkpoint)
    for content in ({"epoch": 3}, {"optimizer": {"lr": 1.0}}, {"state_dict": {"classifier.weight": torch.tensor(1.0)}}):
        torch.save(content, checkpoint)
        with pytest.raises(UsageError, match=r"--checkpoint .*: holds no weights of a network"):
            export.trained(network, checkpoint)
    for scalar in ([torch.ones(2)], torch.ones(2), "text"):
        torch.save(scalar, checkpoint)
        with pytest.raises(UsageError, match=r"--checkpoint .*: holds no weights of a network"):
            export.trained(network, checkpoint)
    for text, told in (("", "it is empty"), (LFS_POINTER, "`git lfs pull` fetches")):
        checkpoint.write_text(text)
        with pytest.raises(UsageError, match=rf"--checkpoint .*: holds no weights of a network \(.*{told}"):
            export.trained(network, checkpoint)
    checkpoint.write_text("no checkpoint")
    with pytest.raises(UsageError, match=r"--checkpoint .*: holds no weights of a network"):
        export.trained(network, checkpoint)
    torch.save({"state_dict": replace_stem(network.arch).build(2).state_dict()}, checkpoint)
    with pytest.raises(UsageError, match=r"--checkpoint .*: holds another network's weights") as caught:
        export.trained(network, checkpoint)
    assert "\n" not in str(caught.value)


def replace_stem(arch: ArchSpec) -> ArchSpec:
    return replace(arch, stem_width=arch.stem_width * 2)
