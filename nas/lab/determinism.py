"""The cost of deterministic algorithms, by longer trainings than a search makes: `python -m nas.lab.determinism`."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from nas.config import ProxyConfig
from nas.errors import CandidateFailed
from nas.lab.options import Space
from nas.training.determinism import measure
from search_spaces import load_space


def main(
    device: Annotated[str, typer.Option(help="Device: cpu, cuda or cuda:N.")] = "cuda",
    space: Space = "small",
    steps: Annotated[int, typer.Option(min=1, help="Steps of each training.")] = 200,
    rounds: Annotated[int, typer.Option(min=2, help="Trainings of either kind.")] = 4,
) -> None:
    """Train the space's anchor with and without deterministic algorithms, and compare seconds and losses."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter(f"{device}: no CUDA device here", param_hint="--device")
    try:
        loaded = load_space(space)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--space") from None
    try:
        cost = measure(loaded.anchor(), ProxyConfig(steps=steps), device, loaded.default_resolution, rounds)
    except CandidateFailed as error:
        print(f"--device {device}: {error}")
        raise typer.Exit(1) from None
    for name, seconds, losses in (
        ("default", cost.default_seconds, cost.default_losses),
        ("deterministic", cost.deterministic_seconds, cost.deterministic_losses),
    ):
        print(f"{name:13} {seconds:7.3f} s a training, {losses} different losses in {rounds}")
    print(f"deterministic / default: {cost.ratio:.2f}")


if __name__ == "__main__":
    typer.run(main)
