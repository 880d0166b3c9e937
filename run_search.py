"""Hardware-aware search for ConvFirst networks: `python run_search.py --budget 200`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from nas.config import AUTO, DEFAULT_STORAGE, DEFAULT_STUDY, Dtype, Sampler

if TYPE_CHECKING:
    import pandas as pd

    from nas.config import SearchConfig
    from studies import Store

app = typer.Typer(add_completion=False, no_args_is_help=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
out = Console()
err = Console(stderr=True)


class Format(StrEnum):
    TABLE = "table"
    CSV = "csv"
    JSON = "json"


Storage = Annotated[str, typer.Option(help="Study database, any SQLAlchemy URL.", rich_help_panel="Study")]
StudyName = Annotated[str, typer.Option("--study", help="Name of the study in it.", rich_help_panel="Study")]


@app.callback(invoke_without_command=True)
def search(
    context: typer.Context,
    budget: Annotated[
        int, typer.Option(help="Distinct architectures fully evaluated in the study.", rich_help_panel="Search")
    ] = 200,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds after which no candidate is begun.", rich_help_panel="Search")
    ] = None,
    sampler: Annotated[Sampler, typer.Option(help="Who proposes.", rich_help_panel="Search")] = Sampler.TPE,
    seed: Annotated[int, typer.Option(help="Of proposals and training.", rich_help_panel="Search")] = 0,
    space: Annotated[
        str, typer.Option(help="small, imagenet, or a TOML file (see `space`).", rich_help_panel="Search")
    ] = "small",
    storage: Storage = DEFAULT_STORAGE,
    study: StudyName = DEFAULT_STUDY,
    take_over: Annotated[
        bool, typer.Option(help="Search a study that a vanished machine left claimed.", rich_help_panel="Study")
    ] = False,
    data: Annotated[
        str,
        typer.Option(
            help="digits, cifar10, cifar100, a folder of class subfolders, or a name of timm's create_dataset.",
            rich_help_panel="Data and training",
        ),
    ] = "digits",
    data_dir: Annotated[
        str, typer.Option(help="Where CIFAR's and timm's files are.", rich_help_panel="Data and training")
    ] = "data",
    download: Annotated[
        bool, typer.Option(help="Fetch CIFAR or timm data.", rich_help_panel="Data and training")
    ] = False,
    resolution: Annotated[
        int | None, typer.Option(help="Pixels; by default the space's.", rich_help_panel="Data and training")
    ] = None,
    proxy_steps: Annotated[int, typer.Option(help="Training steps.", rich_help_panel="Data and training")] = 200,
    proxy_batch: Annotated[int, typer.Option(help="Training batch.", rich_help_panel="Data and training")] = 32,
    proxy_lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel="Data and training")] = 8e-3,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads that train; by default all, up to 4.", rich_help_panel="Data and training"),
    ] = None,
    deterministic: Annotated[
        bool, typer.Option(help="Deterministic algorithms on CUDA.", rich_help_panel="Data and training")
    ] = False,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N; trains and is measured.", rich_help_panel="Latency")
    ] = AUTO,
    engine: Annotated[
        str, typer.Option(help="auto, fused (CUDA), eager, torchscript (CPU) or compile.", rich_help_panel="Latency")
    ] = AUTO,
    dtype: Annotated[
        Dtype, typer.Option(help="auto is float16 on CUDA, else float32.", rich_help_panel="Latency")
    ] = Dtype.AUTO,
    latency_batch: Annotated[int, typer.Option(help="Batch of the deployment.", rich_help_panel="Latency")] = 1,
    latency_resolution: Annotated[
        int | None, typer.Option(help="Its pixels; by default the training's.", rich_help_panel="Latency")
    ] = None,
    latency_classes: Annotated[
        int | None,
        typer.Option(help="Its classes; by default 10, with the imagenet space 1000.", rich_help_panel="Latency"),
    ] = None,
    latency_threads: Annotated[int, typer.Option(help="Its CPU threads.", rich_help_panel="Latency")] = 1,
    latency_seconds: Annotated[
        float, typer.Option(help="Time each candidate is sampled for.", rich_help_panel="Latency")
    ] = 1.5,
    max_latency_ms: Annotated[float | None, typer.Option(rich_help_panel="Limits")] = None,
    max_params: Annotated[int | None, typer.Option(rich_help_panel="Limits")] = None,
    max_macs: Annotated[int | None, typer.Option(rich_help_panel="Limits")] = None,
    max_memory_mb: Annotated[
        float | None, typer.Option(help="Weights and peak workspace of inference.", rich_help_panel="Limits")
    ] = None,
) -> None:
    """Search for the Pareto front of accuracy and latency; the same command goes on where it was stopped."""
    if context.invoked_subcommand:
        if given := _given_options(context):
            _fail(f"{given[0]}: belongs after the command: run_search.py {context.invoked_subcommand} {given[0]} ...")
        return
    with _reported(storage):
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


# -- helpers -------------------------------------------------------------------------------------------------------


def _config(
    *, budget: int, time_limit: float | None, sampler: Sampler, seed: int, space: str, storage: str, study: str,
    data: str, data_dir: str, download: bool, resolution: int | None, proxy_steps: int, proxy_batch: int,
    proxy_lr: float, threads: int | None, deterministic: bool, device: str, engine: str, dtype: Dtype,
    latency_batch: int, latency_resolution: int | None, latency_classes: int | None, latency_threads: int,
    latency_seconds: float,
    max_latency_ms: float | None, max_params: int | None, max_macs: int | None, max_memory_mb: float | None,
) -> SearchConfig:  # fmt: skip
    """The flags as one value, with what they leave open filled in."""
    from nas.config import DataConfig, LatencyConfig, Limits, ProxyConfig, SearchConfig, default_threads
    from nas.errors import UsageError
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
        "seconds": ("--latency-seconds", latency_seconds),
    }  # fmt: skip

    def checked(make: Any, names: dict[str, tuple[str, Any]], /, **fields: Any) -> Any:
        try:
            return make(**fields)
        except ValueError as error:
            # "budget=0 is not at least 1" is the value's own word; the user typed a flag.
            field, _, rest = str(error).partition("=")
            flag, value = names[field]
            raise UsageError(f"{flag} {value}: {rest.partition(' ')[2]}") from error

    try:
        loaded = load_space(space)
    except ValueError as error:
        raise UsageError(f"--space {error}") from error
    pixels = loaded.resolution if resolution is None else resolution
    proxy = dict(
        steps=proxy_steps, batch_size=proxy_batch, learning_rate=proxy_lr, deterministic=deterministic,
        threads=default_threads() if threads is None else threads,
    )  # fmt: skip
    latency = dict(
        device=device, engine=engine, dtype=dtype.value,
        batch_size=latency_batch, resolution=pixels if latency_resolution is None else latency_resolution,
        num_classes=(1000 if space == "imagenet" else 10) if latency_classes is None else latency_classes,
        threads=latency_threads, seconds=latency_seconds,
    )  # fmt: skip
    limits = dict(latency_ms=max_latency_ms, params=max_params, macs=max_macs, memory_mb=max_memory_mb)
    config: SearchConfig = checked(
        SearchConfig, flags, budget=budget, time_limit_s=time_limit, storage=storage, study=study, space=loaded,
        data=checked(DataConfig, flags, source=data, resolution=pixels, data_dir=data_dir, download=download),
        proxy=checked(ProxyConfig, flags, **proxy), latency=checked(LatencyConfig, latency_flags, **latency),
        limits=checked(Limits, flags, **limits), sampler=sampler.value, seed=seed,
    )  # fmt: skip
    return config


def _run(config: SearchConfig, take_over: bool) -> None:
    # A polite kill, as schedulers and containers send it, ends a search as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # Importing torch takes seconds, in which Ctrl-C may come, too.
        from nas import study
        from nas.progress import LiveProgress, PlainProgress, shares_line
        from nas.search import run
        from studies import displayed

        if take_over:
            study.take_over(config)
        if out.is_terminal:
            with LiveProgress(out) as progress:
                result = run(config, progress=progress)
        else:
            result = run(config, progress=PlainProgress(out))
    except KeyboardInterrupt:
        err.print("Interrupted. What was finished is kept; the same command goes on from there.", highlight=False)
        # Not sys.exit: worker threads of torch and OpenMP may take seconds to be joined.
        sys.stdout.flush()
        os._exit(130)
    _print_front(result.pareto_front, f"Pareto front of {config.study} ({result.complete} candidates)")
    shown = displayed(config.storage)
    for line in (
        f"{result.why}: {result.complete} of {config.budget} candidates; hypervolume {result.hypervolume:.4f}",
        shares_line(result),
        f"study {config.study!r} is in {shown}",
        f"front again: python run_search.py pareto --storage {shown} --study {config.study}",
    ):
        out.print(line, highlight=False, soft_wrap=True)


# What makes one front: latencies of different deployments are not compared.
DEPLOYMENT = ["device_id", "engine", "dtype", "batch_size", "resolution", "threads"]


def _plot_front(evaluations: pd.DataFrame, front: pd.DataFrame, study: str, path: Path) -> None:
    from nas.errors import UsageError
    from nas.plots import plot_front

    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {path}: not a .png, .svg or .pdf file")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: its folder does not exist")
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
    from nas.plots import deployment_line
    from nas.progress import front_table

    if front.empty:
        out.print("The front is empty: no candidate is complete yet.")
        return
    for _, members in front.groupby(DEPLOYMENT, sort=False):
        out.print(front_table(members, f"{title}\n{deployment_line(members.iloc[0])}"))


@contextlib.contextmanager
def _opened(storage: str, study: str | None = None) -> Iterator[Store]:
    """The database of a command that only reads."""
    from nas.errors import UsageError
    from studies import Store, displayed

    store = Store.open(storage, create=False)
    if store is None:
        raise UsageError(f"--storage {displayed(storage)}: there is no study database of ours")
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
    """Options typed before a subcommand: they would be ignored without a word."""
    return [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name and getattr(context.get_parameter_source(parameter.name), "name", "") == "COMMANDLINE"
    ]


if __name__ == "__main__":
    app()
