"""Torch's engines at their best: how they run wherever the fused kernels' figures stand beside theirs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# It prints a page for every product that it tries.
_QUIET = {"max_autotune_report_choices_stats": False, "autotune_num_choices_displayed": 0}


def inductor_options(device: torch.device, freezing: bool = True) -> dict[str, Any]:
    """Options of `torch.compile` for inference on a device.

    On CUDA they are those of the mode "max-autotune" with frozen weights, but without Inductor's own CUDA graphs: a
    graph cannot be captured within another, and whoever measures captures one of the whole call. On a CPU there are
    none: neither freezing nor max-autotune made a difference there that stood out of the noise (docs/latency.md).

    Args:
        freezing: whether weights become constants, which are folded; the first call has to be without gradients.
    """
    if device.type != "cuda":
        return {}
    import torch._inductor

    mode = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    return {**mode, **_QUIET, **({"freezing": True} if freezing else {})}


@contextmanager
def cudnn_search(device: torch.device) -> Iterator[None]:
    """Context in which cuDNN times its algorithms for every convolution that it meets for the first time, on CUDA.

    It keeps what it found, and also what it took without a search: the first call of a network belongs in here, and a
    CUDA graph's capture, within which nothing can be timed, need not.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
