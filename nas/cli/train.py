"""`train`: found networks, trained to the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nas.cli.console import interruptible, note, out, reported, say
from nas.cli.opening import existing_study, require_folder
from nas.cli.options import Storage, StudyName, given, made, takes, typed_options
from nas.config import DEFAULT_STORAGE, DEFAULT_STUDY, Limits
from nas.errors import CandidateFailed, UsageError
from nas.final_training.config import FinalConfig
from nas.options import options

if TYPE_CHECKING:
    from nas.export.directories import Exported
    from nas.final_training.fit import Epoch, Within
    from nas.recorded import RecordedStudy

WHICH = "Which networks"


@takes(FinalConfig)
def train(
    context: typer.Context,
    directory: Annotated[
        Path | None, typer.Argument(help="An exported network (default: one of the study)", show_default=False)
    ] = None,
    trial: Annotated[
        list[int] | None,
        typer.Option(
            help="Number of a trial to train; may be repeated (default: what `recommend` names)",
            show_default=False,
            rich_help_panel=WHICH,
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of the front's networks to train, the most accurate",
            show_default=False,
            rich_help_panel=WHICH,
        ),
    ] = None,
    max_latency_ms: Annotated[
        float | None,
        typer.Option(
            help="Limit on the latency of what is trained (default: the study's)",
            show_default=False,
            rich_help_panel=WHICH,
        ),
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder of the exported directories")] = Path("exports"),
    storage: Storage = DEFAULT_STORAGE,
    study: StudyName = DEFAULT_STUDY,
) -> None:
    """Train found networks to the end, on the search's own images, and leave a directory that can be deployed.

    The same command goes on after an interruption. By default it trains the network that `recommend` names.

    \b
    Examples:
      run_search.py train --study photos --hours 1
      run_search.py train exports/convfirst_0p33ms_t009
    """
    with interruptible(), reported(storage):
        from nas.final_training.train import train as train_to_the_end

        config = made(FinalConfig, given(FinalConfig, context))
        # The bounds are those of the search's own limit.
        made(Limits, {"latency_ms": max_latency_ms})
        if directory is not None:
            own = {option.flag.partition("/")[0] for option in options(FinalConfig).values()}
            for flag in typed_options(context):
                if flag != "directory" and flag not in own:
                    raise UsageError(f"{flag}: is for networks of a study, not for {directory}")
            folders = [directory]
        else:
            require_folder("--out", out_dir)
            with existing_study(storage, study) as recorded:
                networks = _chosen(recorded, storage, trial, top, max_latency_ms)
            folders = [_exported(network, out_dir) for network in networks]
        failed = []
        for folder in folders:
            try:
                done = train_to_the_end(folder, config, note, _told, _told_within)
            except CandidateFailed as error:
                # The others are trained all the same.
                failed.append(f"{folder}: cannot be trained ({error})")
                continue
            say(str(done))
            if done.failed:
                failed.append(done.failed)
                continue
            say(f"what is on a photo: python {folder / 'classify.py'} PHOTO ...")
        if failed:
            raise UsageError("; ".join(failed))


def _chosen(
    recorded: RecordedStudy, storage: str, trial: list[int] | None, top: int | None, max_latency_ms: float | None
) -> list[Exported]:
    """The networks of a study that are to be trained."""
    from nas.export.directories import chosen, of_study
    from nas.export.selection import Selection
    from nas.recommendation import recommend

    if trial or top is not None:
        selection = made(Selection, {"trials": tuple(trial or ()), "top": top, "max_latency_ms": max_latency_ms})
    else:
        selection = Selection(trials=(recommend(recorded, max_latency_ms).chosen.number,))
    return of_study(recorded, storage, chosen(recorded, selection))


def _exported(network: Exported, out_dir: Path) -> Path:
    """The directory of a network, which is written if it is not there.

    Raises:
        UsageError: another network is there.
    """
    from nas.export.directories import CONFIG, SECTION, read, same_network, write

    # After another measurement, its name would be another.
    number = network.config[SECTION]["study"]["trial"]
    for place in sorted(out_dir.glob(f"*_t{number:03d}")):
        if (place / CONFIG).exists() and same_network(read(place), network):
            return place
    place = out_dir / network.name
    if (place / CONFIG).exists():
        raise UsageError(f"--out {out_dir}: {place} holds another study's network; use another folder")
    return write([network], out_dir, force=True, note=note)[0]


def _told(epoch: Epoch, epochs: int) -> None:
    """Print the course of a training."""
    from nas.display.notes import duration

    left = epoch.seconds / epoch.number * (epochs - epoch.number)
    accuracy = "" if epoch.accuracy is None else f"  accuracy {epoch.accuracy:.2%}"
    out.print(
        f"{epoch.number}/{epochs}  loss {epoch.train_loss:.3f}{accuracy}  rate {epoch.learning_rate:.2g}  "
        f"{duration(epoch.seconds)}, {duration(left)} left"
    )


def _told_within(within: Within, epochs: int) -> None:
    """Print the course of an epoch."""
    from nas.display.notes import duration

    done = within.number - 1 + within.step / within.steps
    left = within.seconds / done * (epochs - done)
    out.print(
        f"{within.number}/{epochs}  step {within.step:,} of {within.steps:,}  loss {within.train_loss:.3f}  "
        f"rate {within.learning_rate:.2g}  {duration(within.seconds)}, {duration(left)} left"
    )
