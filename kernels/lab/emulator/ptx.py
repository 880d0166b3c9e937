"""A parser of PTX as Triton writes it: one kernel in a module, and a statement on one line or a few."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


class EmulationError(Exception):
    """An error of the kernel, or an instruction that is not known; the message has its line of PTX."""


@dataclass(frozen=True)
class Address:
    base: Any
    offset: int


@dataclass(frozen=True)
class Literal:
    """An immediate operand: the bits of a float, or the value of an integer."""

    value: int
    is_float: bool = False


@dataclass(frozen=True)
class Instruction:
    """One line of PTX.

    Args:
        guard: predicate register, and the value it must have; None if all threads take part.
        name: operation without its modifiers.
        modifiers: the rest of the operation, split at its dots.
        operands: registers by name, `Literal`s, `Address`es, and tuples of these.
    """

    text: str
    guard: tuple[str, bool] | None
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Any, ...]


@dataclass(frozen=True)
class Code:
    """One kernel.

    Args:
        threads: number of threads of a program.
        params: names of the parameters, in order.
        instructions: the body.
        labels: index of the instruction that follows each label.
        bits: width of each class of registers, by prefix; 1 for predicates.
    """

    threads: int
    params: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    bits: dict[str, int]


_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)


def parse(ptx: str) -> Code:
    """Parse the one kernel of a module that Triton made."""
    text = re.sub(r"//[^\n]*", "", ptx)
    entry = re.search(r"\.entry\s+\w+\(([^)]*)\)(.*?)\{(.*)", text, re.DOTALL)
    if entry is None:
        raise EmulationError("no kernel")
    params = tuple(re.findall(r"(\w+)\s*(?:,|$)", entry[1].strip()))
    threads = int(re.search(r"\.reqntid (\d+)", entry[2])[1])  # type: ignore[index]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    bits: dict[str, int] = {}
    # Statements end with a semicolon, labels with a colon, and directives for debuggers with the line.
    body = re.sub(r"^\s*\.(loc|file|pragma)\b[^\n]*", "", entry[3], flags=re.MULTILINE)
    for statement in body.split(";"):
        rest = statement.strip()
        while label := re.match(r"(\$\w+):\s*", rest):
            labels[label[1]] = len(instructions)
            rest = rest[label.end() :]
        if declared := re.match(r"\.reg\s+\.(\w+)\s+%(\w+)<", rest):
            bits[declared[2]] = 1 if declared[1] == "pred" else int(declared[1][1:])
        elif rest.startswith("}"):
            break
        elif rest:
            instructions.append(_instruction(rest))
    return Code(threads, params, tuple(instructions), labels, bits)


def _instruction(text: str) -> Instruction:
    match = _STATEMENT.fullmatch(text)
    if match is None:
        raise EmulationError(f"not understood: {text}")
    negated, guard, operation, operands = match.groups()
    name, *modifiers = operation.replace("::", ":").split(".")
    return Instruction(
        " ".join(text.split()), (guard, not negated) if guard else None, name, tuple(modifiers), _operands(operands)
    )


def _operands(text: str) -> tuple[Any, ...]:
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+(?:\|[^,\s]+)?", text)
    return tuple(map(_operand, parts))


def _operand(text: str) -> Any:
    if text.startswith("{"):
        return _operands(text[1:-1])
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(_operand(base), int(offset or "0", 0))
    if text.startswith("0f"):
        return Literal(int(text[2:], 16), True)
    if re.fullmatch(r"-?\d\w*", text):
        return Literal(int(text.rstrip("U"), 0))
    return text
