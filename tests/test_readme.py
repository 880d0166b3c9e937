"""The README's walk from photos to a classifier, with its own commands, a tiny budget and a short training."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def walk() -> str:
    """The first block of commands after the marker `<!-- walk -->`."""
    found = re.search(r"<!-- walk -->\n```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_walk_leads_from_photos_to_names() -> None:
    commands = walk()
    assert [re.search(r"run_search\.py (\S+)", line)[1] for line in commands.splitlines() if "run_search" in line] == [  # type: ignore[index]
        "--data", "recommend", "train",
    ]  # fmt: skip
    assert "classify.py" in commands.splitlines()[-1]


def test_of_several_exports_the_walk_takes_the_latest(tmp_path: Path) -> None:
    for number, name in enumerate(("convfirst_2ms_t003", "convfirst_1ms_t001", "convfirst_3ms_t002")):
        (tmp_path / "exports" / name).mkdir(parents=True)
        (tmp_path / "exports" / name / "classify.py").write_text("import sys; print(*sys.argv)")
        # The first one of the three was exported and not trained, and one was trained before the other.
        if number:
            (tmp_path / "exports" / name / "model.onnx").touch()
            os.utime(tmp_path / "exports" / name / "model.onnx", (1e9 - number, 1e9 - number))
    (tmp_path / "photos" / "val" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "val" / "cat" / "0006.jpg").touch()
    environment = {**os.environ, "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    done = subprocess.run(
        ["bash", "-euc", walk().splitlines()[-1]], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout == "exports/convfirst_1ms_t001/classify.py photos/val/cat/0006.jpg\n"


@pytest.mark.slow
def test_the_walk_runs_as_it_stands_there(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 60), ("val", 20)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (40, 48, 3)) + 120 * label
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / split / name / f"{number:04d}.jpg")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "run_search.py").symlink_to(ROOT / "run_search.py")
    commands, changed = walk(), 0
    # Only the amount of work is changed.
    for words, fewer in (("--budget 40", "--budget 3"), (r"--hours [\d.]+", "--epochs 2 --lr 0.003")):
        commands, count = re.subn(words, fewer, commands)
        changed += count
    assert changed == 2
    environment = {**os.environ, "CONVFIRST_LOCKS": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-euxc", commands], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "recommended: trial " in done.stdout
    assert re.search(r"^exports/convfirst_\w+: accuracy ", done.stdout, re.MULTILINE)
    named = [line for line in done.stdout.splitlines() if line.startswith("photos/val/")]
    assert len(named) == 2
    assert all(re.match(r"photos/val/\S+: (cat|dog) \d+\.\d%, (cat|dog) \d+\.\d%$", line) for line in named)
