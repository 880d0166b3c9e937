"""The space of a new study: the one that is named, or the one that fits the latency's limit or the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nas.cli.console import note, say
from nas.cli.options import made
from nas.config import AUTO, DataConfig, LatencyConfig, SearchConfig
from nas.errors import UsageError
from search_spaces import SearchSpace, ladder_space, load_space

if TYPE_CHECKING:
    from nas.search.auto_space import Choice

# Where only loading the images would tell.
USUAL_IMAGES, USUAL_SIZE, USUAL_CLASSES = 50_000, 32, 10


def space_of(typed: Mapping[str, Any]) -> SearchSpace:
    """The space of a new study.

    Args:
        typed: what `nas.cli.options.given` found of a `SearchConfig`.

    Raises:
        UsageError: no space fits, or the named one does not go with other flags.
    """
    space, limit_ms = typed.get("space"), typed["limits"].get("latency_ms")
    usual = space is None and limit_ms is None and typed["data"].get("source", "digits") == "digits"
    if usual:
        space = load_space("small")
    elif space in (None, AUTO):
        if limit_ms is not None and "ray_address" in typed:
            raise UsageError(
                "--space auto: times networks on this machine, not on a cluster; on a node that times, "
                f"`run_search.py space auto --max-latency-ms {limit_ms:g}` says which --space to name here"
            )
        # Whatever is wrong with other flags is said before anything is timed.
        made(SearchConfig, {name: value for name, value in typed.items() if name != "space"})
        choice = chosen_space(typed["data"], typed["latency"], limit_ms)
        say(choice.reason)
        return choice.space
    assert isinstance(space, SearchSpace)
    return narrowed(space, typed)


def refuse_sizes(space: SearchSpace, typed: Mapping[str, Any]) -> None:
    """Refuse flags that give all networks one resolution, in a study whose networks have their own.

    Raises:
        UsageError: there is such a flag.
    """
    for flag, part in (("--resolution", "data"), ("--latency-resolution", "latency")):
        if space.own_resolutions and "resolution" in typed[part]:
            own = ", ".join(map(str, space.own_resolutions))
            raise UsageError(
                f"{flag} {typed[part]['resolution']}: the networks of the space {space.name} have resolutions of their "
                f"own ({own}); use another --study"
            )


def narrowed(space: SearchSpace, typed: Mapping[str, Any]) -> SearchSpace:
    """A space whose networks have no resolution of their own where `--resolution` says it.

    Raises:
        UsageError: `--latency-resolution` says another than the networks have.
    """
    if not space.own_resolutions:
        return space
    if "resolution" in typed["data"]:
        # It may be impossible.
        return space.at(made(DataConfig, typed["data"]).resolution)
    if "resolution" in typed["latency"]:
        own = ", ".join(map(str, space.own_resolutions))
        raise UsageError(
            f"--latency-resolution {typed['latency']['resolution']}: the networks of the space {space.name} have "
            f"resolutions of their own ({own}); --resolution gives all of them one"
        )
    return space


def chosen_space(images: Mapping[str, Any], deployment: Mapping[str, Any], limit_ms: float | None) -> Choice:
    """The space that fits a limit on the latency, or else the images.

    Args:
        images, deployment: the fields of `DataConfig` and `LatencyConfig` that the user gave.

    Raises:
        UsageError: see `nas.search.auto_space.for_limit`.
    """
    from nas.search import auto_space
    from nas.training.facts import facts
    from search_spaces.ladder import TOP_RUNG, shown_resolutions
    from search_spaces.space import middle

    known = facts(made(DataConfig, images))
    given = deployment.get("resolution") or images.get("resolution")
    resolutions = (given,) if given else shown_resolutions(known.size or USUAL_SIZE)
    classes = deployment.get("num_classes") or known.classes or USUAL_CLASSES
    try:
        # All resolutions that have a ladder have its highest rung.
        ladder_space(resolutions, TOP_RUNG)
    except ValueError as error:
        raise UsageError(f"--space auto: {error}; name a --space") from error
    if limit_ms is None:
        if known.images is None:
            say(f"before the data are loaded, {USUAL_IMAGES:,} images of {classes} classes are assumed")
        return auto_space.for_images(known.images or USUAL_IMAGES, classes, resolutions)
    fields = {"resolution": middle(resolutions), "num_classes": classes, **deployment}
    with auto_space.timer(made(LatencyConfig, fields), note) as time:
        say(f"timing networks of several sizes, to choose a space for --max-latency-ms {limit_ms:g}")
        return replace(auto_space.for_limit(time, resolutions, limit_ms), classes=classes)
