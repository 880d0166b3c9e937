"""`export`: networks as directories."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from nas.cli.console import note, reported, say
from nas.cli.opening import existing_study, require_folder
from nas.cli.options import Storage, StudyName, given, made, takes, typed_options
from nas.config import DEFAULT_STORAGE, DEFAULT_STUDY
from nas.errors import UsageError
from nas.export.selection import Selection


@takes(Selection)
def export(
    context: typer.Context,
    directory: Annotated[
        Path | None,
        typer.Argument(help="An exported network, to give it trained weights or further formats", show_default=False),
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder that gets a directory for each network")] = Path(
        "exports"
    ),
    storage: Storage = DEFAULT_STORAGE,
    study: StudyName = DEFAULT_STUDY,
    format: Annotated[
        list[str] | None, typer.Option(help="Format to write beside timm's: onnx or torch-export; may be repeated")
    ] = None,
    softmax: Annotated[bool, typer.Option("--softmax", help="Let the ONNX file give probabilities")] = False,
    normalise: Annotated[
        bool, typer.Option("--normalise", help="Let the ONNX file take images of 0 to 1, and normalise them itself")
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint of timm's train.py, whose weights DIRECTORY gets")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="File of the names of the checkpoint's classes, one a line, or a folder of class folders"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty")] = False,
) -> None:
    """Write networks of the front as directories that timm builds, trains and publishes."""
    # Whatever ends it, what is half made is taken away.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with reported(storage):
        from nas.export import directories as exports
        from nas.export.formats import ExportFormat, Within, makers

        wanted = _formats(format)
        for flag, given_ in (("--softmax", softmax), ("--normalise", normalise)):
            if given_ and ExportFormat.ONNX not in wanted:
                raise UsageError(f"{flag}: is for --format onnx")
        if classes is not None and checkpoint is None:
            raise UsageError(f"--classes {classes}: is for --checkpoint")
        formats = makers(wanted, note, Within(normalise, softmax))
        if directory is not None:
            for flag in typed_options(context):
                if flag not in ("directory", "--format", "--softmax", "--normalise", "--checkpoint", "--classes"):
                    raise UsageError(f"{flag}: is for networks of a study, not for {directory}")
            if checkpoint is None and not formats:
                raise UsageError(f"{directory}: nothing to do (--checkpoint, or a --format of onnx or torch-export)")
            network = exports.read(directory)
            if checkpoint is not None:
                names = None if classes is None else exports.read_names(classes)
                network = exports.trained(network, checkpoint, names, note)
                # Whatever becomes of the formats, the weights are there.
                exports.rewrite(directory, network, note=note)
                note(f"{directory}: has the weights of {checkpoint} now")
            if formats:
                # What was edited is told once.
                exports.rewrite(directory, network, formats, note if checkpoint is None else lambda line: None)
            written = [directory]
        else:
            if checkpoint is not None:
                raise UsageError(f"--checkpoint {checkpoint}: belongs to one DIRECTORY that was exported before")
            selection = made(Selection, given(Selection, context))
            require_folder("--out", out_dir)
            with existing_study(storage, study) as recorded:
                networks = exports.of_study(recorded, storage, exports.chosen(recorded, selection))
            written = exports.write(networks, out_dir, formats, force, note)
            if all(network.weights is None for network in networks):
                note(
                    f"no weights, the search kept none (--keep-weights); the classifiers are the deployment's, of "
                    f"{networks[0].num_classes} classes: train.py takes another --num-classes"
                )
        for path in written:
            say(str(path))


def _formats(named: list[str] | None) -> list[Any]:
    """The formats that a user typed, of which several may stand in one word."""
    from nas.export.formats import ExportFormat

    words = [word.strip() for text in named or () for word in text.split(",") if word.strip()]
    for word in words:
        if word not in set(ExportFormat):
            raise UsageError(f"--format {word}: none of {', '.join(ExportFormat)}")
    return [ExportFormat(word) for word in words]
