"""What deterministic algorithms cost the proxy training: `python -m nas.determinism --device cuda`.

The anchor of a space is trained with and without them in turns, and the losses of equal trainings are compared.
"""

from __future__ import annotations

import os
from statistics import median
from typing import Annotated

import torch
import typer

from nas import data as image_data
from nas import proxy
from nas.config import DataConfig, ProxyConfig
from search_spaces import ArchSpec, load_space


def train_once(arch: ArchSpec, batches: proxy.Batches, config: ProxyConfig, deterministic: bool) -> proxy.ProxyResult:
    """One training from the same seed as all others."""
    torch.manual_seed(0)
    network = arch.build(num_classes=10)
    torch.use_deterministic_algorithms(deterministic)
    try:
        return proxy.train(network, batches, config, seed=0)
    finally:
        torch.use_deterministic_algorithms(False)


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cuda",
    space: Annotated[str, typer.Option(help="The space whose anchor is trained.")] = "small",
    steps: Annotated[int, typer.Option(min=1, help="Of each training.")] = 200,
    rounds: Annotated[int, typer.Option(min=2, help="Trainings of either kind.")] = 4,
) -> None:
    """Print seconds of either kind of training side by side, their ratio, and whether equal trainings agree."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter(f"{device}: no CUDA device here", param_hint="--device")
    # cuBLAS reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    arch = load_space(space).anchor()
    batches = proxy.Batches(image_data.load(DataConfig()), torch.device(device))
    config = ProxyConfig(steps=steps)
    torch.set_num_threads(config.threads)
    train_once(arch, batches, ProxyConfig(steps=min(steps, 20)), False)
    results: dict[bool, list[proxy.ProxyResult]] = {False: [], True: []}
    for _ in range(rounds):
        for deterministic, into in results.items():
            into.append(train_once(arch, batches, config, deterministic))
    seconds = {kind: median(result.seconds for result in found) for kind, found in results.items()}
    for kind, found in results.items():
        losses = {result.loss for result in found}
        print(
            f"{'deterministic' if kind else 'default':13} {seconds[kind]:7.3f} s a training, "
            f"{len(losses)} different losses in {rounds}"
        )
    print(f"deterministic / default: {seconds[True] / seconds[False]:.2f}")


if __name__ == "__main__":
    typer.run(main)
