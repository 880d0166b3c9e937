"""Formats in which a trained network is deployed: ONNX, and torch.export's programs, plain, compiled and fused."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels.fold import fold_batch_norms
from kernels.peers import cudnn_search, inductor_options
from nas.config import cuda_or_warning
from nas.errors import UsageError, message_line
from nas.export.directories import COMPILED, FUSED, ONNX, PROGRAM, SECTION, Exported
from nas.files import no_room
from nas.latency.onnx_graph import INPUT, onnx_graph, quiet
from nas.reporting import Note

# Largest difference of a format's logits from torch's, as a share of the largest logit: float32 is summed in another
# order, and the other two have 16 bits.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class ExportFormat(StrEnum):
    """Values of `export --format`."""

    TIMM = "timm"
    ONNX = "onnx"
    TORCH_EXPORT = "torch-export"


@dataclass(frozen=True)
class Within:
    """What an ONNX file does beside the network.

    Args:
        normalise: whether it takes images of 0 to 1 and normalises them itself.
        softmax: whether it gives probabilities.
    """

    normalise: bool = False
    softmax: bool = False


def makers(
    formats: Sequence[ExportFormat], note: Note, within: Within = Within()
) -> list[Callable[[Exported, Path], object]]:
    """Functions that write a network in these formats into its directory; timm's files are always there.

    Args:
        note: function that takes a line on each file that cannot be made on this machine.
        within: what the ONNX file does beside the network.
    """
    by_format: dict[ExportFormat, Callable[[Exported, Path], object]] = {
        ExportFormat.ONNX: partial(write_onnx, within=within),
        ExportFormat.TORCH_EXPORT: partial(write_programs, note=note),
    }
    return [by_format[each] for each in dict.fromkeys(formats) if each in by_format]


def write_onnx(network: Exported, folder: Path, within: Within = Within()) -> Path:
    """Write `model.onnx`: images (N, 3, H, W) float32 to logits or probabilities (N, classes), for any N.

    Its metadata are JSON values by name: what `onnx_metadata` returns.

    Raises:
        UsageError: there are no weights, a package is missing, or onnxruntime gives other logits than torch.
    """
    _require_weights(network, ExportFormat.ONNX)
    about = onnx_metadata(network, within)
    model = fold_batch_norms(network.build())
    parts = [_normalisation(about["mean"], about["std"])] if within.normalise else []
    parts += [model, *([nn.Softmax(1)] if within.softmax else [])]
    whole = nn.Sequential(*parts).eval() if len(parts) > 1 else model
    return onnx_file(whole, network.resolution, folder / ONNX, about)


def onnx_metadata(network: Exported, within: Within) -> dict[str, Any]:
    """What an ONNX file says of itself: names of the outputs, preparation of its images, and where it comes from."""
    prepared, section = network.config["pretrained_cfg"], network.config[SECTION]
    return {
        "classes": network.classes, "input_size": list(prepared["input_size"]), "mean": list(prepared["mean"]),
        "std": list(prepared["std"]), "interpolation": prepared["interpolation"], "crop": "middle of the shorter side",
        # Whether the images that it takes are to be normalised before, by mean and std, or are of 0 to 1.
        "input": "0 to 1" if within.normalise else "normalised",
        "output": "probabilities" if within.softmax else "logits",
        "origin": {
            "name": network.name, "arch": section["arch"], "study": section["study"]["name"],
            "trial": section["study"]["trial"], "weights": section["weights"],
        },
    }  # fmt: skip


def _normalisation(mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """Images of 0 to 1 normalised, as a convolution, which runtimes know well."""
    layer = nn.Conv2d(3, 3, 1, groups=3)
    with torch.no_grad():
        layer.weight.copy_(1 / torch.tensor(std).view(3, 1, 1, 1))
        assert layer.bias is not None
        layer.bias.copy_(-torch.tensor(mean) / torch.tensor(std))
    return layer


def onnx_file(model: nn.Module, resolution: int, path: Path, about: Mapping[str, Any] | None = None) -> Path:
    """Write an ONNX file of any network in evaluation mode.

    Args:
        about: its metadata, as values that JSON knows.

    Raises:
        UsageError: a package is missing, or onnxruntime gives other logits than torch.
    """
    try:
        import onnx
        import onnxruntime
        from onnx import shape_inference
    except ImportError as error:
        raise UsageError(f"--format onnx: {error.name} is not installed (pip install onnx onnxruntime)") from error
    folded = fold_batch_norms(model)
    images = torch.randn(2, 3, resolution, resolution)
    # The very graph that the engines time, but for the batch, which is left open.
    graph = onnx_graph(folded, images.shape, free_batch=True)
    onnx.helper.set_model_props(graph, {key: json.dumps(value) for key, value in (about or {}).items()})
    path.write_bytes(shape_inference.infer_shapes(graph).SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {INPUT: x.numpy()})[0])

    _check(run, folded, images, path.name)
    return path


def write_programs(network: Exported, folder: Path, note: Note) -> list[Path]:
    """Write `model.pt2`, and where this machine can make them `model_aoti.pt2` and `model_fused.pt2`.

    The first is in float32, for any device. The others are for CUDA and in the deployment's dtype where there is CUDA,
    else for the CPU and in float32.

    Args:
        note: function that takes a line on each file that cannot be made on this machine.

    Raises:
        UsageError: there are no weights, or a program gives other logits than torch.
    """
    _require_weights(network, ExportFormat.TORCH_EXPORT)
    model = network.build()
    made = [program_file(model, network.resolution, folder / PROGRAM)]
    on_cuda = cuda_or_warning()
    device = torch.device("cuda" if on_cuda else "cpu")
    dtype = getattr(torch, network.deployment.dtype) if on_cuda else torch.float32
    if _has_compiler():
        try:
            made.append(_compiled_file(model, network.resolution, device, dtype, folder / COMPILED))
        except UsageError:
            raise
        except Exception as error:  # a compiler without its headers may raise anything
            if full := no_room(error):
                raise full from error
            (folder / COMPILED).unlink(missing_ok=True)
            note(f"{COMPILED}: left out, it does not compile here ({message_line(error)})")
    else:
        note(f"{COMPILED}: left out, there is no C++ compiler here")
    if on_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        made.append(_fused_file(model, network.resolution, device, dtype, folder / FUSED))
    else:
        note(f"{FUSED}: left out, it is made on a CUDA device")
    return made


def program_file(model: nn.Module, resolution: int, path: Path) -> Path:
    """Write a `torch.export` program of any network in evaluation mode.

    Batch norms are folded, memory is channels_last, data are float32, and the batch is free.

    Raises:
        UsageError: the program gives other logits than torch.
    """
    folded = fold_batch_norms(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = _images(resolution, torch.device("cpu"), torch.float32)
    with quiet():
        _save(_program(folded, images), path)
        loaded = torch.export.load(path).module()
    _check(loaded, folded, images, path.name)
    return path


def _compiled_file(model: nn.Module, resolution: int, device: torch.device, dtype: torch.dtype, path: Path) -> Path:
    folded = fold_batch_norms(model).to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = _images(resolution, device, dtype)
    with quiet():
        package = io.BytesIO()
        # Weights stay as they are, for a package may be given others.
        options = inductor_options(device, freezing=False)
        with cudnn_search(device):
            torch._inductor.aoti_compile_and_package(
                _program(folded, images), package_path=package, inductor_configs=options
            )
        path.write_bytes(package.getvalue())
        loaded = torch._inductor.aoti_load_package(str(path))
    _check(loaded, folded, images, path.name)
    return path


def _fused_file(model: nn.Module, resolution: int, device: torch.device, dtype: torch.dtype, path: Path) -> Path:
    from kernels import fuse

    fused = fuse(model.to(device), dtype=dtype)
    images = _images(resolution, device, dtype)
    # The batches that are checked below are tuned: without tuning, the tiling that is counted best may not run on this
    # GPU.
    for batch in (len(images), 1):
        fused.prepare(batch, resolution)
    with quiet():
        _save(_program(fused, images), path)
        loaded = torch.export.load(path).module()
    folded = fold_batch_norms(model).to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    _check(loaded, folded, images, path.name)
    return path


def _images(resolution: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    images = torch.randn(2, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
    return images.to(device, dtype).contiguous(memory_format=torch.channels_last)


def _program(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


def _save(program: torch.export.ExportedProgram, path: Path) -> None:
    # By way of the memory: torch 2.11 itself, writing to a full disk, ends the process (`terminate called`).
    made = io.BytesIO()
    torch.export.save(program, made)
    path.write_bytes(made.getvalue())


def _has_compiler() -> bool:
    """Whether there is a C++ compiler: Inductor compiles the host's part of a package in C++, whatever the device."""
    named = os.environ.get("CXX", "").split()
    return any(shutil.which(name) for name in (named[:1] or ["g++", "clang++"]))


def _require_weights(network: Exported, wanted: ExportFormat) -> None:
    if network.weights is None:
        raise UsageError(
            f"--format {wanted}: {network.name} has no weights (search with --keep-weights, or train it and export its "
            "directory with --checkpoint)"
        )


@torch.no_grad()
def _check(run: Callable[[Tensor], Tensor], model: nn.Module, images: Tensor, name: str) -> None:
    """Hold a format's logits against the network's, for the given images and for the first of them alone.

    Raises:
        UsageError: they differ by more than the tolerance.
    """
    for x in (images, images[:1].contiguous(memory_format=torch.channels_last)):
        # With TF32, convolutions of float32 on CUDA would drop 13 bits, for which the tolerance does not allow.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            expected, actual = model(x).float(), run(x).float()
        error = (actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
        if not error <= TOLERANCE[images.dtype]:
            raise UsageError(f"{name}: gives other logits than torch, by {error:.1e} of the largest")
