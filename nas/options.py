"""Options that are declared once: a field of a dataclass carries its flag, help, panel, default and bounds.

The command line, its refusals and docs/options.md are made of these declarations; `nas.cli.options` reads them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass
from enum import Enum, StrEnum
from typing import Any

from nas.errors import FieldError


@dataclass(frozen=True)
class Bounds:
    """The values that are allowed: a test, and the words that follow "is not" in the message where it fails."""

    hold: Callable[[Any], bool]
    expected: str


def at_least(minimum: float) -> Bounds:
    return Bounds(lambda value: value >= minimum, f"at least {minimum}")


def between(low: int, high: int, unit: str = "") -> Bounds:
    largest = f"{high:,}" if high >= 10_000 else str(high)
    return Bounds(lambda value: low <= value <= high, f"between {low} and {largest} {unit}".rstrip())


def one_of(choices: type[StrEnum]) -> Bounds:
    return Bounds(lambda value: value in list(choices), f"one of {', '.join(choices)}")


POSITIVE = Bounds(lambda value: value > 0, "positive")
FINITE = Bounds(lambda value: 0 < value < math.inf, "positive and finite")
SHARE = Bounds(lambda value: 0 < value < 1, "a share between 0 and 1")
# Control characters and the ends of lines, which would tear apart lines and tables.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# No database takes these.
NAME = Bounds(lambda value: bool(value) and not re.search(r"[\x00\ud800-\udfff]", value), "a name")
# Optuna's table has 512 characters for it, which SQLite does not count, but PostgreSQL does.
NEW_NAME = Bounds(
    lambda value: len(value) <= 512 and not UNPRINTABLE.search(value),
    "a name of at most 512 characters, without control characters",
)


def listed(what: str) -> Callable[[str], tuple[str, ...]]:
    """Function that reads names separated by commas; its ValueError says that there are none.

    Args:
        what: the things that have the names, in words.
    """

    def parse(typed: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in typed.split(",") if name.strip())
        if not names:
            raise ValueError(f"{typed}: is not a list of {what}")
        return names

    return parse


class Keep(Enum):
    """Ways in which a study keeps an option's value."""

    FIXED = "stored, and the same in every run of the study"
    STORED = "stored, and replaced for one run where a flag says so"
    TRANSIENT = "not stored"


@dataclass(frozen=True)
class Option:
    """The declaration of one option.

    Args:
        flag: the flag on the command line, such as `--budget`, or a pair `--mirror/--no-mirror`.
        help: the help text, without the default.
        default: the default in words; empty where there is none.
        panel: the heading under which `--help` lists it (default: that of the command itself).
        bounds: the values that are allowed (default: all).
        keep: the way in which a study keeps the value.
        typed: the type on the command line (default: the field's).
        parse: function that makes the field's value from what was typed, or None, which leaves the field open; its
            ValueError begins with what was typed.
    """

    flag: str
    help: str
    default: str
    panel: str | None = None
    bounds: Bounds | None = None
    keep: Keep = Keep.FIXED
    typed: Any = None
    parse: Callable[[Any], Any] | None = None

    @property
    def name(self) -> str:
        """The flag in messages: of a pair, the first."""
        return self.flag.partition("/")[0]

    @property
    def parameter(self) -> str:
        """The flag as a Python name."""
        return self.name.removeprefix("--").replace("-", "_")


def option(value: Any, flag: str, help: str, *, default: str | None = None, **rest: Any) -> Any:
    """A dataclass field that declares an option.

    Args:
        value: the field's default, or a function that makes it.
        default: that default in words (default: the value itself).
        rest: the other fields of `Option`.
    """
    if default is None:
        default = f"{value:g}" if isinstance(value, float) else str(value)
        default = "" if value is None or value is False else default
    made = {"default_factory": value} if callable(value) else {"default": value}
    return dataclasses.field(**made, metadata={"option": Option(flag, help, default, **rest)})


def same_as(owner: Any, name: str) -> Any:
    """A field that declares the option of another class's field again."""
    declared: Field[Any] = owner.__dataclass_fields__[name]
    return dataclasses.field(default=declared.default, metadata=declared.metadata)


def options(owner: Any) -> dict[str, Option]:
    """The options that a dataclass's fields declare, by field name; without those of nested dataclasses."""
    return {each.name: each.metadata["option"] for each in dataclasses.fields(owner) if "option" in each.metadata}


def parts(owner: Any) -> dict[str, type[Any]]:
    """The classes of the fields that are dataclasses of options themselves, by field name."""
    made = {
        each.name: each.default_factory for each in dataclasses.fields(owner) if each.default_factory is not MISSING
    }
    return {name: part for name, part in made.items() if isinstance(part, type) and issubclass(part, Checked)}


class Checked:
    """Base of dataclasses whose fields declare options; an instance checks its fields when it is made.

    Raises:
        FieldError: a field is out of its bounds. None, which leaves a field open, is not checked.
    """

    def __post_init__(self) -> None:
        for name, each in options(self).items():
            value = getattr(self, name)
            if each.bounds is not None and value is not None and not each.bounds.hold(value):
                raise FieldError(type(self), name, value, each.bounds.expected)
