"""The search itself."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from nas.cli.choosing import narrowed, refuse_sizes, space_of
from nas.cli.console import fail, interruptible, out, prepare, reported, say
from nas.cli.fronts import print_front
from nas.cli.opening import store_if_any
from nas.cli.options import given, made, takes, typed_options
from nas.config import AUTO, DEFAULT_STORAGE, DEFAULT_STUDY, PILOT, DataConfig, SearchConfig, respelled
from nas.options import Keep, options, parts


@takes(SearchConfig)
def search(
    context: typer.Context,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over",
            help="Free a study whose process ran on a machine that is gone for good",
            rich_help_panel="Study",
        ),
    ] = False,
) -> None:
    """Search for the Pareto front of accuracy and latency, or continue a search that was stopped.

    A study is continued with its own settings: a flag that is left out has the study's value.

    \b
    Examples:
      run_search.py --budget 200
      run_search.py --data photos --resolution 64 --max-latency-ms 2 --study photos --keep-weights
      run_search.py --space imagenet --data /data/imagenet --to-rgb --resolution 128 --latency-resolution 224
    """
    # This comes before every command.
    prepare()
    if context.invoked_subcommand:
        if typed := typed_options(context):
            fail(f"{typed[0]}: belongs after the command: run_search.py {context.invoked_subcommand} {typed[0]} ...")
        return
    storage = context.params["storage"]
    # Importing torch takes seconds, in which Ctrl-C may come, too.
    with interruptible(), reported(DEFAULT_STORAGE if storage is None else storage):
        _run(_config(given(SearchConfig, context)), take_over)


def _config(typed: dict[str, Any]) -> SearchConfig:
    """The search that the flags ask for: of the study that is there, or of a new one.

    Raises:
        UsageError: a flag differs from what the study was begun with.
        FieldError: a flag has a value that it cannot have.
    """
    from nas.recorded import RecordedStudy
    from nas.search.opening import other_configuration

    name = typed.get("study", DEFAULT_STUDY)
    with store_if_any(typed.get("storage", DEFAULT_STORAGE)) as store:
        study = RecordedStudy.find(store, name) if store else None
    if study is None:
        return made(SearchConfig, _completed(typed))
    if typed.get("space") == AUTO:
        # It was chosen when the study began.
        del typed["space"]
    refuse_sizes(study.config.space, typed)
    if "space" in typed and not study.config.space.own_resolutions:
        typed["space"] = narrowed(typed["space"], {"data": {"resolution": study.config.data.resolution}})
    config = made(SearchConfig, typed, study.config)
    if lines := list(_changes(SearchConfig, study.config, respelled(config, study.config), typed)):
        raise other_configuration(name, lines)
    return config


def _changes(owner: type[Any], stored: Any, now: Any, typed: dict[str, Any]) -> Iterator[str]:
    """A line for each flag that says something else than the study."""
    from nas.search.opening import differences, plain

    for name, option in options(owner).items():
        if name in typed and option.keep is Keep.FIXED:
            yield from differences(plain(getattr(stored, name)), plain(getattr(now, name)), option.name)
    for name, part in parts(owner).items():
        yield from _changes(part, getattr(stored, name), getattr(now, name), typed[name])


def _completed(typed: dict[str, Any]) -> dict[str, Any]:
    """The fields of a new study, with those that follow from others where they were left out."""
    from nas.training.facts import class_count
    from search_spaces import load_space

    space = space_of(typed)
    images = {"resolution": space.default_resolution, **typed["data"]}
    large = space == load_space("imagenet")
    # The embedded digits stand for whatever the network will be for.
    data = made(DataConfig, images)
    known = None if large and data.source == "digits" else class_count(data)
    deployed = {"resolution": data.resolution, "num_classes": known or (1000 if large else 10)}
    open_ = () if "steps" in typed["proxy"] else tuple(name for name in PILOT if name not in typed["proxy"])
    return {**typed, "space": space, "data": images, "latency": {**deployed, **typed["latency"]}, "pilot": open_}


def _run(config: SearchConfig, take_over: bool) -> None:
    from nas.search import opening
    from nas.search.loop import run
    from nas.search.progress import LiveProgress, PlainProgress, hypervolume_words, shares_line
    from studies import displayed

    if take_over:
        opening.take_over(config)
    if out.is_terminal:
        with LiveProgress(out) as progress:
            result = run(config, progress=progress)
    else:
        result = run(config, progress=PlainProgress(out))
    early = f", {result.stopped} of them stopped early" if result.stopped else ""
    print_front(result.pareto_front, f"Pareto front of {config.study} ({result.complete} candidates{early})")
    shown = displayed(config.storage)
    for line in (
        f"{result.why}: {result.complete} of {config.budget} candidates{early}; "
        f"{hypervolume_words(result.hypervolumes)}",
        *result.remarks,
        shares_line(result),
        f"study '{config.study}' is in {shown}",
        f"front again: python run_search.py pareto --storage {shlex.quote(shown)} --study {shlex.quote(config.study)}",
        *result.advice,
    ):
        say(line)
