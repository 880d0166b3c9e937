from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from nas.files import folder_for, no_room, save_tensors, whole
from tests.conftest import Room


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, room: Room) -> None:
    path = tmp_path / "figure.png"
    path.write_text("old")
    with pytest.raises(OSError, match=r"figure\.png'$"), room(4), whole(path) as part:
        part.write_bytes(bytes(5000))
    assert path.read_text() == "old"
    with whole(path) as part:
        assert part.suffix == ".png"
        part.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_does_not_end_torch(tmp_path: Path, room: Room) -> None:
    """torch 2.11 calls `terminate` where it writes itself, or sees that a file does not take all."""
    content = {"images": torch.arange(50_000), "name": "some"}
    path = tmp_path / "data.pt"
    with pytest.raises(OSError, match=r"data\.pt") as caught, room(64):
        save_tensors(content, path)
    assert no_room(caught.value) is caught.value
    assert list(tmp_path.iterdir()) == []
    save_tensors(content, path)
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert torch.equal(loaded["images"], content["images"])
    assert loaded["name"] == "some"


def test_only_folders_that_were_made_for_nothing_are_removed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="no"), folder_for(tmp_path / "there" / "new" / "newer"):
        raise ValueError("no")
    with pytest.raises(ValueError, match="no"), folder_for(tmp_path / "there"):
        raise ValueError("no")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "there"]
    with folder_for(tmp_path / "new"):
        pass
    assert (tmp_path / "new").is_dir()


def test_a_full_disk_is_found_among_the_causes() -> None:
    full = OSError(errno.EDQUOT, "Disk quota exceeded")
    shown = RuntimeError("unexpected pos 704 vs 598")
    # As after `raise ... from None`, which torch is fond of.
    shown.__context__, shown.__suppress_context__ = full, True
    assert no_room(shown) is full
    by_compiler = no_room(RuntimeError(f"g++: fatal error: {os.strerror(errno.ENOSPC)}\ncompilation terminated"))
    assert by_compiler is not None
    assert by_compiler.errno == errno.ENOSPC
    assert no_room(OSError(errno.ENOENT, "No such file")) is None


def test_a_link_stays_a_link_and_a_name_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to(tmp_path / "file.txt")
    long = tmp_path / f"{'x' * 250}.txt"
    for path in (tmp_path / "link.txt", long):
        with whole(path) as part:
            assert part.suffix == ".txt"
            part.write_text("content")
        assert path.read_text() == "content"
    assert (tmp_path / "link.txt").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"link.txt", "file.txt", long.name}
