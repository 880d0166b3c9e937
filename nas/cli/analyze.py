"""`analyze`: where a network's time goes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nas.cli.console import note, out, reported, say
from nas.cli.opening import require_folder, store_if_any, writable_store
from nas.cli.options import ARCH, Again, Storage, StudyName, given, takes
from nas.config import DEFAULT_STORAGE, DEFAULT_STUDY, LatencyConfig
from nas.errors import CandidateFailed, UsageError
from nas.files import folder_for

if TYPE_CHECKING:
    from nas.latency.analysis import Analysis


@takes(LatencyConfig, resolution="the network's own", num_classes="1000 for timm models and total stride 32, else 10")
def analyze(
    context: typer.Context,
    storage: Storage = DEFAULT_STORAGE,
    study: StudyName = DEFAULT_STUDY,
    trial: Annotated[
        int | None, typer.Option(help="Number of a trial of the study; its deployment is the default here")
    ] = None,
    arch: Annotated[str | None, ARCH] = None,
    timm: Annotated[str | None, typer.Option(help="Name of a timm model, which is analysed by its layers")] = None,
    against: Annotated[
        str | None, typer.Option(help="Network to compare with: a trial's number, an architecture or a timm model")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show the layers of each block, too")] = False,
    again: Again = False,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder for the plots, as PNG and SVG")] = None,
) -> None:
    """Show where a network's time goes: each part's operations, bytes, ideal and measured time, and efficiency."""
    with reported(storage):
        from nas.latency.analysis import analyse
        from nas.latency.analysis_table import analysis_lines, analysis_table
        from nas.latency.devices import check_device
        from nas.latency.subjects import choose

        named = {"--trial": trial, "--arch": arch, "--timm": timm}
        chosen = [(flag, value) for flag, value in named.items() if value is not None]
        if len(chosen) != 1:
            raise UsageError(f"analyze: give one of {', '.join(named)}" + (", not several" if chosen else ""))
        if out_dir is not None:
            require_folder("--out", out_dir)
        with store_if_any(storage) as found:
            subjects = choose(found, study, chosen[0], against, given(LatencyConfig, context))
        for subject in subjects:
            check_device(subject.config)
        with writable_store(storage) as store:
            try:
                analyses = [analyse(store, subject, note, again=again, by_layer=layers) for subject in subjects]
            except CandidateFailed as error:
                raise UsageError(f"analyze: {error}") from error
        for analysis in analyses:
            out.print(analysis_table(analysis, out.width))
            for line in analysis_lines(analysis):
                say(line)
            out.print()
        if out_dir is not None:
            try:
                drawn = _draw(analyses, out_dir)
            except OSError as error:
                raise UsageError(f"--out {out_dir}: cannot be written ({error.strerror or error})") from error
            for path in drawn:
                note(f"drawn: {path}")


def _draw(analyses: Sequence[Analysis], folder: Path) -> list[Path]:
    """Write the plots of one or two networks, as PNG and SVG; returns the files."""
    from nas.display.efficiency_plots import plot_efficiency_gap, plot_waterline

    networks = [analysis.efficiency for analysis in analyses]
    names = []
    with folder_for(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".plots-") as aside:
        for name, plot in (("efficiency_gap", plot_efficiency_gap), ("waterline", plot_waterline)):
            for suffix in (".png", ".svg"):
                names.append(f"{name}{suffix}")
                plot(networks, Path(aside) / names[-1])
        for name in names:
            os.replace(Path(aside) / name, folder / name)
    return [folder / name for name in names]
