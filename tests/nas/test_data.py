from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nas.config import DataConfig
from nas.errors import UsageError
from nas.training import clutter, data, facts, images


def make_folder(root: Path, classes: dict[str, int], size: tuple[int, int] = (20, 16), mode: str = "RGB") -> Path:
    """Image files of random pixels, `classes` name -> how many."""
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(root / name / f"{index:03d}.png")
    return root


def load(source: object, **changes: object) -> data.ImageData:
    return data.load(DataConfig(source=str(source), **{"resolution": 16, **changes}))  # type: ignore[arg-type]


# -- the embedded digits -------------------------------------------------------------------------------------------


def test_digits_are_made_from_disjoint_stratified_digits() -> None:
    train, val = clutter.split_digits(0)
    assert len(train.labels) + len(val.labels) == 1797
    both = torch.cat([train.images, val.images]).flatten(1)
    # A few scans are equal to the pixel in the source; none may be on both sides beyond those.
    assert len(both.unique(dim=0)) >= 1790
    for digit in range(10):
        shares = [(part.labels == digit).float().mean().item() for part in (train, val)]
        assert shares[0] == pytest.approx(shares[1], abs=0.01)


def test_digits_are_reproducible_and_seeded() -> None:
    train, _ = clutter.split_digits(0)
    one, labels = clutter.compose(train, 50, 32, seed=1)
    two, _ = clutter.compose(train, 50, 32, seed=1)
    other, _ = clutter.compose(train, 50, 32, seed=2)
    assert one.shape == (50, 3, 32, 32)
    assert one.dtype == torch.uint8
    assert set(labels.tolist()) <= set(range(10))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_clutter_hides_the_digit_from_a_linear_model() -> None:
    """Which reads the bare digits: in clutter it must not, or every network would."""
    from sklearn.linear_model import RidgeClassifier

    train, val = clutter.split_digits(0)
    bare = RidgeClassifier(1.0).fit(train.images.flatten(1).numpy(), train.labels.numpy())
    assert bare.score(val.images.flatten(1).numpy(), val.labels.numpy()) > 0.9
    images, labels = clutter.compose(train, 3000, 32, seed=0)
    val_images, val_labels = clutter.compose(val, 1000, 32, seed=1)
    cluttered = RidgeClassifier(1e4).fit(images.flatten(1).numpy() / 255, labels.numpy())
    assert cluttered.score(val_images.flatten(1).numpy() / 255, val_labels.numpy()) < 0.4


@pytest.mark.parametrize(("variable", "folder"), [("XDG_CACHE_HOME", "convfirst-nas"), ("CONVFIRST_CACHE", "")])
def test_digits_are_cached_whole_and_a_damaged_cache_is_made_again(
    variable: str, folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(data, "DIGITS_TRAIN", 60)
    monkeypatch.setattr(data, "DIGITS_VAL", 40)
    said: list[str] = []
    first = data.load(DataConfig(resolution=16), said.append)
    assert said == ["composing 100 images of 16x16, once: some 0 s"]
    assert (len(first.train_labels), len(first.val_labels)) == (60, 40)
    (cached,) = (tmp_path / folder).iterdir()
    again = data.load(DataConfig(resolution=16), said.append)
    assert len(said) == 1
    assert again.fingerprint == first.fingerprint
    cached.write_bytes(cached.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="made again"):
        repaired = load("digits")
    assert repaired.fingerprint == first.fingerprint
    assert not repaired.flip


def test_a_cache_that_cannot_be_written_costs_a_warning_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(data, "DIGITS_TRAIN", 20)
    monkeypatch.setattr(data, "DIGITS_VAL", 10)
    with pytest.warns(UserWarning, match="not cached|cannot be read"):
        assert len(load("digits").train_labels) == 20


# -- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_of_classes_is_split(tmp_path: Path) -> None:
    root = make_folder(tmp_path, {"cat": 20, "dog": 30})
    loaded = load(root)
    assert loaded.classes == ("cat", "dog")
    assert loaded.train_images.shape == (45, 3, 16, 16)
    assert sorted(loaded.val_labels.tolist()) == [0, 0, 1, 1, 1]
    pictures = torch.cat([loaded.train_images, loaded.val_images]).flatten(1)
    assert len(pictures.unique(dim=0)) == 50
    assert load(root).fingerprint == loaded.fingerprint


def test_train_and_val_folders_are_used_as_they_are(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"cat": 6, "dog": 6})
    make_folder(tmp_path / "val", {"cat": 3, "dog": 2})
    loaded = load(tmp_path)
    assert (len(loaded.train_labels), len(loaded.val_labels)) == (12, 5)
    assert loaded.classes == ("cat", "dog")


def test_hidden_files_and_folders_are_no_images(tmp_path: Path) -> None:
    """Copies in them would stand on both sides of the split, and what a Mac leaves beside each file is no image."""
    make_folder(tmp_path / "train", {"cat": 6, "dog": 6, "cat/.ipynb_checkpoints": 6, ".cache": 2})
    make_folder(tmp_path / "val", {"cat": 3, "dog": 2, ".cache": 2})
    (tmp_path / "train" / "cat" / "._000.png").write_bytes(b"no image")
    loaded = load(tmp_path)
    assert loaded.classes == ("cat", "dog")
    assert (len(loaded.train_labels), len(loaded.val_labels)) == (12, 5)


@pytest.mark.parametrize("names", [("Train", "Val"), ("training", "validation")])
def test_folders_of_the_split_may_be_named_otherwise(tmp_path: Path, names: tuple[str, str]) -> None:
    make_folder(tmp_path / names[0], {"cat": 6, "dog": 6})
    make_folder(tmp_path / names[1], {"cat": 3, "dog": 2})
    loaded = load(tmp_path)
    assert loaded.classes == ("cat", "dog")
    assert (len(loaded.train_labels), len(loaded.val_labels)) == (12, 5)


def test_a_folder_of_test_images_is_no_class(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 6, "dog": 6, "Test/cat": 4, "Test/dog": 4})
    loaded = load(tmp_path)
    assert loaded.classes == ("cat", "dog")
    assert loaded.notes == (f"{tmp_path}: test images, which are only for the final front, from Test",)
    assert loaded.test_images is not None
    assert loaded.test_labels is not None
    assert tuple(loaded.test_images.shape) == (8, 3, 16, 16)
    assert loaded.test_labels.tolist() == [0] * 4 + [1] * 4
    # What is only looked at in the end does not make another study.
    (tmp_path / "Test").rename(tmp_path.parent / "elsewhere")
    without = load(tmp_path)
    assert without.test_images is None
    assert without.fingerprint == loaded.fingerprint


def test_a_test_set_that_cannot_be_used_is_left_out_and_said(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 6, "dog": 6, "test/unknown": 4})
    loaded = load(tmp_path)
    assert loaded.test_images is None
    assert f"{tmp_path}: test is left out: it has the class unknown, which training lacks" in loaded.notes
    (tmp_path / "test" / "unknown").rename(tmp_path / "test" / "cat")
    (tmp_path / "test" / "cat" / "broken.png").write_text("no image")
    loaded = load(tmp_path)
    assert loaded.test_images is None
    assert loaded.notes[-1].startswith(
        f"{tmp_path}: the test images are left out: {tmp_path}/test/cat/broken.png cannot"
    )
    assert facts.class_count(DataConfig(source=str(tmp_path))) == 2


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    """What holds no class folders is no split."""
    make_folder(tmp_path, {"train": 6, "bus": 6, "test": 6, "valid": 6})
    loaded = load(tmp_path)
    assert loaded.classes == ("bus", "test", "train", "valid")
    assert facts.class_count(DataConfig(source=str(tmp_path))) == 4
    assert f"{tmp_path}: train is taken for a class, as it holds no folders of images" in loaded.notes
    assert len(loaded.notes) == 3


def test_what_was_taken_for_what_is_said(tmp_path: Path) -> None:
    make_folder(tmp_path, {"Train/cat": 6, "Train/dog": 6, "valid/cat": 2, "valid/dog": 2, "test/cat": 3, "more": 2})
    assert load(tmp_path).notes == (
        f"{tmp_path}: training images from Train, validation images from valid",
        f"{tmp_path}: test images, which are only for the final front, from test",
        f"{tmp_path}: left out beside Train: more",
    )


def test_a_class_called_train_may_hold_folders(tmp_path: Path) -> None:
    """Of thumbnails, or none at all: most of its images lie outside of them."""
    make_folder(tmp_path, {"bus": 6, "car": 6, "train": 6, "train/more": 2, "valid": 6, "valid/thumbs": 0})
    loaded = load(tmp_path)
    assert loaded.classes == ("bus", "car", "train", "valid")
    assert len(loaded.train_labels) + len(loaded.val_labels) == 26


def test_a_split_may_hold_a_stray_image_and_have_an_empty_namesake(tmp_path: Path) -> None:
    make_folder(tmp_path, {"Train/cat": 6, "Train/dog": 6, "Train": 1, "train": 0, "val/cat": 2, "val/dog": 2})
    loaded = load(tmp_path)
    assert (loaded.classes, len(loaded.train_labels)) == (("cat", "dog"), 12)
    assert f"{tmp_path}: left out: images outside of class folders (1)" in loaded.notes


def test_splits_without_classes_are_no_classes_either(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--data {tmp_path}: train, val: no folders of images in them"):
        load(make_folder(tmp_path, {"train": 6, "val": 6}))


def test_what_was_loaded_is_said(tmp_path: Path) -> None:
    loaded = load(make_folder(tmp_path, {"cat": 20, "dog": 30}))
    assert loaded.summary.startswith("data: 2 classes (cat, dog), 45 training and 5 validation images of 16x16, ")
    assert "16x16, mirrored at random in training; so few" in loaded.summary
    assert "16x16, never mirrored; so few" in load(tmp_path, mirror=False).summary


def test_images_are_resized_and_cropped_to_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = (200, 100, 50)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(2):
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    middle = load(tmp_path, resolution=20).train_images[0]
    assert middle[:, 10, 10].tolist() == [200, 100, 50]
    assert middle.float().mean(dim=(1, 2)).tolist() == [200, 100, 50]


def test_of_too_many_images_a_subset_is_used_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_BYTES", 10 * 3 * 16 * 16)
    monkeypatch.setattr(data, "MAX_VAL_IMAGES", 3)
    loaded = load(make_folder(tmp_path, {"cat": 30, "dog": 30}))
    assert (len(loaded.train_labels), len(loaded.val_labels)) == (10, 3)
    assert len(loaded.notes) == 2
    assert "10 of 54 training images" in loaded.notes[0]


def test_other_images_have_another_fingerprint(tmp_path: Path) -> None:
    one = load(make_folder(tmp_path, {"cat": 4, "dog": 4})).fingerprint
    Image.fromarray(np.zeros((16, 20, 3), np.uint8)).save(tmp_path / "cat" / "000.png")
    assert load(tmp_path).fingerprint != one


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({}, "no images in class subfolders"),
        ({"cat": 0, "dog": 0}, "no images in class subfolders"),
        ({"cat": 5}, "at least 2 are needed"),
        ({"cat": 5, "dog": 0}, "class folder dog holds no image|at least 2"),
        ({"cat": 5, "dog": 1}, "class dog has one image"),
        ({"cat": 5, "dog": 5, "emu": 0}, "class folder emu holds no image"),
    ],
)
def test_folders_that_hold_no_classification(tmp_path: Path, classes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load(make_folder(tmp_path, classes))
    assert f"--data {tmp_path}" in str(caught.value)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK"])
def test_images_that_are_not_rgb_are_refused_by_name(tmp_path: Path, mode: str) -> None:
    make_folder(tmp_path, {"cat": 3, "dog": 3})
    odd = tmp_path / "dog" / "odd.tif"
    Image.new(mode, (16, 16)).save(odd)
    with pytest.raises(UsageError, match=f"odd.tif is not an RGB image .its mode is {mode}.; --to-rgb converts"):
        load(tmp_path)
    assert len(load(tmp_path, to_rgb=True).train_labels) == 5


def test_sixteen_bits_a_channel_keep_their_upper_half(tmp_path: Path) -> None:
    """Pillow would make nearly all of it white."""
    make_folder(tmp_path, {"cat": 3, "dog": 3})
    Image.fromarray(np.full((16, 16), 0x4080, np.uint16)).save(tmp_path / "dog" / "deep.png")
    with pytest.raises(UsageError, match=r"deep.png is not an RGB image .its mode is I.*--to-rgb converts it"):
        load(tmp_path)
    loaded = load(tmp_path, to_rgb=True)
    pictures = torch.cat([loaded.train_images, loaded.val_images])
    assert (pictures == 0x40).flatten(1).all(dim=1).sum() == 1
    assert f"{tmp_path}: images reduced from 16 bits a channel to 8: 1" in loaded.notes


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_of_32_bits_have_no_known_white(mode: str, tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 3, "dog": 3})
    Image.new(mode, (16, 16)).save(tmp_path / "dog" / "deep.tif")
    with pytest.raises(UsageError, match=rf"deep.tif is not an RGB image .its mode is {mode}.*cannot be converted to"):
        load(tmp_path, to_rgb=True)


def black_on_nothing(mode: str) -> Image.Image:
    """A black square on transparency, under which there is black."""
    drawing = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    drawing.paste((0, 0, 0, 255), (4, 4, 12, 12))
    if mode in ("RGBA", "LA"):
        return drawing.convert(mode)
    # In palettes and in grey or RGB without an alpha channel, one value stands for transparency.
    square = np.full((16, 16), 1, np.uint8)
    square[4:12, 4:12] = 0
    image = Image.fromarray(square, "L") if mode == "L" else Image.fromarray(np.stack([square] * 3, axis=-1), "RGB")
    if mode == "P":
        image = Image.fromarray(square, "P")
        image.putpalette([0] * 6)
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_is_transparent_becomes_white(mode: str, tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 3, "dog": 3})
    transparency = {"P": 1, "L": 1, "RGB": (1, 1, 1)}.get(mode)
    extra = {} if transparency is None else {"transparency": transparency}
    black_on_nothing(mode).save(tmp_path / "cat" / "drawing.png", **extra)
    with pytest.raises(UsageError, match=r"drawing.png is not an RGB image .*; --to-rgb converts it"):
        load(tmp_path)
    loaded = load(tmp_path, to_rgb=True)
    pictures = torch.cat([loaded.train_images, loaded.val_images])
    corners = pictures[:, :, :4].flatten(1)
    (drawing,) = pictures[(corners == 255).all(dim=1)]
    assert (drawing[:, 4:12, 4:12] <= 1).all()
    assert f"{tmp_path}: images laid on white where they are transparent: 1" in loaded.notes
    assert "images were laid on white where they are transparent" in loaded.preparation


@pytest.mark.parametrize("mode", [mode for mode in images.CONVERTIBLE if mode not in ("LAB", "HSV", "YCbCr")])
def test_every_mode_becomes_rgb(mode: str) -> None:
    """White stays white: so no mode is inverted, and none is black where they are transparent."""
    white = {"1": 1, "P": 0, "PA": (0, 255), "L": 255, "CMYK": (0, 0, 0, 0)}.get(mode, (255,) * len(mode))
    image = Image.new(mode, (8, 8), white)
    if mode in ("P", "PA"):
        image.putpalette([255] * 3)
    reader = images.ImageReader(DataConfig(source="here", resolution=8, to_rgb=True))
    assert (reader.tensor(image) == 255).all()


def test_images_are_upright(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 3, "dog": 3})
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    # The camera lay on its side: turned by 90 degrees to the right, what is above comes to the right.
    Image.fromarray(pixels).save(tmp_path / "cat" / "photo.png", exif=exif)
    loaded = load(tmp_path)
    pictures = torch.cat([loaded.train_images, loaded.val_images])
    (photo,) = [picture for picture in pictures if (picture[:, :, 8:] == 255).all()]
    assert (photo[:, :, :8] == 0).all()
    assert f"{tmp_path}: images turned upright as their EXIF orientation says: 1" in loaded.notes


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation(orientation: int, tmp_path: Path) -> None:
    """As Pillow turns it; 0 and 9 mean nothing."""
    from PIL import ImageOps

    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    reader = images.ImageReader(DataConfig(source="here", resolution=8))
    with Image.open(tmp_path / "photo.png") as photo:
        expected = torch.from_numpy(np.asarray(ImageOps.exif_transpose(photo)).copy()).permute(2, 0, 1)
    assert torch.equal(reader.read(tmp_path / "photo.png"), expected)
    assert reader.done[images.UPRIGHT] == (2 <= orientation <= 8)


def test_an_orientation_beside_damaged_exif_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which Pillow's own function would write anew, and fail."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg", exif=exif)

    def fails(*_: object, **__: object) -> bytes:
        raise TypeError("a bytes-like object is required")

    monkeypatch.setattr(Image.Exif, "tobytes", fails)
    reader = images.ImageReader(DataConfig(source="here", resolution=8))
    assert reader.read(tmp_path / "photo.jpg").shape == (3, 8, 8)
    assert reader.done[images.UPRIGHT] == 1


def test_a_long_thin_image_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.zeros((1, 20_001, 3), np.uint8)
    pixels[:, 9_980:10_021] = 200
    Image.fromarray(pixels).save(tmp_path / "line.png")
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def seen(image: Image.Image, size: tuple[int, int], *args: object, **options: object) -> Image.Image:
        sizes.append(size)
        return resize(image, size, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", seen)
    reader = images.ImageReader(DataConfig(source="here", resolution=224))
    assert (reader.read(tmp_path / "line.png") == 200).all()
    assert sizes == [(32 * 224, 224)]


def test_what_is_transparent_in_sixteen_bits_becomes_white(tmp_path: Path) -> None:
    deep = np.full((8, 8), 0x8000, np.uint16)
    deep[:4] = 0x0102
    Image.fromarray(deep).save(tmp_path / "deep.png", transparency=0x0102)
    reader = images.ImageReader(DataConfig(source="here", resolution=8, to_rgb=True))
    read = reader.read(tmp_path / "deep.png")
    assert (read[:, :4] == 255).all()
    assert (read[:, 4:] == 0x80).all()
    assert set(reader.done) == {images.EIGHT_BITS, images.ON_WHITE}


@pytest.mark.parametrize("error", [RuntimeError("no AVIF\nmore"), NotImplementedError(), MemoryError()])
def test_whatever_a_reader_of_pillows_raises_the_file_is_named(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path, {"cat": 3, "dog": 3})

    def raises(*_: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", raises)
    with pytest.raises(
        UsageError, match=r"6 images cannot be used: .*/cat/000.png cannot be read as an image"
    ) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_all_damaged_images_are_named_at_once(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 3, "dog": 3})
    (tmp_path / "cat" / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(UsageError, match=rf"--data {tmp_path}: {tmp_path}/cat/broken\.jpg cannot be read as an image"):
        load(tmp_path)
    # A PNG whose chunk is damaged, which is a SyntaxError to Pillow; half a PNG; and a file that Git has left out.
    whole = bytearray((tmp_path / "dog" / "000.png").read_bytes())
    whole[50] ^= 255
    (tmp_path / "cat" / "chunk.png").write_bytes(whole)
    whole = bytearray((tmp_path / "cat" / "000.png").read_bytes())
    (tmp_path / "cat" / "000.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "dog" / "lfs.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UsageError) as caught:
        load(tmp_path)
    line = str(caught.value)
    assert "\n" not in line
    assert f"--data {tmp_path}: 4 images cannot be used: " in line
    for name in ("cat/000.png", "cat/broken.jpg", "cat/chunk.png", "dog/lfs.png"):
        assert f"{tmp_path}/{name} cannot be read as an image" in line
    assert "it is Git LFS's pointer" in line
    # Together with what is whole but not RGB.
    Image.new("L", (16, 16)).save(tmp_path / "cat" / "grey.png")
    with pytest.raises(UsageError, match=r"5 images cannot be used: .*grey.png is not an RGB image .*; --to-rgb"):
        load(tmp_path)
    (tmp_path / "cat" / "grey.png").unlink()
    for index in range(20):
        (tmp_path / "dog" / f"empty{index:02d}.png").touch()
    with pytest.raises(UsageError, match=r"24 images cannot be used: .*; and 14 more"):
        load(tmp_path)


# -- what is left out ----------------------------------------------------------------------------------------------


def test_links_are_followed(tmp_path: Path) -> None:
    """Data sets are often put together of links to folders and files that lie elsewhere."""
    make_folder(tmp_path / "store", {"cats": 6, "more": 3, "dogs": 6})
    root = tmp_path / "linked"
    (root / "dog").mkdir(parents=True)
    (root / "cat").symlink_to(tmp_path / "store" / "cats")
    (tmp_path / "store" / "cats" / "more").symlink_to(tmp_path / "store" / "more")
    for path in (tmp_path / "store" / "dogs").iterdir():
        (root / "dog" / path.name).symlink_to(path)
    # A link to what is above it would have no end.
    (root / "dog" / "all").symlink_to(root)
    (root / "dog" / "gone.png").symlink_to(tmp_path / "nowhere")
    (root / "dog" / "itself").symlink_to(root / "dog" / "itself")
    # This one may have been a class.
    (root / "emu").symlink_to(tmp_path / "nowhere")
    loaded = load(root)
    assert len(loaded.train_labels) + len(loaded.val_labels) == 15
    assert set(loaded.notes[0].removeprefix(f"{root}: left out: ").split(", ")) == {
        "links to a folder that holds them (1)", "broken links (3)",
    }  # fmt: skip


def test_files_that_pillow_reads_are_images_and_others_are_counted(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 3, "dog": 3})
    for name in ("a.jfif", "b.pgm", "c.tga", "d.JPE"):
        kind = {"a.jfif": "JPEG", "b.pgm": "PPM", "d.JPE": "JPEG"}.get(name)
        Image.new("RGB" if kind == "JPEG" or name == "c.tga" else "L", (16, 16)).save(tmp_path / "cat" / name, kind)
    for name in ("notes.txt", "more.txt", "labels.csv", "README", ".DS_Store"):
        (tmp_path / "dog" / name).touch()
    Image.new("RGB", (16, 16)).save(tmp_path / "lost.png")
    loaded = load(tmp_path, to_rgb=True)
    assert len(loaded.train_labels) + len(loaded.val_labels) == 10
    assert set(loaded.notes[0].removeprefix(f"{tmp_path}: left out: ").split(", ", 2)) >= {
        "hidden files and folders (1)", "images outside of class folders (1)",
    }  # fmt: skip
    assert "files that are no images (4: .txt 2, " in loaded.notes[0]
    assert any("timm's folders leave out .jfif, .jpe, .pgm, .tga" in line for line in loaded.preparation)


def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read all, so the refusal is the system's in words only."""
    make_folder(tmp_path, {"cat": 3, "dog/more": 3})
    scandir = os.scandir

    def refusing(path: Path) -> object:
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UsageError, match=f"--data {tmp_path}: {tmp_path}/dog/more cannot be read .Permission denied"):
        load(tmp_path)


def test_a_class_without_validation_images_is_said(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train/cat": 3, "train/dog": 3, "train/emu": 3, "val/cat": 3, "val/dog": 3, "val/emu": 0})
    loaded = load(tmp_path)
    assert f"{tmp_path}: val holds no image of emu" in loaded.notes
    assert any("lacks emu" in line for line in loaded.preparation)


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path: Path) -> None:
    """A Mac writes an accented letter as two characters, Linux as one."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    make_folder(tmp_path / "train", {composed: 3, decomposed: 2, "bar": 5})
    make_folder(tmp_path / "val", {decomposed: 2, "bar": 2})
    loaded = load(tmp_path)
    assert loaded.classes == ("bar", decomposed)
    assert loaded.train_labels.tolist().count(1) == 5
    assert loaded.val_labels.tolist().count(1) == 2
    # To timm they are two.
    assert any("spell a class with other accents" in line for line in loaded.preparation)
    # The first reading takes names as they are.
    (tmp_path / "val" / composed).mkdir()
    assert load(tmp_path, reading=1).classes == ("bar", decomposed, composed)


def test_reading_many_images_shows_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PROGRESS_SECONDS", 0.0)
    said: list[str] = []
    data.load(DataConfig(source=str(make_folder(tmp_path, {"cat": 4, "dog": 4})), resolution=16), said.append)
    assert said[0] == "1 of 8 images were read"
    assert said[-1] == "8 of 8 images were read"


# -- order and readings --------------------------------------------------------------------------------------------


def test_classes_are_numbered_as_timm_numbers_them(tmp_path: Path) -> None:
    from timm.data import create_dataset

    # The last but one has its accent in a character of its own, and so comes before the last.
    names = [
        "2",
        "10",
        "apple",
        "Banana",
        "x9y",
        "x10y",
        "\u00e9t\u00e9",
        "Zebra",
        "_",
        "1a",
        "1B",
        "cafe\u0301",
        "cafz",
    ]
    loaded = load(make_folder(tmp_path, dict.fromkeys(names, 2)))
    assert loaded.classes != tuple(sorted(names))
    dataset = create_dataset("", root=str(tmp_path), split="train")
    assert not any("rename" in line for line in loaded.preparation)
    assert {name: label for label, name in enumerate(loaded.classes)} == dataset.reader.class_to_idx


def test_the_first_reading_stays_what_it_was(tmp_path: Path) -> None:
    make_folder(tmp_path, {"2": 6, "10": 6, "test": 6})
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "2" / "drawing.png")
    (tmp_path / "2" / "photo.jfif").write_bytes(b"no image")
    loaded = load(tmp_path, reading=1, to_rgb=True)
    assert loaded.classes == ("10", "2")
    assert len(loaded.train_labels) + len(loaded.val_labels) == 13
    pictures = torch.cat([loaded.train_images, loaded.val_images])
    assert (pictures.flatten(1) == 0).all(dim=1).sum() == 1


def test_a_class_of_the_validation_images_that_training_has_not(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"cat": 3, "dog": 3})
    make_folder(tmp_path / "val", {"cat": 3, "emu": 3})
    with pytest.raises(UsageError, match="val has the class emu"):
        load(tmp_path)


# -- torchvision and timm ------------------------------------------------------------------------------------------


def make_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small CIFAR-10 in the layout of the official files, their checksums waived."""
    from torchvision import datasets

    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        labels = [index % 10 for index in range(40)]
        pixels = rng.integers(0, 256, (40, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    names = [f"class{i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda _: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)


def test_cifar_in_its_official_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar10(tmp_path, monkeypatch)
    loaded = load("cifar10", resolution=32, data_dir=str(tmp_path))
    assert len(loaded.classes) == 10
    # 200 training images, of which a tenth of each class is held out; the test file is not touched.
    assert (len(loaded.train_labels), len(loaded.val_labels)) == (180, 20)
    assert loaded.val_labels.bincount().tolist() == [2] * 10
    assert loaded.flip


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_that_is_not_there_names_the_flags(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=rf"--data {name}: .*--data-dir {tmp_path}.*--download fetches them"):
        load(name, data_dir=str(tmp_path))
    assert not os.listdir(tmp_path)


def test_any_name_of_timms_create_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar10(tmp_path, monkeypatch)
    loaded = load("torch/cifar10", resolution=24, data_dir=str(tmp_path))
    assert loaded.train_images.shape == (180, 3, 24, 24)
    assert len(loaded.classes) == 10


def make_mnist(folder: Path, count: int = 40) -> None:
    """A small MNIST in the layout of the official files: big-endian headers, then bytes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("train", "t10k"):
        pixels, labels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
        header = np.array([0x803, count, 28, 28], ">i4").tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(np.array([0x801, count], ">i4").tobytes() + labels.tobytes())


@pytest.mark.parametrize(
    ("name", "folder", "flip"), [("mnist", "MNIST", False), ("fashion_mnist", "FashionMNIST", True)]
)
def test_data_whose_labels_are_a_tensor(tmp_path: Path, name: str, folder: str, flip: bool) -> None:
    """Of which `or` asks for one truth value; and a mirrored 2 is no 2, but a mirrored shirt is one."""
    make_mnist(tmp_path / folder / "raw")
    loaded = load(f"torch/{name}", resolution=28, data_dir=str(tmp_path))
    assert loaded.train_images.shape == (30, 3, 28, 28)
    assert sorted(loaded.val_labels.tolist()) == list(range(10))
    assert loaded.flip == flip


@pytest.mark.parametrize("name", ["torch/nosuch", "hfds/nosuch", "torch/cifar10"])
def test_names_that_timm_cannot_open(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"--data {name}: .*timm's create_dataset cannot open it") as caught:
        load(name, data_dir=str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nosuch", "nosuch/folder", "./nosuch/folder", "/nosuch/folder", "Digits"])
def test_unknown_data(tmp_path: Path, name: str) -> None:
    """Also where --data-dir holds images, which timm would open under any name."""
    make_folder(tmp_path, {"cat": 6, "dog": 6})
    with pytest.raises(UsageError, match=f"--data {name}: (not digits|no such folder)"):
        load(name, data_dir=str(tmp_path))


# -- what is derived -----------------------------------------------------------------------------------------------


def test_mean_and_deviation_are_those_of_all_images_or_of_an_even_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (100, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(100) % 2

    def mean_std() -> tuple[torch.Tensor, torch.Tensor]:
        return data.ImageData(images, labels, images, labels, ("a", "b"), False).mean_std

    everything = images.float() / 255
    torch.testing.assert_close(mean_std(), (everything.mean(dim=(0, 2, 3)), everything.std(dim=(0, 2, 3))))
    monkeypatch.setattr(data, "MEAN_VALUES", 30 * 3 * 8 * 8)
    sample = everything[::4]
    torch.testing.assert_close(mean_std(), (sample.mean(dim=(0, 2, 3)), sample.std(dim=(0, 2, 3))))


def test_names_that_timms_class_map_cannot_hold_are_told(tmp_path: Path) -> None:
    loaded = load(make_folder(tmp_path, {"cat": 3, "a\nb": 3, "d ": 3}))
    assert any("timm's class map cannot hold class names such as" in line for line in loaded.preparation)
    assert "\n" not in loaded.summary


def test_a_name_that_timm_cannot_sort_has_a_place(tmp_path: Path) -> None:
    assert load(make_folder(tmp_path, {"\u00b2": 3, "b": 3, "10": 3})).classes == ("10", "b", "\u00b2")
