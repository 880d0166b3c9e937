"""What else a directory may hold of a trained network: ONNX, and torch.export's programs, plain, compiled, fused."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels.fold import fold_batch_norms
from nas.errors import UsageError
from nas.export.directories import COMPILED, FUSED, ONNX, PROGRAM, Exported
from nas.reporting import Note

INPUT, OUTPUT = "images", "logits"
# What torch 2.11 writes by itself: newer ones give these networks nothing, and fewer runtimes read them.
OPSET = 20
# Logits of a format may differ from torch's by so much of the largest: float32 summed in another order, and 16 bits.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class ExportFormat(StrEnum):
    TIMM = "timm"
    ONNX = "onnx"
    TORCH_EXPORT = "torch-export"


def makers(formats: Sequence[ExportFormat], note: Note) -> list[Callable[[Exported, Path], object]]:
    """Functions that make files of a network in its directory; timm's are there anyhow.

    Args:
        note: told what cannot be made on this machine.
    """
    by_format: dict[ExportFormat, Callable[[Exported, Path], object]] = {
        ExportFormat.ONNX: write_onnx,
        ExportFormat.TORCH_EXPORT: partial(write_programs, note=note),
    }
    return [by_format[each] for each in dict.fromkeys(formats) if each in by_format]


def write_onnx(network: Exported, folder: Path) -> Path:
    """`model.onnx`: images (N, 3, H, W) float32 to logits (N, classes), N free.

    Raises:
        UsageError: there are no weights, a package is missing, or onnxruntime gives other logits than torch.
    """
    _require_weights(network, ExportFormat.ONNX)
    return onnx_file(network.build(), network.resolution, folder / ONNX)


def onnx_file(model: nn.Module, resolution: int, path: Path) -> Path:
    """As `write_onnx`, of any network in evaluation mode."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--format onnx: {error.name} is not installed (pip install 'convfirst-nas[onnx]')") from error
    folded = fold_batch_norms(model)
    # Two, as torch.export takes an example's batch of one for all there is.
    images = torch.randn(2, 3, resolution, resolution)
    with quiet():
        program: Any = torch.onnx.export(
            folded, (images,), input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False,
            opset_version=OPSET, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )  # fmt: skip
        program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {INPUT: x.numpy()})[0])

    _check(run, folded, images, path.name)
    return path


def write_programs(network: Exported, folder: Path, note: Note) -> list[Path]:
    """`model.pt2`, and where this machine can make them `model_aoti.pt2` and `model_fused.pt2`.

    The first is in float32, for any device. The others are in the dtype of the deployment on CUDA where there is CUDA,
    else in float32 for the CPU.

    Raises:
        UsageError: there are no weights, or a program gives other logits than torch.
    """
    _require_weights(network, ExportFormat.TORCH_EXPORT)
    model = network.build()
    made = [program_file(model, network.resolution, folder / PROGRAM)]
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")
    dtype = getattr(torch, network.deployment.dtype) if on_cuda else torch.float32
    if _has_compiler():
        try:
            made.append(_compiled_file(model, network.resolution, device, dtype, folder / COMPILED))
        except UsageError:
            raise
        except Exception as error:  # whatever a compiler raises whose headers are not there
            (folder / COMPILED).unlink(missing_ok=True)
            words = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            note(f"{COMPILED}: left out, it does not compile here ({words})")
    else:
        note(f"{COMPILED}: left out, there is no C++ compiler here")
    if on_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        made.append(_fused_file(model, network.resolution, device, dtype, folder / FUSED))
    else:
        note(f"{FUSED}: left out, it is made on a CUDA device")
    return made


def program_file(model: nn.Module, resolution: int, path: Path) -> Path:
    """`model.pt2` of any network in evaluation mode: batch norms folded, channels_last, float32, any batch."""
    folded = fold_batch_norms(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = _images(resolution, torch.device("cpu"), torch.float32)
    with quiet():
        torch.export.save(_program(folded, images), path)
        loaded = torch.export.load(path).module()
    _check(loaded, folded, images, path.name)
    return path


def _compiled_file(model: nn.Module, resolution: int, device: torch.device, dtype: torch.dtype, path: Path) -> Path:
    folded = fold_batch_norms(model).to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = _images(resolution, device, dtype)
    with quiet():
        torch._inductor.aoti_compile_and_package(_program(folded, images), package_path=str(path))
        loaded = torch._inductor.aoti_load_package(str(path))
    _check(loaded, folded, images, path.name)
    return path


def _fused_file(model: nn.Module, resolution: int, device: torch.device, dtype: torch.dtype, path: Path) -> Path:
    from kernels import fuse

    fused = fuse(model.to(device), dtype=dtype)
    images = _images(resolution, device, dtype)
    # Tuned for what is checked below: of what was not, the first tiling counted need not run on every GPU.
    for batch in (len(images), 1):
        fused.prepare(batch, resolution)
    with quiet():
        torch.export.save(_program(fused, images), path)
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


def _has_compiler() -> bool:
    """Inductor compiles the host's part of a package in C++, whatever the device."""
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
    """Raises UsageError where a format does not give a network's logits, of its own batch and of one image."""
    for x in (images, images[:1].contiguous(memory_format=torch.channels_last)):
        # On CUDA convolutions of float32 would drop 13 bits, which the tolerance does not allow for.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            expected, found = model(x).float(), run(x).float()
        error = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
        if not error <= TOLERANCE[images.dtype]:
            raise UsageError(f"{name}: gives other logits than torch, by {error:.1e} of the largest")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters and compilers talk about themselves, on all channels there are."""
    disabled = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)
