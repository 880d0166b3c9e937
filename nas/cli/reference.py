"""The options of all commands as Markdown: `python -m nas.cli.reference > docs/options.md`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from nas.cli.app import app


def reference() -> str:
    """The text of docs/options.md: a table for each command, made of what the commands declare."""
    search: Any = typer.main.get_command(app)
    lines = ["# Options", "", "`python -m nas.cli.reference` writes this page."]
    head = ["", "| option | group | meaning | values |", "| --- | --- | --- | --- |"]
    for command in (search, *search.commands.values()):
        name = "" if command is search else f" {command.name}"
        lines += ["", f"## `run_search.py{name}`", *head, *_rows(command)]
    return "\n".join(lines) + "\n"


def _rows(command: Any) -> Iterator[str]:
    declared = getattr(command.callback, "declared", {})
    for each in command.params:
        name = "/".join(each.opts + each.secondary_opts) if each.opts[0].startswith("-") else each.name.upper()
        default = f" (default: {each.default})" if each.show_default and each.default else ""
        bounds = declared[each.name].bounds if each.name in declared else None
        group, values = each.rich_help_panel or "", bounds.expected if bounds else ""
        yield f"| `{name}` | {group} | {each.help}{default} | {values} |"


if __name__ == "__main__":
    print(reference(), end="")
