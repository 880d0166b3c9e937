"""`export`: networks as directories."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from nas.cli.console import note, out, reported
from nas.cli.opening import existing_store, require_folder
from nas.cli.options import (
    Storage,
    StudyName,
    checked,
    given_options,
)
from nas.config import DEFAULT_STORAGE, DEFAULT_STUDY


def export(
    context: typer.Context,
    directory: Annotated[
        Path | None,
        typer.Argument(
            help="A network exported before: put its trained weights there, or add formats.", show_default=False
        ),
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for a directory of each network.")] = Path("exports"),
    storage: Storage = DEFAULT_STORAGE,
    study: StudyName = DEFAULT_STUDY,
    trial: Annotated[
        list[int] | None,
        typer.Option(
            help="This candidate instead of the front, on it or not; may be repeated.", rich_help_panel="Which networks"
        ),
    ] = None,
    top: Annotated[
        int | None, typer.Option(help="Only so many, the most accurate.", rich_help_panel="Which networks")
    ] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="Only those that are as fast.", rich_help_panel="Which networks")
    ] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(help="Only those that are as accurate, 0 to 1.", rich_help_panel="Which networks")
    ] = None,
    format: Annotated[
        list[str] | None, typer.Option(help="onnx or torch-export beside timm's; may be repeated.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Of timm's train.py: the weights that DIRECTORY is to hold.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
) -> None:
    """Write networks of the front as directories that timm builds, trains and publishes."""
    # Whatever ends it, what is half made is taken away.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with reported(storage):
        from nas.errors import UsageError
        from nas.export import directories as exports
        from nas.export.formats import makers
        from nas.recorded import RecordedStudy

        formats = makers(_formats(format), note)
        if directory is not None:
            of_studies = [
                flag for flag in given_options(context) if flag not in ("directory", "--format", "--checkpoint")
            ]
            if of_studies:
                raise UsageError(f"{of_studies[0]}: is for networks of a study, not for {directory}")
            if checkpoint is None and not formats:
                raise UsageError(f"{directory}: nothing to do (--checkpoint, or a --format of onnx or torch-export)")
            network = exports.read(directory)
            if checkpoint is not None:
                network = exports.trained(network, checkpoint)
            exports.rewrite(directory, network, formats, note)
            written = [directory]
        else:
            if checkpoint is not None:
                raise UsageError(f"--checkpoint {checkpoint}: belongs to one DIRECTORY that was exported before")
            flags = {
                "top": ("--top", top), "max_latency_ms": ("--max-latency-ms", max_latency_ms),
                "min_accuracy": ("--min-accuracy", min_accuracy),
            }  # fmt: skip
            selection = checked(
                exports.Selection, flags, trials=tuple(trial or ()), top=top, max_latency_ms=max_latency_ms,
                min_accuracy=min_accuracy,
            )  # fmt: skip
            require_folder("--out", out_dir)
            with existing_store(storage, study) as store:
                recorded = RecordedStudy.open(store, study)
                networks = exports.of_study(recorded, storage, exports.chosen(recorded, selection))
            written = exports.write(networks, out_dir, formats, force)
            if all(network.weights is None for network in networks):
                note(
                    f"no weights, the search kept none (--keep-weights); the classifiers are the deployment's, of "
                    f"{networks[0].num_classes} classes: train.py takes another --num-classes"
                )
        for path in written:
            out.print(str(path), highlight=False, soft_wrap=True)


def _formats(named: list[str] | None) -> list[Any]:
    """The formats that a user typed, of which several may stand in one word."""
    from nas.errors import UsageError
    from nas.export.formats import Format

    words = [word.strip() for text in named or () for word in text.split(",") if word.strip()]
    for word in words:
        if word not in set(Format):
            raise UsageError(f"--format {word}: none of {', '.join(Format)}")
    return [Format(word) for word in words]
