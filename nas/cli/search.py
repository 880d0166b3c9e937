"""The search itself."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from nas.cli.console import fail, interruptible, out, reported
from nas.cli.fronts import print_front
from nas.cli.options import (
    Storage,
    StudyName,
    checked,
    given_options,
)
from nas.config import AUTO, DEFAULT_STORAGE, DEFAULT_STUDY, Dtype, Sampler

if TYPE_CHECKING:
    from nas.config import SearchConfig


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
        if given := given_options(context):
            fail(f"{given[0]}: belongs after the command: run_search.py {context.invoked_subcommand} {given[0]} ...")
        return
    with interruptible(), reported(storage):
        # Importing torch takes seconds, in which Ctrl-C may come, too.
        config = _config(**{name: value for name, value in context.params.items() if name != "take_over"})
        _run(config, take_over)


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
    images = checked(
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
    config: SearchConfig = checked(
        SearchConfig, flags, budget=budget, time_limit_s=time_limit, storage=storage, study=study, space=loaded,
        data=images,
        proxy=checked(ProxyConfig, flags, **proxy), latency=checked(LatencyConfig, latency_flags, **latency),
        limits=checked(Limits, flags, **limits), sampler=sampler.value, seed=seed,
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
    print_front(result.pareto_front, f"Pareto front of {config.study} ({result.complete} candidates)")
    shown = displayed(config.storage)
    for line in (
        f"{result.why}: {result.complete} of {config.budget} candidates; hypervolume {result.hypervolume:.4f}",
        *result.remarks,
        shares_line(result),
        f"study {config.study!r} is in {shown}",
        f"front again: python run_search.py pareto --storage {shlex.quote(shown)} --study {shlex.quote(config.study)}",
    ):
        out.print(line, highlight=False, soft_wrap=True)
