"""Notes in Markdown, read by a parser of Markdown: names and reasons are shown as they are."""

from __future__ import annotations

import html
import re

import pytest
from markdown_it import MarkdownIt

from nas.display.notes import code, markdown_table, plain

NAMES = [
    "plain", "snake_case_name", "*bold*", "`tick`", "``", "a|b", "<b>x</b>", "[link](http://x)", "# head", "$a_b$",
    "back\\slash", "trailing\\", "&lt;", "~~gone~~", "\u4e2d\u6587", "1. list", "a``b`c",
]  # fmt: skip


def shown(markdown: str) -> str:
    """The text that a reader sees."""
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown)
    return html.unescape(re.sub("<[^>]*>", "", page)).strip()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is(name: str) -> None:
    assert shown(f"study {code(name)}.") == f"study {name}."
    assert shown(f"reason: {plain(name)}.") == f"reason: {name}."


@pytest.mark.parametrize("name", [*NAMES, "two\nlines"])
def test_a_name_stays_in_its_cell(name: str) -> None:
    name_in_line = name.replace("\n", " ")
    for cell in (code(name), plain(name)):
        table = markdown_table(("what", "how"), [("data", f"{cell}, 32x32"), ("end", 1)])
        cells = re.findall(r"<td>(.*?)</td>", MarkdownIt("commonmark").enable("table").render(table))
        texts = [html.unescape(re.sub("<[^>]*>", "", each)) for each in cells]
        assert texts == ["data", f"{name_in_line}, 32x32", "end", "1"]
