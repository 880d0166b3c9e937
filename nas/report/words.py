"""Sentences of the report that contain its numbers."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pandas as pd

from nas.display.notes import accuracy_line, pixels, stopping_line
from nas.report.data import Material

LIMITS = {
    "latency_ms": "latency at most {:g} ms", "params": "at most {:,} parameters", "macs": "at most {:,} MACs",
    "memory_mb": "memory at most {:g} MB",
}  # fmt: skip
# The share of the last candidates for which the page says how much they gained.
LAST_SHARE = 0.25


def set_up(material: Material) -> str:
    """A paragraph that says how the study was searched."""
    recorded = material.recorded
    row, config, device = recorded.row, recorded.config, recorded.device
    data, training, latency = config.data, config.proxy, config.latency
    limits = [LIMITS[name].format(value) for name, value in asdict(config.limits).items() if value is not None]
    driver = f", {device.driver}" if device.driver not in ("", "none") else ""
    versions = ", ".join(f"{name} {value}" for name, value in json.loads(row.versions).items() if value != "none")
    pilot = "".join(f"{line[0].upper()}{line[1:]}. " for line in recorded.pilot_lines)
    stopping = stopping_line(material.candidates, training.steps)
    early = f"{stopping[0].upper()}{stopping[1:]}. " if stopping else ""
    return (
        f"The space {config.space.name} was searched by {config.sampler} with seed {config.seed}; "
        f"candidates evaluated: {len(material.candidates)}, of which complete: {material.complete}. "
        f"Each was timed on {device.name} ({device.kind}{driver}) by the engine {latency.engine_label} in "
        f"{latency.dtype}: batch {latency.batch_size}, {pixels(latency.resolution, config.space)}, "
        f"{latency.num_classes} classes, {latency.threads} CPU thread(s), medians corrected for drift by an "
        f"anchor network ({recorded.anchor}) of {row.anchor_ms:.4g} ms. "
        f"It was trained on {data.source} at {pixels(data.resolution, config.space)} (fingerprint "
        f"{row.data_fingerprint}) for {training.steps} steps of {training.batch_size} images with AdamW, "
        f"learning rate up to {training.learning_rate:g}, weight decay {training.weight_decay:g}, label "
        f"smoothing {training.label_smoothing:g}, {training.threads} thread(s). "
        f"{pilot}{early}Limits: {', '.join(limits) or 'none'}. Begun {row.created_at:%Y-%m-%d %H:%M} UTC. "
        f"Versions: {versions}."
    )


def front_words(front: pd.DataFrame) -> str:
    """The front in a sentence."""
    first, last = front.iloc[0], front.iloc[-1]
    line = accuracy_line(front)
    line = f"{line[0].upper()}{line[1:]}."
    if len(front) == 1:
        return f"The front is one network: {first['accuracy']:.1%} at {first['latency_ms']:.3g} ms. {line}"
    return (
        f"The front has {len(front)} networks, from {first['accuracy']:.1%} at {first['latency_ms']:.3g} ms "
        f"to {last['accuracy']:.1%} at {last['latency_ms']:.3g} ms. {line}"
    )


def history_words(material: Material) -> str:
    """Sentences that say whether the search was still improving."""
    volumes = material.history["hypervolume"].to_numpy()
    reached = (
        f"As searched, it came to {volumes[-1]:.4f} after {len(volumes)} candidate{'s' if len(volumes) > 1 else ''}."
    )
    recent = round(LAST_SHARE * len(volumes))
    if not volumes[-1] or not recent:
        return reached
    gained = volumes[-1] / volumes[-1 - recent] - 1 if volumes[-1 - recent] else np.inf
    last = int(np.flatnonzero(np.diff(volumes, prepend=0))[-1]) + 1
    if not gained:
        return f"{reached} The last {recent} added nothing: the last improvement was at candidate {last}."
    grew = f"it grew by {gained:.2%}" if np.isfinite(gained) else "it grew from nothing"
    return f"{reached} Over the last {recent} candidates {grew}; the last improvement was at candidate {last}."
