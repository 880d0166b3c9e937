"""Choice of the networks to analyse: a study's candidate, an architecture or a timm model, and their deployment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nas.config import LatencyConfig, moved
from nas.errors import UsageError
from nas.latency.parts import network_shape
from nas.latency.timm_networks import require_timm_model, timm_engine, timm_resolution
from nas.recorded import RecordedStudy
from search_spaces import ArchSpec
from studies import Store


@dataclass(frozen=True)
class Subject:
    """A network to analyse.

    Args:
        title: the name in figures and messages.
        name: the name in the block latency table: an architecture's line, or a timm model's name.
        arch: the architecture; None for a timm model.
        config: the deployment.
    """

    title: str
    name: str
    arch: ArchSpec | None
    config: LatencyConfig

    @property
    def shape(self) -> str:
        """The shape of the network as a whole."""
        return network_shape(self.name, self.config)


# Pixels and classes of a ConvFirst network by its total stride, where nobody says them.
DEPLOYED_AT = {32: (224, 1000)}
SMALL_AT = (32, 10)


def choose(
    store: Store | None, study: str, chosen: tuple[str, Any], against: str | None, given: dict[str, Any]
) -> list[Subject]:
    """The one or two networks that are meant, in one deployment but for the engine and the networks' own resolutions.

    Args:
        store: the database; None where there is none yet.
        study: the study in which trials are looked up.
        chosen: the flag "--trial", "--arch" or "--timm", and its value.
        against: the second network: a trial's number, an architecture or a timm model; None for none.
        given: the fields of `LatencyConfig` that the user gave; others are those of a trial's study, or the networks'
            own.

    Raises:
        UsageError: something is not there, or does not parse.
    """
    wanted = [(*chosen, chosen[0])]
    if against is not None:
        is_arch = "|" in against or against.lstrip().startswith("{")
        wanted.append(("--trial" if against.isdecimal() else "--arch" if is_arch else "--timm", against, "--against"))
    found = [_named(store, study, kind, str(value), flag) for kind, value, flag in wanted]
    if given.get("engine") == "fused" and all(arch is None for _, arch, _ in found):
        raise UsageError("--engine fused: times ConvFirst networks by their blocks, and no timm models by their layers")
    asked = given
    base = next((config for _, _, config in found if config is not None), None)
    if base is None:
        models = [name for name, arch, _ in found if arch is None]
        archs = [arch for _, arch, _ in found if arch is not None]
        pixels, classes = (
            (timm_resolution(models[0]), 1000) if models else DEPLOYED_AT.get(archs[0].total_stride, SMALL_AT)
        )
        given = {"resolution": pixels, "num_classes": classes, **given}
    # Whatever is measured here is measured with what is installed here.
    config = moved(base, **{"runtime": None, **given})
    subjects = []
    for name, arch, _ in found:
        if arch is not None:
            title = f"ConvFirst {arch.arch_id}"
            if "resolution" in asked:
                # The network is measured at that resolution, whatever its own is.
                arch = replace(arch, resolution=None)
            own = replace(config, resolution=arch.shown(config.resolution))
            subjects.append(Subject(title, str(arch), arch, own))
            continue
        subjects.append(Subject(name, name, None, replace(config, engine=timm_engine(config.engine))))
    return subjects


def _named(
    store: Store | None, study: str, kind: str, value: str, flag: str
) -> tuple[str, ArchSpec | None, LatencyConfig | None]:
    """Name, architecture and study's deployment of a network; the last two None where there is none."""
    if kind == "--timm":
        require_timm_model(value, flag)
        return value, None, None
    if kind == "--arch":
        try:
            arch = ArchSpec.parse(value)
        except ValueError as error:
            raise UsageError(f"{flag} {value}: {error}") from error
        return str(arch), arch, None
    recorded = RecordedStudy.find(store, study) if store else None
    if recorded is None:
        raise UsageError(f"--study {study}: not in the database, so there is no {flag} {value}")
    candidate = next((each for each in recorded.candidates() if each.number == int(value)), None)
    if candidate is None:
        raise UsageError(f"{flag} {value}: the study {study} has no such candidate")
    arch = ArchSpec.from_json(candidate.arch)
    return str(arch), arch, recorded.config.latency
