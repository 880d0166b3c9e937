"""Networks by way of timm: its builder, a directory, and a file of their own. All must be the same network."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

import search_spaces  # noqa: F401  registers "convfirst"
from search_spaces import ACTIVATIONS, ArchSpec, SearchSpace, StageSpec, builtin_spaces, load_space
from search_spaces.timm_config import IMAGENET_MEAN, model_args, timm_config
from search_spaces.timm_file import timm_file
from tests.conftest import make_tiny_space

NAME = "convfirst_0p8ms_t042"
CLASSES = 7


def drawn(space: SearchSpace, count: int) -> list[ArchSpec]:
    rng = random.Random(0)
    return [space.sample(rng) for _ in range(count)]


def all_spaces() -> list[SearchSpace]:
    without_stride = make_tiny_space(name="no stride in the stem", stem_stride=(1,), head_width=(0,))
    rung = load_space("rung4@32")
    return [make_tiny_space(), without_stride, rung, *(load_space(name) for name in builtin_spaces())]


ARCHS = [
    pytest.param(arch, id=f"{space.name}{number}")
    for space in all_spaces()
    for number, arch in enumerate(drawn(space, 3))
]


@pytest.fixture
def imported(tmp_path: Path) -> Iterator[Callable[[Path], ModuleType]]:
    """Imports a file as a module, which timm forgets again."""
    names: list[str] = []

    def load(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        names.append(path.stem)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in names:
        del sys.modules[name]
        registry = timm.models._registry
        registry._model_entrypoints.pop(name, None)
        # Overwritten they are, too, and with a warning.
        registry._model_pretrained_cfgs.pop(name, None)


def directory(folder: Path, arch: ArchSpec, resolution: int = 32) -> Path:
    """What is exported, without weights."""
    made = folder / NAME
    made.mkdir()
    config = timm_config(arch, CLASSES, resolution, notes=["a note"], convfirst={"arch_id": arch.arch_id})
    (made / "config.json").write_text(json.dumps(config))
    (made / f"{NAME}.py").write_text(timm_file(NAME, arch, config))
    return made


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("arch", ARCHS)
def test_all_ways_lead_to_one_network(arch: ArchSpec, tmp_path: Path, imported: Callable[[Path], ModuleType]) -> None:
    folder = directory(tmp_path, arch)
    imported(folder / f"{NAME}.py")
    torch.manual_seed(0)
    own = arch.build(CLASSES).eval()
    # Fresh batch norms would hide a mistake in them.
    for module in own.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.running_mean, -1.0, 1.0)
    images = torch.randn(2, 3, 32, 32)
    expected = own(images)
    for model in (
        timm.create_model("convfirst", **model_args(arch), num_classes=CLASSES),
        timm.create_model(f"local-dir:{folder}"),
        timm.create_model(NAME),
    ):
        assert list(shapes(model).items()) == list(shapes(own).items())
        model.load_state_dict(own.state_dict())
        assert torch.equal(model.eval()(images), expected)


@pytest.mark.parametrize(("stages", "activation"), list(zip((1, 2, 3, 4), ACTIVATIONS, strict=True)))
def test_features_of_any_number_of_stages(
    stages: int, activation: str, tmp_path: Path, imported: Callable[[Path], ModuleType]
) -> None:
    each = [StageSpec(16 * (1 + number), 3, 8, 2, 1, 1 if number == 1 else 2) for number in range(stages)]
    arch = ArchSpec(8, tuple(each), activation, 32)
    imported(directory(tmp_path, arch) / f"{NAME}.py")
    model = timm.create_model(NAME, features_only=True, in_chans=4)
    features = model(torch.randn(1, 4, 64, 64))
    assert [feature.shape[1] for feature in features] == model.feature_info.channels()
    assert [64 // feature.shape[2] for feature in features] == model.feature_info.reduction()
    # The last of each resolution: stage 2 has that of stage 1, whose features are not offered.
    reductions = {1: [2, 4], 2: [2, 4], 3: [2, 4, 8], 4: [2, 4, 8, 16]}
    assert model.feature_info.reduction() == reductions[stages]
    last = timm.create_model(NAME, features_only=True, out_indices=(-1,))(torch.randn(1, 3, 64, 64))
    assert [feature.shape[1] for feature in last] == [each[-1].width]


def test_timms_usual_arguments(tmp_path: Path, imported: Callable[[Path], ModuleType]) -> None:
    arch = load_space("small").anchor()
    folder = directory(tmp_path, arch)
    imported(folder / f"{NAME}.py")
    for source in (NAME, f"local-dir:{folder}"):
        model: Any = timm.create_model(
            source, num_classes=3, in_chans=1, drop_path_rate=0.2, pretrained_cfg_overlay={"crop_pct": 0.5}
        )
        assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)
        assert model.pretrained_cfg["crop_pct"] == 0.5
        assert model.pretrained_cfg["mean"] == IMAGENET_MEAN or model.pretrained_cfg["mean"] == list(IMAGENET_MEAN)
        rates = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
        assert max(rates) > 0
        assert timm.create_model(source, num_classes=0)(torch.randn(2, 3, 32, 32)).shape == (2, arch.head_width)
    assert timm.create_model(NAME).num_classes == CLASSES
    # Its benchmark.py adds to this as to a tuple.
    assert timm.create_model(NAME).pretrained_cfg["input_size"] == (3, 32, 32)


@pytest.mark.parametrize("arch", ARCHS[:4])
def test_the_configuration_is_timms_own(arch: ArchSpec, tmp_path: Path) -> None:
    """As the tested version of timm writes it down itself, our part and the notes included."""
    folder = directory(tmp_path, arch)
    model = timm.create_model(f"local-dir:{folder}")
    ours = {"convfirst": {"arch_id": arch.arch_id}}
    save_for_hf(model, str(tmp_path / "again"), model_config=ours, safe_serialization=True)
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == json.loads((folder / "config.json").read_text())
    assert timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True) is not None


def test_what_timm_saves_under_another_name_can_be_built(
    tmp_path: Path, imported: Callable[[Path], ModuleType]
) -> None:
    arch = make_tiny_space().smallest()
    imported(directory(tmp_path, arch) / f"{NAME}.py")
    model = timm.create_model(NAME, num_classes=3).eval()
    save_for_hf(model, str(tmp_path / "saved"), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(again(images), model(images))


def test_weights_beside_the_file_are_its_own(tmp_path: Path, imported: Callable[[Path], ModuleType]) -> None:
    from safetensors.torch import save_file

    arch = make_tiny_space().smallest()
    folder = directory(tmp_path, arch)
    own = arch.build(CLASSES).eval()
    save_file(own.state_dict(), folder / "model.safetensors")
    imported(folder / f"{NAME}.py")
    images = torch.randn(1, 3, 16, 16)
    for source in (NAME, f"local-dir:{folder}"):
        assert torch.equal(timm.create_model(source, pretrained=True).eval()(images), own(images))
    adapted = timm.create_model(NAME, pretrained=True, num_classes=3)
    assert torch.equal(adapted.conv_stem.weight, own.conv_stem.weight)
    features = timm.create_model(NAME, pretrained=True, features_only=True).eval()(images)
    assert torch.equal(features[-1], own.forward_features(images))


# -- In a process of their own -----------------------------------------------------------------------------------------


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("order", ["search_spaces, timm", "timm, search_spaces"])
def test_importing_search_spaces_registers_whenever_timm_comes(order: str) -> None:
    root = Path(__file__).parents[2]
    done = run(root, "-W", "error::UserWarning", "-c", f"import {order}; assert timm.is_model('convfirst')")
    assert done.returncode == 0, done.stderr


def test_importing_search_spaces_imports_no_torch() -> None:
    root = Path(__file__).parents[2]
    code = "import sys, search_spaces; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert run(root, "-c", code).returncode == 0


def test_the_file_needs_timm_alone_and_runs_its_scripts(tmp_path: Path) -> None:
    """The script stands for timm's train.py, which imports nothing of ours."""
    folder = directory(tmp_path, load_space("small").anchor())
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "beside.py").write_text("HERE = 1\n")
    (tmp_path / "scripts" / "train.py").write_text(
        "import argparse, sys, timm\n"
        "import beside\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--model')\n"
        "if __name__ == '__main__':\n"
        "    args = parser.parse_args()\n"
        "    print(parser.prog, timm.create_model(args.model).num_classes, timm.is_model('convfirst'))\n"
        "    sys.exit(3 if 'search_spaces' in sys.modules or 'kernels' in sys.modules else 5)\n"
    )
    done = run(tmp_path, "-W", "error::UserWarning", str(folder / f"{NAME}.py"), "scripts/train.py", "--model", NAME)
    assert done.returncode == 5, done.stderr
    assert done.stdout.split() == ["train.py", str(CLASSES), "True"]
    done = run(tmp_path, str(folder / f"{NAME}.py"), "no_such.py")
    assert done.returncode == 1
    assert done.stderr.startswith("usage: python")
    assert "Traceback" not in done.stderr


def test_file_and_package_do_not_quarrel(tmp_path: Path, imported: Callable[[Path], ModuleType]) -> None:
    folder = directory(tmp_path, make_tiny_space().smallest())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        imported(folder / f"{NAME}.py")
