"""The command line's options, made of what dataclasses declare (see `nas.options`), and values of what was typed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from inspect import Parameter, Signature
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from nas.config import SearchConfig
from nas.errors import UsageError
from nas.options import Checked, Option, options, parts

Made = TypeVar("Made", bound=Checked)


def _typers(option: Option, *value: Any) -> Any:
    """An option as Typer declares it, with its value on the command line or, in an annotation, without one."""
    default = f" (default: {option.default})" if option.default else ""
    return typer.Option(
        *value, option.flag, help=option.help + default, rich_help_panel=option.panel, show_default=False
    )


Storage = Annotated[str, _typers(options(SearchConfig)["storage"])]
StudyName = Annotated[str, _typers(options(SearchConfig)["study"])]
Again = Annotated[bool, typer.Option("--again", help="Measure anew what was measured before")]
ARCH = typer.Option("--arch", help="Architecture, as its line or as JSON")


def _declared(owner: type[Any]) -> Iterator[tuple[str, Option, Any]]:
    """Name, option and type on the command line of each field that declares an option, nested ones included."""
    hints = get_type_hints(owner)
    declared, nested = options(owner), parts(owner)
    for name in hints:
        if name in declared:
            yield name, declared[name], declared[name].typed or hints[name]
        elif name in nested:
            yield from _declared(nested[name])


def takes(
    owner: type[Checked], *names: str, default: str | None = None, **defaults: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that gives a command the options of a dataclass; the command reads them with `given`.

    Args:
        names: the fields whose options the command takes (default: all).
        default, defaults: words for the defaults of all fields, and of single ones (default: those declared).
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        declared, added = {}, []
        for name, option, typed in _declared(owner):
            if not names or name in names:
                option = replace(option, default=defaults.get(name, default or option.default))
                declared[option.parameter] = option
                # What is left out is None: its default may be a study's value.
                is_switch = typed is bool and "/" not in option.flag
                value, kind = (False, bool) if is_switch else (None, typed | None)
                added.append(
                    Parameter(option.parameter, Parameter.KEYWORD_ONLY, default=_typers(option, value), annotation=kind)
                )

        @functools.wraps(command)
        def wrapper(**typed: Any) -> None:
            command(**{name: typed[name] for name in own})

        after = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own.values()]
        vars(wrapper).update(__signature__=Signature([*added, *after]), declared=declared)
        return wrapper

    return decorate


def given(owner: type[Checked], context: typer.Context) -> dict[str, Any]:
    """The fields of a dataclass whose flags were given, nested as the dataclass is.

    Raises:
        UsageError: what was typed cannot be read.
    """
    found: dict[str, Any] = {name: given(part, context) for name, part in parts(owner).items()}
    for name, option in options(owner).items():
        value = context.params.get(option.parameter)
        # A flag that can only be set is False where it was left out; of a pair of flags, False is the second.
        if value is None or (value is False and "/" not in option.flag):
            continue
        try:
            value = option.parse(value) if option.parse else value
        except ValueError as error:
            raise UsageError(f"{option.flag} {error}") from error
        if value is not None:
            found[name] = value
    return found


def made(owner: type[Made], given: Mapping[str, Any], base: Made | None = None) -> Made:
    """A dataclass made of the fields that `given` found; the others are those of `base` (default: the class's).

    Raises:
        FieldError: a field has a value that it cannot have.
    """
    values = dict(given)
    for name, part in parts(owner).items():
        values[name] = made(part, values.get(name, {}), getattr(base, name, None))
    return owner(**values) if base is None else replace(base, **values)  # type: ignore[type-var]


def typed_options(context: typer.Context) -> list[str]:
    """The flags that were typed, for commands that must not ignore them without a word."""
    return [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name and getattr(context.get_parameter_source(parameter.name), "name", "") == "COMMANDLINE"
    ]
