"""What CUDA graphs gain in training: `python -m nas.lab.benchmark_training` trains eagerly and captured in turns.

The anchor of a space is trained on random images from the same seed, launched kernel by kernel and as a captured step.
Seconds of a step come from the second half of each training, so that the capture is not in them; it is in the seconds
of a whole training. The defaults take half a minute at most on a GPU.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from statistics import median
from typing import Annotated

import torch
import typer

from kernels.device_info import DeviceInfo
from nas.config import ProxyConfig
from nas.lab.options import Space
from nas.training import graphs, proxy
from nas.training.determinism import CLASSES, LEARNING_RATE, random_images
from nas.training.proxy import Batches, ProxyResult
from search_spaces import ArchSpec, load_space

EAGER, CAPTURED = "eager", "captured"
# Steps of the trainings before those that are timed.
WARM_UP_STEPS = graphs.EAGER_STEPS + graphs.LEAST_REPLAYS


def compare(arch: ArchSpec, batches: Batches, config: ProxyConfig, rounds: int) -> dict[str, list[ProxyResult]]:
    """Train an architecture eagerly and captured, from the same seed, in turns; every other round in reverse order.

    Raises:
        CandidateFailed: the loss diverges.
    """

    def train(kind: str, config: ProxyConfig) -> ProxyResult:
        torch.manual_seed(0)
        return proxy.train(arch.build(num_classes=CLASSES), batches, config, seed=0, capture=kind == CAPTURED)

    kinds = (EAGER, CAPTURED)
    for kind in kinds:
        train(kind, replace(config, steps=WARM_UP_STEPS))
    results: dict[str, list[ProxyResult]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind in kinds if number % 2 == 0 else reversed(kinds):
            results[kind].append(train(kind, config))
    return results


def main(
    device: Annotated[str, typer.Option(help="CUDA device: cuda or cuda:N.")] = "cuda",
    space: Space = "small",
    batch: Annotated[int, typer.Option(min=2, help="Images of a step.")] = ProxyConfig.batch_size,
    steps: Annotated[int, typer.Option(min=2 * WARM_UP_STEPS, help="Steps of each training.")] = 200,
    rounds: Annotated[int, typer.Option(min=1, help="Trainings of either kind.")] = 5,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Train deterministically.")] = False,
) -> None:
    """Train the space's anchor eagerly and as a CUDA graph, and compare the seconds and the losses."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter(f"{device}: no CUDA device here, so nothing was measured", param_hint="--device")
    where = torch.device(device)
    if graphs.capture_on(where) is None:
        raise typer.BadParameter(f"{device}: has no graphs, so there is nothing to compare", param_hint="--device")
    try:
        loaded = load_space(space)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--space") from None
    if deterministic:
        proxy.prepare_determinism()
    anchor, resolution = loaded.anchor(), loaded.default_resolution
    config = ProxyConfig(steps=steps, batch_size=batch, learning_rate=LEARNING_RATE, deterministic=deterministic)
    results = compare(anchor, Batches(random_images(resolution), where), config, rounds)
    print(
        f"{DeviceInfo.of(where).name}, torch {torch.__version__}: the anchor of {space} at {resolution} pixels, "
        f"{steps} steps of {batch} images, {rounds} trainings of either kind in turns"
        f"{', deterministic' * deterministic}"
    )
    if reason := next((each.uncaptured for each in results[CAPTURED] if each.uncaptured), None):
        print(f"nothing was captured: {reason}")
        raise typer.Exit(1)
    for kind, each in results.items():
        step_ms = sorted(1e3 * result.step_seconds for result in each)
        print(
            f"{kind:9} {median(step_ms):7.3f} ms a step ({step_ms[0]:.3f} to {step_ms[-1]:.3f}), "
            f"{median(result.seconds for result in each):6.3f} s a training, loss {each[0].loss:.5f}"
        )
    eager, captured = results[EAGER], results[CAPTURED]
    steps_ratio = median(each.step_seconds for each in eager) / median(each.step_seconds for each in captured)
    whole_ratio = median(each.seconds for each in eager) / median(each.seconds for each in captured)
    print(f"eager / captured: {steps_ratio:.2f} times the seconds of a step, {whole_ratio:.2f} of a training")
    points = zip(itertools.chain(*(each.curve for each in eager)), itertools.chain(*(each.curve for each in captured)),
                 strict=True)  # fmt: skip
    apart = max(abs(one.train_loss - other.train_loss) for one, other in points)
    print(f"training losses of the same steps are at most {apart:.2g} apart")


if __name__ == "__main__":
    typer.run(main)
