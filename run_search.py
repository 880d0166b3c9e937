"""Hardware-aware search for ConvFirst networks: `python run_search.py --budget 200`."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from nas.config import AUTO, DEFAULT_STORAGE, DEFAULT_STUDY, Dtype, Sampler

if TYPE_CHECKING:
    import pandas as pd

    from nas.config import LatencyConfig, SearchConfig
    from studies import Store

app = typer.Typer(add_completion=False, no_args_is_help=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
# In a pipe or a file there is no edge at which lines would have to be broken.
WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
# Brackets and colons in names and paths are the user's own.
out = Console(markup=False, emoji=False, width=WIDTH)
err = Console(stderr=True, markup=False, emoji=False)


class Format(StrEnum):
    TABLE = "table"
    CSV = "csv"
    JSON = "json"


# What several commands share: a deployment, of which a study's is the default where there is a study.
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", rich_help_panel="Deployment")]
EngineOption = Annotated[
    str, typer.Option("--engine", help="auto, fused, eager, torchscript or compile.", rich_help_panel="Deployment")
]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="auto is float16 on CUDA, else float32.", rich_help_panel="Deployment")
]
BatchOption = Annotated[
    int | None,
    typer.Option("--latency-batch", help="Images; by default 1, or the study's.", rich_help_panel="Deployment"),
]
ResolutionOption = Annotated[
    int | None,
    typer.Option("--latency-resolution", help="Pixels; by default the network's own.", rich_help_panel="Deployment"),
]
ClassesOption = Annotated[
    int | None,
    typer.Option(
        "--latency-classes",
        help="By default 10, with total stride 32 and of timm models 1000; or the study's.",
        rich_help_panel="Deployment",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--latency-threads", help="CPU threads; by default 1, or the study's.", rich_help_panel="Deployment"),
]
PrecisionOption = Annotated[
    float | None,
    typer.Option(
        "--latency-precision", help="Share of the median that its 95 % interval may be wide; 0.05, on CUDA 0.02.",
        rich_help_panel="Deployment",
    ),
]  # fmt: skip
SecondsOption = Annotated[
    float | None,
    typer.Option("--latency-seconds", help="Sampling ends then all the same; 3.", rich_help_panel="Deployment"),
]

Storage = Annotated[
    str,
    typer.Option(
        help="URL of the study database: SQLite or PostgreSQL, as SQLAlchemy writes it.", rich_help_panel="Study"
    ),
]
StudyName = Annotated[str, typer.Option("--study", help="Name of the study in that database.", rich_help_panel="Study")]


@app.callback(invoke_without_command=True)
def search(
    context: typer.Context,
    budget: Annotated[
        int,
        typer.Option(
            help="Stop when the study holds so many distinct architectures, trained and timed.",
            rich_help_panel="Search",
        ),
    ] = 200,
    time_limit: Annotated[
        float | None, typer.Option(help="Begin no candidate after so many seconds.", rich_help_panel="Search")
    ] = None,
    sampler: Annotated[
        Sampler, typer.Option(help="Which of Optuna's samplers proposes candidates.", rich_help_panel="Search")
    ] = Sampler.TPE,
    seed: Annotated[int, typer.Option(help="Seed of proposals and trainings.", rich_help_panel="Search")] = 0,
    space: Annotated[
        str,
        typer.Option(
            help="Search space: small, imagenet, or a TOML file of your own (see `space`).", rich_help_panel="Search"
        ),
    ] = "small",
    storage: Storage = DEFAULT_STORAGE,
    study: StudyName = DEFAULT_STUDY,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over", help="Go on with a study that a machine which is gone left claimed.", rich_help_panel="Study"
        ),
    ] = False,
    data: Annotated[
        str,
        typer.Option(
            help="Images: digits (embedded), cifar10, cifar100, a folder with a subfolder a class, or timm's name "
            "of a data set, such as torch/mnist.",
            rich_help_panel="Data and training",
        ),
    ] = "digits",
    data_dir: Annotated[
        str, typer.Option(help="Folder of CIFAR's and timm's files.", rich_help_panel="Data and training")
    ] = "data",
    download: Annotated[
        bool, typer.Option("--download", help="Download CIFAR or timm's data.", rich_help_panel="Data and training")
    ] = False,
    to_rgb: Annotated[
        bool,
        typer.Option(
            "--to-rgb",
            help="Convert images that are not RGB; else they are refused.",
            rich_help_panel="Data and training",
        ),
    ] = False,
    resolution: Annotated[
        int | None,
        typer.Option(
            help="Train on images of so many pixels square; by default the space's.",
            rich_help_panel="Data and training",
        ),
    ] = None,
    proxy_steps: Annotated[
        int, typer.Option(help="Steps of a candidate's training.", rich_help_panel="Data and training")
    ] = 200,
    proxy_batch: Annotated[
        int, typer.Option(help="Batch of a candidate's training.", rich_help_panel="Data and training")
    ] = 32,
    proxy_lr: Annotated[
        float, typer.Option(help="Peak of its learning rate.", rich_help_panel="Data and training")
    ] = 8e-3,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Train with so many CPU threads; by default all, up to 4.", rich_help_panel="Data and training"
        ),
    ] = None,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Make trainings on CUDA repeatable; a new study says what that costs.",
            rich_help_panel="Data and training",
        ),
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            help="Train and measure on cpu, cuda or cuda:N; auto is cuda where there is one.", rich_help_panel="Latency"
        ),
    ] = AUTO,
    engine: Annotated[
        str,
        typer.Option(
            help="Deploy with fused, eager, torchscript or compile; auto is fused on CUDA, torchscript on a CPU.",
            rich_help_panel="Latency",
        ),
    ] = AUTO,
    dtype: Annotated[
        Dtype,
        typer.Option(help="Deploy in this type; auto is float16 on CUDA, else float32.", rich_help_panel="Latency"),
    ] = Dtype.AUTO,
    latency_batch: Annotated[
        int, typer.Option(help="Deploy with so many images a batch.", rich_help_panel="Latency")
    ] = 1,
    latency_resolution: Annotated[
        int | None,
        typer.Option(
            help="Deploy on images of so many pixels square; by default the training's.", rich_help_panel="Latency"
        ),
    ] = None,
    latency_classes: Annotated[
        int | None,
        typer.Option(
            help="Deploy with so many classes; by default a folder's or CIFAR's, else 10, in the imagenet space 1000.",
            rich_help_panel="Latency",
        ),
    ] = None,
    latency_threads: Annotated[int, typer.Option(help="Deploy on so many CPU threads.", rich_help_panel="Latency")] = 1,
    latency_precision: Annotated[
        float | None,
        typer.Option(
            help="Measure until the median's 95 % interval is no wider than this share of it; 0.05, on CUDA 0.02.",
            rich_help_panel="Latency",
        ),
    ] = None,
    latency_seconds: Annotated[
        float, typer.Option(help="Measure for no longer than so many seconds.", rich_help_panel="Latency")
    ] = 3.0,
    block_table: Annotated[
        bool,
        typer.Option(
            "--block-table",
            help="Measure the blocks of every candidate by themselves, not only the front's.",
            rich_help_panel="Latency",
        ),
    ] = False,
    keep_weights: Annotated[
        bool,
        typer.Option(
            "--keep-weights", help="Keep the front's weights as trained here, for `export`.", rich_help_panel="Study"
        ),
    ] = False,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="Latency of a batch; what is slower is not trained.", rich_help_panel="Limits")
    ] = None,
    max_params: Annotated[int | None, typer.Option(help="Parameters.", rich_help_panel="Limits")] = None,
    max_macs: Annotated[
        int | None, typer.Option(help="Multiply-accumulates of one image.", rich_help_panel="Limits")
    ] = None,
    max_memory_mb: Annotated[
        float | None, typer.Option(help="Memory of inference: weights and peak workspace.", rich_help_panel="Limits")
    ] = None,
) -> None:
    """Search for the Pareto front of accuracy and latency; the same command goes on where it was stopped.

    \b
    Examples:
      run_search.py --budget 200
      run_search.py --data photos --resolution 64 --max-latency-ms 2 --study photos --keep-weights
      run_search.py --space imagenet --data /data/imagenet --to-rgb --resolution 128 --latency-resolution 224
    """
    if context.invoked_subcommand:
        if given := _given_options(context):
            _fail(f"{given[0]}: belongs after the command: run_search.py {context.invoked_subcommand} {given[0]} ...")
        return
    with _interruptible(), _reported(storage):
        # Importing torch takes seconds, in which Ctrl-C may come, too.
        config = _config(**{name: value for name, value in context.params.items() if name != "take_over"})
        _run(config, take_over)


@app.command()
def pareto(
    storage: Storage = DEFAULT_STORAGE,
    study: StudyName = DEFAULT_STUDY,
    format: Annotated[Format, typer.Option(help="How to print it.")] = Format.TABLE,
    plot: Annotated[Path | None, typer.Option(help="Draw it, too: a PNG, SVG or PDF file.")] = None,
) -> None:
    """Print a study's Pareto front, now."""
    with _reported(storage), _opened(storage, study) as store:
        front = store.front(study)
        if plot is not None:
            _plot_front(store.evaluations(study), front, study, plot)
        if format is Format.CSV:
            sys.stdout.write(front.to_csv(index=False))
        elif format is Format.JSON:
            sys.stdout.write(front.to_json(orient="records", indent=2) + "\n")
        else:
            _print_front(front, f"Pareto front of {study}")


@app.command()
def studies(
    storage: Storage = DEFAULT_STORAGE,
    study: Annotated[str | None, typer.Option("--study", help="List only this one.", rich_help_panel="Study")] = None,
) -> None:
    """List the studies of a database."""
    with _reported(storage), _opened(storage, study) as store:
        table = Table(*("study", "complete", "over limit", "failed", "device", "engine", "begun (UTC)"))
        for row in store.summaries():
            if study not in (None, row.name):
                continue
            counts = (row.complete, row.over_limit, row.failed)
            table.add_row(row.name, *map(str, counts), row.device, row.engine, row.created_at)
        out.print(table)


@app.command()
def dashboard(
    storage: Storage = DEFAULT_STORAGE,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own let others in.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="By default a free one.")] = 0,
    artifacts: Annotated[
        Path | None, typer.Option(help="Folder of the trials' files; by default next to the database.")
    ] = None,
) -> None:
    """Open the Optuna dashboard on a study database, also while a search runs."""
    with _reported(storage):
        from nas.display.showcase import show
        from nas.report.dashboard import Server
        from studies import StorageError
        from studies.display import artifact_folder

        folder = artifact_folder(storage) if artifacts is None else artifacts
        _require_folder("--artifacts", folder)
        with _opened(storage) as store:
            server = Server(store, folder, host, port)
            for summary in store.summaries():
                try:
                    made = show(store, summary.name, folder)
                    out.print(f"{summary.name}: {made} files of its front made", highlight=False)
                except StorageError as error:
                    # A file that is read-only, say: what is there can be looked at.
                    err.print(f"{summary.name}: not brought up to date ({error})", highlight=False)
            server.warm_up()
            out.print(f"dashboard: {server.url} (Ctrl-C ends it)", highlight=False, soft_wrap=True)
            # As Ctrl-C does.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            server.run()


@app.command()
def report(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the page and its figures.")],
    storage: Storage = DEFAULT_STORAGE,
    study: StudyName = DEFAULT_STUDY,
) -> None:
    """Make a study's report: one HTML file to hand around, and its main figures as PNGs."""
    with _reported(storage):
        _require_folder("--out", out_dir)
        with _opened(storage, study) as store:
            from nas.report.page import write_report
            from nas.validation.baselines import contenders, verdict

            found = contenders(store, study)
            for path in write_report(store, study, storage, out_dir, found, verdict(found)):
                out.print(f"made: {path}", highlight=False, soft_wrap=True)


@app.command()
def baselines(
    storage: Storage = DEFAULT_STORAGE,
    study: StudyName = DEFAULT_STUDY,
    models: Annotated[
        str | None,
        typer.Option(help="timm models, separated by commas, or all; by default those that suit the device."),
    ] = None,
    found: Annotated[int, typer.Option(help="Members of the front, from the fastest to the most accurate.")] = 3,
    steps: Annotated[int | None, typer.Option(help="Of training; by default 4 times the study's.")] = None,
    learning_rates: Annotated[
        str | None,
        typer.Option(help="Of which the best counts, separated by commas; by default 1/8, 1/2 and 2 of the study's."),
    ] = None,
    map_size: Annotated[
        int | None,
        typer.Option(
            "--map",
            help="Pixels across of the final map of networks that are not ours; the study's, on a CPU half of it.",
        ),
    ] = None,
    data_dir: Annotated[str, typer.Option(help="Folder of CIFAR's and timm's files.")] = "data",
    download: Annotated[bool, typer.Option("--download", help="Download CIFAR or timm's data.")] = False,
) -> None:
    """Train and measure known networks beside a study's own, and say what the found ones are worth."""
    with _interruptible(), _reported(storage), _opened(storage, study, write=True) as store:
        from nas.validation import baselines as known

        flags = {
            "models": ("--models", models), "found": ("--found", found), "steps": ("--steps", steps),
            "learning_rates": ("--learning-rates", learning_rates), "map_size": ("--map", map_size),
        }  # fmt: skip
        config = _checked(
            known.BaselineConfig, flags, models=known.names(models), found=found, steps=steps,
            learning_rates=known.rates(learning_rates), map_size=map_size, data_dir=data_dir, download=download,
        )  # fmt: skip
        known.compare(store, study, config, _note)
        compared = known.contenders(store, study)
        out.print(known.table(compared, f"Baselines of {study}"))
        for line in (*known.training_lines(compared), *known.failures(store, study), *known.verdict(compared)):
            out.print(line, highlight=False, soft_wrap=True)


@app.command()
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
    with _reported(storage):
        from nas.errors import UsageError
        from nas.export import directories as exports
        from nas.export.formats import makers

        formats = makers(_formats(format), _note)
        if directory is not None:
            of_studies = [
                flag for flag in _given_options(context) if flag not in ("directory", "--format", "--checkpoint")
            ]
            if of_studies:
                raise UsageError(f"{of_studies[0]}: is for networks of a study, not for {directory}")
            if checkpoint is None and not formats:
                raise UsageError(f"{directory}: nothing to do (--checkpoint, or a --format of onnx or torch-export)")
            network = exports.read(directory)
            if checkpoint is not None:
                network = exports.trained(network, checkpoint)
            exports.rewrite(directory, network, formats, _note)
            written = [directory]
        else:
            if checkpoint is not None:
                raise UsageError(f"--checkpoint {checkpoint}: belongs to one DIRECTORY that was exported before")
            flags = {
                "top": ("--top", top), "max_latency_ms": ("--max-latency-ms", max_latency_ms),
                "min_accuracy": ("--min-accuracy", min_accuracy),
            }  # fmt: skip
            selection = _checked(
                exports.Selection, flags, trials=tuple(trial or ()), top=top, max_latency_ms=max_latency_ms,
                min_accuracy=min_accuracy,
            )  # fmt: skip
            _require_folder("--out", out_dir)
            with _opened(storage, study) as store:
                row = store.find_study(study)
                assert row is not None
                rows = exports.chosen(store, row, study, selection)
                networks = exports.of_study(store, row, study, storage, rows)
            written = exports.write(networks, out_dir, formats, force)
            if all(network.weights is None for network in networks):
                _note(
                    f"no weights, the search kept none (--keep-weights); the classifiers are the deployment's, of "
                    f"{networks[0].num_classes} classes: train.py takes another --num-classes"
                )
        for path in written:
            out.print(str(path), highlight=False, soft_wrap=True)


@app.command()
def bench(
    context: typer.Context,
    directories: Annotated[list[Path], typer.Argument(help="Exported networks.", show_default=False)],
    device: DeviceOption = AUTO,
    dtype: DtypeOption = Dtype.AUTO,
    latency_batch: Annotated[
        int | None, typer.Option(help="Images; by default as exported.", rich_help_panel="Deployment")
    ] = None,
    latency_resolution: ResolutionOption = None,
    latency_threads: Annotated[
        int | None, typer.Option(help="CPU threads; by default as exported.", rich_help_panel="Deployment")
    ] = None,
    latency_precision: PrecisionOption = None,
    latency_seconds: SecondsOption = None,
) -> None:
    """Measure exported networks on this machine, in every format that runs here."""
    with _reported(str(directories[0])):
        from nas.errors import CandidateFailed, UsageError
        from nas.export import bench as benches
        from nas.export.directories import read

        networks = [(folder, read(folder)) for folder in directories]
        told = networks[0][1].deployment
        config = _deployment(told, **{"device": benches.device_here(told.device), **_given(context)})
        try:
            rows = benches.bench(networks, config, _note)
        except CandidateFailed as error:
            raise UsageError(f"bench: {error}") from error
        where = f"{config.device}, batch {config.batch_size}, {config.resolution}x{config.resolution}"
        for table in benches.tables(rows, f"{where}, {config.threads} CPU thread(s)"):
            out.print(table)
            out.print()
        for line in benches.remarks(rows):
            out.print(line, highlight=False, soft_wrap=True)


@app.command()
def retrain(
    storage: Storage = DEFAULT_STORAGE,
    study: StudyName = DEFAULT_STUDY,
    top: Annotated[int | None, typer.Option(help="The front's so many most accurate; by default all of it.")] = None,
    dominated: Annotated[int, typer.Option(help="Candidates off the front, spread over the latencies.")] = 20,
    steps: Annotated[int | None, typer.Option(help="Of training; by default 4 times the study's.")] = None,
    data: Annotated[str | None, typer.Option(help="Other data than the study's, named as for the search.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels; by default the study's.")] = None,
    data_dir: Annotated[str, typer.Option(help="Folder of CIFAR's and timm's files.")] = "data",
    download: Annotated[bool, typer.Option("--download", help="Download CIFAR or timm's data.")] = False,
    to_rgb: Annotated[
        bool, typer.Option("--to-rgb", help="Convert images that are not RGB; else they are refused.")
    ] = False,
) -> None:
    """Train the front and some it left behind for longer, and say how well the search ranked them."""
    with _interruptible(), _reported(storage), _opened(storage, study, write=True) as store:
        from nas.validation import retrain as retraining

        flags = {
            "top": ("--top", top), "dominated": ("--dominated", dominated), "steps": ("--steps", steps),
            "resolution": ("--resolution", resolution),
        }  # fmt: skip
        config = _checked(
            retraining.RetrainConfig, flags, top=top, dominated=dominated, steps=steps, data=data,
            resolution=resolution, data_dir=data_dir, download=download, to_rgb=to_rgb,
        )  # fmt: skip
        found = retraining.retrain(store, study, config, _note)
        out.print(found.set_up, highlight=False, soft_wrap=True)
        for table in retraining.tables(found, f"Longer trainings of {study}"):
            out.print(table)
            out.print()
        for line in retraining.remarks(found):
            out.print(line, highlight=False, soft_wrap=True)


@app.command()
def space(
    name: Annotated[str, typer.Argument(help="small, imagenet, or a TOML file.")] = "small",
    classes: Annotated[int, typer.Option(help="Of the classifier that is counted in.")] = 10,
    resolution: Annotated[int | None, typer.Option(help="Pixels; by default the space's.")] = None,
) -> None:
    """Print a search space: its choices, what is excluded, how many architectures, and what they cost."""
    with _reported(name):
        from nas.errors import UsageError
        from search_spaces import load_space

        try:
            loaded = load_space(name)
        except ValueError as error:
            raise UsageError(f"space {error}") from error
        if classes < 1:
            raise UsageError(f"--classes {classes}: not at least 1")
        if resolution is not None and resolution < 8:
            raise UsageError(f"--resolution {resolution}: not at least 8 pixels")
        pixels = resolution or loaded.resolution
        table = Table("parameter", "choices", title=f"{loaded.name}: {loaded.description}", title_justify="left")
        for parameter, choices in loaded.choices().items():
            table.add_row(parameter, "  ".join(f"{c:g}" if isinstance(c, float) else str(c) for c in choices))
        out.print(table)
        low, high = loaded.cost_range(pixels, classes)
        for line in loaded.exclusions():
            out.print(f"excluded: {line}", highlight=False)
        out.print(f"architectures: {loaded.size():,}", highlight=False)
        out.print(f"params: {low.params:,} to {high.params:,} ({classes} classes)", highlight=False)
        out.print(f"MACs:   {low.macs:,} to {high.macs:,} (one image of {pixels}x{pixels})", highlight=False)
        out.print(f"anchor: {loaded.anchor()}", highlight=False, soft_wrap=True)


@app.command()
def device(
    context: typer.Context,
    storage: Storage = DEFAULT_STORAGE,
    device: DeviceOption = AUTO,
    dtype: DtypeOption = Dtype.AUTO,
    latency_threads: ThreadsOption = None,
    again: Annotated[bool, typer.Option("--again", help="Measure it also where it was measured before.")] = False,
) -> None:
    """Measure what a device can do, once, and print it: bandwidth, matrix rate, launch overhead."""
    with _reported(storage):
        from nas.latency import ceilings as profile
        from nas.locks import WAITING
        from nas.search.evaluation import check_device

        # Any engine will do: none runs.
        config = _deployment(**{**_given(context), "engine": "eager"})
        check_device(config)
        with _made(storage) as store:
            profile.find_or_measure(store, config, again, partial(_note, WAITING))
            for line in profile.lines(store.profiles()):
                out.print(line, highlight=False, soft_wrap=True)


@app.command()
def remeasure(
    context: typer.Context,
    storage: Storage = DEFAULT_STORAGE,
    study: StudyName = DEFAULT_STUDY,
    everything: Annotated[bool, typer.Option("--all", help="All complete candidates, not the front only.")] = False,
    device: Annotated[
        str | None, typer.Option(help="By default the study's, as all that follows.", rich_help_panel="Deployment")
    ] = None,
    engine: Annotated[str | None, typer.Option(rich_help_panel="Deployment")] = None,
    dtype: Annotated[Dtype | None, typer.Option(rich_help_panel="Deployment")] = None,
    latency_batch: BatchOption = None,
    latency_threads: ThreadsOption = None,
    latency_precision: PrecisionOption = None,
    latency_seconds: SecondsOption = None,
) -> None:
    """Measure a study's front again, in turns; with other settings all candidates, as a second latency of theirs."""
    with _reported(storage), _opened(storage, study, write=True) as store:
        from nas.display.plots import deployment_line
        from nas.search.progress import front_table
        from nas.validation import remeasure as again

        given = _given(context)
        flags = {name: (DEPLOYMENT_FLAGS[name], value) for name, value in given.items()}
        note = partial(out.print, highlight=False, soft_wrap=True)
        # Only what the flags say is theirs to answer for.
        planned = _checked(again.plan, flags, store=store, name=study, changes=given)
        done = again.remeasure(store, study, planned, everything, note)
        if done is None:
            out.print("The front is empty: nothing was measured.")
            return
        front = again.of_deployment(store.front(study), done.config, done.device_id)
        if front.empty:
            out.print("The front is empty now.")
        else:
            out.print(front_table(front, f"Pareto front of {study}\n{deployment_line(front.iloc[0])}"))
        note(str(done))


@app.command()
def analyze(
    context: typer.Context,
    storage: Storage = DEFAULT_STORAGE,
    study: StudyName = DEFAULT_STUDY,
    trial: Annotated[int | None, typer.Option(help="A candidate of the study.")] = None,
    arch: Annotated[str | None, typer.Option(help="An architecture's line, or its JSON.")] = None,
    timm: Annotated[str | None, typer.Option(help="A timm model, by its layers.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Beside it another: a trial's number, an architecture or a timm model.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show the layers of each block, too.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure all of it anew.")] = False,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder for the plots, PNG and SVG.")] = None,
    device: DeviceOption = AUTO,
    engine: EngineOption = AUTO,
    dtype: DtypeOption = Dtype.AUTO,
    latency_batch: BatchOption = None,
    latency_resolution: ResolutionOption = None,
    latency_classes: ClassesOption = None,
    latency_threads: ThreadsOption = None,
    latency_precision: PrecisionOption = None,
    latency_seconds: SecondsOption = None,
) -> None:
    """Show where a network's time goes: each part's operations, bytes, ideal and measured time, and efficiency."""
    with _reported(storage):
        from nas.errors import CandidateFailed, UsageError
        from nas.latency.analysis import analyse, choose, draw
        from nas.search.evaluation import check_device

        given = _given(context)
        named = {"--trial": trial, "--arch": arch, "--timm": timm}
        chosen = [(flag, value) for flag, value in named.items() if value is not None]
        if len(chosen) != 1:
            raise UsageError(f"analyze: give one of {', '.join(named)}" + (", not several" if chosen else ""))
        if out_dir is not None:
            _require_folder("--out", out_dir)
        with _found(storage) as found:
            subjects = choose(found, study, chosen[0], against, given, _deployment)
        for subject in subjects:
            check_device(subject.config)
        with _made(storage) as store:
            try:
                analyses = [analyse(store, subject, _note, again=again, by_layer=layers) for subject in subjects]
            except CandidateFailed as error:
                raise UsageError(f"analyze: {error}") from error
        for analysis in analyses:
            out.print(analysis.table(out.width))
            for line in analysis.lines():
                out.print(line, highlight=False, soft_wrap=True)
            out.print()
        if out_dir is not None:
            for path in draw(analyses, out_dir):
                err.print(f"drawn: {path}", highlight=False, soft_wrap=True)


@app.command()
def latency(
    context: typer.Context,
    arch: Annotated[str, typer.Option(help="An architecture's line, or its JSON.")],
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure what the block latency table lacks of it.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure all of it anew.")] = False,
    storage: Storage = DEFAULT_STORAGE,
    device: DeviceOption = AUTO,
    engine: EngineOption = AUTO,
    dtype: DtypeOption = Dtype.AUTO,
    latency_batch: BatchOption = None,
    latency_resolution: ResolutionOption = None,
    latency_classes: ClassesOption = None,
    latency_threads: ThreadsOption = None,
    latency_precision: PrecisionOption = None,
    latency_seconds: SecondsOption = None,
) -> None:
    """An architecture's latency by the block latency table, at once: what it adds up to, and what is missing."""
    with _reported(storage):
        from nas.errors import CandidateFailed, UsageError
        from nas.latency.analysis import analyse, choose, table_lines
        from nas.search.evaluation import check_device

        (subject,) = choose(None, DEFAULT_STUDY, ("--arch", arch), None, _given(context), _deployment)
        check_device(subject.config)
        measure = measure or again
        with _made(storage) if measure else _opened(storage) as store:
            if measure:
                try:
                    analyse(store, subject, _note, again=again)
                except CandidateFailed as error:
                    raise UsageError(f"--arch {arch}: {error}") from error
            for line in table_lines(store, subject):
                out.print(line, highlight=False, soft_wrap=True)


# -- helpers -------------------------------------------------------------------------------------------------------


def _checked(make: Any, names: dict[str, tuple[str, Any]], /, **fields: Any) -> Any:
    """A value of these fields; what it refuses is told by the flag that the user typed."""
    from nas.errors import UsageError

    try:
        return make(**fields)
    except ValueError as error:
        # "budget=0 is not at least 1" is the value's own word.
        field, _, rest = str(error).partition("=")
        flag, value = names[field]
        raise UsageError(f"{flag} {value}: {rest.partition(' ')[2]}") from error


def _formats(named: list[str] | None) -> list[Any]:
    """The formats that a user typed, of which several may stand in one word."""
    from nas.errors import UsageError
    from nas.export.formats import Format

    words = [word.strip() for text in named or () for word in text.split(",") if word.strip()]
    for word in words:
        if word not in set(Format):
            raise UsageError(f"--format {word}: none of {', '.join(Format)}")
    return [Format(word) for word in words]


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """For work of which all that is finished is kept. A polite kill, as schedulers and containers send it, ends it as
    Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        err.print("Interrupted. What was finished is kept; the same command goes on from there.", highlight=False)
        sys.stdout.flush()
        # Not sys.exit: worker threads of torch and OpenMP may take seconds to be joined.
        os._exit(130)


def _note(line: str) -> None:
    """Progress, beside what a command prints."""
    err.print(line, highlight=False, soft_wrap=True)


def _require_folder(flag: str, folder: Path) -> None:
    """Raises UsageError where a folder is none, or could not be made or written to; makes nothing."""
    from nas.errors import UsageError

    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise UsageError(f"{flag} {folder}: {existing} is not a folder")
    if not os.access(existing, os.W_OK):
        raise UsageError(f"{flag} {folder}: the folder {existing} is read-only")


def _given(context: typer.Context) -> dict[str, Any]:
    """The fields of a deployment that the command's flags give; not those left out, or left to `auto`."""
    found = {}
    for field, flag in DEPLOYMENT_FLAGS.items():
        value = context.params.get(flag.removeprefix("--").replace("-", "_"))
        if value is not None and value != AUTO:
            found[field] = str(value) if isinstance(value, StrEnum) else value
    return found


# Field of LatencyConfig -> flag.
DEPLOYMENT_FLAGS = {
    "device": "--device", "engine": "--engine", "dtype": "--dtype", "batch_size": "--latency-batch",
    "resolution": "--latency-resolution", "num_classes": "--latency-classes", "threads": "--latency-threads",
    "precision": "--latency-precision", "seconds": "--latency-seconds",
}  # fmt: skip


def _deployment(base: LatencyConfig | None = None, **given: Any) -> LatencyConfig:
    """A deployment of the flags that were given, and what they leave open: `base`'s, or the defaults."""
    from nas.config import LatencyConfig, moved

    fields = {name: value for name, value in given.items() if value is not None}
    names = {name: (flag, given.get(name)) for name, flag in DEPLOYMENT_FLAGS.items()}
    config: LatencyConfig = _checked(LatencyConfig if base is None else partial(moved, base), names, **fields)
    return config


def _config(
    *, budget: int, time_limit: float | None, sampler: Sampler, seed: int, space: str, storage: str, study: str,
    data: str, data_dir: str, download: bool, to_rgb: bool, resolution: int | None, proxy_steps: int, proxy_batch: int,
    proxy_lr: float, threads: int | None, deterministic: bool, device: str, engine: str, dtype: Dtype,
    latency_batch: int, latency_resolution: int | None, latency_classes: int | None, latency_threads: int,
    latency_precision: float | None, latency_seconds: float, block_table: bool, keep_weights: bool,
    max_latency_ms: float | None, max_params: int | None, max_macs: int | None, max_memory_mb: float | None,
) -> SearchConfig:  # fmt: skip
    """The flags as one value, with what they leave open filled in."""
    from nas.config import DataConfig, LatencyConfig, Limits, ProxyConfig, SearchConfig, default_threads
    from nas.errors import UsageError
    from nas.training.data import class_count
    from search_spaces import load_space

    flags = {
        "budget": ("--budget", budget), "time_limit": ("--time-limit", time_limit), "seed": ("--seed", seed),
        "study": ("--study", study), "resolution": ("--resolution", resolution),
        "steps": ("--proxy-steps", proxy_steps),
        "batch_size": ("--proxy-batch", proxy_batch), "learning_rate": ("--proxy-lr", proxy_lr),
        "threads": ("--threads", threads), "latency_ms": ("--max-latency-ms", max_latency_ms),
        "params": ("--max-params", max_params), "macs": ("--max-macs", max_macs),
        "memory_mb": ("--max-memory-mb", max_memory_mb),
    }  # fmt: skip
    latency_flags = {
        "batch_size": ("--latency-batch", latency_batch), "resolution": ("--latency-resolution", latency_resolution),
        "num_classes": ("--latency-classes", latency_classes), "threads": ("--latency-threads", latency_threads),
        "precision": ("--latency-precision", latency_precision), "seconds": ("--latency-seconds", latency_seconds),
    }  # fmt: skip

    try:
        loaded = load_space(space)
    except ValueError as error:
        raise UsageError(f"--space {error}") from error
    pixels = loaded.resolution if resolution is None else resolution
    images = _checked(
        DataConfig, flags, source=data, resolution=pixels, data_dir=data_dir, download=download, to_rgb=to_rgb
    )
    # The embedded digits stand for whatever the network will be for.
    known = None if space == "imagenet" and data == "digits" else class_count(images)
    classes = known or (1000 if space == "imagenet" else 10)
    proxy = dict(
        steps=proxy_steps, batch_size=proxy_batch, learning_rate=proxy_lr, deterministic=deterministic,
        threads=default_threads() if threads is None else threads,
    )  # fmt: skip
    latency = dict(
        device=device, engine=engine, dtype=dtype.value,
        batch_size=latency_batch, resolution=pixels if latency_resolution is None else latency_resolution,
        num_classes=classes if latency_classes is None else latency_classes,
        threads=latency_threads, precision=latency_precision, seconds=latency_seconds,
    )  # fmt: skip
    limits = dict(latency_ms=max_latency_ms, params=max_params, macs=max_macs, memory_mb=max_memory_mb)
    config: SearchConfig = _checked(
        SearchConfig, flags, budget=budget, time_limit_s=time_limit, storage=storage, study=study, space=loaded,
        data=images,
        proxy=_checked(ProxyConfig, flags, **proxy), latency=_checked(LatencyConfig, latency_flags, **latency),
        limits=_checked(Limits, flags, **limits), sampler=sampler.value, seed=seed,
        block_table=block_table, keep_weights=keep_weights,
    )  # fmt: skip
    return config


def _run(config: SearchConfig, take_over: bool) -> None:
    from nas.search import live_study as study
    from nas.search.loop import run
    from nas.search.progress import LiveProgress, PlainProgress, shares_line
    from studies import displayed

    if take_over:
        study.take_over(config)
    if out.is_terminal:
        with LiveProgress(out) as progress:
            result = run(config, progress=progress)
    else:
        result = run(config, progress=PlainProgress(out))
    _print_front(result.pareto_front, f"Pareto front of {config.study} ({result.complete} candidates)")
    shown = displayed(config.storage)
    for line in (
        f"{result.why}: {result.complete} of {config.budget} candidates; hypervolume {result.hypervolume:.4f}",
        *result.remarks,
        shares_line(result),
        f"study {config.study!r} is in {shown}",
        f"front again: python run_search.py pareto --storage {shlex.quote(shown)} --study {shlex.quote(config.study)}",
    ):
        out.print(line, highlight=False, soft_wrap=True)


# What makes one front: latencies of different deployments are not compared.
DEPLOYMENT = ["device_id", "engine", "dtype", "batch_size", "resolution", "threads"]


def _plot_front(evaluations: pd.DataFrame, front: pd.DataFrame, study: str, path: Path) -> None:
    from nas.display.plots import plot_front
    from nas.errors import UsageError

    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {path}: not a .png, .svg or .pdf file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"--plot {path}: its folder does not exist")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UsageError(f"--plot {path}: cannot be written")
    if front.empty:
        raise UsageError(f"--plot {path}: the front of {study} is empty")
    fronts = list(front.groupby(DEPLOYMENT, sort=False))
    for number, (deployment, members) in enumerate(fronts, start=1):
        rows = evaluations
        for column, value in zip(DEPLOYMENT, deployment, strict=True):
            rows = rows[rows[column] == value]
        target = path if len(fronts) == 1 else path.with_stem(f"{path.stem}_{number}")
        plot_front(rows, members, f"{study}: {len(rows)} candidates", target)
        err.print(f"drawn: {target}", highlight=False)


def _print_front(front: pd.DataFrame, title: str) -> None:
    from nas.display.plots import deployment_line
    from nas.search.progress import front_table

    if front.empty:
        out.print("The front is empty: no candidate is complete, or all turned out over a limit.")
        return
    for _, members in front.groupby(DEPLOYMENT, sort=False):
        out.print(front_table(members, f"{title}\n{deployment_line(members.iloc[0])}"))


@contextlib.contextmanager
def _made(storage: str) -> Iterator[Store]:
    """The database of a command that writes, made if there is none."""
    from studies import Store

    Store.check_writable(storage)
    store = Store.open(storage, create=True)
    assert store is not None
    try:
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def _found(storage: str) -> Iterator[Store | None]:
    """A database to look something up in, if there is one."""
    from studies import Store

    store = Store.open(storage, create=False)
    try:
        yield store
    finally:
        if store is not None:
            store.close()


@contextlib.contextmanager
def _opened(storage: str, study: str | None = None, write: bool = False) -> Iterator[Store]:
    """A database that is there, and holds the study."""
    from nas.errors import UsageError
    from studies import Store, displayed

    store = Store.open(storage, create=False)
    if store is not None and write:
        store.close()
        store = Store.open(storage, create=True)
    if store is None:
        raise UsageError(f"--storage {displayed(storage)}: there is no study database of ours; a search makes one")
    try:
        if study is not None and store.find_study(study) is None:
            known = ", ".join(row.name for row in store.summaries()) or "none"
            raise UsageError(f"--study {study}: not in {displayed(storage)} (there: {known})")
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def _reported(storage: str) -> Iterator[None]:
    """Turns what a user can mend into one line and exit code 2; anything else is a bug and keeps its traceback."""
    from nas.errors import UsageError
    from studies import StorageError, displayed

    try:
        yield
    except UsageError as error:
        _fail(str(error))
    except StorageError as error:
        _fail(f"--storage {displayed(storage)}: {error}")


def _fail(message: str) -> NoReturn:
    err.print(f"Error: {message}", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(2)


def _given_options(context: typer.Context) -> list[str]:
    """Options that were typed, which would be ignored without a word: before a subcommand, say."""
    return [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name and getattr(context.get_parameter_source(parameter.name), "name", "") == "COMMANDLINE"
    ]


if __name__ == "__main__":
    app()
