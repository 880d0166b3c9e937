"""Options that several commands share, and values made of what was typed."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.config import AUTO, Dtype

if TYPE_CHECKING:
    from nas.config import LatencyConfig


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


# Field of LatencyConfig -> flag.
DEPLOYMENT_FLAGS = {
    "device": "--device", "engine": "--engine", "dtype": "--dtype", "batch_size": "--latency-batch",
    "resolution": "--latency-resolution", "num_classes": "--latency-classes", "threads": "--latency-threads",
    "precision": "--latency-precision", "seconds": "--latency-seconds",
}  # fmt: skip


def checked(make: Any, names: dict[str, tuple[str, Any]], /, **fields: Any) -> Any:
    """A value of these fields; what it refuses is told by the flag that the user typed."""
    from nas.errors import UsageError

    try:
        return make(**fields)
    except ValueError as error:
        # "budget=0 is not at least 1" is the value's own word.
        field, _, rest = str(error).partition("=")
        flag, value = names[field]
        raise UsageError(f"{flag} {value}: {rest.partition(' ')[2]}") from error


def given_fields(context: typer.Context) -> dict[str, Any]:
    """The fields of a deployment that the command's flags give; not those left out, or left to `auto`."""
    found = {}
    for field, flag in DEPLOYMENT_FLAGS.items():
        value = context.params.get(flag.removeprefix("--").replace("-", "_"))
        if value is not None and value != AUTO:
            found[field] = str(value) if isinstance(value, StrEnum) else value
    return found


def given_options(context: typer.Context) -> list[str]:
    """Options that were typed, which would be ignored without a word: before a subcommand, say."""
    return [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name and getattr(context.get_parameter_source(parameter.name), "name", "") == "COMMANDLINE"
    ]


def deployment(base: LatencyConfig | None = None, **given: Any) -> LatencyConfig:
    """A deployment of the flags that were given, and what they leave open: `base`'s, or the defaults."""
    from nas.config import LatencyConfig, moved

    fields = {name: value for name, value in given.items() if value is not None}
    names = {name: (flag, given.get(name)) for name, flag in DEPLOYMENT_FLAGS.items()}
    config: LatencyConfig = checked(LatencyConfig if base is None else partial(moved, base), names, **fields)
    return config
