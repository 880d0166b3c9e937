"""Networks that were put through one and the same data, schedule and measurement: baselines, and a study's own.

The values that `nas.validation.baselines` makes and the report shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ContenderKind(StrEnum):
    TIMM = "timm"
    # A ConvFirst network nobody searched for: the middle of the space.
    DEFAULT = "default"
    FOUND = "found"


@dataclass(frozen=True, slots=True)
class Contender:
    """One network with the best of its trainings.

    Args:
        name: a timm model's, "ConvFirst anchor", or "trial 12".
        summary: for people, what it is: an architecture's line, or the model's name once more.
        trial: the number of a study's own; None of others.
        accuracy: of the best of its learning rates, on held-out images.
        latency_ms, latency_p20_ms, latency_p80_ms: drift-corrected, in the study's deployment but for resolution and
            engine.
        engine: the best standard one for networks that are not ours.
        resolution: pixels of the images it was trained on, and of its deployment.
        learning_rate, steps, batch_size: of that training.
        converged: whether the training had come to an end of its improvement; see `training`.
        training: the state of the training, in words.
    """

    name: str
    kind: ContenderKind
    summary: str
    trial: int | None
    params: int
    macs: int
    accuracy: float
    latency_ms: float
    latency_p20_ms: float
    latency_p80_ms: float
    engine: str
    resolution: int
    learning_rate: float
    steps: int
    batch_size: int
    converged: bool
    training: str
