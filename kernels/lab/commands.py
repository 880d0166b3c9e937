"""Functions that the labs' commands share: options, refusals, and the folder for results."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer

from kernels.cost_model import GPU_SPECS
from kernels.device_functions import INTERPRETED
from kernels.diagnosis import why_no_cuda

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"

Minutes = Annotated[float, typer.Option(help="Begin nothing new after this many minutes.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the results (default: docs/benchmarks/<device>).")]


def capability_option(default: str) -> Any:
    """The option `--capability`, whose default the command fills in."""
    return typer.Option(help=f"Compute capability: 80, 89 or 90. May be given several times (default: {default}).")


def fail(message: str) -> NoReturn:
    """Print one line and end with exit code 2."""
    typer.echo(message, err=True)
    raise typer.Exit(2)


def deadline_after(minutes: float) -> float:
    """The value of `time.monotonic` after which a command begins nothing new."""
    now = time.monotonic()
    if not 0 < minutes < math.inf:
        fail(f"--minutes {minutes:g}: not a positive number")
    return now + 60 * minutes


def current_gpu(refusal: str = "torch finds no CUDA device here") -> torch.device:
    """The current CUDA device; without one the command ends."""
    if not torch.cuda.is_available():
        reason = why_no_cuda()
        fail(f"{refusal} ({reason})" if reason else refusal)
    return torch.device("cuda", torch.cuda.current_device())


def known_capabilities(asked: Iterable[int]) -> list[int]:
    """The capabilities asked for; the command ends if one is unknown or the compiler cannot run here."""
    if INTERPRETED:
        fail("TRITON_INTERPRET=1: the compiler cannot run under the interpreter; unset it")
    for capability in asked:
        if capability not in GPU_SPECS:
            fail(f"--capability {capability}: none of {', '.join(map(str, GPU_SPECS))}")
    return list(asked)


def results_folder(out: Path | None, device_name: str) -> Path:
    """Make the folder for results (default: one for the device under docs/benchmarks)."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in device_name.lower()).split())
    folder = out or BENCHMARKS / slug
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {folder}: {error.strerror}")
    if not os.access(folder, os.W_OK):
        fail(f"--out {folder}: not writable")
    return folder
